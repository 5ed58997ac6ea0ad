"""Every wrapper of csrc/cuda/core/ptx.cuh, as the emulator runs it.

The layouts of fragments are compared with those of the PyPI package tensor-layouts, which takes them from CUTLASS: the
same mistake cannot be in both.
"""

import numpy as np
import pytest
import torch

from tests.simt.running import ORDERS, Kernels

nv = pytest.importorskip("tensor_layouts.atoms_nv", reason="the oracle of fragment layouts: pip install tensor-layouts")
SCHEDULES = [(order, lazy) for order in ORDERS for lazy in (False, True)]


@pytest.fixture(scope="module")
def run():
    return Kernels("ptx_kernels")


def bits(values, dtype):
    """The 16-bit words of ``values`` in a torch dtype."""
    return torch.as_tensor(values).to(dtype).view(torch.int16).numpy().view(np.uint16)


def floats(words):
    return words.view(np.float32)


# --- matrices ---

ATOMS = {
    "mma_bf16": (nv.SM80_16x8x16_F32BF16BF16F32_TN, torch.bfloat16),
    "mma_f16": (nv.SM80_16x8x16_F32F16F16F32_TN, torch.float16),
}


def fragment(layout, values, matrix):
    """What each of 32 lanes holds of a matrix, value by value; the oracle counts down its columns."""
    flat = matrix.T.reshape(-1)
    return np.array([[flat[layout(lane, v)] for v in range(values)] for lane in range(32)])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kernel", ATOMS)
def test_mma(run, kernel, order):
    atom, dtype = ATOMS[kernel]
    random = np.random.default_rng(1)
    # Small integers, so that products and sums are exact, whatever their order.
    a, b, c = (random.integers(-8, 9, shape).astype(np.float32) for shape in ((16, 16), (16, 8), (16, 8)))
    words = np.concatenate([
        bits(fragment(atom.a_layout, 8, a), dtype).reshape(-1).view(np.uint32),
        bits(fragment(atom.b_layout, 4, b.T), dtype).reshape(-1).view(np.uint32),  # the oracle's B is (N, K)
        fragment(atom.c_layout, 4, c).astype(np.float32).reshape(-1).view(np.uint32),
    ])  # fmt: skip
    result = floats(run(kernel, words, 128, order=order)).reshape(32, 4)
    np.testing.assert_array_equal(result, fragment(atom.c_layout, 4, c + a @ b))


@pytest.mark.parametrize("kernel", ATOMS)
def test_mma_of_special_values(run, kernel):
    """Denormals count, infinity and NaN go through."""
    atom, dtype = ATOMS[kernel]
    a, b, c = np.zeros((16, 16), np.float32), np.zeros((16, 8), np.float32), np.zeros((16, 8), np.float32)
    tiny = torch.finfo(dtype).smallest_normal / 4
    a[0, 3], a[1, 3], a[2, 3], b[3, :] = tiny, np.inf, np.nan, 2.0
    words = np.concatenate([
        bits(fragment(atom.a_layout, 8, a), dtype).reshape(-1).view(np.uint32),
        bits(fragment(atom.b_layout, 4, b.T), dtype).reshape(-1).view(np.uint32),
        fragment(atom.c_layout, 4, c).astype(np.float32).reshape(-1).view(np.uint32),
    ])  # fmt: skip
    result = floats(run(kernel, words, 128)).reshape(32, 4)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(result, fragment(atom.c_layout, 4, a @ b))


