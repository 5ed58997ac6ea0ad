"""sample: draws one token a row from logits, after penalties, bias, temperature, top-k, top-p and min-p.

Shapes: N rows, V vocabulary, L previous tokens.

What happens to a row, in this order (repetition penalty: CTRL, Keskar et al. 2019; presence and frequency: the OpenAI
API; top-k: Fan et al. 2018; top-p: Holtzman et al. 2020; min-p: Nguyen et al. 2024; filters in Hugging Face's order):

1. For a token that occurs ``count > 0`` times in ``previous_tokens``: ``x = x / r if x > 0 else x * r`` with ``r`` the
   repetition penalty, then ``x = x - presence_penalty - frequency_penalty * count`` (in float64, rounded once).
2. ``x = x + logit_bias``.
3. Temperature: weights ``w = exp((x - max x) / temperature)``, as integers (below). Temperature 0 is greedy: the token
   is the lowest index of the largest x, the filters do not matter, and log_prob is its log-softmax at temperature 1.
4. top-k keeps x >= the k-th largest x.
5. top-p keeps x >= t for the largest t whose kept weight is at least top_p of what top-k kept.
6. min-p keeps w >= min_p times the largest weight (w before it was rounded).
7. The token is drawn in proportion to the kept weights; log_prob is the logarithm of its share of them.

The filters are thresholds: equal logits are kept or dropped together, whatever their index (as in Hugging Face's top-k;
its top-p splits ties by the order of its sort).

One seed, one token, on every backend. A weight is an integer, the float32 exponential times 2^42 rounded to nearest, so
sums do not depend on their order; that exponential is a fixed sequence of IEEE operations, none of them fused; the draw
is integer arithmetic too. So the reference and the kernels pick the same token from the same bits, always, not almost
always. A token less likely than 2^-43 of the most likely one has weight 0 and is never drawn.

On a GPU nothing waits for the device: options given as numbers are checked here and travel with the launch, those given
as CUDA tensors are checked by the kernel. A row that it must refuse gets token -1 and log_prob NaN; see ``sample``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import profiler

from fastgpt.ops import checks, native, philox, registry
from fastgpt.ops.native import DTYPES, Kernels, unsupported_dtype
from fastgpt.ops.numerics import accumulate, as_rows

# Columns of the two tables of options; csrc/fastgpt.h's Sample has them in this order.
_REALS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_INTEGERS = ("top_k", "seed", "position")

WEIGHT_BITS = 42  # the most likely token weighs 2^42
TEMPERATURES = (1e-30, 1e30)  # those beyond count as these
MAX_VOCABULARY = 1 << 20  # so that the sum of weights fits into 63 bits

Option = float | Tensor
IntOption = int | Tensor


def sample(
    logits: Tensor,
    *,
    temperature: Option = 1.0,
    top_k: IntOption = 0,
    top_p: Option = 1.0,
    min_p: Option = 0.0,
    repetition_penalty: Option = 1.0,
    presence_penalty: Option = 0.0,
    frequency_penalty: Option = 0.0,
    previous_tokens: Tensor | Sequence[int] | Sequence[Sequence[int]] | None = None,
    logit_bias: Tensor | None = None,
    seed: IntOption = 0,
    position: IntOption = 0,
    row: IntOption | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Draws one token from every row of ``logits``. The module's docstring defines every step.

    Every option but ``previous_tokens`` and ``logit_bias`` is a number, or a tensor (N,) with one value per row.

    Args:
        logits: (N, V) or (V,), float32, bfloat16, float16 (float64 on the reference); -inf forbids a token. V <= 2^20.
        temperature: 0 (greedy) or more.
        top_k: keep the k largest; 0 keeps all.
        top_p: in (0, 1]; keep the smallest set of most likely tokens that holds at least this probability.
        min_p: in [0, 1]; keep tokens at least this likely relative to the most likely one.
        repetition_penalty: above 0; 1 is off, more discourages tokens of ``previous_tokens``.
        presence_penalty, frequency_penalty: subtracted once, and once per occurrence, from tokens that occur in
            ``previous_tokens``.
        previous_tokens: int64 (N, L), or (L,) for logits (V,), padded with -1; or a list per row.
        logit_bias: (V,) or (N, V), added to the logits; -inf forbids a token.
        seed, position, row: what the random number depends on, and all that it depends on. ``row`` is the index in the
            batch unless given: give one to sequences that must not depend on where in a batch they stand.
        backend: see ``fastgpt.ops``.

    Returns:
        (token, log_prob): int64 and float32, (N,), or 0-d for logits (V,). log_prob is the logarithm of the token's
        probability in the distribution it was drawn from, after penalties and filters. Neither has a derivative: the
        result is detached.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or value; logits or bias with NaN or +inf; a
            previous token outside the vocabulary; a row with no token left to choose from. The message names argument,
            row and value. The CUDA kernel cannot raise, since nobody waits for it: where it reads what is wrong from
            device memory (logits, bias, previous tokens, options by row), that row gets token -1 and log_prob NaN.
    """
    if logit_bias is None and previous_tokens is None and (backend is None or backend == "cpu"):
        scalars = (temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty)
        drawn = _sample_at_once(logits, scalars, (top_k, seed, position), row)
        if drawn is not None:
            return drawn
    checks.floating("sample", "logits", logits)
    single = logits.dim() == 1
    if single:
        logits = logits.unsqueeze(0)
    if logits.dim() != 2 or not 1 <= logits.shape[-1] <= MAX_VOCABULARY:
        raise ValueError(
            f"sample: logits has shape {tuple(logits.shape)}; "
            f"it must be (N, V) or (V,) with V from 1 to {MAX_VOCABULARY}"
        )
    rows, vocab = logits.shape
    reals = _table(
        (temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty),
        _REALS, rows, logits.device, torch.float64,
    )  # fmt: skip
    integers = _table((top_k, seed, position), _INTEGERS, rows, logits.device, torch.int64)
    row_key = None if row is None else _column("row", row, rows, logits.device, torch.int64)
    previous = _previous(previous_tokens, rows, single, logits.device)
    if logit_bias is not None:
        checks.floating("sample", "logit_bias", logit_bias)
        if tuple(logit_bias.shape) not in ((vocab,), (rows, vocab)):
            raise ValueError(
                f"sample: logit_bias has shape {tuple(logit_bias.shape)}; it must be {(vocab,)} or {(rows, vocab)}"
            )
        if logit_bias.device != logits.device:
            raise ValueError(f"sample: logit_bias is on {logit_bias.device}, but logits is on {logits.device}")
        logit_bias = (
            logit_bias.detach()
            .to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
            .expand(rows, vocab)
        )

    chosen = registry.resolve("sample", backend, logits.device, unsupported_dtype(logits))
    arguments = (logits.detach(), reals, integers, row_key, previous, logit_bias)
    token, log_prob = torch_eager(*arguments) if chosen == "torch" else _op(*arguments, chosen)
    return (token.squeeze(0), log_prob.squeeze(0)) if single else (token, log_prob)


