import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastgpt.ops import philox
from tests.ops import harness
from tests.ops.harness import ops

# Published with Random123 (kat_vectors, philox4x32-10): counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return tuple(torch.tensor([int(word, 16)]) for word in text.split())


def test_known_answers():
    for counter, key, result in KNOWN_ANSWERS:
        assert philox.philox4x32(words(counter), words(key)) == words(result)
    # and all at once
    counters, keys, results = (
        tuple(map(torch.cat, zip(*(words(answer[i]) for answer in KNOWN_ANSWERS), strict=True))) for i in range(3)
    )
    for word, expected in zip(philox.philox4x32(counters, keys), results, strict=True):
        assert torch.equal(word, expected)


def test_the_counter_and_key_are_laid_out_as_documented():
    seed, row, position = 0x299F31D0A4093822, 0x13198A2E, 0x85A308D3243F6A88
    high, low, _, _ = philox.philox4x32(words("243f6a88 85a308d3 13198a2e 03707344"), words("a4093822 299f31d0"))
    [bits] = philox.uniform_bits(
        torch.tensor([seed]), torch.tensor([row]), torch.tensor([position - 2**64]), stream=0x03707344
    )
    assert bits == (int(high) << 32 | int(low)) == 0xD16CFE0994FDCCEB


@pytest.mark.parametrize("backend", harness.backends("sample"))
def test_every_backend_draws_these_very_bits(backend):
    """Over 2^20 equally likely tokens, the token is the top 20 bits of the random number."""
    seed = torch.tensor([0, 1, 2**32 + 5, -1])
    row = torch.tensor([0, 7, 2**32 - 1, 123456])
    position = torch.tensor([0, 2**32 + 9, 3, 2**62])
    token, _ = ops.sample(torch.zeros(4, 2**20), seed=seed, row=row, position=position, backend=backend)
    bits = philox.uniform_bits(seed, row, position, philox.SAMPLE_STREAM)
    assert token.tolist() == [b >> 44 for b in bits]


@pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")
def test_dropout_values_are_those_of_the_header(tmp_path):
    """csrc/core/philox.h itself, compiled on its own."""
    source = """
    #include "core/philox.h"
    using namespace fastgpt::FASTGPT_ISA;
    extern "C" unsigned value(long long seed, long long head, long long query, long long key) {
      return dropout_value(dropout_words(seed, head, query, key / 8), key % 8);
    }"""
    library = tmp_path / "philox.so"
    csrc = Path(__file__).resolve().parents[2] / "csrc"
    command = ["c++", "-std=c++17", "-shared", "-fPIC", f"-I{csrc}", "-x", "c++", "-", "-o", library]
    subprocess.run(command, input=source, text=True, check=True)
    value = ctypes.CDLL(str(library)).value
    value.argtypes = [ctypes.c_longlong] * 4
    for seed in (0, 1, -1, 2**40 + 5, -(2**63)):
        for first in (0, 70000):
            ours = philox.dropout_values(torch.tensor([seed]), first, 3, 4, 21)
            theirs = [[[value(seed, first + h, i, j) for j in range(21)] for i in range(4)] for h in range(3)]
            assert ours.tolist() == theirs
