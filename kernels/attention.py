"""attention: its entries, of csrc/fastgpt.h. See attention_forward.py and attention_backward.py."""

from fastgpt.kernels.attention_backward import attention_backward
from fastgpt.kernels.attention_forward import attention_forward

__all__ = ["attention_backward", "attention_forward"]