# --- the short way ---

# As names of this module: when everything is out of the caches, as in a decoding step, each look-up takes 2 us.
_is_compiling = torch.compiler.is_compiling
_is_like_a_subclass = torch._C._dispatch_isTensorSubclassLike  # with a mode or a transform, every tensor is


def _sample_at_once(
    logits: Tensor, reals: tuple[Any, ...], integers: tuple[Any, ...], row: Any
) -> tuple[Tensor, Tensor] | None:
    """The CPU's kernel called past the dispatcher, when all options are numbers and the tensor is an ordinary one; None
    if anything is out of the ordinary, or wrong: the long way then does it, or says what it is.

    One row takes the long way longer than it takes the kernel.
    """
    if (
        _is_compiling()
        or type(logits) is not Tensor
        or not logits.is_cpu
        or _is_like_a_subclass(logits)
        or logits.is_neg()
        or profiler._is_profiler_enabled  # which shall see the operator
        or logits.dtype not in DTYPES
        or not (row is None or (type(row) is int and 0 <= row < 2**32))
    ):
        return None
    shape, strides = logits.shape, logits.stride()
    single = len(shape) == 1
    if not 1 <= len(shape) <= 2 or type(shape[0]) is not int:  # but a tensor, under torch.jit.trace
        return None
    if not 1 <= shape[-1] <= MAX_VOCABULARY or not shape[0] or strides[-1] != 1:
        return None
    address = logits.data_ptr()
    if not address:  # a tensor of zeros that has no memory
        return None
    of_rows = list(shape[:-1])
    token, log_prob = logits.new_empty(of_rows, dtype=torch.int64), logits.new_empty(of_rows, dtype=torch.float32)
    try:
        native._C.cpu.sample(
            token=token,
            log_prob=log_prob,
            logits=address,
            reals=None,
            integers=None,
            row=None,
            previous=None,
            logit_bias=None,
            rows=1 if single else shape[0],
            vocab=shape[-1],
            previous_count=0,
            logits_stride=strides[0],
            bias_stride=0,
            all_reals=reals,
            all_integers=integers,
            all_row=-1 if row is None else row,
            dtype=DTYPES[logits.dtype],
        )
    except (TypeError, ValueError):
        return None
    return token, log_prob


