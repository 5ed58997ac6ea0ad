"""Predicted floor times: the rule, a case computed by hand, and that the page in docs/ is what the command writes."""

import math

import pytest

from fastgpt.cli.explain import BUDGETS, Kind
from fastgpt.gpu import budget, predictions
from fastgpt.gpu.code import ROOT
from fastgpt.gpu.predictions import DEVICES, FORMULAS, SHAPES, Work, floor


def formula(work):
    return next(f for f in FORMULAS if f.work == work)


def test_the_longest_of_the_four_bounds():
    a100 = DEVICES[0]
    assert floor(Work(bytes=2039e9), a100) == (1.0, "memory")
    assert floor(Work(bytes=1, tensor=2 * 312e12), a100) == (2.0, "tensor cores")
    assert floor(Work(bytes=1, vector=19.5e12), a100) == (1.0, "FP32")
    seconds, bound = floor(Work(bytes=1, special=108 * 16 * 1.41e9), a100)
    assert bound == "exponentials"
    assert math.isclose(seconds, 1.0)


def test_cases_by_hand():
    gpt2, llama = SHAPES
    work = formula("attention forward, causal").count(gpt2)
    assert work.tensor == 4 * 64 * 16 * 12 * (1024 * 1025 // 2)
    assert work.bytes == 2 * 4 * 16 * 1024 * 768 + 4 * 16 * 12 * 1024
    work = formula("attention, one query a sequence, S cached keys").count(llama)
    assert work.bytes == 2 * 2 * (2 * 32 * 128 + 2 * 8 * 4096 * 128)
    work = formula("adamw, all parameters, with float32 masters").count(gpt2)
    assert work.bytes == 124_439_808 * (2 + 2 + 2 + 8 + 8 + 8)  # parameter read and written, gradient; m, v, master


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
def test_every_formula_counts_something(shape):
    for f in FORMULAS:
        work = f.count(shape)
        assert work.bytes > 0
        assert min(work.tensor, work.vector, work.special) >= 0


def test_the_page_is_what_the_command_writes():
    """After `fastgpt gate --update`: `fastgpt predict --output docs/predictions.md`."""
    assert (ROOT / "docs" / "predictions.md").read_text() == predictions.document(budget.load(BUDGETS[Kind.cuda]))
