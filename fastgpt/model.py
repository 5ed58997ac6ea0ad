"""GPT: a pre-norm, decoder-only transformer that takes every operator from one OpSet.

    x = embedding(tokens) + positions
    for each block:  x += attention(norm(x));  x += mlp(norm(x))
    logits = norm(x) W_out^T

No addition to the residual stream x is a pass of its own: a block hands on (delta, residual), and the next norm adds
them in the pass over memory that it makes anyway. Training never holds the (B, T, V) logits: linear_cross_entropy.

Shapes: B batch, T new tokens, S tokens seen (cached and new), H heads, Hkv key/value heads, D head_dim, C width,
V vocab_size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt.config import GPTConfig
from fastgpt.ops import rotary_tables
from fastgpt.ops.opset import OpSet


class GPT(nn.Module):
    """A GPT with fresh weights as GPT-2's: normal, 0.02; residual projections 0.02 / sqrt(2 layers); biases 0.

    They come from torch's default generator: torch.manual_seed before makes them repeatable.

    Args:
        config: its shape; see GPTConfig.
        ops: where the operators come from: "fused", "reference", "torch" or {operator: backend}; see OpSet.
        dtype, device: of the parameters; torch's defaults if None. On ``device="meta"`` nothing is allocated.
    """

    def __init__(
        self,
        config: GPTConfig,
        ops: str | Mapping[str, str] | OpSet = "fused",
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.set_ops(ops)
        options: dict[str, Any] = {"dtype": dtype, "device": device}
        self.token_embedding = nn.Parameter(torch.empty(config.vocab_size, config.width, **options))
        learned = config.positions == "learned"
        self.position_embedding = (
            nn.Parameter(torch.empty(config.context, config.width, **options)) if learned else None
        )
        self.blocks = nn.ModuleList(Block(config, options) for _ in range(config.layers))
        self.norm = Norm(config, options)
        self.head = (
            None if config.tie_weights else nn.Parameter(torch.empty(config.vocab_size, config.width, **options))
        )
        self._initialize()
        self.rotary: tuple[Tensor, Tensor] | None = None  # (cos, sin), (context, D / 2) each
        self._build_rotary()

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        reduction: str = "mean",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        cache: KVCache | None = None,
        lengths: Sequence[int] | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Logits, or the loss if there are targets.

        Args:
            tokens: (B, T) int64 or int32, 1 <= T, and T with what the cache holds at most config.context.
            targets: (B, T) int64, the token that should follow each token; ignore_index counts for nothing.
            reduction: "mean" over the targets that count, "sum" over them, or "none": (B, T).
            label_smoothing, z_loss: as in ops.linear_cross_entropy.
            cache: the keys and values of the tokens before these; is given those of these. For inference only.
            lengths: with a cache, how many of a row's tokens count; the rest are padding on the right. Default: all T.
            last_only: only the logits of each row's last token that counts: (B, V).

        Returns:
            Logits (B, T, V) in the parameters' dtype, or the loss as ops.linear_cross_entropy gives it.

        Raises:
            RuntimeError: a cache while gradients are on.
            TypeError, ValueError: a dtype or shape not as above; a sequence longer than the context or the cache.
            IndexError, ValueError: a token or target outside the vocabulary, from the operator that meets it.
        """
        if targets is not None:
            if cache is not None or lengths is not None or last_only:
                raise ValueError("GPT: targets go with none of cache, lengths, last_only")
            if targets.shape != tokens.shape:
                raise ValueError(f"GPT: targets have shape {tuple(targets.shape)}, tokens {tuple(tokens.shape)}")
            table, output_weight = self._weights_of_a_loss()
            return self.ops.linear_cross_entropy(
                self._hidden(tokens, table),
                output_weight,
                targets,
                reduction=reduction,
                ignore_index=ignore_index,
                label_smoothing=label_smoothing,
                z_loss=z_loss,
            )
        x = self.hidden(tokens, cache=cache, lengths=lengths)
        if last_only:
            x = x[:, -1] if lengths is None else x[list(range(len(lengths))), [n - 1 for n in lengths]]
        return F.linear(x, self.output_weight)

    def hidden(self, tokens: Tensor, *, cache: KVCache | None = None, lengths: Sequence[int] | None = None) -> Tensor:
        """What the output head reads: (B, T, C), after the last norm. Arguments as in ``forward``."""
        return self._hidden(tokens, self.token_embedding, cache, lengths)

    def _hidden(
        self, tokens: Tensor, table: Tensor, cache: KVCache | None = None, lengths: Sequence[int] | None = None
    ) -> Tensor:
        self._check(tokens, cache, lengths)
        ops = self.ops
        step = None if cache is None else cache.step(tokens.shape[1], tokens.device)
        offset = 0 if step is None or self.position_embedding is None else step.offset
        x = ops.embedding(
            tokens,
            table,
            sparse=table is not self.token_embedding,
            position_weight=self.position_embedding,
            position_offset=offset,
        )
        residual = None
        for layer, block in enumerate(self.blocks):
            past = None if cache is None or step is None else (cache, layer, step)
            x, residual = block(x, residual, ops, self.rotary, past)
        x, _ = self.norm(x, residual, ops)
        if cache is not None:
            cache.advance(tokens.shape[1] if lengths is None else lengths)
        return x

    @property
    def output_weight(self) -> Tensor:
        """(V, C): the output head, which is the token embedding if config.tie_weights."""
        return self.token_embedding if self.head is None else self.head

    def _weights_of_a_loss(self) -> tuple[Tensor, Tensor]:
        """The token embedding and the output head. Where they are one matrix, its gradient is a sum of two.

        The tokens' part is nothing but zeros in all rows that do not occur, and for GPT-2 such a matrix, its zeros and
        the addition cost 2 % of a training step. So it is a sparse tensor, added to the head's part in place. On a GPU,
        which would have to wait for the number of rows, and in a graph, where that is no constant, it stays dense.
        """
        table, head = self.token_embedding, self.output_weight
        eager = type(table) is nn.Parameter and table.device.type == "cpu" and not torch.compiler.is_compiling()
        wanted = head is table and table.requires_grad and torch.is_grad_enabled()
        ours = all(self.ops.backend(name) != "torch" for name in ("embedding", "linear_cross_entropy"))
        if not (eager and wanted and ours):
            return table, head
        return _TwoUses.apply(table)

    def set_ops(self, ops: str | Mapping[str, str] | OpSet) -> GPT:
        """Takes the operators from elsewhere from now on, with the same weights. Returns the model."""
        self.ops = OpSet(ops)
        return self

    def num_parameters(self, *, embeddings: bool = True) -> int:
        """The number of weights, shared ones once; without ``embeddings``, of the blocks and the last norm only."""
        tables = (self.token_embedding, self.position_embedding, self.head)
        total = sum(p.numel() for p in self.parameters())
        return total if embeddings else total - sum(p.numel() for p in tables if p is not None)

    def estimate_flops(self, tokens: int, *, length: int | None = None, backward: bool = True) -> int:
        """Floating-point operations of the matrix products for ``tokens`` tokens in sequences of ``length``.

        A multiplication with a (n, m) weight is 2 n m for each token. Causal attention meets (length + 1) / 2 keys on
        average and does 4 H D for each: scores and weighted sum. The backward pass does everything twice more (Kaplan
        et al., 2020). What kernels compute twice to save memory is no useful work and is not counted.

        Args:
            length: of each sequence. Default: the context.
            backward: whether to count training (forward and backward) or the forward pass alone.
        """
        c = self.config
        length = c.context if length is None else length
        weights = c.vocab_size * c.width + sum(p.numel() for p in self.blocks.parameters() if p.dim() == 2)
        attention = c.layers * 2 * c.heads * c.head_dim * (length + 1)
        return tokens * (2 * weights + attention) * (3 if backward else 1)

    @torch.no_grad()
    def _initialize(self) -> None:
        for name, p in self.named_parameters():
            if p.dim() == 1:
                nn.init.constant_(p, 0.0 if name.endswith("bias") else 1.0)
            else:
                residual = name.endswith(("output.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.layers) if residual else 0.02)

    def _build_rotary(self) -> None:
        """Tables on the parameters' device; float32 even in a bf16 model: a bf16 cosine has two right digits."""
        c, weight = self.config, self.token_embedding
        if c.positions == "rotary":
            dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
            scaling = None if c.rotary_scaling is None else dataclasses.asdict(c.rotary_scaling)
            self.rotary = rotary_tables(
                c.context, c.head_dim, c.rotary_theta, scaling=scaling, dtype=dtype, device=weight.device
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GPT:
        # .to(), .cuda(), .double(), .to_empty() all come through here.
        super()._apply(fn, recurse)
        self._build_rotary()
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As nn.Module's; ``assign=True`` also makes a model built on the meta device whole."""
        result = super().load_state_dict(*args, **kwargs)
        self._build_rotary()
        return result

    def _check(self, tokens: Tensor, cache: KVCache | None, lengths: Sequence[int] | None) -> None:
        if not isinstance(tokens, Tensor):
            raise TypeError(f"GPT: tokens must be a Tensor, not {type(tokens).__name__}")
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"GPT: tokens have dtype {tokens.dtype}; allowed are int64, int32")
        if tokens.dim() != 2 or not tokens.shape[1]:
            raise ValueError(f"GPT: tokens have shape {tuple(tokens.shape)}; it must be (batch, at least 1 token)")
        batch, new = tokens.shape
        before = 0
        if cache is not None:
            if torch.is_grad_enabled() and self.token_embedding.requires_grad:
                raise RuntimeError(
                    "GPT: no gradient flows through a cache; call with it under torch.inference_mode() or no_grad()"
                )
            before = max(cache.lengths)
            if batch != len(cache.lengths):
                raise ValueError(f"GPT: tokens have {batch} rows, the cache {len(cache.lengths)}")
            if before + new > cache.max_length:
                raise ValueError(
                    f"GPT: {before} cached and {new} new tokens exceed the cache's max_length={cache.max_length}"
                )
        if before + new > self.config.context:
            raise ValueError(
                f"GPT: a sequence of {before + new} tokens is longer than the model's context of {self.config.context}"
            )
        if lengths is not None:
            if cache is None:
                raise ValueError(
                    "GPT: lengths go with a cache; without one, padding on the right changes nothing before it"
                )
            if len(lengths) != batch or not all(1 <= n <= new for n in lengths):
                raise ValueError(
                    f"GPT: lengths={list(lengths)} must be {batch} numbers from 1 to {new}, one for each row"
                )


class _TwoUses(torch.autograd.Function):
    """A weight twice: for a use whose gradient is sparse, and for one whose gradient is dense and becomes the sum."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return weight.view_as(weight), weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, rows: Tensor | None, dense: Tensor | None) -> Tensor | None:
        if rows is None or dense is None:
            return dense if rows is None else rows.to_dense()
        # In place: it comes from linear_cross_entropy, whose backward gives its gradients away.
        return dense + rows if torch.is_grad_enabled() else dense.add_(rows)


class Block(nn.Module):
    """delta, residual -> the same after attention and MLP. The first block's residual is None."""

    def __init__(self, config: GPTConfig, options: dict[str, Any]) -> None:
        super().__init__()
        self.attention_norm = Norm(config, options)
        self.attention = Attention(config, options)
        self.mlp_norm = Norm(config, options)
        self.mlp = MLP(config, options)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        ops: OpSet,
        rotary: tuple[Tensor, Tensor] | None,
        past: tuple[KVCache, int, Step] | None,
    ) -> tuple[Tensor, Tensor]:
        x, residual = self.attention_norm(x, residual, ops)
        x = self.attention(x, ops, rotary, past)
        x, residual = self.mlp_norm(x, residual, ops)
        return self.mlp(x, ops), residual


class Attention(nn.Module):
    """Causal self-attention. One projection makes queries, keys and values; all are views of its result."""

    def __init__(self, config: GPTConfig, options: dict[str, Any]) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        rows = (self.heads + 2 * self.kv_heads) * self.head_dim  # queries, then keys, then values; head by head
        self.qkv = Linear(config.width, rows, config.qkv_bias, **options)
        self.output = Linear(self.heads * self.head_dim, config.width, config.bias, **options)

    def forward(
        self,
        x: Tensor,
        ops: OpSet,
        rotary: tuple[Tensor, Tensor] | None,
        past: tuple[KVCache, int, Step] | None,
    ) -> Tensor:
        batch, new, _ = x.shape
        heads, kv_heads = self.heads, self.kv_heads
        # Split before transposing: the backward is then one cat straight into the layout that the projection's needs.
        qkv = self.qkv(x).view(batch, new, heads + 2 * kv_heads, self.head_dim)
        if rotary is None:
            q, k, v = (part.transpose(1, 2) for part in qkv.split((heads, kv_heads, kv_heads), 2))
        else:
            qk, v = (part.transpose(1, 2) for part in qkv.split((heads + kv_heads, kv_heads), 2))
            q, k = ops.rotary(qk, *rotary, offsets=0 if past is None else past[2].offset).split((heads, kv_heads), 1)
        mask = None
        if past is not None:
            cache, layer, step = past
            k, v = cache.append(layer, step, k, v)
            mask = step.mask
        y = ops.attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None and new > 1,  # a single token sees everything
            enable_gqa=heads != kv_heads,
            causal_alignment="top_left" if past is None else "bottom_right",
        )
        return self.output(y.transpose(1, 2).reshape(batch, new, heads * self.head_dim))


