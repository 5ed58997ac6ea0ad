"""Calls every planted bug of planted.cpp in a process of its own: the sanitizer must report each, at its line, and must
say nothing where the bug is left out. Runs inside the sanitized process: see __main__.py."""

from __future__ import annotations

import ctypes
import os
import re
import sys
import tempfile

import torch

from fastgpt.ops.native import _C

# What the report of each must say. GCC 12 calls an access that begins within memory and ends beyond it "unknown-crash".
OVERFLOW = "AddressSanitizer: (heap-buffer-overflow|unknown-crash)"
BUGS = {
    "address": {
        "vector_past_the_end": OVERFLOW,
        "tail_load_past_the_end": OVERFLOW,
        "tail_store_past_the_end": OVERFLOW,
        "before_the_beginning": OVERFLOW,
        "scratch_past_the_end": OVERFLOW,
        "scratch_after_its_end": "heap-use-after-free",
        "lanes_past_the_end": "out of bounds",
        "index_of_32_bits": "signed integer overflow",
        "misaligned_load": "misaligned address",
        "shift_of_too_many_bits": "shift exponent 32 is too large",
        "float_beyond_integers": "outside the range of representable values",
        "null_pointer": "null pointer",
    },
    "thread": dict.fromkeys(
        ("shared_sum", "overlapping_pieces", "vector_into_the_next_piece", "read_of_another_piece"), "data race"
    ),
}


def report_of(level: str, bug: str, wrong: bool) -> str:
    """What the sanitizer says about one call; "" if nothing."""
    size = 1000 + 64  # neither a whole number of pages nor of vectors
    function = getattr(ctypes.CDLL(_C.__file__), f"fastgpt_planted_{level}_{bug}")
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32), ctypes.c_float
    data = torch.zeros(size)  # torch's own memory: where it ends must be known too
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if child == 0:
            os.dup2(output.fileno(), 2)
            function(data.data_ptr(), size, wrong)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        output.seek(0)
        text = output.read().decode(errors="replace")
    return text if bool(text) == bool(status) else f"{text}\nand the process ended with status {status}"


def main() -> int:
    kind = sys.argv[1]
    _C.set_parallel_functions(0, 0)
    _C.set_own_threads(3)
    levels = [name for name, _, supported in _C.cpu.isas() if supported]
    failures = []
    for level in levels:
        for bug, words in BUGS[kind].items():
            silent = report_of(level, bug, False)
            found = report_of(level, bug, True)
            if silent:
                failures.append(f"{level}: {bug}, left out, is reported all the same:\n{silent}")
            if not re.search(words, found) or "planted.cpp:" not in found:
                failures.append(f"{level}: {bug} is not reported as {words!r} at its line, but:\n{found or 'nothing'}")
    print("\n".join(failures) or f"all {len(BUGS[kind])} planted bugs are noticed, on {', '.join(levels)}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
