"""Installing with pip's own build isolation: a wheel, used from an empty folder, next to a stranger's `kernels`."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The Python of a fresh environment that has our wheel, and sees the dependencies of the environment we run in."""
    folder = tmp_path_factory.mktemp("install")
    source = folder / "source"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(source)], check=True)
    environment = {**os.environ, "FASTGPT_CUDA": "off", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(source)],
        check=True,
        env=environment,
    )
    (wheel,) = folder.glob("fastgpt_kernels-*.whl")
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", str(wheel)], check=True, env=environment)
    # The dependencies come after the environment's own packages, so nothing of ours is found there by accident.
    packages = Path(
        subprocess.check_output(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        ).strip()
    )
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def run(python, code, cwd):
    result = subprocess.run([python, "-P", "-c", code], cwd=cwd, text=True, capture_output=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_wheel_works_away_from_the_source(installed, tmp_path):
    code = (
        "import torch, fastgpt\n"
        "with fastgpt.strict(): y = fastgpt.ops.layer_norm(torch.ones(2, 8), (8,))\n"
        "print(fastgpt.__file__, y.abs().max().item())"
    )
    where, value = run(installed, code, tmp_path)
    assert str(installed.parents[1]) in where
    assert float(value) == 0.0


def test_console_command(installed, tmp_path):
    result = subprocess.run([installed.parent / "fastgpt", "--help"], cwd=tmp_path, text=True, capture_output=True)
    assert result.returncode == 0, result.stderr
    assert "doctor" in result.stdout


def test_wheel_installs_no_top_level_kernels(installed, tmp_path):
    code = "import importlib.util; print(importlib.util.find_spec('kernels'))"
    assert run(installed, code, tmp_path) == ["None"]
