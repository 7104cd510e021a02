"""From text to tokens and back: sampling and scoring of texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..data.schema import Example, Prompt
from ..data.tokenize import encode_prompt, encode_response
from .logprobs import AnyModel
from .losses import response_mask
from .rollout import sequence_scores
from .sampling import generate, pad_prompts, row_keys

Tokenizer = PreTrainedTokenizerBase
Row = Example
"""A row of a data set: `prompt` (text or messages) or ready-made `input_ids`, other columns."""


@torch.no_grad()
def sample_ids(
    model: AnyModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    samples: int = 1,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
    batch: int = 256,
    progress: Callable[[int], None] | None = None,
) -> list[list[list[int]]]:
    """`samples` responses for each prompt, as ids up to and with eos. A seed gives the same."""
    model.eval()
    jobs = [(i, s) for i in range(len(prompts)) for s in range(samples)]
    encoded = [encode_prompt(tokenizer, p) for p in prompts]
    jobs.sort(key=lambda job: len(encoded[job[0]]))  # less padding; the noise does not change
    sampled: dict[tuple[int, int], list[int]] = {}
    for start in range(0, len(jobs), batch):
        part = jobs[start : start + batch]
        ids, mask = pad_prompts([encoded[i] for i, _ in part], tokenizer.pad_token_id)
        index = torch.tensor(part)
        keys = row_keys(seed, 0, index[:, 0], index[:, 1])
        responses = generate(
            model,
            ids.to(model.device),
            mask.to(model.device),
            keys.to(model.device),
            max_new_tokens=max_new_tokens,
            stop_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            temperature=temperature,
        )
        real = response_mask(responses, tokenizer.eos_token_id)
        for job, row, m in zip(part, responses, real, strict=True):
            sampled[job] = row[m].tolist()
        if progress:
            progress(len(part))
    return [[sampled[i, s] for s in range(samples)] for i in range(len(prompts))]


def sample_texts(
    model: AnyModel, tokenizer: Tokenizer, prompts: Sequence[Prompt], **settings: Any
) -> list[list[str]]:
    """`sample_ids` as texts, with its settings."""
    return [
        tokenizer.batch_decode(rows, skip_special_tokens=True)
        for rows in sample_ids(model, tokenizer, prompts, **settings)
    ]


def decode(tokenizer: Tokenizer, responses: Tensor, mask: Tensor | None = None) -> list[str]:
    """Text of each response where the mask is True (without one up to eos), special tokens left
    out. responses, mask: (b, t)."""
    if mask is None:
        mask = response_mask(responses, tokenizer.eos_token_id)
    rows = [r[m].tolist() for r, m in zip(responses, mask, strict=True)]
    return tokenizer.batch_decode(rows, skip_special_tokens=True)


@torch.no_grad()
def score_texts(
    model: AnyModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    responses: Sequence[str],
    batch: int = 256,
) -> Tensor:
    """The reward model's score of each (prompt, response), eos appended as in training. → (n,).

    `tokenizer`: the reward model's.
    """
    model.eval()
    rows = [
        encode_prompt(tokenizer, p) + encode_response(tokenizer, r)
        for p, r in zip(prompts, responses, strict=True)
    ]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    scores = torch.empty(len(rows))
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        ids, mask = pad_prompts([rows[i] for i in part], tokenizer.pad_token_id)
        device = next(model.parameters()).device
        scores[part] = sequence_scores(model, ids.to(device), mask.to(device)).cpu()
    return scores
