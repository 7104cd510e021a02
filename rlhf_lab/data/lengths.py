"""How long rows are, and what that makes of a batch: padding, and which rows pass together.

Needs no torch: a plan counts with it what the trainer does.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..models.load import Model
from ..stages import STAGES, Settings
from .load import Data, Split
from .schema import Example
from .tokenize import encoded_rows

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

LEAST_TOKENS_SAVED = 128
"""Tokens of padding that one more pass has to save at least: on two CPU cores calling the layers
of a small model once more takes about as long."""
LEAST_SHARE_SAVED = 0.2
"""And this share of the tokens of the pass that is cut. Rows of like length stay one pass, so that
memory is as planned."""
LOOKED_AT = 2_000
"""Rows of a set whose lengths a plan looks at."""


def expected_longest(lengths: list[int], count: int) -> float:
    """Mean length of the longest of `count` random rows: what a batch is padded to."""
    n, total, before = len(lengths), 0.0, 0.0
    for place, length in enumerate(sorted(lengths), 1):
        here = (place / n) ** count  # the chance that none is longer
        total += length * (here - before)
        before = here
    return total


def by_length(lengths: Sequence[int], rows: int, least: int) -> list[list[int]]:
    """Which rows to pass through a model together: the longest first, at most `rows` at a time,
    and cut once more wherever that saves over `least` tokens of padding and `LEAST_SHARE_SAVED`
    of the pass. → indices of rows, pass by pass."""

    def cut(part: list[int]) -> list[list[int]]:
        n, top = len(part), lengths[part[0]]
        saved, k = max(((n - k) * (top - lengths[part[k]]), k) for k in range(n))
        if saved <= max(least, LEAST_SHARE_SAVED * n * top):
            return [part]
        return cut(part[:k]) + cut(part[k:])

    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [p for at in range(0, len(order), rows) for p in cut(order[at : at + rows])]


def worth_a_pass(config: PreTrainedConfig) -> int:
    """Tokens of padding that one more pass has to save in training. It calls every layer again,
    and while it runs the gradients of those before are held: about 12 h² numbers a layer, against
    some 20 h of a token's activations, so that h tokens less outweigh them."""
    return max(LEAST_TOKENS_SAVED, int(config.get_text_config().hidden_size))


def _padded(prompts: list[int], responses: list[int], rows: int, most: int, least: int) -> float:
    """Tokens of a row as it is padded where `by_length` cuts, on average over batches of `rows`."""
    draw, total, count = random.Random(0), 0, 64
    for _ in range(count):
        drawn = (draw.choices(prompts, k=rows), draw.choices(responses, k=rows))
        both = [p + r for p, r in zip(*drawn, strict=True)]
        total += sum(len(x) * max(both[i] for i in x) for x in by_length(both, most, least))
    return total / (count * rows)


def _row_lengths(
    model: Model, rows: Sequence[Example], fields: Sequence[str]
) -> list[tuple[int, list[int]]]:
    """Tokens of the prompt and of the answers in `fields`, of the rows that are looked at."""
    encoded = encoded_rows(model.tokenizer, rows[:LOOKED_AT], fields, {})
    return [(len(prompt), [len(a) for a in answers]) for _, prompt, answers in encoded]


def planned_lengths(stage: str, model: Model, data: Data, settings: Settings) -> dict[str, float]:
    """What a plan has to know of the data: longest prompt and response in tokens, the length that
    a batch is padded to on average, and the number of rows. {} where a stage has no rows."""
    split: Split = getattr(data, STAGES[stage].rows)
    if not split.train:
        return {}
    sampled = STAGES[stage].rows == "prompts"
    fields = [] if sampled else STAGES[stage].columns[: STAGES[stage].answers]
    rows = _row_lengths(model, split.train, fields)
    prompts, responses = [prompt for prompt, _ in rows], [answers for _, answers in rows]
    if not rows:
        return {}
    if sampled:
        return _sampled_lengths(stage, model, data, settings, prompts)
    limit = int(settings.get("max_length") or 2**31)
    totals = [
        min(prompt + response, limit)
        for prompt, of_row in zip(prompts, responses, strict=True)
        for response in of_row
    ]
    longest = max(max(of_row) for of_row in responses)
    mean_prompt = sum(prompts) / len(prompts)
    batch = int(settings.get("per_device_train_batch_size", 8))
    return {
        "prompt_length": max(1, max(totals) - longest),
        "response_length": longest,
        "rows": len(split.train),
        "padded_prompt": mean_prompt,
        "mean_tokens": sum(totals) / len(totals),
        "padded_response": expected_longest(totals, batch * len(fields)) - mean_prompt,
    }


def _sampled_lengths(
    stage: str, model: Model, data: Data, settings: Settings, prompts: list[int]
) -> dict[str, float]:
    """The lengths of a stage that samples: its responses are taken to be as long as the
    demonstrations, or as the limit where there are none. `prompts`: lengths in tokens."""
    limit = int(settings.get("response_length", 53))
    responses = [
        min(limit, length) for _, (length,) in _row_lengths(model, data.sft.train, ["completion"])
    ] or [limit]
    batch = int(settings.get("per_device_train_batch_size", 8))
    passes = settings.get("steps_per_generation")  # RLOO's and GRPO's
    size = batch * int(passes or settings.get("gradient_accumulation_steps", 1))
    mean = sum(responses) / len(responses)
    cut: dict[str, float] = {}
    if stage == "ppo":
        minibatch = max(1, size // int(settings.get("num_mini_batches", 1)))
        least = worth_a_pass(model.config)
        cut["padded_update"] = _padded(prompts, responses, minibatch, batch, least)
        most = int(settings.get("local_rollout_forward_batch_size", 64))
        cut["padded_scoring"] = _padded(prompts, responses, size, most, LEAST_TOKENS_SAVED)
    return cut | {
        "prompt_length": max(prompts),
        "rows": len(data.prompts.train),
        "mean_response": mean,
        "padded_prompt": expected_longest(prompts, size),
        "padded_response": expected_longest(responses, size),
        "mean_tokens": sum(prompts) / len(prompts) + mean,
    }
