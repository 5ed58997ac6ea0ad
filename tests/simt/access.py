"""How well each kernel's warps use memory: ``python -m tests.simt.access`` prints it, ``--update`` sets the budget.

For the aligned calls of calls.py, per kernel: the 32-byte sectors that its requests touch in global memory over the
fewest that could hold their bytes, and the wavefronts that its shared-memory accesses take over the fewest for their
size. 1.00 is ideal; csrc/cuda/access.toml is the budget, which test_access.py holds.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from pathlib import Path

import torch

from fastgpt.ops import native
from tests.simt.calls import ALIGNED

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BUDGET = Path(__file__).resolve().parents[2] / "csrc" / "cuda" / "access.toml"
Ratios = dict[str, dict[str, float]]  # kernel -> {"sectors": ratio, "wavefronts": ratio}


def requests(op: str) -> list[dict]:
    """The counted requests of an operator's aligned call, by kernel and line."""
    from fastgpt import _simt_checked

    torch.manual_seed(0)
    _simt_checked.configure()
    _simt_checked.count_requests(True)
    try:
        with native.checked_simt():
            ALIGNED[op]()
        return _simt_checked.requests()
    finally:
        _simt_checked.count_requests(False)


def ratios(counted: list[dict]) -> Ratios:
    totals: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for entry in counted:
        what = "wavefronts" if entry["space"] == "shared" else "sectors"
        total = totals[entry["kernel"].split("<")[0], what]
        total[0] += entry["moved"]
        total[1] += entry["ideal"]
    out: Ratios = defaultdict(dict)
    for (kernel, what), (moved, ideal) in sorted(totals.items()):
        out[kernel][what] = moved / ideal
    return dict(out)


def budget() -> Ratios:
    return tomllib.loads(BUDGET.read_text())


def _write(measured: Ratios) -> None:
    lines = [
        "# The most sectors (global memory) and wavefronts (shared memory) that a kernel's requests may take, over the",
        "# fewest that could do; measured on aligned sizes by `python -m tests.simt.access --update`, which rounds up.",
    ]
    for kernel, values in sorted(measured.items()):
        lines += ["", f"[{kernel}]", *(f"{what} = {math.ceil(value * 100) / 100}" for what, value in values.items())]
    BUDGET.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.simt.access", description=__doc__.split("\n\n")[0])
    parser.add_argument("op", nargs="*", help=f"operators; all if none. There are {', '.join(ALIGNED)}")
    parser.add_argument("--lines", action="store_true", help="one line for each place in a kernel")
    parser.add_argument("--update", action="store_true", help=f"write the measured ratios to {BUDGET.name}")
    options = parser.parse_args()
    if unknown := set(options.op) - set(ALIGNED):
        parser.error(f"unknown operator {', '.join(sorted(unknown))}; there are {', '.join(ALIGNED)}")
    if options.update and options.op:
        parser.error("--update measures all operators")
    measured: Ratios = {}
    for op in options.op or ALIGNED:
        counted = requests(op)
        for kernel, values in ratios(counted).items():  # two operators may share a kernel
            worst = measured.setdefault(kernel, {})
            worst |= {what: max(value, worst.get(what, 0.0)) for what, value in values.items()}
        if options.lines:
            for e in sorted(counted, key=lambda e: e["ideal"] - e["moved"]):
                print(
                    f"{e['moved'] / e['ideal']:6.2f}  {e['moved']:7} / {e['ideal']:7}  {e['space']:6} {e['kind']:6}"
                    f" {e['place']:28} {e['kernel']}"
                )
        else:
            for kernel, values in ratios(counted).items():
                print(f"{kernel:44}", "  ".join(f"{what} {value:5.2f}" for what, value in values.items()))
    if options.update:
        _write(measured)


if __name__ == "__main__":
    main()
