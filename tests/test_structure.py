"""The house rules that a test can hold: imports run one way, and every operator has every slice."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastgpt.ops import registry

ROOT = Path(__file__).resolve().parents[1]

# A module may import from its own layer and from the layers after it.
LAYERS = [
    ("fastgpt.cli", "fastgpt.__main__"),
    ("fastgpt.training",),
    ("fastgpt.generation",),
    ("fastgpt.checkpoint", "fastgpt.metrics", "fastgpt.progress", "fastgpt.interrupt"),
    ("fastgpt.gpu.catalogue", "fastgpt.gpu.triton_build"),  # they call every operator
    ("fastgpt.model", "fastgpt.data"),
    ("fastgpt.config", "fastgpt.train_config", "fastgpt.optim", "fastgpt.tokenizers"),
    ("fastgpt.ops",),
    ("fastgpt.gpu", "fastgpt.kernels", "fastgpt._C", "fastgpt.files"),
]


def layer(module):
    for index, names in enumerate(LAYERS):
        if any(module == name or module.startswith(name + ".") for name in names):
            return index
    return None


def modules():
    for path in sorted((ROOT / "fastgpt").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize(("module", "path"), [m for m in modules() if m[0] != "fastgpt"], ids=lambda v: str(v)[:40])
def test_imports_run_one_way(module, path):
    mine = layer(module)
    assert mine is not None, f"{module} is in no layer: add it to LAYERS"
    for name in imports(path):
        theirs = layer(name)
        assert theirs is None or theirs >= mine, f"{module} imports {name}, which lies above it"


def test_triton_is_imported_in_its_own_folder_alone():
    """So that everything else works without it."""
    for module, path in modules():
        if not module.startswith("fastgpt.kernels"):
            assert not any(name.split(".")[0] == "triton" for name in imports(path)), f"{module} imports triton"


SLICES = (
    "fastgpt/ops/{}.py",
    "csrc/cpu/{}.cpp",
    "csrc/cuda/{}.cu",
    "kernels/{}.py",
    "tests/ops/test_{}.py",
    "docs/ops/{}.md",
    "benchmarks/{}.py",
)
# What an operator does without, and why.
WITHOUT = {
    "csrc/cpu/attention_varlen.cpp": "attention's kernel, one sequence after the other",
    "csrc/cpu/attention_with_kvcache.cpp": "attention's kernel, one sequence after the other",
    "csrc/cpu/linear_cross_entropy.cpp": "cross_entropy's kernel on chunks of logits; the GEMMs are torch's",
    "csrc/cuda/attention.cu": "too long for one file: attention_forward.cu, attention_backward.cu and others",
    "csrc/cuda/attention_varlen.cu": "attention's kernels",
    "csrc/cuda/attention_with_kvcache.cu": "attention's kernels",
    "csrc/cuda/linear_cross_entropy.cu": "cross_entropy's kernel on chunks of logits; the GEMMs are torch's",
    "kernels/attention_varlen.py": "attention's kernels",
    "kernels/attention_with_kvcache.py": "attention's kernels",
    "kernels/linear_cross_entropy.py": "cross_entropy's kernel on chunks of logits; the GEMMs are torch's",
    "docs/ops/attention_varlen.md": "on attention's page",
    "docs/ops/attention_with_kvcache.md": "on attention's page",
}


@pytest.mark.parametrize("op", registry.operators())
def test_every_operator_has_every_slice(op):
    missing = [path for path in (s.format(op) for s in SLICES) if path not in WITHOUT and not (ROOT / path).exists()]
    assert not missing
    assert {"reference", "cpu"} <= set(registry.backends(op))


def test_kernels_folder_does_not_shadow_the_package_of_that_name(tmp_path):
    """Hugging Face's package `kernels` must win over our folder `kernels/`, from the root of the checkout too."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "fastgpt" / "kernels").is_symlink()
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("whose = 'theirs'")
    result = subprocess.run(
        [sys.executable, "-c", "import kernels, fastgpt.kernels; print(kernels.whose, fastgpt.kernels.__name__)"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},  # ours first: the worst case
        text=True,
        capture_output=True,
    )
    assert result.stdout.split() == ["theirs", "fastgpt.kernels"], result.stderr
