"""How long rows are, and what that makes of a batch: padding, and which rows pass together.

Needs no torch: a plan counts with it what the trainer does.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

from ..models.load import Model, load, small_models_folder
from ..stages import STAGES, Setting, Settings, resolve
from .rows_left import check_rows, nothing_left, response_limit, room_for_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from .load import Data
    from .schema import Example
    from .tokenize import Encoded

LEAST_TOKENS_SAVED = 128
"""Tokens of padding that one more pass has to save at least: on two CPU cores calling the layers
of a small model once more takes about as long."""
LEAST_SHARE_SAVED = 0.2
"""And this share of the tokens of the pass that is cut. Rows of like length stay one pass, so that
memory is as planned."""
LOOKED_AT = 2_000
"""Rows of a set whose lengths a plan looks at; more where none of them can be trained on."""
ANY_LENGTH = 2**31


def expected_longest(lengths: list[int], count: int) -> float:
    """Mean length of the longest of `count` random rows: what a batch is padded to."""
    n, total, before = len(lengths), 0.0, 0.0
    for place, length in enumerate(sorted(lengths), 1):
        here = (place / n) ** count  # the chance that none is longer
        total += length * (here - before)
        before = here
    return total


def grouped_longest(lengths: list[int], batch: int, step: int, count: int) -> float:
    """The same of `batch` rows of like length, as transformers' `group_by_length` picks them from
    `count`: it sorts stretches of 50 optimizer steps of `step` rows, or of a quarter of all."""
    stretch, draw = step * max(1, min(count // (4 * step), 50)), random.Random(0)
    drawn = (draw.choices(lengths, k=min(stretch, count)) for _ in range(8))
    longest = [length for rows in drawn for length in sorted(rows, reverse=True)[::batch]]
    return sum(longest) / len(longest)


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
    return tokens_worth(int(config.get_text_config().hidden_size))


def tokens_worth(width: int) -> int:
    """The same for a model of this hidden width."""
    return max(LEAST_TOKENS_SAVED, width)


def _padded(prompts: list[int], responses: list[int], rows: int, most: int, least: int) -> float:
    """Tokens of a row as it is padded where `by_length` cuts, on average over batches of `rows`."""
    draw, total, count = random.Random(0), 0, 64
    for _ in range(count):
        drawn = (draw.choices(prompts, k=rows), draw.choices(responses, k=rows))
        both = [p + r for p, r in zip(*drawn, strict=True)]
        total += sum(len(x) * max(both[i] for i in x) for x in by_length(both, most, least))
    return total / (count * rows)


@dataclass(frozen=True)
class RowLengths:
    """Tokens of a stage's rows: `count` that are left to train on, of which some were looked at (of
    more the count is projected from the share that is left of those). `answers`: of each
    row; `demonstrations`: how long a sampled response is taken to be, where rows have none."""

    count: int
    prompts: list[int]
    answers: list[list[int]]
    demonstrations: list[int] = field(default_factory=list)


def row_lengths(stage: str, model: Model, data: Data, limit: int = ANY_LENGTH) -> RowLengths:
    """Of the rows that a stage trains on; `limit`: the most tokens of a row, or of its prompt where
    the stage samples. Raises ValueError, one line, where no row is left of some."""
    spec = STAGES[stage]
    rows = getattr(data, spec.rows).train
    fields = [] if spec.rows == "prompts" else spec.columns[: spec.answers]
    make = resolve(spec.tokenize or "rlhf_lab.data.tokenize:prompt_rows")  # inference has none
    counts: dict[str, int] = {}
    left: list[list[int]] = []
    looked = 0
    while not left and looked < len(rows):
        here = rows[looked : looked + LOOKED_AT]
        left, looked = _left(model, here, fields, make, limit, counts), looked + len(here)
    if rows and not left:
        raise nothing_left(stage, model, data, limit, counts)
    count = round(len(rows) * len(left) / looked) if rows else 0
    prompts, answers = [row[0] for row in left], [row[1:] for row in left]
    if fields:
        return RowLengths(count, prompts, answers)
    from .tokenize import encoded_rows

    shown = encoded_rows(model.encoder, data.sft.train[:LOOKED_AT], ["completion"], {})
    return RowLengths(count, prompts, answers, [len(answer) for *_, (answer,) in shown])


def _room(model: Model, settings: Settings) -> int:
    """Tokens that a row may have."""
    return min(int(settings.get("max_length") or ANY_LENGTH), model.context)


def _left(
    model: Model,
    rows: Sequence[Example],
    fields: Sequence[str],
    make: Callable[..., Encoded],
    limit: int,
    counts: dict[str, int],
) -> list[list[int]]:
    """Tokens of the prompt and of the answers in `fields`, of the rows that `make`, the stage's own
    maker of rows, does not drop; `counts` takes down the drops by reason."""
    from .tokenize import id_rows

    sizes: dict[str, list[int]] = {name: [] for name in ("prompt", *fields)}
    left = []
    for row in id_rows(model.encoder, rows, sizes, counts):
        made, dropped = make(model.encoder, [row], limit)
        for reason, n in dropped.items():
            counts[reason] = counts.get(reason, 0) + n
        if made:
            left.append([of_field[-1] for of_field in sizes.values()])
    return left


STORIES = "lengths.json.gz"
"""Beside the bundled models: `RowLengths` of the bundled stories, by what a stage's rows are."""


