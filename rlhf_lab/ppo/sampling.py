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
from transformers.cache_utils import DynamicLayer

from .losses import StopTokens, is_stop

LanguageModel = Callable[..., Any]
"""Called as transformers calls a causal language model, with a cache; → its output."""
ROUTERS = "output_router_logits"
"""Field of a mixture's config, and argument of its pass: its outputs have its routers' loss too."""


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


def uniforms(keys: Tensor, position: int | Tensor) -> Tensor:
    """One uniform number in (0, 1) per response and position. keys: (b,) and one position, or
    (b, 1) and (t,) → (b,) or (b, t), fp64."""
    bits = _shift(mix(keys * _STEP + position + 1), 12)  # 52, and half a bit more: fp64 has 53
    return (bits.to(torch.float64) + 0.5) / (1 << 52)


def sample_tokens(logits: Tensor, uniform: Tensor, temperature: float = 1.0) -> Tensor:
    """Sample one token per row by inverting its cumulative distribution (rule 1: the temperature
    only, neither top-k nor top-p).

    logits: (b, vocab), uniform: (b,) → (b,) int64. Summed in fp64: a vocabulary of 150k tokens
    would lose its tail in fp32.
    """
    cumulative = torch.softmax(logits / temperature, -1).cumsum(-1, dtype=torch.float64)
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


def _ready_mask(model: LanguageModel, cache: Any, seen: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask of all steps after the first, as attention adds it: (b, 1, 1, s), of which a step
    takes what is there by then. Else transformers makes one in every step, and each layer turns it
    into numbers. Where it might be read otherwise (windows, positions that are counted from it,
    another kernel) it stays (b, s), as it is. seen: (b, s) bool."""
    config: Any = getattr(model, "config", None)
    plain = all(type(layer) is DynamicLayer for layer in getattr(cache, "layers", (None,)))
    if config is None or not plain:
        return seen
    config = config.get_text_config()
    rotary = getattr(config, "rope_parameters", None) and not getattr(config, "alibi", False)
    if not rotary or config._attn_implementation != "sdpa":
        return seen
    hidden = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return hidden.masked_fill_(~seen, torch.finfo(dtype).min)[:, None, None]


def _no_router_loss(model: LanguageModel) -> dict[str, bool]:
    """What a mixture is called with whose config asks for its routers' loss: transformers 5.23
    computes it from the whole mask, of which a step with a cache has one token."""
    config: Any = getattr(model, "config", None)
    asks = config is not None and getattr(config.get_text_config(), ROUTERS, False)
    return {ROUTERS: False} if asks else {}


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
    prompt_of: Tensor | None = None,
) -> Tensor:
    """Sample responses with a KV cache.

    prompt_ids, prompt_mask: (p, s); keys: (b,), the noise of each response (`row_keys`) → responses
    (b, t), t ≤ max_new_tokens. A row leaves the batch when it has stopped, so nothing is computed
    for finished rows. Temperature 0 takes the likeliest token. `positions`: which of the tokens
    1 … max_new_tokens are sampled; None is all of them. `prompt_of`: (b,), the prompt of each
    response, which passes once however many it has; None: one each.
    """
    rows = torch.arange(len(keys), device=prompt_ids.device)  # those still running
    out = prompt_ids.new_full((len(rows), max_new_tokens), pad_token_id)
    tokens, place, length = prompt_ids.masked_fill(~prompt_mask, 0), positions_of(prompt_mask), 0
    mask = torch.cat([prompt_mask, prompt_mask.new_ones(len(place), max_new_tokens)], 1)
    noise = uniforms(keys.unsqueeze(1), torch.arange(max_new_tokens, device=keys.device))
    cache, more = None, _no_router_loss(model)
    for length in range(1, max_new_tokens + 1) if positions is None else positions:
        result = model(
            input_ids=tokens,
            attention_mask=mask[..., : prompt_ids.shape[1] + length - 1],
            position_ids=place,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **more,
        )
        logits = result.logits[:, -1]
        if cache is None:
            cache = result.past_key_values
            mask = _ready_mask(model, cache, mask, logits.dtype)
            if prompt_of is not None:
                logits, place, mask = (x[prompt_of] for x in (logits, place, mask))
                cache.batch_select_indices(prompt_of)
        if temperature == 0:
            tokens = logits.argmax(-1)
        else:
            tokens = sample_tokens(logits.float(), noise[:, length - 1], temperature)
        out[rows, length - 1] = tokens
        going = tokens >= 0 if stop_token_ids is None else ~is_stop(tokens, stop_token_ids)
        place = place[:, -1:] + 1
        if not going.all():
            if not going.any():
                break
            keep = going.nonzero().squeeze(1)
            rows, tokens, place, mask, noise = (x[keep] for x in (rows, tokens, place, mask, noise))
            cache.batch_select_indices(keep)
        tokens = tokens.unsqueeze(1)
    return out[:, :length]
