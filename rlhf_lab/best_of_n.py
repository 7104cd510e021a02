"""Best-of-n on held-out prompts, what it brings and what it costs: no training, a dearer answer.

lab.best_of_n("tiny", n=(1, 4, 16))
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .data.load import Data, load_data
from .data.tokenize import prompt_rows
from .display import format_number, html_table, table
from .models.load import Model, load
from .runs.progress import Progress


@dataclass(frozen=True)
class BestOf:
    """One row: the best of `n` responses. Rewards are means over prompts, and come with the
    standard error of that mean; `kl_bound` in nats per response; `tokens` sampled and `flops`
    for one answer (None where the cost model does not know the model)."""

    n: int
    reward: float
    reward_error: float
    gold_reward: float | None
    gold_error: float | None
    kl_bound: float
    tokens: float
    flops: float | None


@dataclass
class BestOfN:
    """A table of best-of-n. `points`: one `BestOf` for each n; `prompts`, `samples`: how many
    prompts there were, and responses to each of them."""

    model: str
    prompts: int
    samples: int
    points: list[BestOf]

    @property
    def rows(self) -> list[dict[str, str]]:
        def mean(value: float | None, error: float | None) -> str:
            return "" if value is None else f"{value:.2f} ± {error:.2f}"

        rows = [
            {
                "best of": str(p.n),
                "reward": mean(p.reward, p.reward_error),
                "gold reward": mean(p.gold_reward, p.gold_error),
                "KL (nats)": "0" if p.n == 1 else f"at most {p.kl_bound:.2f}",
                "tokens/answer": format_number(round(p.tokens, 1)),
                "FLOPs/answer": format_number(p.flops, "FLOP"),
            }
            for p in self.points
        ]
        return [{k: v for k, v in row.items() if any(r[k] for r in rows)} for row in rows]

    def __repr__(self) -> str:
        return f"{table(self.rows)}\n{self._note}"

    def _repr_html_(self) -> str:
        return f"{html_table(self.rows)}<p>{self._note}</p>"

    @property
    def _note(self) -> str:
        return (
            f"{self.prompts} held-out prompts, {self.samples} responses to each; means over "
            "all subsets of n, ± the standard error over prompts"
        )


def best_of_n(
    model: str | Path | Model = "tiny",
    data: Data | str | Path = "stories",
    n: Sequence[int] = (1, 2, 4, 8, 16),
    *,
    prompts: int = 256,
    response_length: int = 64,
    temperature: float = 1.0,
    seed: int = 99,
    quiet: bool = False,
) -> BestOfN:
    """Draw max(n) responses to each held-out prompt from the SFT model; keep the reward model's
    favourite of n.

    `prompts`: how many at most. FLOPs are those of the plan: n prompts read, n responses sampled
    and (beyond n=1) scored. Raises ValueError, one line, for what cannot be.
    """
    from .launch.machine import settle
    from .trainers.best_of_n import draw, expected_best, kl_bound

    settle()
    model, data = load(model), load_data(data)
    counts = sorted(set(n))
    _check(model, counts, prompts, response_length)
    rows = (data.prompts.test or data.prompts.train)[:prompts]
    kept, _ = prompt_rows(model.tokenizer, rows, model.context - response_length)
    if not kept:
        raise ValueError(f"{data.name} has no prompt that leaves room for {response_length} tokens")
    asked = [r["prompt"] for r in kept]
    bar = None if quiet else Progress(len(asked) * counts[-1], "best-of-n")
    drawn = draw(
        model.sft,
        model.tokenizer,
        model.reward,
        asked,
        counts[-1],
        temperature=temperature,
        gold_reward=data.gold_reward if data.has_gold else None,
        seed=seed,
        max_new_tokens=response_length,
        reward_tokenizer=model.reward_tokenizer,
        progress=bar.update if bar else None,
    )
    if bar:
        bar.close()
    length = float(drawn.tokens.double().mean())
    sampling, scoring = _flops(model, data, response_length, length)
    points = []
    for count in counts:
        reward = _mean(expected_best(drawn.scores, drawn.scores, count))
        gold = (None, None)
        if drawn.golds is not None:
            gold = _mean(expected_best(drawn.scores, drawn.golds, count))
        flops = None if sampling is None else count * (sampling + (scoring if count > 1 else 0))
        points.append(BestOf(count, *reward, *gold, kl_bound(count), count * length, flops))
    return BestOfN(model.name, len(asked), counts[-1], points)


def _check(model: Model, counts: list[int], prompts: int, response_length: int) -> None:
    if not counts or any(type(c) is not int or c < 1 for c in counts):
        raise ValueError(f"n={counts}: give whole numbers of at least 1")
    if prompts < 1 or not 0 < response_length < model.context:
        raise ValueError(
            f"prompts={prompts}, response_length={response_length}: give at least 1 "
            f"of each, and fewer tokens than the {model.context} that fit"
        )
    if "reward" not in model.paths:
        raise ValueError(
            f"best-of-n needs a reward model: train one first (rlhf-lab train reward "
            f"--model {model.name}) and use model.with_stage('reward', …)"
        )


def _mean(values: Any) -> tuple[float, float]:
    """→ mean over prompts, and its standard error."""
    count = len(values)
    spread = float(values.var()) if count > 1 else math.nan
    return float(values.mean()), math.sqrt(spread / count)


def _flops(
    model: Model, data: Data, response_length: int, length: float
) -> tuple[float | None, float | None]:
    """FLOPs of sampling a response of average length, and of scoring it, as planned for PPO."""
    from .planning import plan
    from .studies import predict

    try:
        e = predict(plan("ppo", model, response_length=response_length, mean_response=length), data)
    except ValueError:
        return None, None  # the cost model does not know this architecture
    of = {f.name: f.work.flops * f.times / e.setup.rollout_batch for f in e.average}
    return of["rollout"], of["score"]
