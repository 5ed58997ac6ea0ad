"""The operators, one file each: schema, argument checks, reference, fake, autograd formula, backends.

Every operator takes ``backend=None | "fused" | "cpu" | "reference" | "torch"``. ``None`` and ``"fused"`` choose the
owner for the input's device (``fastgpt.explain()`` prints it); ``"reference"`` is the readable formula in plain
PyTorch; ``"torch"`` is what torch.nn.functional itself does, the peer that benchmarks and tests compare with.
"""

from fastgpt.ops.adamw import adamw, grad_norm
from fastgpt.ops.attention import attention
from fastgpt.ops.cross_entropy import cross_entropy
from fastgpt.ops.embedding import embedding
from fastgpt.ops.gelu import gelu
from fastgpt.ops.layer_norm import layer_norm
from fastgpt.ops.linear_cross_entropy import linear_cross_entropy
from fastgpt.ops.rms_norm import rms_norm
from fastgpt.ops.rotary import rotary, rotary_tables
from fastgpt.ops.sample import sample
from fastgpt.ops.swiglu import swiglu

__all__ = [
    "adamw",
    "attention",
    "cross_entropy",
    "embedding",
    "gelu",
    "grad_norm",
    "layer_norm",
    "linear_cross_entropy",
    "rms_norm",
    "rotary",
    "rotary_tables",
    "sample",
    "swiglu",
]
