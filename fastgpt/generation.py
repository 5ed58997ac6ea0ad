"""generate: continues prompts of any lengths, all at once, with a KV cache.

The prompts go through the model in one pass, padded on the right, where no token of a prompt sees the padding. Then
every pass gives each row one token, at that row's own position. Rows that are done leave the batch.

A token is drawn by ops.sample from a random number that depends on the seed, on the prompt's place in the list and on
the token's position in its sequence, and on nothing else. With a list of seeds, one for each prompt, the place counts
for nothing: a prompt is then continued alike alone and in any batch, in one go and in several (but for the last bits of
torch's matrix products, which may depend on the number of rows).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastgpt.model import GPT, KVCache
from fastgpt.tokenizers import IncrementalDecoder, Tokenizer

# Of ops.sample: one number for all prompts, or one for each.
Option = float | Sequence[float]
_NEUTRAL = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


@dataclass
class Generation:
    """What became of one prompt."""

    prompt: list[int]
    """The tokens that were continued: without those dropped, and the end-of-text token for an empty prompt."""
    dropped: int = 0
    """How many tokens truncate="left" took off the beginning of the prompt."""
    tokens: list[int] = field(default_factory=list)
    """Every token drawn, a stop token at the end included."""
    log_probs: list[float] = field(default_factory=list)
    """Of each token in the distribution it was drawn from."""
    finish_reason: str = "length"
    """"stop" (a stop token or string), "length" (max_new_tokens) or "context" (the model's context is full)."""
    text: str | None = None
    """With a tokenizer, the new text, without stop token and stop string."""


@torch.inference_mode()
def generate(
    model: GPT,
    prompts: Sequence[Sequence[int] | str],
    max_new_tokens: int,
    *,
    temperature: Option = 1.0,
    top_k: int | Sequence[int] = 0,
    top_p: Option = 1.0,
    min_p: Option = 0.0,
    repetition_penalty: Option = 1.0,
    presence_penalty: Option = 0.0,
    frequency_penalty: Option = 0.0,
    logit_bias: Mapping[int, float] | None = None,
    seed: int | Sequence[int] = 0,
    tokenizer: Tokenizer | None = None,
    stop_tokens: Sequence[int] | None = None,
    stop_strings: Sequence[str] = (),
    truncate: str | None = None,
    stream: Callable[[int, int, str], None] | None = None,
) -> list[Generation]:
    """Continues each prompt by up to ``max_new_tokens`` tokens.

    Args:
        prompts: token ids, or texts if there is a tokenizer; lengths may differ. An empty one starts from the
            tokenizer's end-of-text token, after which documents begin.
        max_new_tokens: the most to draw for each prompt. A sequence that fills the model's context ends before, with
            finish_reason "context".
        temperature: 0 takes the likeliest token.
        top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty: as in ops.sample; the penalties
            look at the prompt and at what was drawn. These, temperature and seed may be lists with one value a prompt.
        logit_bias: {token: number to add to its logit}; -inf forbids it.
        seed: what all randomness comes from. One for all: equal prompts are continued differently, by their places in
            the list. A list: each continuation depends on its own seed alone.
        tokenizer: encodes text prompts, and makes the text of the results and of ``stream``.
        stop_tokens: end a sequence. Default: the tokenizer's end-of-text token, if there is a tokenizer.
        stop_strings: texts that end a sequence as soon as they appear in what is new; they need a tokenizer.
        truncate: what to do with a prompt longer than the context. None: ValueError. "left": drop its oldest tokens,
            so many that min(max_new_tokens, context // 2) new ones fit; Generation.dropped and a warning say how many.
        stream: called as ``stream(i, token, text)`` for each token drawn for prompt i. The texts, joined, are the
            result's: each comes when it can no longer become part of a stop string. "" without a tokenizer.

    Returns:
        A Generation for each prompt.

    Raises:
        ValueError, TypeError: an argument that is impossible; the message names it.
        ValueError: the model's logits hold NaN or +inf, or no token is left to choose from.
    """
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        raise ValueError(f"generate: max_new_tokens={max_new_tokens!r} must be an int, at least 0")
    if truncate not in (None, "left"):
        raise ValueError(f"generate: truncate={truncate!r}; allowed are None and 'left'")
    if stop_strings and tokenizer is None:
        raise ValueError("generate: stop_strings need a tokenizer")
    if isinstance(stop_strings, str) or not all(isinstance(s, str) and s for s in stop_strings):
        raise ValueError(f"generate: stop_strings={stop_strings!r} must be a list of texts, none empty")
    results = [
        _prepare(prompt, i, model, tokenizer, max_new_tokens, truncate) for i, prompt in enumerate(_as_list(prompts))
    ]
    if stop_tokens is None:
        stop_tokens = () if tokenizer is None else (tokenizer.eos_id,)
    stops = frozenset(stop_tokens)
    rows = [
        _Row(i, result, None if tokenizer is None else _Text(tokenizer, stop_strings))
        for i, result in enumerate(results)
    ]
    options = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "seed": seed,
        # The key of a row's randomness beside the seed; not its place in the batch, which shrinks as rows end.
        "row": 0 if len(rows) == 1 or not isinstance(seed, int) else list(range(len(rows))),
    }
    options = {name: _per_prompt(name, value, len(rows)) for name, value in options.items()}
    penalties = any(isinstance(options[name], Tensor) or options[name] != off for name, off in _NEUTRAL.items())
    bias = _bias_tensor(logit_bias, model, tokenizer)
    if not rows or not max_new_tokens:
        for row in rows:
            row.finish("length")
        return results

    context, device = model.config.context, model.token_embedding.device
    lengths = [len(row.sequence) for row in rows]
    cache = KVCache(model, len(rows), min(context, max(lengths) + max_new_tokens - 1))
    logits = model(_padded([row.sequence for row in rows], 0, device), cache=cache, lengths=lengths, last_only=True)
    while True:
        tokens, log_probs = model.ops.sample(
            logits,
            **options,
            logit_bias=bias,
            previous_tokens=_padded([row.sequence for row in rows], -1, device) if penalties else None,
            position=_same_or_tensor([len(row.sequence) for row in rows], device),
        )
        going = []
        for place, (row, token, log_prob) in enumerate(zip(rows, tokens.tolist(), log_probs.tolist(), strict=True)):
            if token < 0:  # a kernel on a GPU cannot raise; on the CPU ops.sample has
                raise ValueError(
                    f"generate: no token can be drawn for prompts[{row.index}] at position {len(row.sequence)}: its "
                    "logits, after penalties and bias, hold NaN or +inf, or all of them are -inf"
                )
            reason = row.add(token, log_prob, stops, max_new_tokens, context)
            if stream is not None:
                stream(row.index, token, row.piece)
            if reason is None:
                going.append(place)
        if not going:
            return results
        if len(going) < len(rows):
            cache.select(going)
            rows, tokens = [rows[place] for place in going], tokens[going]
            options = {name: v[going] if isinstance(v, Tensor) else v for name, v in options.items()}
        logits = model(tokens[:, None], cache=cache, last_only=True)


