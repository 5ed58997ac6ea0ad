"""The checker sees every kind of bug that is planted in planted.cu, names the line, and accuses no sound kernel."""

import ctypes
import re
from pathlib import Path

import pytest

from tests.simt import build

SOURCE = Path(__file__).with_name("planted.cu")
LINES: dict[str, list[int]] = {}
for number, line in enumerate(SOURCE.read_text().splitlines(), 1):
    if found := re.search(r"// BUG (\w+)", line):
        LINES.setdefault(found[1], []).append(number)
SOUND = sorted(
    set(re.findall(r"__global__ void (\w+)\(", SOURCE.read_text())) - set(LINES)
)  # every kernel without a BUG line
SCHEDULES = [(0, 0), (1, 1), (2, 1)]  # (order, lazy copies)
# What the report must say of each kind.
SAYS = {
    "race": "race: ",
    "out_of_bounds": "out of bounds: ",
    "uninitialised": "uninitialised ",
    "divergent": "divergence: ",
    "missed_barrier": "threads have returned|returns while others wait",
    "lane_not_in_its_mask": "not in its own mask",
    "unwaited_copy": "was not waited for",
    "copy_waited_one_group_short": "was not waited for",
    # Which of these it is depends on how far the neighbour has come.
    "copy_without_barrier": "race: |was not waited for|uninitialised ",
    "copy_over_readers": "race: |was not waited for",
    "misaligned": "misaligned ",
    "ldmatrix_outside_shared": "outside the block's shared memory",
}
# These the plain build sees too: it needs no shadow memory for them.
ALSO_PLAIN = ("divergent", "missed", "lane_not", "misaligned_vector", "misaligned_copy", "ldmatrix_outside")


def run(library, kernel, order, lazy):
    message = ctypes.create_string_buffer(2000)
    library.run_planted(kernel.encode(), order, lazy, message, len(message))
    return message.value.decode()


@pytest.fixture(scope="module")
def checked():
    return build.library(SOURCE, checked=True)


@pytest.fixture(scope="module")
def plain():
    return build.library(SOURCE, checked=False)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("kernel", sorted(LINES))
def test_planted_bug_is_reported_with_its_line(checked, kernel, schedule):
    message = run(checked, kernel, *schedule)
    (says,) = [text for kind, text in SAYS.items() if kernel.startswith(kind)]
    assert message.startswith(f"{kernel}: "), message
    assert re.search(says, message), message
    # A race has two ends, and which comes second depends on the schedule: both are named.
    assert any(f"planted.cu:{line}" in message for line in LINES[kernel]), f"none of lines {LINES[kernel]}: {message}"


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("kernel", SOUND)
def test_sound_kernel_is_not_accused(checked, kernel, schedule):
    assert run(checked, kernel, *schedule) == ""


@pytest.mark.parametrize("kernel", [k for k in sorted(LINES) if k.startswith(ALSO_PLAIN)])
def test_plain_build_sees_what_needs_no_shadow(plain, kernel):
    message = run(plain, kernel, 0, 0)
    assert any(f"planted.cu:{line}" in message for line in LINES[kernel]), message
