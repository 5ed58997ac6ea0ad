"""How many blocks of a kernel an SM runs at once: the rules of CUDA's cuda_occupancy.h, for sm_80 and later.

Sources: "Compute Capabilities" in the CUDA C++ Programming Guide, and cuda_occupancy.h, which a test compares with.
"""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32
REGISTERS = 64 * 1024  # of an SM, and the most that a block may have
REGISTER_UNIT = 256  # a warp gets its registers in units of this many
PARTITIONS = 4  # of an SM; each has a quarter of the registers
SHARED_UNIT = 128  # bytes
SHARED_RESERVED = 1024  # bytes that the system takes of every block's shared memory


@dataclass(frozen=True)
class Architecture:
    """Limits of an SM: resident threads and blocks, shared memory in bytes (of the SM, and the most for one block)."""

    number: int
    threads: int
    blocks: int
    shared: int
    shared_per_block: int

    @property
    def name(self) -> str:
        return f"sm_{self.number}"


ARCHITECTURES = {
    number: Architecture(number, threads, blocks, shared << 10, shared_per_block << 10)
    for number, threads, blocks, shared, shared_per_block in (
        (80, 2048, 32, 164, 163),
        (86, 1536, 16, 100, 99),
        (89, 1536, 24, 100, 99),
        (90, 2048, 32, 228, 227),
        (100, 2048, 32, 228, 227),
        (120, 1536, 24, 100, 99),
    )
}


@dataclass(frozen=True)
class Occupancy:
    """Blocks that an SM holds, what stops it from holding one more, and the share of its threads that they fill."""

    blocks: int
    limit: str
    fraction: float


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def occupancy(architecture: int, *, threads: int, registers: int, shared: int) -> Occupancy:
    """The occupancy of a kernel.

    Args:
        architecture: a key of ARCHITECTURES.
        threads: of a block.
        registers: of a thread.
        shared: bytes of a block, static and dynamic.

    Returns:
        0 blocks where the kernel cannot be launched at all; ``limit`` then says what is too large.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture={architecture}: allowed are {', '.join(map(str, ARCHITECTURES))}")
    if not 1 <= threads <= 1024:
        raise ValueError(f"threads={threads}: a block has 1 to 1024")
    if not 1 <= registers <= 255:
        raise ValueError(f"registers={registers}: a thread has 1 to 255")
    sm = ARCHITECTURES[architecture]
    warps = -(-threads // WARP)
    # Registers are dealt out in each quarter of the SM; a launch is checked as if every quarter had as many warps.
    per_warp = _round_up(registers * WARP, REGISTER_UNIT)
    fits = per_warp * _round_up(warps, PARTITIONS) <= REGISTERS
    by_registers = REGISTERS // PARTITIONS // per_warp * PARTITIONS // warps if fits else 0
    by_shared = sm.shared // _round_up(shared + SHARED_RESERVED, SHARED_UNIT) if shared <= sm.shared_per_block else 0
    limits = {
        "registers": by_registers,
        "shared memory": by_shared,
        "threads": sm.threads // WARP // warps,
        "blocks": sm.blocks,
    }
    limit, blocks = min(limits.items(), key=lambda item: item[1])
    return Occupancy(blocks, limit, blocks * warps * WARP / sm.threads)