# --- arguments ---


def _column(name: str, value: float | Tensor, rows: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """One option as a tensor: (N,) on ``device`` when it is a tensor; (1,) on the host when it is a number."""
    integer = dtype == torch.int64
    if isinstance(value, Tensor):
        if value.is_complex() or value.dtype == torch.bool or (integer and value.is_floating_point()):
            kind = "an integer" if integer else "a floating or integer"
            raise TypeError(f"sample: {name} has dtype {value.dtype}; it must be {kind} dtype")
        if tuple(value.shape) not in ((), (rows,)):
            raise ValueError(f"sample: {name} has shape {tuple(value.shape)}; it must be {(rows,)} (one value per row)")
        return value.detach().to(device, dtype).reshape(-1).expand(rows)
    _number(name, value, integer)
    return torch.tensor([_as_int64(name, value) if integer else float(value)], dtype=dtype)


def _number(name: str, value: object, integer: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, int if integer else (int, float)):
        kind = "an int" if integer else "a number"
        raise TypeError(f"sample: {name} must be {kind} or a tensor, not {type(value).__name__} ({value!r})")


def _as_int64(name: str, value: float) -> int:
    """The int64 with the bits of ``value``: seeds are unsigned to some and signed to others."""
    if not -(2**63) <= value < 2**64:
        raise ValueError(f"sample: {name}={value}; it must fit into 64 bits")
    return int(value) if value < 2**63 else int(value) - 2**64


def _table(
    values: tuple[float | Tensor, ...], names: tuple[str, ...], rows: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """The options side by side, (N, len(names)) on ``device``; (1, len(names)) on the host when all are numbers."""
    if any(isinstance(value, Tensor) for value in values):
        columns = [
            _column(*item, rows, device, dtype).to(device).expand(rows) for item in zip(names, values, strict=True)
        ]
        return torch.stack(columns, -1)
    integer = dtype == torch.int64
    for name, value in zip(names, values, strict=True):
        _number(name, value, integer)
    if integer:
        values = tuple(_as_int64(*item) for item in zip(names, values, strict=True))  # type: ignore[arg-type]
    return torch.tensor([values], dtype=dtype)


def _previous(
    tokens: Tensor | Sequence[int] | Sequence[Sequence[int]] | None, rows: int, single: bool, device: torch.device
) -> Tensor | None:
    """previous_tokens as an int64 tensor (N, L), lists padded with -1."""
    if tokens is None:
        return None
    if not isinstance(tokens, Tensor):
        nested: Sequence[Any] = (
            [tokens] if single and not any(isinstance(item, Sequence) for item in tokens) else tokens
        )
        lists = [list(item) for item in nested]
        length = max(map(len, lists), default=0)
        tokens = torch.tensor([item + [-1] * (length - len(item)) for item in lists], dtype=torch.int64)
        tokens = tokens.reshape(len(lists), length)
    if tokens.dtype != torch.int64:
        raise TypeError(f"sample: previous_tokens has dtype {tokens.dtype}; it must be int64")
    if single and tokens.dim() == 1:
        tokens = tokens.unsqueeze(0)
    if tokens.dim() != 2 or tokens.shape[0] != rows:
        raise ValueError(
            f"sample: previous_tokens has shape {tuple(tokens.shape)}; it must be ({rows}, L), a row per row of logits"
        )
    return tokens.to(device)


def _check_values(
    reals: Tensor | None, integers: Tensor | None, row: Tensor | None, previous: Tensor | None, vocab: int
) -> None:
    """Every option of every row is in its range. Values live in tensors, so this runs inside the operator."""
    infinity = math.inf
    for i, (temperature, top_p, min_p, repetition, presence, frequency) in enumerate(_rows_of(reals)):
        if not 0 <= temperature < infinity:
            _refuse("temperature", temperature, i, reals, "finite and at least 0")
        if not 0 < top_p <= 1:
            _refuse("top_p", top_p, i, reals, "in (0, 1]")
        if not 0 <= min_p <= 1:
            _refuse("min_p", min_p, i, reals, "in [0, 1]")
        if not 0 < repetition < infinity:
            _refuse("repetition_penalty", repetition, i, reals, "finite and above 0")
        if not -infinity < presence < infinity:
            _refuse("presence_penalty", presence, i, reals, "finite")
        if not -infinity < frequency < infinity:
            _refuse("frequency_penalty", frequency, i, reals, "finite")
    for i, (top_k, _, position) in enumerate(_rows_of(integers)):
        if top_k < 0:
            _refuse("top_k", top_k, i, integers, "at least 0 (0 keeps every token)")
        if position < 0:
            _refuse("position", position, i, integers, "at least 0")
    for i, value in enumerate(_rows_of(row)):
        if not 0 <= value < 2**32:
            _refuse("row", value, i, row, "in [0, 2^32)")
    if previous is not None and previous.numel():
        low, high = torch.aminmax(previous)
        if low < -1 or high >= vocab:
            i, j = ((previous < -1) | (previous >= vocab)).nonzero()[0].tolist()
            raise ValueError(
                f"sample: previous_tokens[{i}, {j}]={int(previous[i, j])}; "
                f"it must be in [0, {vocab}), or -1 for padding"
            )


def _rows_of(table: Tensor | None) -> list[Any]:
    return [] if table is None else table.tolist()


def _refuse(name: str, value: float, row: int, table: Tensor | None, allowed: str) -> None:
    where = f"{name}={value}" if table is None or table.shape[0] == 1 else f"{name}[{row}]={value} (row {row})"
    raise ValueError(f"sample: {where}; it must be {allowed}")


# --- reference ---


def adjusted_logits(logits: Tensor, reals: Tensor, previous: Tensor | None, logit_bias: Tensor | None) -> Tensor:
    """Steps 1 and 2: the logits after penalties and bias, float32 (float64 stays). Refuses what has no distribution."""
    x = accumulate(logits)
    _check_no("logits", logits)
    if previous is not None:
        _, _, _, repetition, presence, frequency = reals.unsqueeze(-1).unbind(1)
        vocab = logits.shape[1]
        index = torch.where(previous < 0, vocab, previous)  # padding counts in a column of its own
        count = torch.zeros(len(x), vocab + 1, dtype=torch.float64, device=x.device)
        count = count.scatter_add(1, index, torch.ones_like(index, dtype=torch.float64))[:, :vocab]
        penalised = torch.where(x > 0, x / repetition, x * repetition) - presence - frequency * count
        x = torch.where(count > 0, penalised, x).to(x.dtype)
    if logit_bias is not None:
        _check_no("logit_bias", logit_bias)
        x = x + logit_bias
    _check_no("logits after penalties and bias", x)
    empty = (x == -math.inf).all(-1)
    if empty.any():
        raise ValueError(
            f"sample: row {int(empty.nonzero()[0])} of logits leaves no token to choose from: "
            "after penalties and bias every logit is -inf"
        )
    return x


def _check_no(name: str, values: Tensor) -> None:
    """``values`` hold no NaN and no +inf."""
    bad = ~(values < math.inf)
    if bad.any():
        i, j = bad.nonzero()[0].tolist()
        raise ValueError(
            f"sample: {name}[{i}, {j}]={float(values[i, j])} (row {i}); allowed are finite values and -inf"
        )


# 2^f on [-1/2, 1/2] by a polynomial whose value at 0 is exactly 1; relative error 2e-9 before rounding.
_EXP2 = (
    0.00015353361959569156, 0.0013398875016719103, 0.00961843691766262,
    0.055503323674201965, 0.24022647738456726, 0.6931471824645996, 1.0,
)  # fmt: skip


def relative_weights(x: Tensor, best: Tensor, temperature: Tensor) -> Tensor:
    """Step 3 before rounding: exp((x - best) / temperature), with best and temperature (N, 1).

    In float32 every operation is one IEEE operation in the order written, so that a kernel can repeat its bits.
    """
    scale = (math.log2(math.e) / temperature).to(x.dtype)
    exponent = ((x - best) * scale).clamp(min=-64.0)
    if x.dtype == torch.float64:
        return torch.exp2(exponent)
    whole = exponent.round()
    fraction = exponent - whole
    power = torch.full_like(x, _EXP2[0])
    for coefficient in _EXP2[1:]:
        power = power * fraction + coefficient
    return power * ((whole.to(torch.int32) + 127) << 23).view(torch.float32)


def keys_of_rows(integers: Tensor, row: Tensor | None, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """(seed, row, position), each (N,)."""
    _, seed, position = integers.expand(rows, -1).unbind(1)
    row = torch.arange(rows) if row is None else row
    return seed, row.to(seed.device).expand(rows), position


def reference(
    logits: Tensor,
    reals: Tensor,
    integers: Tensor,
    row: Tensor | None,
    previous: Tensor | None,
    logit_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(token, log_prob) by sorting; the options' tables are (1 or N, columns)."""
    rows, vocab = logits.shape
    _check_values(reals, integers, row, previous, vocab)
    if not rows:
        return logits.new_empty(0, dtype=torch.int64), logits.new_empty(0, dtype=torch.float32)
    reals, integers = reals.to(logits.device), integers.to(logits.device)
    x = adjusted_logits(logits, reals, previous, logit_bias)
    temperature, top_p, min_p = reals.expand(rows, -1)[:, :3].unsqueeze(-1).unbind(1)
    top_k = integers.expand(rows, -1)[:, :1]
    greedy = temperature == 0
    temperature = torch.where(greedy, 1.0, temperature.clamp(*TEMPERATURES))
    best = x.amax(-1, keepdim=True)
    relative = relative_weights(x, best, temperature)
    w = (relative.double() * 2.0**WEIGHT_BITS).round().long()
    ordered, order = x.sort(-1, descending=True)

    kth = torch.where((top_k == 0) | (top_k > vocab), vocab, top_k) - 1
    kept = greedy | (x >= ordered.gather(1, kth))

    cumulative = torch.where(kept, w, 0).gather(1, order).cumsum(1)
    needed = (top_p * cumulative[:, -1:].double()).ceil().long().clamp(min=1)
    last = (cumulative >= needed.minimum(cumulative[:, -1:])).long().argmax(1, keepdim=True)
    kept &= greedy | (top_p == 1) | (x >= ordered.gather(1, last))

    kept &= greedy | (relative.double() >= min_p)

    cumulative = torch.where(kept, w, 0).cumsum(1)
    total = cumulative[:, -1:]
    draws = philox.uniform_bits(*keys_of_rows(integers, row, rows), philox.SAMPLE_STREAM)
    target = torch.tensor([(u * t) >> 64 for u, [t] in zip(draws, total.tolist(), strict=True)], device=x.device)
    drawn = torch.searchsorted(cumulative, target.unsqueeze(1), right=True)
    token = torch.where(greedy, x.argmax(1, keepdim=True), drawn)
    share = (x.gather(1, token) - best).double() / temperature
    log_prob = share - ((total.double()).log() - WEIGHT_BITS * math.log(2))
    return token.squeeze(1), log_prob.squeeze(1).float()


def torch_eager(
    logits: Tensor,
    reals: Tensor,
    integers: Tensor,
    row: Tensor | None,
    previous: Tensor | None,
    logit_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The same by softmax, sort and cumsum, in floating point: the usual way."""
    rows, vocab = logits.shape
    _check_values(reals, integers, row, previous, vocab)
    if not rows:
        return logits.new_empty(0, dtype=torch.int64), logits.new_empty(0, dtype=torch.float32)
    reals, integers = reals.to(logits.device), integers.to(logits.device)
    x = adjusted_logits(logits, reals, previous, logit_bias)
    temperature, top_p, min_p = reals.expand(rows, -1)[:, :3].to(x.dtype).unsqueeze(-1).unbind(1)
    top_k = integers.expand(rows, -1)[:, :1]
    greedy = temperature == 0
    best = x.amax(-1, keepdim=True)
    scaled = (x - best) / torch.where(greedy, 1.0, temperature.clamp(*TEMPERATURES))
    ordered = scaled.sort(-1, descending=True).values
    kth = ordered.gather(1, torch.where((top_k == 0) | (top_k > vocab), vocab, top_k) - 1)
    kept = greedy | (scaled >= kth)
    p = torch.where(kept, scaled, -math.inf).softmax(-1)
    largest = p.sort(-1, descending=True).values
    before = largest.cumsum(-1) - largest  # probability of everything more likely
    smallest = torch.where((before < top_p) | (top_p == 1), largest, math.inf).amin(-1, keepdim=True)
    kept &= greedy | (p >= smallest)
    kept &= greedy | (p >= min_p * p.amax(-1, keepdim=True))
    log_p = torch.where(kept, scaled, -math.inf).log_softmax(-1)
    cumulative = log_p.double().exp().cumsum(-1)
    draws = philox.uniform_bits(*keys_of_rows(integers, row, rows), philox.SAMPLE_STREAM)
    target = torch.tensor([[u / 2**64] for u in draws], dtype=torch.float64, device=x.device) * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, target, right=True).clamp(max=vocab - 1)
    token = torch.where(greedy, x.argmax(1, keepdim=True), drawn)
    return token.squeeze(1), log_p.gather(1, token).squeeze(1).float()


# --- kernels ---


def _native(
    kernels: Kernels,
    logits: Tensor,
    reals: Tensor,
    integers: Tensor,
    row: Tensor | None,
    previous: Tensor | None,
    logit_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    rows, vocab = logits.shape
    _check_values(_on_host(reals), _on_host(integers), _on_host(row), _on_host(previous), vocab)
    token = logits.new_empty(rows, dtype=torch.int64)
    log_prob = logits.new_empty(rows, dtype=torch.float32)
    if not rows:
        return token, log_prob
    x, logits_stride = as_rows(logits)
    bias, bias_stride = (None, 0) if logit_bias is None else as_rows(logit_bias)
    by_row, for_all = zip(*(_by_row_or_for_all(t, rows, logits.device) for t in (reals, integers, row)), strict=True)
    previous = None if previous is None else previous.contiguous()
    try:
        kernels.sample(
            token=token,
            log_prob=log_prob,
            logits=x,
            reals=by_row[0],
            integers=by_row[1],
            row=by_row[2],
            previous=previous,
            logit_bias=bias,
            rows=rows,
            vocab=vocab,
            previous_count=0 if previous is None else previous.shape[1],
            logits_stride=logits_stride,
            bias_stride=bias_stride,
            all_reals=for_all[0] or [0.0] * len(_REALS),
            all_integers=for_all[1] or [0] * len(_INTEGERS),
            all_row=-1 if for_all[2] is None else for_all[2],
            dtype=DTYPES[logits.dtype],
        )
    except ValueError:
        adjusted_logits(logits, reals, previous, logit_bias)  # says which argument, row and value it was
        raise
    return token, log_prob


def _on_host(tensor: Tensor | None) -> Tensor | None:
    """The tensor, unless a look at its values would have to wait for a device."""
    return tensor if tensor is not None and tensor.device.type == "cpu" else None


def _by_row_or_for_all(table: Tensor | None, rows: int, device: torch.device) -> tuple[Tensor | None, Any]:
    """What a kernel gets of a table of options: memory with a row for every row, or the values that hold for all."""
    if table is None:
        return None, None
    if table.shape[0] == 1 and table.device.type == "cpu":
        return None, table[0].tolist()
    return table.to(device).expand(rows, *table.shape[1:]).contiguous(), None


# --- registration ---


def _fake(
    logits: Tensor,
    reals: Tensor,
    integers: Tensor,
    row: Tensor | None,
    previous: Tensor | None,
    logit_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0]
    return logits.new_empty(rows, dtype=torch.int64), logits.new_empty(rows, dtype=torch.float32)


_op = registry.define(
    "sample",
    "(Tensor logits, Tensor reals, Tensor integers, Tensor? row, Tensor? previous, Tensor? logit_bias)"
    " -> (Tensor, Tensor)",
    {"reference": reference, **native.backends(_native)},
    _fake,
)