LDMATRIX = {
    "ldmatrix_x2": (nv.SM75_U32x2_LDSM_N, 2),
    "ldmatrix_x4": (nv.SM75_U32x4_LDSM_N, 4),
    "ldmatrix_x2_trans": (nv.SM75_U16x4_LDSM_T, 2),
    "ldmatrix_x4_trans": (nv.SM75_U16x8_LDSM_T, 4),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kernel", LDMATRIX)
def test_ldmatrix(run, kernel, order):
    atom, matrices = LDMATRIX[kernel]
    memory = np.arange(256, dtype=np.uint16).reshape(32, 8) + 1000
    pointed_at = np.random.default_rng(2).permutation(32).astype(np.uint32)
    source = memory[pointed_at].reshape(-1)  # the rows in the order in which the lanes name them
    half = [[[atom.dst_layout_bits(lane, 32 * r + 16 * h) // 16 for h in (0, 1)] for r in range(matrices)]
            for lane in range(32)]  # fmt: skip
    expected = source[np.array(half)].astype(np.uint16).reshape(-1).view(np.uint32)
    words = np.concatenate([pointed_at, memory.reshape(-1).view(np.uint32)])
    np.testing.assert_array_equal(run(kernel, words, 32 * matrices, order=order), expected)


# --- asynchronous copies ---


@pytest.mark.parametrize(("order", "lazy"), SCHEDULES)
def test_cp_async(run, order, lazy):
    """Groups arrive when they are waited for, oldest first; what is not valid becomes zeros and is not read."""
    source = np.arange(384, dtype=np.uint32).reshape(3, 32, 4) + 5
    expected = source.copy()
    expected[:, 2::3] = 0
    result = run("cp_async", source, 6 * 128, order=order, lazy=lazy, seed=4).reshape(6, 32, 4)
    np.testing.assert_array_equal(result[:3], expected)
    np.testing.assert_array_equal(result[3:], expected)


# --- functions of one number ---


def apply(run, kernel, x):
    count = -(-len(x) // 32)
    padded = np.zeros(32 * count, np.float32)
    padded[: len(x)] = x
    return floats(run(kernel, padded, 32 * count, grid=(count,)))[: len(x)]


def test_exp2_is_within_two_ulp_and_flushes_denormals(run):
    x = np.concatenate([np.linspace(-130, 128.5, 20001), np.random.default_rng(3).normal(size=5000)]).astype(np.float32)
    result = apply(run, "exp2", x)
    with np.errstate(over="ignore"):
        exact = np.exp2(x.astype(np.float64))
    normal = (exact >= 2.0**-126) & (exact < 3.4028e38)
    np.testing.assert_allclose(result[normal], exact[normal], rtol=2 * 2.0**-23)
    assert (result[exact < 2.0**-126] == 0).all()
    special = apply(run, "exp2", np.array([0, -0.0, 1, -np.inf, np.inf, np.nan, 1e-40, -1e-40, 128, -1e30]))
    np.testing.assert_array_equal(special, [1, 1, 2, 0, np.inf, np.nan, 1, 1, np.inf, 0])


def test_tanh_errs_as_much_as_the_instruction_may(run):
    x = np.concatenate([np.linspace(-12, 12, 10001), [1e-6, -1e-6, 1e-3]]).astype(np.float32)
    x = x[x != 0]
    error = apply(run, "tanh", x) / np.tanh(x.astype(np.float64)) - 1
    assert (np.abs(error) <= 2.0**-11).all()
    assert error.max() > 2.0**-12, "it never errs upwards, so no test would see a kernel that cannot bear it"
    assert error.min() < -(2.0**-12)
    special = apply(run, "tanh", np.array([0, -0.0, 50, -50, np.inf, -np.inf, np.nan]))
    assert (np.abs(special[:6]) <= 1).all()
    assert special[0] == special[1] == 0
    np.testing.assert_allclose(special[2:6], [1, -1, 1, -1], rtol=2.0**-11)
    assert np.isnan(special[6])


# --- 16-bit pairs and packs ---

AWKWARD = np.array(
    [0.0, -0.0, 1.0, -1.0, 1 + 2.0**-9, 1 + 3 * 2.0**-9, 1 + 2.0**-12, 65504, 65519.9, 65520, 1e38, -1e38, 3.4e38,
     np.inf, -np.inf, 2.0**-14, 2.0**-24, 2.0**-25, 1.5 * 2.0**-25, 1e-40, -1e-45, 1 / 3], np.float32,
)  # fmt: skip


@pytest.mark.parametrize(("kernel", "dtype"), [("pack_pair_bf16", torch.bfloat16), ("pack_pair_f16", torch.float16)])
def test_pack_pair_rounds_as_torch_does(run, kernel, dtype):
    values = np.concatenate([AWKWARD, np.random.default_rng(5).normal(size=999).astype(np.float32)])
    values = values[: len(values) // 64 * 64]
    count = len(values) // 2
    result = run(kernel, values, count, grid=(count // 32,))
    np.testing.assert_array_equal(result.view(np.uint16), bits(values, dtype))
    pair = run(kernel, np.array([np.nan, 1.0] * 32, np.float32), 32)[0]
    low, high = torch.tensor([pair & 0xFFFF, pair >> 16], dtype=torch.int32).to(torch.int16).view(dtype).tolist()
    assert (np.isnan(low), high) == (True, 1.0)


@pytest.mark.parametrize(
    ("kernel", "dtype"), [("pack_float", torch.float32), ("pack_bf16", torch.bfloat16), ("pack_f16", torch.float16)]
)
def test_packs_keep_every_bit(run, kernel, dtype):
    size = torch.finfo(dtype).bits // 8
    values = torch.randn(512 // size, generator=torch.Generator().manual_seed(6)).to(dtype)
    words = values.view(torch.uint8).numpy().view(np.uint32)
    stored, one_by_one = run(kernel, words, 256).reshape(2, 128)
    np.testing.assert_array_equal(stored, words)
    np.testing.assert_array_equal(one_by_one, words)