class MLP(nn.Module):
    """up, activation, down. For swiglu, up makes [gate, up] side by side; gelu adds up's bias in its own pass."""

    def __init__(self, config: GPTConfig, options: dict[str, Any]) -> None:
        super().__init__()
        self.swiglu = config.activation == "swiglu"
        self.approximate = "tanh" if config.activation == "gelu_tanh" else "none"
        self.up = Linear(config.width, config.mlp_width * (2 if self.swiglu else 1), config.bias, **options)
        self.down = Linear(config.mlp_width, config.width, config.bias, **options)

    def forward(self, x: Tensor, ops: OpSet) -> Tensor:
        if self.swiglu:
            return self.down(ops.swiglu(self.up(x)))
        return self.down(ops.gelu(F.linear(x, self.up.weight), self.approximate, bias=self.up.bias))


class Norm(nn.Module):
    """(x, residual) -> (norm(x + residual), x + residual); without a residual, (norm(x), x)."""

    def __init__(self, config: GPTConfig, options: dict[str, Any]) -> None:
        super().__init__()
        self.rms, self.eps, self.shape = config.norm == "rms_norm", config.norm_eps, (config.width,)
        self.weight = nn.Parameter(torch.empty(config.width, **options))
        self.bias = nn.Parameter(torch.empty(config.width, **options)) if config.bias and not self.rms else None

    def forward(self, x: Tensor, residual: Tensor | None, ops: OpSet) -> tuple[Tensor, Tensor]:
        if self.rms:
            y = ops.rms_norm(x, self.shape, self.weight, self.eps, residual=residual)
        else:
            y = ops.layer_norm(x, self.shape, self.weight, self.bias, self.eps, residual=residual)
        return (y, x) if residual is None else y


