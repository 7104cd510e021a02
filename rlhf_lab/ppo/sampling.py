"""Sampling responses, with noise that belongs to a response and not to a batch.

Shapes: b = responses, p = prompt length, t = response length. Prompts are padded on the left.

Each random number is a hash of (seed, iteration, index of the prompt in the data set, sample,
position). A response is therefore the same whatever the batch order, the padding, the
number of processes or a restart: the counter-based idea of Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3" (SC 2011), with the mixing function of SplitMix64 (Steele et al.,
OOPSLA 2014).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .losses import StopTokens, is_stop

LanguageModel = Callable[..., Any]
"""Called as transformers calls a causal language model, with a cache; → its output."""


def _signed(x: int) -> int:
    """A 64-bit constant as torch's int64 takes it."""
    return x - (1 << 64) if x >= 1 << 63 else x


_STEP, _A, _B = (_signed(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's >> keeps the sign). (…) → (…)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64 (arithmetic wraps modulo 2^64). (…) → (…)."""
    x = (x ^ _shift(x, 30)) * _A
    x = (x ^ _shift(x, 27)) * _B
    return x ^ _shift(x, 31)


def row_keys(seed: int, iteration: int, prompt_index: Tensor, sample: Tensor) -> Tensor:
    """One key per response. prompt_index, sample: (b,) int64 → (b,) int64."""
    key = torch.full_like(prompt_index, seed)
    for word in (torch.full_like(prompt_index, iteration), prompt_index, sample):
        key = mix(key * _STEP + word + 1)
    return key


def shuffled(seed: int, size: int, wanted: Tensor) -> Tensor:
    """Rows of a data set in an endless order: pass after pass, each a permutation of its own.

    size: rows of the data set; wanted: (b,) places in the order → (b,) rows.
    """
    index = torch.empty_like(wanted)
    for epoch in torch.unique(wanted // size).tolist():
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(size, generator=generator)
        here = wanted // size == epoch
        index[here] = order[wanted[here] % size]
    return index


def uniforms(keys: Tensor, position: int) -> Tensor:
    """One uniform number in (0, 1) per response for one position. keys: (b,) → (b,) fp64."""
    bits = _shift(mix(keys * _STEP + position + 1), 12)  # 52, and half a bit more: fp64 has 53
    return (bits.to(torch.float64) + 0.5) / (1 << 52)


def sample_tokens(logits: Tensor, uniform: Tensor, temperature: float = 1.0) -> Tensor:
    """Sample one token per row by inverting its cumulative distribution (rule 1: the temperature
    only, neither top-k nor top-p).

    logits: (b, vocab), uniform: (b,) → (b,) int64. Summed in fp64: a vocabulary of 150k tokens
    would lose its tail in fp32.
    """
    cumulative = torch.softmax(logits.double() / temperature, -1).cumsum(-1)
    # The last cumulative value is 1 up to rounding; scaling by it keeps the index in range. Logits
    # that are no numbers would give one beyond: whoever trains sees them in the KL.
    found = torch.searchsorted(cumulative, (uniform * cumulative[:, -1]).unsqueeze(1)).squeeze(1)
    return found.clamp(max=logits.shape[-1] - 1)


# -------------------------------------------------------------------------------- whole responses


def pad_prompts(prompts: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Rule 5: prompts are padded on the left. → input_ids (b, p) and a boolean mask (b, p).

    An empty prompt is one padding token: a response needs a position to start from.
    """
    prompts = [prompt if len(prompt) else [pad_token_id] for prompt in prompts]
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_token_id)
    mask = torch.zeros((len(prompts), width), dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = True
    return ids, mask


def positions_of(mask: Tensor) -> Tensor:
    """Rule 5: positions are counted from the mask, as its exclusive sum (N+ detail 5). (b, s)."""
    return (mask.long().cumsum(1) - mask.long()).clamp(min=0)


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    keys: Tensor,
    *,
    max_new_tokens: int,
    stop_token_ids: StopTokens,
    pad_token_id: int,
    temperature: float = 1.0,
    positions: Sequence[int] | None = None,
) -> Tensor:
    """Sample one response per prompt with a KV cache.

    prompt_ids, prompt_mask: (b, p); keys: (b,), the noise of each row (`row_keys`) → responses
    (b, t), t ≤ max_new_tokens. A row leaves the batch when it has stopped, so nothing is computed
    for finished rows. Temperature 0 takes the likeliest token. `positions`: which of the tokens
    1 … max_new_tokens are sampled; None is all of them.
    """
    rows = torch.arange(prompt_ids.shape[0], device=prompt_ids.device)  # those still running
    out = prompt_ids.new_full((len(rows), max_new_tokens), pad_token_id)
    mask, tokens, cache, length = prompt_mask, prompt_ids.masked_fill(~prompt_mask, 0), None, 0
    place = positions_of(mask)
    for length in range(1, max_new_tokens + 1) if positions is None else positions:
        result = model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=place,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits, cache = result.logits[:, -1].float(), result.past_key_values
        if temperature == 0:
            tokens = logits.argmax(-1)
        else:
            tokens = sample_tokens(logits, uniforms(keys[rows], length - 1), temperature)
        out[rows, length - 1] = tokens
        going = tokens >= 0 if stop_token_ids is None else ~is_stop(tokens, stop_token_ids)
        place = place[:, -1:] + 1
        if not going.all():
            if not going.any():
                break
            keep = going.nonzero().squeeze(1)
            rows, tokens, place, mask = (x[keep] for x in (rows, tokens, place, mask))
            cache.batch_select_indices(keep)
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
        tokens = tokens.unsqueeze(1)
    return out[:, :length]
