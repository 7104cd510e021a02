"""What a saved dollar costs in quality: gold reward against dollars per million tokens.

lab.frontier_serving({"SFT": "tiny", "PPO": [run_0, run_1, run_2], "best of 4": ("tiny", 4)},
                     price=0.2)
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, TypeAlias

from .data.load import Data, load_data
from .data.tokenize import prompt_of
from .deploy.quantize import quantize
from .display import html_table, table
from .models.load import Model
from .models.weights import load_causal_lm
from .planning import plan
from .runs.run import Run
from .stages import Setting

if TYPE_CHECKING:
    from .charts.plotly_style import Figure
    from .data.schema import Example

Policy: TypeAlias = "Run | Model | str | Path | tuple[Model | str | Path, int]"
"""What writes; (model, n): the best of n by the model's own reward model."""
PREDICTED: dict[str, dict[str, Setting]] = {
    "fp32": {"dtype": "float32", "bf16": False},
    "bf16": {},
    "int8": {"quantization": "int8_weight_only"},
    "nf4": {"quantization": "nf4"},
}
"""Settings of the larger model's plan in each format."""


@dataclass(frozen=True)
class Served:
    """A model in a format: figures of each seed. Tokens are those that are read: of best-of-n's
    samples one."""

    name: str
    to: str
    gold_reward: tuple[float, ...]
    tokens_per_second: tuple[float, ...]
    usd_per_million: tuple[float, ...]


@dataclass(frozen=True)
class ServingFrontier:
    """`points`: measured here. `predicted`: (format, requests in flight, USD per million tokens,
    seconds per token) of `larger` on `hardware`."""

    points: list[Served]
    predicted: list[tuple[str, int, float, float]]
    price: float
    larger: str
    hardware: str

    @property
    def rows(self) -> list[dict[str, str]]:
        def spread(values: Sequence[float], decimals: int) -> str:
            error = f" ± {stdev(values):.{decimals}f}" if len(values) > 1 else ""
            return f"{mean(values):.{decimals}f}{error}"

        return [
            {
                "model": p.name,
                "in": p.to,
                "gold reward": spread(p.gold_reward, 2),
                "tokens/s": spread(p.tokens_per_second, 0),
                "USD/M tokens": spread(p.usd_per_million, 4),
            }
            for p in self.points
        ]

    @property
    def note(self) -> str:
        seeds = len(self.points[0].gold_reward)
        return f"measured here at {self.price:g} USD an hour; {seeds} seeds, ± standard deviation"

    def __repr__(self) -> str:
        return f"{table(self.rows)}\n{self.note}"

    def _repr_html_(self) -> str:
        return f"{html_table(self.rows)}<p>{self.note}</p>"

    def figure(self) -> Figure:
        """Both panels, a plotly figure."""
        from .charts.serving_frontier import serving_frontier

        return serving_frontier(self)


def frontier_serving(
    models: Mapping[str, Policy | Sequence[Policy]],
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

    data = load_data(data)
    if not data.has_gold:
        raise ValueError(f"{data.name} has no gold reward, so nothing is known of quality")
    predicted = _predicted(larger, hardware, formats, concurrency)
    prepare_process()
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for turn, seed in enumerate(seeds):
        for name, given in models.items():
            policy = given[turn % len(given)] if isinstance(given, list) else given
            of, n = policy if isinstance(policy, tuple) else (policy, 1)
            for to in formats:
                handle = quantize(of, to, data=None)
                rows = held_out_prompts(handle, data, prompts, response_length)
                if not found:
                    _answers(handle, rows[:8], n, response_length, seed)  # warm up
                rate, texts = _answers(handle, rows, n, response_length, seed)
                pairs = zip(map(prompt_of, rows), texts, strict=True)
                gold = mean(data.gold_reward(str(prompt), text) for prompt, text in pairs)
                found.setdefault((name, to), []).append((gold, rate))
    points = []
    for (name, to), values in found.items():
        golds, rates = zip(*values, strict=True)
        points.append(Served(name, to, golds, rates, tuple(price / 3600 / r * 1e6 for r in rates)))
    return ServingFrontier(points, predicted, price, larger, hardware)


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
) -> list[tuple[str, int, float, float]]:
    found = []
    for to in formats:
        load: dict[str, Setting] = {"prompt_length": 512, "response_length": 256}
        e = plan(
            "inference", model, hardware=hardware, engine="vllm", **load, **PREDICTED[to]
        ).estimate
        for count in concurrency:
            got = e.serving_at(count)
            if got.usd_per_million is None:
                raise ValueError(f"{hardware} has no price: choose another device")
            found.append((to, count, got.usd_per_million, got.per_token))
    return found
