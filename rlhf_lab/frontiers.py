"""What a saved dollar costs in quality: gold reward against dollars per million tokens.

lab.frontier_serving({"SFT": "tiny", "PPO": [run_0, run_1, run_2], "best of 4": ("tiny", 4)},
                     price=0.2)
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from .data.load import Data, load_data
from .data.tokenize import prompt_of
from .deploy.quantize import quantize
from .display import Tabled, check_choice, plus_minus
from .models.load import Model
from .models.policy import find_policy
from .models.weights import load_causal_lm
from .planning import plan
from .runs.run import Run
from .stages import Setting

if TYPE_CHECKING:
    from .charts.plotly_style import Figure
    from .data.schema import Example

Contender: TypeAlias = "Run | Model | str | Path | tuple[Model | str | Path, int]"
"""What writes; (model, n): the best of n by the model's own reward model."""
PREDICTED: dict[str, dict[str, Setting]] = {
    "fp32": {"dtype": "float32", "bf16": False},
    "bf16": {},
    "int8": {"quantization": "int8_weight_only"},
    "nf4": {"quantization": "nf4"},
}
"""Settings of the larger model's plan in each format."""


class Served(NamedTuple):
    """A model in a format, with figures of each seed. Tokens are those that are read: of
    best-of-n's samples one."""

    name: str
    to: str
    gold_reward: list[float]
    tokens_per_second: list[float]
    usd_per_million: list[float]


class Predicted(NamedTuple):
    """A larger model in a format, so many requests in flight; seconds of an output token."""

    to: str
    requests: int
    usd_per_million: float
    seconds: float


@dataclass(frozen=True, repr=False)
class ServingFrontier(Tabled):
    """`points`: measured here, at `price` USD an hour. `predicted`: of `larger` on `hardware`."""

    points: list[Served]
    predicted: list[Predicted]
    price: float
    larger: str
    hardware: str

    @property
    def rows(self) -> list[dict[str, str]]:
        titles = ("gold reward", 2), ("tokens/s", 0), (f"USD/M tokens at ${self.price:g}/h", 4)
        rows = []
        for name, to, *columns in self.points:
            row = {"model": name, "in": to}
            for (title, decimals), values in zip(titles, columns, strict=True):
                row[title] = plus_minus(values, decimals)
            rows.append(row)
        return rows

    def figure(self) -> Figure:
        """Both panels, a plotly figure."""
        from .charts.studies import serving_frontier

        return serving_frontier(self)


def frontier_serving(
    models: Mapping[str, Contender | Sequence[Contender]],
    formats: Sequence[str] = ("fp32", "bf16", "int8", "nf4"),
    *,
    price: float,
    data: Data | str | Path = "stories",
    seeds: Sequence[int] = (0, 1, 2),
    prompts: int = 128,
    response_length: int = 64,
    larger: str = "Qwen2.5-7B",
    hardware: str = "h100",
    concurrency: Sequence[int] = (1, 4, 16, 64, 256),
) -> ServingFrontier:
    """Gold reward against what a million tokens cost on this machine, at `price` USD an hour.

    `models`: what writes by name, or a list of them, one a seed; (model, n) is the best of n. Each
    in each of `formats` ("fp32", or of `quantize`) answers held-out `prompts` with every seed, one
    after the other, and is timed at it. Beside it, without gold, what is predicted of a `larger`
    model on `hardware` under an engine, 512 tokens read and 256 written. Raises ValueError for data
    without a gold reward, and for a device without a price.
    """
    from .launch.launcher import prepare_process
    from .trainers.evaluate import held_out_prompts

    if not models or not formats or not seeds:
        raise ValueError("frontier_serving: models by name, as {'SFT': 'tiny'}; formats; seeds")
    for to in formats:
        check_choice("format", to, PREDICTED)
    policies = {name: of if isinstance(of, list) else [of] for name, of in models.items()}
    pairs = [x for of in policies.values() for x in of if isinstance(x, tuple)]
    if price <= 0 or prompts < 1 or any(n < 1 for _, n in pairs):
        raise ValueError("price is above 0; prompts and n of (model, n) are at least 1")
    for of in chain(*policies.values()):
        find_policy(of[0] if isinstance(of, tuple) else of)  # raises for what writes nothing
    data = load_data(data)
    if not data.has_gold:
        raise ValueError(f"{data.name} has no gold reward, so nothing is known of quality")
    predicted = _predicted(larger, hardware, formats, concurrency)
    prepare_process()
    found: dict[tuple[str, str], Served] = {}
    for turn, seed in enumerate(seeds):
        for name, given in policies.items():
            policy = given[turn % len(given)]
            of, n = policy if isinstance(policy, tuple) else (policy, 1)
            for to in formats:
                handle = quantize(of, to, data=None)
                rows = held_out_prompts(handle, data, prompts, response_length)
                if not found:
                    _answers(handle, rows[:8], n, response_length, seed)  # warm up
                rate, texts = _answers(handle, rows, n, response_length, seed)
                asked = [str(prompt_of(row)) for row in rows]
                point = found.setdefault((name, to), Served(name, to, [], [], []))
                point.gold_reward.append(mean(map(data.gold_reward, asked, texts)))
                point.tokens_per_second.append(rate)
                point.usd_per_million.append(price / 3600 / rate * 1e6)
    return ServingFrontier(list(found.values()), predicted, price, larger, hardware)


def _answers(
    handle: Model, rows: Sequence[Example], n: int, length: int, seed: int
) -> tuple[float, list[str]]:
    """An answer to each row, of `n` samples that which the reward model likes best. → tokens of
    these answers a second, scoring included; texts."""
    from .ppo.texts import sample_ids
    from .trainers.best_of_n import draw

    # As it was saved: `handle.sft` would be fp32.
    policy = load_causal_lm(handle.paths["sft"], handle.tokenizer, dtype="auto")
    tokenizer, reward = handle.tokenizer, handle.reward if n > 1 else None
    how: dict[str, Setting] = {"max_new_tokens": length, "seed": seed}
    start = time.perf_counter()
    if reward is None:
        sampled = [ids for (ids,) in sample_ids(policy, tokenizer, rows, **how)]
        tokens, texts = sum(map(len, sampled)), tokenizer.batch_decode(sampled, True)
    else:
        theirs = handle.reward_tokenizer
        drawn = draw(policy, tokenizer, reward, rows, n, reward_tokenizer=theirs, **how)
        best = drawn.scores.argmax(1, keepdim=True)
        tokens = int(drawn.tokens.gather(1, best).sum())
        texts = [of_row[i] for of_row, (i,) in zip(drawn.texts, best.tolist(), strict=True)]
    return tokens / (time.perf_counter() - start), texts


def _predicted(
    model: str, hardware: str, formats: Sequence[str], concurrency: Sequence[int]
) -> list[Predicted]:
    found = []
    for to in formats:
        how = {"engine": "vllm", "prompt_length": 512, "response_length": 256, **PREDICTED[to]}
        e = plan("inference", model, hardware=hardware, **how).estimate
        for count in concurrency:
            got = e.serving_at(count)
            if got.usd_per_million is None:
                raise ValueError(f"{hardware} has no price: choose another device")
            found.append(Predicted(to, count, got.usd_per_million, got.per_token))
    return found
