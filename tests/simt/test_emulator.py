"""The emulator itself: what lanes exchange, where they meet, in which order they run, and what it refuses."""

import re

import numpy as np
import pytest

from tests.simt.running import FOLDER, ORDERS, KernelError, Kernels

LINES = {}
for number, line in enumerate((FOLDER / "emulator_kernels.cu").read_text().splitlines(), 1):
    if found := re.search(r"// LINE (\w+)", line):
        LINES.setdefault(found[1], []).append(number)

UNTOUCHED = 0xDEADBEEF
LANES = np.arange(32)
ALL = 0xFFFFFFFF
MASKS = [ALL, 0x0000FFFF, 0xFFFF0000, 0x80000001, 0x5A5A5A5A, 1]


@pytest.fixture(scope="module")
def run():
    return Kernels("emulator_kernels")


def with_mask(mask, arguments):
    return np.concatenate([[mask], np.broadcast_to(arguments, 32)]).astype(np.int64).astype(np.uint32)


# --- shuffles ---


def source(form, lane, argument, width):
    """The lane that CUDA reads from (Programming Guide, "Warp Shuffle Functions")."""
    begin = lane // width * width
    if form == "index":
        return begin + argument % width
    if form == "up":
        return lane - argument if lane - argument >= begin else lane
    if form == "down":
        return lane + argument if lane + argument < begin + width else lane
    return lane ^ argument if lane ^ argument < begin + width else lane


