"""From text to tokens and back: sampling and scoring of texts, and reward functions."""

from __future__ import annotations

import math
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
Numbers = Sequence[float | None]
"""What a reward function gives: a number for each completion, None where it does not apply."""


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


def call_reward(
    function: Callable[..., Numbers],
    rows: Sequence[Row],
    completions: Sequence[str],
    ids: list[list[int]],
    finite: bool = False,
) -> Tensor:
    """Call a reward function as GRPOTrainer does: prompts, completions, completion_ids, columns.

    → (b,) fp32; None ("does not apply") becomes NaN. Raises ValueError for what is no list of one
    number for each completion, with `finite` for a number that is none to learn from too.
    """
    columns = {k: [r[k] for r in rows] for k in rows[0] if k not in ("prompt", "prompt_ids")}
    prompts = [r.get("prompt", r.get("input_ids")) for r in rows]
    messages: list[list[dict[str, str]]] = []
    if isinstance(prompts[0], list) and prompts[0] and isinstance(prompts[0][0], dict):
        messages = [[{"role": "assistant", "content": c}] for c in completions]
    values = function(
        prompts=prompts, completions=messages or completions, completion_ids=ids, **columns
    )
    try:
        count = len(values)
        numbers = [float("nan") if v is None else float(v) for v in values]
    except (TypeError, ValueError):
        raise ValueError(
            f"{name_of(function)} must give a list with a number, or None, for each "
            f"completion, and gave {str(values)[:60]!r}"
        ) from None
    if count != len(rows):
        raise ValueError(f"{name_of(function)} gave {count} rewards for {len(rows)} completions")
    for row, (value, number) in enumerate(zip(values, numbers, strict=True)):
        if finite and value is not None and not math.isfinite(number):
            raise ValueError(
                f"{name_of(function)} gave {number} for row {row} "
                f"({completions[row][:40]!r}): a reward is a finite number, or None "
                "where there is none"
            )
    return torch.tensor(numbers)


def name_of(function: object) -> str:
    """What a function is called, in metrics and in complaints."""
    return str(getattr(function, "__name__", type(function).__name__))
