"""Blocks per SM: worked examples, and CUDA's own calculator (cuda_occupancy.h under g++) where it is installed."""

import itertools
import shutil
import subprocess
from pathlib import Path

import pytest

from fastgpt.gpu.occupancy import ARCHITECTURES, SHARED_RESERVED, occupancy

HEADER = Path("/usr/local/cuda/include/cuda_occupancy.h")
PROGRAM = r"""
#include <cstdio>
#include <cstddef>
#include <climits>
#include "cuda_occupancy.h"
int main() {
  int arch, sm_threads, sm_shared, block_shared, reserved, threads, registers, shared;
  while (std::scanf("%d %d %d %d %d %d %d %d", &arch, &sm_threads, &sm_shared, &block_shared, &reserved, &threads,
                    &registers, &shared) == 8) {
    cudaOccDeviceProp p;
    p.computeMajor = arch / 10, p.computeMinor = arch % 10;
    p.maxThreadsPerBlock = 1024, p.maxThreadsPerMultiprocessor = sm_threads;
    p.regsPerBlock = p.regsPerMultiprocessor = 65536;
    p.warpSize = 32, p.numSms = 1;
    p.sharedMemPerBlock = 48 << 10, p.sharedMemPerMultiprocessor = sm_shared;
    p.sharedMemPerBlockOptin = block_shared, p.reservedSharedMemPerBlock = reserved;
    cudaOccFuncAttributes a;
    a.maxThreadsPerBlock = 1024, a.numRegs = registers, a.sharedSizeBytes = 0;
    a.partitionedGCConfig = PARTITIONED_GC_OFF, a.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    a.maxDynamicSharedSizeBytes = shared, a.numBlockBarriers = 1;
    cudaOccDeviceState state;
    state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
    cudaOccResult result;
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &p, &a, &state, threads, shared) != CUDA_OCC_SUCCESS) return 1;
    std::printf("%d\n", result.activeBlocksPerMultiprocessor);
  }
}
"""


@pytest.mark.parametrize(
    ("architecture", "threads", "registers", "shared", "blocks", "limit"),
    [
        (80, 256, 32, 0, 8, "registers"),  # 2048 threads: registers and threads run out together
        (80, 256, 40, 0, 6, "registers"),
        (86, 256, 32, 0, 6, "threads"),
        (80, 128, 128, 48 << 10, 3, "shared memory"),  # (48 + 1) KiB of 164
        (89, 128, 64, 99 << 10, 1, "shared memory"),
        (89, 128, 64, (99 << 10) + 1, 0, "shared memory"),
        (90, 128, 168, 99 << 10, 2, "shared memory"),
        (120, 32, 16, 0, 24, "blocks"),
        (80, 1024, 65, 0, 0, "registers"),  # 72 a thread when rounded up: more than the block may have
    ],
)
def test_worked_examples(architecture, threads, registers, shared, blocks, limit):
    found = occupancy(architecture, threads=threads, registers=registers, shared=shared)
    assert (found.blocks, found.limit) == (blocks, limit)
    assert found.fraction == blocks * -(-threads // 32) * 32 / ARCHITECTURES[architecture].threads


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"architecture": 75}, "architecture=75: allowed are 80, 86"),
        ({"threads": 0}, "threads=0: a block has 1 to 1024"),
        ({"registers": 256}, "registers=256: a thread has 1 to 255"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        occupancy(**{"architecture": 80, "threads": 128, "registers": 32, "shared": 0, **arguments})


@pytest.mark.skipif(not HEADER.exists() or not shutil.which("g++"), reason="needs g++ and cuda_occupancy.h of CUDA")
def test_agrees_with_cuda(tmp_path):
    """Over threads x registers x shared. The header wants room for the reserved KiB inside a block's limit, the
    hardware beside it, so the last KiB is left out."""
    (tmp_path / "occupancy.cpp").write_text(PROGRAM)
    program = tmp_path / "occupancy"
    subprocess.run(["g++", f"-I{HEADER.parent}", f"{program}.cpp", "-o", program], check=True)
    cases = [
        (sm, threads, registers, shared)
        for sm in ARCHITECTURES.values()
        for threads, registers, shared in itertools.product(
            (1, 32, 96, 128, 256, 320, 512, 1024),
            (16, 32, 33, 40, 64, 96, 128, 168, 255),
            (0, 1, 1024, 5000, 33 << 10, 48 << 10, 65536, sm.shared_per_block - SHARED_RESERVED),
        )
    ]
    lines = "".join(
        f"{sm.number} {sm.threads} {sm.shared} {sm.shared_per_block} {SHARED_RESERVED} {threads} {registers} {shared}\n"
        for sm, threads, registers, shared in cases
    )
    theirs = subprocess.run([program], input=lines, text=True, capture_output=True, check=True).stdout.split()
    assert len(theirs) == len(cases)
    for (sm, threads, registers, shared), blocks in zip(cases, theirs, strict=True):
        ours = occupancy(sm.number, threads=threads, registers=registers, shared=shared)
        assert ours.blocks == int(blocks), (sm.name, threads, registers, shared, ours.limit)