@pytest.mark.parametrize("width", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("form", ["index", "up", "down", "xor"])
def test_shuffle(run, form, width):
    random = np.random.default_rng(width)
    cases = [np.full(32, n) for n in range(32)] if form != "index" else [np.full(32, n) for n in (0, 1, 5, 31, 40, -1)]
    for number, arguments in enumerate([*cases, random.integers(0, 32, 32)]):
        if form == "xor" or number < len(cases):
            arguments = np.broadcast_to(arguments[0], 32)  # a distance is the warp's, an index the lane's own
        for mask in MASKS:
            result = run(f"shuffle_{form}_{width}", with_mask(mask, arguments), order=ORDERS[number % 3], seed=number)
            for lane in LANES:
                if not mask >> lane & 1:
                    expected = UNTOUCHED
                else:
                    read = source(form, int(lane), int(arguments[lane]), width)
                    # Of a lane that is not there a GPU gives anything: the emulator, all ones.
                    expected = 100 + read if mask >> read & 1 else ALL
                assert result[lane] == expected, f"lane {lane}, argument {arguments[lane]}, mask {mask:#x}"


@pytest.mark.parametrize("kernel", ["shuffle_float", "shuffle_double", "shuffle_wide"])
def test_shuffle_of_other_types(run, kernel):
    np.testing.assert_array_equal(run(kernel, with_mask(ALL, LANES ^ 9)), 100 + (LANES ^ 9))


def test_shuffle_keeps_every_bit(run):
    assert (run("shuffle_keeps_every_bit") == 1).all()


@pytest.mark.parametrize("order", ORDERS)
def test_groups_of_a_warp_meet_on_their_own(run, order):
    result = run("shuffle_in_two_groups", order=order, seed=3)
    np.testing.assert_array_equal(result, np.repeat([sum(range(16)), sum(range(16, 32))], 16))


# --- votes, exits, barriers ---


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mask", MASKS)
def test_votes(run, mask, order):
    for values in (LANES % 2, LANES * 0, LANES * 0 + 1, LANES // 5, LANES + 2**31):
        ballot, some, every, match = run("votes", with_mask(mask, values), 128, order=order).reshape(4, 32)
        inside = [lane for lane in range(32) if mask >> lane & 1]
        votes = sum(1 << lane for lane in inside if values[lane] & 1)
        for lane in range(32):
            equal = sum(1 << other for other in inside if values[other] == values[lane])
            expected = [votes, votes != 0, votes == mask, equal] if lane in inside else [UNTOUCHED] * 4
            assert [ballot[lane], some[lane], every[lane], match[lane]] == expected


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("alive", [32, 20, 2])
def test_lanes_that_returned_are_not_waited_for(run, alive, order):
    ballot, neighbour = run("exited_lanes", np.array([alive], np.uint32), 64, order=order).reshape(2, 32)
    assert (ballot[:alive] == (1 << alive) - 1).all()
    np.testing.assert_array_equal(neighbour[:alive], LANES[:alive] ^ 1)
    assert (ballot[alive:] == UNTOUCHED).all()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("threads", [32, 33, 96, 1024])
def test_barriers(run, threads, order):
    for ones in (0, 1, threads):
        votes = (np.arange(threads) < ones).astype(np.uint32)
        count, some, every, sums = run("barriers", votes, 4 * threads, block=(threads,), order=order).reshape(4, -1)
        assert (count == ones).all()
        assert (some == (ones > 0)).all()
        assert (every == (ones == threads)).all()
        np.testing.assert_array_equal(sums, (np.arange(threads) + 33) % threads * 6)


# --- indices, orders, atomics ---


def test_indices_in_three_dimensions(run):
    result = run("indices", out=2 * 3 * 2 * 24, grid=(2, 3, 2), block=(4, 3, 2)).reshape(12, 24)
    np.testing.assert_array_equal(result, np.arange(12)[:, None] * 1000 + np.arange(24))


def test_orders_of_blocks(run):
    def blocks(order, seed=0):
        return run("order_of_blocks", out=17, grid=(16,), order=order, seed=seed, fill=0)[1:].tolist()

    everyone = list(range(16))
    assert blocks("forward") == everyone
    assert blocks("reverse") == everyone[::-1]
    seen = [blocks("random", seed) for seed in (1, 2, 3)]
    assert all(sorted(order) == everyone for order in seen)
    assert len(set(map(tuple, seen))) == 3
    assert blocks("random", 2) == seen[1], "a seed stands for one order"


def test_orders_of_lanes(run):
    def lanes(order, seed=0):
        return run("order_of_lanes", out=64, block=(64,), order=order, seed=seed).tolist()

    everyone = list(range(64))
    # After a barrier its last arriver goes on first.
    assert [i for i in lanes("forward") if i != 63] == everyone[:-1]
    assert [i for i in lanes("reverse") if i != 0] == everyone[:0:-1]
    seen = [lanes("random", seed) for seed in (1, 2, 3)]
    assert all(sorted(order) == everyone for order in seen)
    assert len(set(map(tuple, seen))) == 3
    assert lanes("random", 3) == seen[2]


@pytest.mark.parametrize("order", ORDERS)
def test_atomics(run, order):
    values = np.random.default_rng(7).integers(1, 1000, 32).astype(np.uint32)
    result = run("atomics", values, 10, order=order, seed=5, fill=0)
    assert result[0] == values.sum()
    assert result[1] == (2**32 - int(values.sum())) % 2**32
    assert result[2] == values.max()
    assert result[3] == 0
    assert result[4] == np.bitwise_or.reduce(1 << (values % 32))
    assert result[5] == 0
    assert result[6] == 7
    assert 1 <= result[7] <= 32
    assert result[8:].view(np.uint64)[0] == 32 << 32


# --- shared memory ---


def test_shared_memory(run):
    """Dynamic memory first, aligned to 128 bytes; static variables after it, apart; each block finds it poisoned."""
    for dynamic in (4, 64, 1000):
        for block in run("shared_memory", out=24, grid=(3,), shared=dynamic).reshape(3, 8):
            misaligned, odd, following, left_over, also_left, same, *_ = block.tolist()
            assert misaligned == 0
            assert odd >= dynamic
            assert odd % 16 == 0
            assert following >= odd + 3
            assert following % 16 == 0
            assert (left_over, also_left, same) == (ALL, ALL, 1)


def test_shared_memory_has_a_limit(run):
    with pytest.raises(KernelError, match=r"99.*dynamic shared memory|dynamic shared memory; the device has 101376"):
        run("shared_memory", out=24, shared=99 * 1024 + 1)
    run("too_much_static", shared=40000)
    with pytest.raises(KernelError, match="too_much_static: more than 101376 bytes of shared memory"):
        run("too_much_static", shared=45000)
    with pytest.raises(KernelError, match="more than 49152 bytes of shared memory"):
        run("too_much_static", shared_limit=48 * 1024)


# --- asynchronous copies ---


@pytest.mark.parametrize("order", ORDERS)
def test_only_lazy_copies_show_a_wait_for_too_few_groups(run, order):
    given = np.arange(256, dtype=np.uint32)
    expected = given.reshape(2, 32, 4).transpose(0, 2, 1).reshape(-1)
    np.testing.assert_array_equal(run("wrong_wait", given, 256, order=order), expected)
    lazy = run("wrong_wait", given, 256, order=order, lazy=True)
    np.testing.assert_array_equal(lazy[:128], expected[:128])
    assert (lazy[128:] == ALL).all(), "a copy that nobody waited for was already there"


def test_only_lazy_copies_show_a_missing_barrier(run):
    given = np.arange(128, dtype=np.uint32)
    right = np.roll(given[::4], -1)
    results = {
        (order, lazy): np.array_equal(run("missing_barrier", given, order=order, seed=1, lazy=lazy), right)
        for order in ORDERS
        for lazy in (False, True)
    }
    assert not any(ok for (_, lazy), ok in results.items() if lazy), results


# --- reports ---

SAYS = {
    "different_places": "divergence: __shfl_sync at .*while lanes that it names wait in __shfl_sync",
    "different_masks": "divergence: __shfl_sync at .* with mask 0x[0f]*, while .* with mask 0x[0f]*",
    "different_kinds": "divergence: (__any_sync.*__ballot_sync|__ballot_sync.*__any_sync)",
    "not_in_mask": "__ballot_sync at .*the lane is not in its own mask.*thread \\((3|35), 0, 0\\)",
    "different_barriers": "divergence: __syncthreads at .*while other threads wait at the one of",
    "returned_before_barrier": "1 threads have returned|returns while others wait at the barrier",
    "deadlock": "deadlock: no thread can go on.*waits in (__syncthreads|__shfl_sync)",
    "misaligned_load": "misaligned 16-byte load",
    "misaligned_store": "misaligned 8-byte store",
    "misaligned_copy": "misaligned 16-byte cp.async \\(global address\\)",
    "copy_to_global": "cp.async at .*outside the block's shared memory",
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kernel", SAYS)
def test_report(run, kernel, order):
    """Names the kernel, what is wrong, the line, the thread and the block."""
    with pytest.raises(KernelError) as caught:
        run(kernel, np.arange(64, dtype=np.uint32), 256, block=(64,), order=order, seed=2)
    message = str(caught.value)
    assert message.startswith(f"{kernel}: ")
    assert re.search(SAYS[kernel], message), message
    assert any(f"emulator_kernels.cu:{line}" in message for line in LINES[kernel]), message
    assert re.search(r"in thread \(\d+, 0, 0\) of block \(0, 0, 0\)$|in the host$", message), message


def test_deadlock_names_everyone_who_waits(run):
    with pytest.raises(KernelError) as caught:
        run("deadlock", block=(64,), out=64)
    for line in LINES["deadlock"]:
        assert f"emulator_kernels.cu:{line}" in str(caught.value)


def test_matrix_instructions_need_the_whole_warp(run):
    with pytest.raises(KernelError, match="mma needs all 32 lanes"):
        run("half_a_warp_multiplies", np.zeros(4, np.uint32), block=(16,))


@pytest.mark.parametrize(
    ("size", "says"),
    [
        ({"block": (1025,)}, "allowed are 1 to 1024 threads"),
        ({"block": (32, 33)}, "allowed are 1 to 1024 threads"),
        ({"block": (0,)}, "allowed are 1 to 1024 threads"),
        ({"block": (1, 1, 65)}, "allowed are 1 to 1024 threads"),
        ({"grid": (0,)}, "grid \\(0, 1, 1\\)"),
        ({"grid": (1, 65536)}, "grid \\(1, 65536, 1\\)"),
        ({"grid": (1, 1, 65536)}, "grid"),
    ],
)
def test_launches_that_no_device_takes(run, size, says):
    with pytest.raises(KernelError, match=f"launch of indices: .*{says}"):
        run("indices", out=1, **size)


def test_a_failed_launch_leaves_nothing_behind(run):
    for kernel in SAYS:
        with pytest.raises(KernelError):
            run(kernel, np.arange(64, dtype=np.uint32), 256, block=(64,))
        assert (run("shuffle_keeps_every_bit") == 1).all()
        np.testing.assert_array_equal(run("indices", out=64, block=(64,)), np.arange(64))
