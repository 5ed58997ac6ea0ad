"""Peak memory of one call: how far the process grows beyond what it held before, results of the call included.

Linux keeps the greatest resident size a process has had (VmHWM in /proc/self/status) and forgets it on request (a 5
written to /proc/self/clear_refs). Freed memory that malloc holds back is given back first, or a call could reuse it
unseen. Not counted: what a library keeps from one call to the next (the call has run before), and pages that a call
asks for and never touches. The kernel counts in steps of some 100 kB.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


def peak(call: Callable[[], Any]) -> int | None:
    """Runs ``call`` once; bytes, or None where the system does not tell (it runs there too)."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    try:
        _RESET.write_text("5")
        before = _greatest()
    except OSError:
        call()
        return None
    call()
    return max(0, _greatest() - before)


def _greatest() -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
