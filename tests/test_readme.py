"""The README's Python runs as it stands, from top to bottom; its figures are those of docs/benchmarks.json."""

import re
from pathlib import Path

import pytest

from benchmarks import publish, report

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_python_blocks_run():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(blocks) >= 2
    exec(compile("\n".join(blocks), "README.md", "exec"), {})


def test_figures_are_those_of_one_published_run():
    """README and docs/benchmarks.md are what `fastgpt bench --publish` makes of docs/benchmarks.json."""
    path = ROOT / "docs" / "benchmarks.json"
    if not path.exists():
        pytest.skip("no run was published yet")
    found = report.read(path)
    assert found["complete"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme == publish.with_table(readme, publish.table(found))
    assert (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8") == publish.page(found, ROOT / "docs")