class Linear(nn.Linear):
    """nn.Linear that leaves its weights to GPT's initialisation, and draws no values only to be overwritten."""

    def reset_parameters(self) -> None:
        pass


class Step(NamedTuple):
    """Where a cached forward pass writes its T tokens, and what they see."""

    offset: int | Tensor  # tokens already there: one number for every row, or (B,) int64
    total: int  # S: cached and new tokens of the longest row
    mask: Tensor | None  # (B, 1, T, S) bool, True where a query sees a key; None: causal from the bottom right
    where: tuple[Tensor, Tensor] | None  # rows (B, 1), positions (B, T) to write; None: offset is the same for all


class KVCache:
    """Keys and values of every layer, (B, Hkv, max_length, D) each, allocated once; rows may hold different lengths.

    Args:
        model: whose config, dtype and device it takes.
        batch: rows.
        max_length: room in each row. Default: the model's context.
    """

    def __init__(self, model: GPT, batch: int, max_length: int | None = None) -> None:
        c, weight = model.config, model.token_embedding
        max_length = c.context if max_length is None else max_length
        if batch < 1 or not 1 <= max_length <= c.context:
            raise ValueError(
                f"KVCache: batch={batch} must be at least 1, max_length={max_length} from 1 to {c.context}, the context"
            )
        shape = (c.layers, batch, c.kv_heads, max_length, c.head_dim)
        self.keys = list(weight.detach().new_zeros(shape))
        self.values = list(weight.detach().new_zeros(shape))
        self.max_length = max_length
        self.lengths = [0] * batch

    def select(self, rows: Sequence[int]) -> None:
        """Keeps these rows only, in this order."""
        used = max(self.lengths[row] for row in rows)
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                tensors[layer] = old.new_zeros((len(rows), *old.shape[1:]))
                tensors[layer][:, :, :used] = old[list(rows), :, :used]
        self.lengths = [self.lengths[row] for row in rows]

    def step(self, new: int, device: torch.device) -> Step:
        """Plans a pass of ``new`` tokens a row."""
        start = max(self.lengths)
        if min(self.lengths) == start:
            return Step(start, start + new, None, None)
        offset = torch.tensor(self.lengths, device=device)
        positions = offset[:, None] + torch.arange(new, device=device)
        mask = torch.arange(start + new, device=device) <= positions[:, None, :, None]
        rows = torch.arange(len(self.lengths), device=device)[:, None]
        return Step(offset, start + new, mask, (rows, positions))

    def append(self, layer: int, step: Step, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes a layer's new keys and values (B, Hkv, T, D); returns all of them so far, (B, Hkv, S, D), as views."""
        keys, values = self.keys[layer], self.values[layer]
        if step.where is None:
            new = slice(step.offset, step.total)
            keys[:, :, new] = k
            values[:, :, new] = v
        else:
            rows, positions = step.where
            keys[rows, :, positions] = k.transpose(1, 2)
            values[rows, :, positions] = v.transpose(1, 2)
        return keys[:, :, : step.total], values[:, :, : step.total]

    def advance(self, new: int | Sequence[int]) -> None:
        """Counts the tokens of a pass that is done."""
        each = [new] * len(self.lengths) if isinstance(new, int) else new
        self.lengths = [before + n for before, n in zip(self.lengths, each, strict=True)]
