"""The operators, one file each: schema, argument checks, reference, fake, autograd formula, backends.

Every operator takes ``backend=``, one of

- None or "fused": the owner for the input's device (``fastgpt.explain()`` prints it);
- "cpu", "cuda": our kernels, for tensors on that device;
- "reference": the readable formula in plain PyTorch;
- "torch": what torch.nn.functional itself does, the peer that benchmarks and tests compare with;
- "simt": the CUDA kernels run on CPU tensors by an emulator, for tests and debugging (built with FASTGPT_SIMT=on).
"""

from fastgpt.ops.adamw import adamw, grad_norm
from fastgpt.ops.attention import attention
from fastgpt.ops.attention_varlen import attention_varlen
from fastgpt.ops.attention_with_kvcache import attention_with_kvcache
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
    "attention_varlen",
    "attention_with_kvcache",
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
