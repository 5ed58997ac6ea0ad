"""Memory for large results on the CPU, kept when a result dies and given to the next one of its size.

malloc gives the memory of a large tensor back to the system when it dies (always beyond 32 MiB, often below), so the
next one is new memory, which the system hands out and fills with zeros one page at a time: for 48 MB that takes 23 ms,
where writing it takes 2. GPU allocators keep memory for that reason, and so does this one, in huge pages.

Kept are at most ``LIMIT`` bytes, in use or not; a result beyond that is torch's own allocation. A block goes to results
of its size only. ``release`` gives back what no tensor uses.
"""

from __future__ import annotations

import math
import mmap
import sys
import threading
from collections.abc import Sequence

import torch
import torch.utils.deterministic
from torch import Tensor

SMALLEST = 4 << 20  # malloc does well below
LIMIT = 512 << 20

_blocks: list[mmap.mmap] = []  # the oldest first
_lock = threading.RLock()  # the garbage collector may run anything meanwhile, our operators too


def _references(blocks: list[mmap.mmap], index: int) -> int:
    return sys.getrefcount(blocks[index])


_UNUSED = _references([mmap.mmap(-1, mmap.PAGESIZE)], 0)  # of a block in a list; each tensor's memory holds one more


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """``like.new_empty(shape)``: a contiguous tensor of ``like``'s dtype and device, its elements yet to be written."""
    count = math.prod(shape)
    size = count * like.element_size()
    if like.device.type != "cpu" or not SMALLEST <= size <= LIMIT or not hasattr(mmap, "MAP_PRIVATE"):
        return like.new_empty(shape)
    with _lock:
        block = _take(size)
        if block is None:
            return like.new_empty(shape)
        result = torch.frombuffer(block, dtype=like.dtype, count=count).view(tuple(shape))
    poisoned = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if poisoned and torch.are_deterministic_algorithms_enabled():
        result.fill_(math.nan)
    return result


def release() -> None:
    """Gives the memory of dead results back to the system."""
    with _lock:
        _drop_unused(LIMIT)


def kept() -> int:
    """Bytes that are kept, in use or not."""
    return sum(map(len, _blocks))


def _take(size: int) -> mmap.mmap | None:
    """An unused block of ``size`` bytes, or a new one in the place of unused ones, or None where all are in use."""
    for i in range(len(_blocks)):
        if len(_blocks[i]) == size and _references(_blocks, i) == _UNUSED:
            return _blocks[i]
    _drop_unused(kept() + size - LIMIT)
    if kept() + size > LIMIT:
        return None
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
    _blocks.append(block)
    return block


def _drop_unused(size: int) -> None:
    """Drops unused blocks, the oldest first, until ``size`` bytes are gone or none is left."""
    i = 0
    while size > 0 and i < len(_blocks):
        if _references(_blocks, i) == _UNUSED:
            size -= len(_blocks.pop(i))
        else:
            i += 1