@cache
def story_lengths(rows: str) -> RowLengths:
    """Of the bundled stories in the bundled tokenizer, as `small_models/build.py` counted them."""
    with gzip.open(small_models_folder() / STORIES, "rt", encoding="utf-8") as file:
        return RowLengths(**json.load(file)[rows])


def story_rows(kind: str) -> tuple[list[Example], int, int]:
    """Rows of made-up token ids, as long as the bundled stories' that are looked at; how many there
    are to train on, and held out. `kind`: a set of `Data`."""
    from .load import STORY_ROWS  # a plan needs no world

    fields = {"sft": ["completion"], "preferences": ["chosen", "rejected"], "prompts": []}
    if kind not in fields:
        return [], 0, 0
    known = story_lengths(kind)
    rows: list[Example] = [{"prompt": [0] * length} for length in known.prompts]
    for i, name in enumerate(fields[kind]):  # no two answers to a prompt are the same
        for row, of_row in zip(rows, known.answers, strict=True):
            row[name] = [i] * of_row[i]
    return rows, known.count, STORY_ROWS["test_pairs" if kind == "preferences" else "test"]


STORY_SETTINGS = (
    *("per_device_train_batch_size", "response_length", "max_length", "num_mini_batches"),
    *("gradient_accumulation_steps", "steps_per_generation", "local_rollout_forward_batch_size"),
    "train_sampling_strategy",
)
"""What the lengths of a plan for the bundled data depend on."""


def of_stories(stage: str, model: Model, settings: Settings) -> dict[str, float]:
    """What a plan has to know of the bundled stories, looked up once."""
    known = {name: settings[name] for name in STORY_SETTINGS if name in settings}
    return _of_stories(stage, model.name, **known)


@cache
def _of_stories(stage: str, model: str, **settings: Setting) -> dict[str, float]:
    return of_rows(stage, load(model), story_lengths(STAGES[stage].rows), settings)


def planned_lengths(stage: str, model: Model, data: Data, settings: Settings) -> dict[str, float]:
    """What a plan has to know of the data: longest prompt and response in tokens, the length that
    a batch is padded to on average, and the number of rows. Raises ValueError, with the line that
    `train` has for it, where there is no row to train on, or none is left within the limit."""
    check_rows(stage, data)
    if STAGES[stage].rows == "prompts":
        limit = room_for_prompt(model, settings)
    else:
        limit = _room(model, settings)
    return of_rows(stage, model, row_lengths(stage, model, data, limit), settings)


def of_rows(stage: str, model: Model, rows: RowLengths, settings: Settings) -> dict[str, float]:
    """The same of rows whose lengths are known."""
    if not rows.prompts:
        return {}
    if STAGES[stage].rows == "prompts":
        return _sampled_lengths(stage, model, rows, settings)
    limit = _room(model, settings)
    totals = [
        min(prompt + response, limit)
        for prompt, of_row in zip(rows.prompts, rows.answers, strict=True)
        for response in of_row
    ]
    longest = min(max(max(of_row) for of_row in rows.answers), max(1, max(totals) - 1))
    mean_prompt = sum(rows.prompts) / len(rows.prompts)
    batch, answers = int(settings.get("per_device_train_batch_size", 8)), STAGES[stage].answers
    if settings.get("train_sampling_strategy") == "group_by_length":
        step = batch * int(settings.get("gradient_accumulation_steps", 1))
        longer = [max(totals[i : i + answers]) for i in range(0, len(totals), answers)]
        padded = grouped_longest(longer, batch, step, rows.count)
    else:
        padded = expected_longest(totals, batch * answers)
    return {
        "prompt_length": max(1, max(totals) - longest),
        "response_length": longest,
        "rows": rows.count,
        "padded_prompt": mean_prompt,
        "mean_tokens": sum(totals) / len(totals),
        "padded_response": padded - mean_prompt,
    }


def _sampled_lengths(
    stage: str, model: Model, rows: RowLengths, settings: Settings
) -> dict[str, float]:
    """The lengths of a stage that samples: its responses are taken to be as long as the
    demonstrations, or as the limit where there are none."""
    prompts, limit = rows.prompts, response_limit(settings)
    responses = [min(limit, length) for length in rows.demonstrations] or [limit]
    batch = int(settings.get("per_device_train_batch_size", 8))
    passes = settings.get("steps_per_generation")  # RLOO's and GRPO's
    size = batch * int(passes or settings.get("gradient_accumulation_steps", 1))
    mean = sum(responses) / len(responses)
    cut: dict[str, float] = {}
    if stage == "ppo":
        minibatch = max(1, size // int(settings.get("num_mini_batches", 1)))
        width = model.config_dict().get("hidden_size")  # without transformers, where it is there
        least = tokens_worth(int(width)) if isinstance(width, int) else worth_a_pass(model.config)
        cut["padded_update"] = _padded(prompts, responses, minibatch, batch, least)
        most = int(settings.get("local_rollout_forward_batch_size", 64))
        cut["padded_scoring"] = _padded(prompts, responses, size, most, LEAST_TOKENS_SAVED)
    return cut | {
        "prompt_length": max(prompts),
        "rows": rows.count,
        "mean_response": mean,
        "padded_prompt": expected_longest(prompts, size),
        "padded_response": expected_longest(responses, size),
        "mean_tokens": sum(prompts) / len(prompts) + mean,
    }