class _Row:
    """A sequence that is being continued."""

    def __init__(self, index: int, result: Generation, text: _Text | None) -> None:
        self.index, self.result, self.text = index, result, text
        self.sequence = list(result.prompt)
        self.piece = ""  # the text that the last token brought

    def add(self, token: int, log_prob: float, stops: frozenset[int], max_new_tokens: int, context: int) -> str | None:
        """Takes a token; returns why the sequence ends with it, or None."""
        result = self.result
        result.tokens.append(token)
        result.log_probs.append(log_prob)
        self.sequence.append(token)
        self.piece = ""
        if token in stops:
            return self.finish("stop")
        if self.text is not None:
            self.piece = self.text.add(token)
            if self.text.stopped:
                return self.finish("stop")
        if len(result.tokens) == max_new_tokens:
            return self.finish("length")
        # The token just drawn is the next to be fed: it needs a place of its own.
        return self.finish("context") if len(self.sequence) > context else None

    def finish(self, reason: str) -> str:
        """Notes why the sequence ends, and lets go of the text that was held back."""
        self.result.finish_reason = reason
        if self.text is not None:
            self.piece += self.text.flush()
            self.result.text = self.text.out
        return reason


class _Text:
    """The text of a row as it becomes certain, watched for stop strings."""

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str]) -> None:
        self._decoder = IncrementalDecoder(tokenizer)
        self._stop_strings = stop_strings
        self._held = ""  # may yet become a stop string
        self.out = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that a token makes certain."""
        return self._release(self._decoder.decode([token]), final=False)

    def flush(self) -> str:
        """The text that is certain now that no more tokens come."""
        return "" if self.stopped else self._release(self._decoder.decode([], final=True), final=True)

    def _release(self, piece: str, *, final: bool) -> str:
        self._held += piece
        found = [at for at in map(self._held.find, self._stop_strings) if at >= 0]
        if found:
            self.stopped, end = True, min(found)
        else:
            end = len(self._held) if final else len(self._held) - self._unsure()
        released, self._held = self._held[:end], self._held[end:]
        self.out += released
        return released

    def _unsure(self) -> int:
        """How many of the last characters held are the beginning of a stop string."""
        longest = max(map(len, self._stop_strings), default=1) - 1
        for n in range(min(longest, len(self._held)), 0, -1):
            if any(s.startswith(self._held[-n:]) for s in self._stop_strings):
                return n
        return 0


def _as_list(prompts: Any) -> list[Any]:
    if isinstance(prompts, str) or not isinstance(prompts, (Sequence, Tensor)):
        raise TypeError(f"generate: prompts must be a list of prompts, not {type(prompts).__name__}")
    return list(prompts)


def _prepare(
    prompt: Any, i: int, model: GPT, tokenizer: Tokenizer | None, max_new_tokens: int, truncate: str | None
) -> Generation:
    """Checks a prompt, turns it into tokens, and shortens it if it must and may be."""
    vocab, context = model.config.vocab_size, model.config.context
    if isinstance(prompt, str):
        if tokenizer is None:
            raise TypeError(f"generate: prompts[{i}] is a text, which needs a tokenizer")
        prompt = tokenizer.encode(prompt)
    elif isinstance(prompt, Tensor):
        prompt = prompt.tolist()
    if not isinstance(prompt, Sequence):
        raise TypeError(f"generate: prompts[{i}] must be a list of token ids or a text, not {type(prompt).__name__}")
    tokens = list(prompt)
    if not tokens and tokenizer is None:
        raise ValueError(
            f"generate: prompts[{i}] is empty; give at least one token, or a tokenizer with an end of text"
        )
    tokens = tokens or [tokenizer.eos_id]  # type: ignore[union-attr]
    for j, token in enumerate(tokens):
        if isinstance(token, bool) or not isinstance(token, int):
            raise TypeError(f"generate: prompts[{i}][{j}]={token!r} must be an int")
        if not 0 <= token < vocab:
            raise ValueError(f"generate: prompts[{i}][{j}]={token} is outside the model's vocabulary of {vocab} tokens")
    if len(tokens) <= context:
        return Generation(tokens)
    if truncate is None:
        raise ValueError(
            f"generate: prompts[{i}] has {len(tokens)} tokens, but the model's context holds {context}; "
            "shorten it, or drop its beginning with truncate='left'"
        )
    dropped = len(tokens) - (context - min(max_new_tokens, context // 2))
    warnings.warn(f"generate: dropped the first {dropped} of the {len(tokens)} tokens of prompts[{i}]", stacklevel=4)
    return Generation(tokens[dropped:], dropped)


def _per_prompt(name: str, value: Any, prompts: int) -> Any:
    """A list of one value for each prompt as a tensor; a single value as it is."""
    if not isinstance(value, (Sequence, Tensor)) or isinstance(value, str):
        return value
    values = list(value)
    if len(values) != prompts:
        raise ValueError(f"generate: {name} has {len(values)} values for {prompts} prompts")
    integer = name in ("top_k", "seed", "row")
    for v in values:
        if isinstance(v, bool) or not isinstance(v, int if integer else (int, float)):
            raise TypeError(f"generate: {name} holds {v!r}; it must hold {'ints' if integer else 'numbers'}")
    if integer:
        values = [v - (1 << 64) if v >= 1 << 63 else v for v in values]  # the same bits as a signed number
    return torch.tensor(values, dtype=torch.int64 if integer else torch.float64)


def _bias_tensor(logit_bias: Mapping[int, float] | None, model: GPT, tokenizer: Tokenizer | None) -> Tensor | None:
    """(V,), or None for no bias. Forbids the ids that the tokenizer lacks: some models' vocabularies are padded."""
    vocab = model.config.vocab_size
    known = vocab if tokenizer is None else tokenizer.vocab_size
    if not logit_bias and known >= vocab:
        return None
    bias = torch.zeros(vocab)
    bias[known:] = -torch.inf
    for token, value in (logit_bias or {}).items():
        if not 0 <= token < vocab:
            raise ValueError(f"generate: logit_bias names token {token}; the vocabulary has {vocab}")
        bias[token] += value
    return bias.to(model.token_embedding.device)


def _padded(rows: list[list[int]], padding: int, device: torch.device) -> Tensor:
    """(B, longest) int64, padded on the right."""
    longest = max(map(len, rows))
    return torch.tensor([row + [padding] * (longest - len(row)) for row in rows], device=device)


def _same_or_tensor(values: list[int], device: torch.device) -> int | Tensor:
    return values[0] if min(values) == max(values) else torch.tensor(values, device=device)
