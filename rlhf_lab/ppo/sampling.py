"""Sampling noise that belongs to a response, not to a batch.

Each random number is a hash of (seed, iteration, index of the prompt in the data set, sample,
position). A response is therefore the same whatever the batch order, the padding, the
number of processes or a restart: the counter-based idea of Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3" (SC 2011), with the mixing function of SplitMix64 (Steele et al.,
OOPSLA 2014).
"""

from __future__ import annotations

import torch
from torch import Tensor


def _signed(x: int) -> int:
    """A 64-bit constant as torch's int64 wants it."""
    return x - (1 << 64) if x >= 1 << 63 else x


_STEP, _A, _B = (_signed(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift (torch's >> on int64 keeps the sign)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64 (arithmetic wraps modulo 2^64)."""
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
    bits = _shift(mix(keys * _STEP + position + 1), 12)  # 52 bits and a half: fp64 holds 53
    return (bits.to(torch.float64) + 0.5) / (1 << 52)


def sample_tokens(logits: Tensor, uniform: Tensor, temperature: float = 1.0) -> Tensor:
    """Sample one token per row by inverting its cumulative distribution (rule 1: no truncation).

    logits: (b, vocab), uniform: (b,) → (b,) int64. Summed in fp64: a vocabulary of 150k tokens
    would lose its tail in fp32.
    """
    cumulative = torch.softmax(logits.double() / temperature, -1).cumsum(-1)
    # The last cumulative value is 1 up to rounding; scaling by it keeps the index in range. Logits
    # that are no numbers would give one beyond: whoever trains sees them in the KL.
    found = torch.searchsorted(cumulative, (uniform * cumulative[:, -1]).unsqueeze(1)).squeeze(1)
    return found.clamp(max=logits.shape[-1] - 1)
