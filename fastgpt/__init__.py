"""fastgpt makes GPTs fast without changing what they compute.

Fused kernels behind one set of operators (``fastgpt.ops``), each with a readable reference, and a thin GPT model,
trainer and sampler that take every operator from there.
"""

from fastgpt import ops
from fastgpt.config import GPTConfig
from fastgpt.generation import Generation, generate
from fastgpt.model import GPT, KVCache
from fastgpt.ops.registry import FallbackError, explain, fallbacks, set_strict, strict
from fastgpt.optim import AdamW
from fastgpt.train_config import TrainConfig
from fastgpt.training import Trainer

__version__ = "0.1.0"

__all__ = [
    "GPT",
    "AdamW",
    "FallbackError",
    "GPTConfig",
    "Generation",
    "KVCache",
    "TrainConfig",
    "Trainer",
    "__version__",
    "explain",
    "fallbacks",
    "generate",
    "ops",
    "set_strict",
    "strict",
]
