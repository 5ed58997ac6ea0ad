"""`fastgpt bench` from the command line: its refusals, and one small suite end to end."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from benchmarks import report
from fastgpt.cli import app
from fastgpt.cli.bench import suites
from fastgpt.ops import registry

COMMAND = [sys.executable, "-m", "fastgpt", "bench"]


def run(*arguments):
    return subprocess.run([*COMMAND, *arguments], cwd=report.ROOT, text=True, capture_output=True)


def test_every_operator_has_a_suite():
    assert set(registry.operators()) - set(suites()) <= {"grad_norm"}
    assert {"training_step", "generate", "scaling"} <= set(suites())
    assert not {"harness", "report", "conftest", "gpu"} & set(suites())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dance"], "error: there is no suite 'dance'; there are: adamw, attention, "),
        (["--quick", "--long"], "error: --quick and --long do not go together"),
        (["gelu", "--compare", "a.json", "b.json"], "error: --compare runs no benchmarks: give it files alone"),
        (["--compare", "missing.json", "b.json"], "No such file or directory: 'missing.json'"),
        (["--compare", "README.md", "b.json"], "error: README.md is not valid JSON"),
        (["--publish", "missing.json"], "No such file or directory: 'missing.json'"),
        (["--publish", "missing.json", "--compare", "a", "b"], "error: --compare and --publish do not go together"),
    ],
)
def test_refusals(arguments, message):
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert (result.exit_code, result.stdout) == (1, "")
    assert message in result.stderr


def test_what_cannot_be_written_is_refused_before_the_run(tmp_path):
    (tmp_path / "bench.json").write_text("{}")
    result = CliRunner().invoke(app, ["bench", "gelu", "--keep", "--results", str(tmp_path)])
    assert (result.exit_code, result.stdout) == (1, "")
    assert "is not a results file of `fastgpt bench`" in result.stderr
    result = CliRunner().invoke(app, ["bench", "gelu", "--results", str(tmp_path / "bench.json")])
    assert result.exit_code == 2
    assert "is a file" in result.stderr


@pytest.mark.slow
def test_the_quick_cases_of_every_suite_run():
    command = [sys.executable, "-m", "pytest", "-q", "benchmarks", "--quick", "--benchmark-disable"]
    result = subprocess.run(command, cwd=report.ROOT, text=True, capture_output=True)
    assert result.returncode == 0, result.stdout
    assert "No case" not in result.stdout


@pytest.mark.slow
def test_a_suite_end_to_end(tmp_path):
    result = run("scaling", "--quick", "--minutes", "0.1", "--results", str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "[  1/" in result.stdout
    assert "attention forward_backward" in result.stdout
    assert f"wrote {tmp_path / 'bench.json'}" in result.stdout
    found = report.read(tmp_path / "bench.json")
    assert found["complete"]
    assert found["ceilings"]["1"].keys() == {"copy", "read", "float32", "bfloat16"}
    assert all(row["seconds"] > 0 and row["peers"] for row in found["rows"])
    assert {row["scale"][0] for row in found["rows"] if row["scale"]} == {"T", "V"}
    # A second part beside the first, then what changed: nothing that is in both.
    result = run("rotary", "--keep", "--quick", "--minutes", "0.1", "--results", str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    assert {row["suite"] for row in report.read(tmp_path / "bench.json")["rows"]} == {"rotary", "scaling"}
    path = str(tmp_path / "bench.json")
    result = run("--compare", path, path)
    assert f"{len(report.read(tmp_path / 'bench.json')['rows'])} of " in result.stdout
    assert "faster" not in result.stdout


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_measured(tmp_path):
    with subprocess.Popen(
        [*COMMAND, "scaling", "--results", str(tmp_path)],
        cwd=report.ROOT,
        text=True,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as process:
        seen = ""
        deadline = time.monotonic() + 120
        while "[  3/" not in seen and time.monotonic() < deadline:
            seen += process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        seen += process.stdout.read()
    assert process.returncode == 2
    assert "Not complete: " in seen
    found = json.loads((tmp_path / "bench.json").read_text())
    assert not found["complete"]
    assert 1 <= len(found["rows"]) <= 3
    assert "cases are missing" in (tmp_path / "bench.md").read_text()
