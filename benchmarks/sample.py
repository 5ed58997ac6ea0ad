"""sample against plain torch and against Hugging Face's logits processors. Bytes: the logits, read once."""

import pytest
import torch

from benchmarks import harness
from fastgpt import ops

OPTIONS = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "top_k_top_p": {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
    "top_k_1000": {"top_k": 1000},
    "top_p": {"top_p": 0.9},
    "min_p": {"min_p": 0.05},
}


def plain_torch(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """What one writes by hand: topk, sort, cumsum, softmax, multinomial."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        p = ordered.softmax(-1)
        drop = (p.cumsum(-1) - p >= top_p).scatter(1, order, p.cumsum(-1) - p >= top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    p = logits.softmax(-1)
    if min_p:
        p = p.masked_fill(p < min_p * p.amax(-1, keepdim=True), 0)
    return p.multinomial(1).squeeze(1)


def hugging_face(options):
    """The same with transformers' processors."""
    try:
        from transformers.generation import logits_process as hf
    except ImportError:
        return harness.Missing("transformers is not installed")
    makers = {
        "temperature": hf.TemperatureLogitsWarper,
        "top_k": hf.TopKLogitsWarper,
        "top_p": hf.TopPLogitsWarper,
        "min_p": hf.MinPLogitsWarper,
    }
    processors = hf.LogitsProcessorList([makers[name](value) for name, value in options.items()])

    def call(logits):
        return processors(None, logits).softmax(-1).multinomial(1).squeeze(1)

    return call


@pytest.mark.quick(vocabulary=50257, name="top_k_top_p", dtype=torch.float32)
@pytest.mark.long(vocabulary=128256, name=[name for name in OPTIONS if name != "top_k_top_p"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("vocabulary", [50257, 128256])
def test_sample(benchmark, vocabulary, rows, name, dtype):
    options = OPTIONS[name]
    logits = (torch.randn(rows, vocabulary) * 3).to(dtype)
    peers = {"torch by hand": harness.forward(plain_torch, logits, **options)}
    if name != "greedy":
        peers["Hugging Face"] = harness.forward(hugging_face(options), logits)
    ours = harness.forward(ops.sample, logits, **options)
    harness.versus(benchmark, ours, peers, bytes=logits.numel() * logits.element_size(), flops=5 * logits.numel())
