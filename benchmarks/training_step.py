"""One training step (loss, backward, clipping, AdamW) of GPT-2 124M against Hugging Face's, and its matrix products.

Ours in bfloat16 has bfloat16 weights with float32 masters and moments; theirs has float32 weights under autocast, which
is how Hugging Face's Trainer does it. Neither drops out. *memory*: what a step needs beyond the parameters, gradients
and optimizer state, which are there before it. FLOP: what GPT.estimate_flops counts. ``--long`` adds float32 and
sequences of 1024 tokens.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor, nn

from benchmarks import harness
from fastgpt import GPT, AdamW, GPTConfig
from fastgpt.ops.linear_cross_entropy import chunk_rows

GPT2, SMALL = GPTConfig.preset("gpt2"), GPTConfig.preset("gpt2", layers=4, heads=6, width=384)
# (model, batch, length); the small one for quick runs.
SHAPES = {"2 x 256": (GPT2, 2, 256), "1 x 1024": (GPT2, 1, 1024), "4 x 256, 4 layers of 384": (SMALL, 4, 256)}
LEARNING_RATE, MAX_NORM = 1e-4, 1.0


def text(shape: str) -> tuple[Tensor, Tensor]:
    config, batch, length = SHAPES[shape]
    tokens = torch.randint(config.vocab_size, (batch, length + 1), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def ours(dtype: torch.dtype, shape: str) -> harness.Call:
    torch.manual_seed(0)
    model = GPT(SHAPES[shape][0], dtype=dtype)
    inputs, targets = text(shape)
    optimizer = AdamW(model.parameters(), lr=LEARNING_RATE, max_grad_norm=MAX_NORM)

    def call() -> None:
        optimizer.zero_grad()
        model(inputs, targets).backward()
        optimizer.step()

    return call


def hugging_face(dtype: torch.dtype, shape: str, compiled: bool) -> harness.Call | harness.Missing:
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        return harness.Missing("transformers is not installed")
    torch.manual_seed(0)
    config = SHAPES[shape][0]
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    size = {"n_layer": config.layers, "n_head": config.heads, "n_embd": config.width}
    model = GPT2LMHeadModel(GPT2Config(**size, **no_dropout, use_cache=False, attn_implementation="sdpa"))
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)
    inputs, _ = text(shape)  # the loss shifts it
    run = harness.compiled(model) if compiled else model
    if isinstance(run, harness.Missing):
        return run

    def call() -> None:
        optimizer.zero_grad()
        half = torch.autocast("cpu", torch.bfloat16) if dtype == torch.bfloat16 else contextlib.nullcontext()
        with half:
            loss = run(input_ids=inputs, labels=inputs).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()

    return call


@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.quick(dtype=torch.bfloat16, shape="4 x 256, 4 layers of 384")
@pytest.mark.long(dtype=torch.float32)
@pytest.mark.long(shape="1 x 1024")
def test_training_step(benchmark, dtype, shape):
    config, batch, length = SHAPES[shape]
    harness.versus(
        benchmark,
        ours(dtype, shape),
        {
            "Hugging Face": hugging_face(dtype, shape, compiled=False),
            "Hugging Face, torch.compile": hugging_face(dtype, shape, compiled=True),
        },
        flops=GPT(config, device="meta").estimate_flops(batch * length, length=length),
        shape=shape,
        dtype=dtype,
    )


def matrix_products(dtype: torch.dtype, shape: str) -> harness.Call:
    """Every matrix product of the step with a weight, in its order and layout, into memory that is there already."""
    config, batch, length = SHAPES[shape]
    model, rows = GPT(config, dtype=dtype), batch * length
    layers = [m.weight.detach() for m in model.modules() if isinstance(m, nn.Linear)]
    head = model.output_weight.detach()
    chunk = chunk_rows(rows, head)
    gradients = {weight: torch.empty_like(weight) for weight in (*layers, head)}
    # What comes in and what goes out of a product: one matrix for each size.
    sizes = {(rows, size) for weight in (*layers, head) for size in weight.shape} - {(rows, len(head))}
    given, result = ({size: torch.randn(size).to(dtype) for size in sizes | {(chunk, len(head))}} for _ in range(2))

    def backward(weight: Tensor, g: Tensor, x: Tensor, dx: Tensor, first: bool = True) -> None:
        torch.mm(g, weight, out=dx)
        torch.addmm(gradients[weight], g.t(), x, beta=0 if first else 1, out=gradients[weight])

    def call() -> None:
        for weight in layers:
            torch.mm(given[rows, weight.shape[1]], weight.t(), out=result[rows, weight.shape[0]])
        x, dx = given[rows, head.shape[1]], result[rows, head.shape[1]]
        for start in range(0, rows, chunk):
            part = slice(start, min(start + chunk, rows))
            logits = given[chunk, len(head)][: part.stop - start]
            torch.mm(x[part], head.t(), out=logits)
            backward(head, logits, x[part], dx[part], first=not start)
        for weight in reversed(layers):
            out, size = weight.shape
            backward(weight, given[rows, out], given[rows, size], result[rows, size])

    return call


@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.long(dtype=torch.float32)
@pytest.mark.long(shape="1 x 1024")
def test_matrix_products(benchmark, dtype, shape):
    """The floor that the step is held against: it takes so many times as long as its matrix products alone."""
    config, batch, length = SHAPES[shape]
    model = GPT(config, device="meta")
    matrices = [p for p in (*model.blocks.parameters(), model.output_weight) if p.dim() == 2]
    harness.versus(
        benchmark,
        matrix_products(dtype, shape),
        {"the whole training step": ours(dtype, shape)},
        flops=6 * batch * length * sum(p.numel() for p in matrices),
        shape=shape,
        dtype=dtype,
        backend="torch",
    )
