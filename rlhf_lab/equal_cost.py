"""Ways from a pretrained model to one that people prefer, at equal seconds, FLOPs and dollars.

    found = lab.equal_budget(budget=60, seeds=range(5), file="equal_budget.json")
    found.figure(), found.answer

Each way is trained once a seed, with its schedule made for the largest budget; smaller ones are
read off that run, at what had been spent by then: the ledger's measured seconds and FLOPs, and the
labels that had been learned from, each at a stated price. Judging a policy is not counted.
"""

from __future__ import annotations

import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING
from unittest.mock import patch

from .budget import INPUTS
from .data.load import Data, load_data
from .display import Tabled, check_choice, counted, format_number, plus_minus
from .equal_cost_runs import LENGTH, REJECTION, Point, Seed, seconds_before
from .metering import meter
from .models.load import load
from .overoptimisation import t_quantile
from .runs.json_files import JsonObject, read_written, replace_file, versions
from .runs.run import notebooks_folder
from .settings import check_names

if TYPE_CHECKING:
    from .charts.plotly_style import Figure
    from .stages import Settings

WAYS = {
    "SFT+RM+PPO": "ppo",
    "SFT+RM+RLOO": "rloo",
    "SFT+RM+GRPO": "grpo",
    "SFT+DPO": "dpo",
    "SFT+KTO": "kto",
    "SFT+RM, best of n": "best of n",
    "SFT+RM, rejection sampling": "rejection",
}
"""Each way's name, and the stage that follows SFT and (where it needs one) the reward model."""
STAGES = ("sft", "reward", *(stage for stage in WAYS.values() if stage != "best of n"))
"""What has settings."""
SHARES = (0.5, 0.75, 1.0)
"""Of the largest budget, which is what every way and seed has spent at its end."""
UNITS = {"seconds": "s", "flops": "FLOP", "dollars": "USD"}


@dataclass(frozen=True)
class Trace:
    """One way and seed; the first of its points is the SFT model."""

    way: str
    seed: int
    points: list[Point]


@dataclass(repr=False)
class EqualBudget(Tabled):
    """Prices in USD, of a label and of an hour; `how`: model, settings, machine, versions."""

    traces: list[Trace]
    label_price: float
    hour_price: float
    how: dict[str, object]
    against: str = "SFT+RM+PPO"

    @property
    def notes(self) -> Sequence[str]:
        return self.answer, self.note

    @property
    def ways(self) -> dict[str, dict[int, Trace]]:
        """By way and seed."""
        names = [w for w in WAYS if any(t.way == w for t in self.traces)]
        return {w: {t.seed: t for t in self.traces if t.way == w} for w in names}

    def spent(self, point: Point, quantity: str) -> float:
        """Seconds, FLOPs, or USD for labels and seconds."""
        dollars = point.labels * self.label_price + point.seconds / 3600 * self.hour_price
        return {"seconds": point.seconds, "flops": point.flops, "dollars": dollars}[quantity]

    def budgets(self, quantity: str) -> list[float]:
        """The largest budget that every way and seed came to, and shares of it."""
        largest = min(self.spent(t.points[-1], quantity) for t in self.traces)
        return [share * largest for share in SHARES]

    def at(self, trace: Trace, quantity: str, budget: float) -> Point | None:
        """What a way had come to, linear between its points; None before there is an SFT model."""
        for a, b in reversed([*zip(trace.points, trace.points[1:])]):
            before, after = self.spent(a, quantity), self.spent(b, quantity)
            if before <= budget <= after * (1 + 1e-12):
                share = (budget - before) / (after - before) if after > before else 1.0
                return Point(*(x + share * (y - x) for x, y in zip(a, b, strict=True)))
        return None

    def difference(self, way: str, quantity: str, budget: float) -> tuple[float, float] | None:
        """Gold reward less that of `against`, the mean over the seeds that both have, and the half
        width of its interval: Student's t of paired differences, 95 % for all ways together
        (Bonferroni). None for fewer than two seeds."""
        mine, theirs = self.ways[way], self.ways.get(self.against, {})
        pairs = [
            (self.at(mine[s], quantity, budget), self.at(theirs[s], quantity, budget))
            for s in mine.keys() & theirs.keys()
        ]
        gaps = [a.gold_reward - b.gold_reward for a, b in pairs if a and b]
        if len(gaps) < 2:
            return None
        t = t_quantile(1 - 0.05 / max(1, len(self.ways) - 1), len(gaps) - 1)
        return mean(gaps), t * stdev(gaps) / math.sqrt(len(gaps))

    @property
    def rows(self) -> list[dict[str, str]]:
        """One for each quantity, budget and way: means over seeds ± their standard deviation."""
        at = [(quantity, budget) for quantity in UNITS for budget in self.budgets(quantity)]
        return [self._row(*here, way) for here in at for way in self.ways]

    def _row(self, quantity: str, budget: float, way: str) -> dict[str, str]:
        """No seeds where a budget ends before SFT does."""
        found = [p for t in self.ways[way].values() if (p := self.at(t, quantity, budget))]
        row = {"equal": quantity, "budget": format_number(budget, UNITS[quantity]), "way": way}
        row["seeds"] = str(len(found))
        for title, values in zip(("gold reward", "KL (nats)", "words"), list(zip(*found))[3:]):
            row[title] = plus_minus(values)
        gap = self.difference(way, quantity, budget) if way != self.against else None
        row[f"− {self.against}"] = f"{gap[0]:+.2f} ± {gap[1]:.2f}" if gap else ""
        return row

    @property
    def answer(self) -> str:
        """Which ways are better or worse than `against` at the largest budgets, in words."""
        if self.against not in self.ways:
            return f"{self.against} was not run: no way is compared to it"
        words = []
        for quantity in UNITS:
            budget, found = self.budgets(quantity)[-1], dict[str, list[str]]()
            for way in self.ways:
                if way != self.against and (gap := self.difference(way, quantity, budget)):
                    kind = "no difference that so many seeds can show"
                    if abs(gap[0]) > gap[1]:
                        kind = "more gold reward" if gap[0] > 0 else "less gold reward"
                    found.setdefault(kind, []).append(way)
            parts = [f"{kind}: {', '.join(names)}" for kind, names in found.items()]
            shown = format_number(budget, UNITS[quantity])
            words.append(f"at {shown}: {'; '.join(parts) or 'too few seeds'}")
        return f"Against {self.against} " + ". ".join(words)

    @property
    def note(self) -> str:
        """How many seeds, and what the figures mean."""
        counts = sorted({len(of_way) for of_way in self.ways.values()})
        clock = "CPU seconds" if self.how.get("cpu_seconds") else "seconds by the clock"
        return (
            f"{' to '.join(map(str, counts))} seeds of each way; means ± standard deviations; ± of "
            "a difference: its interval over paired seeds (Student's t), 95 % for all ways "
            f"together; {clock}; a label {self.label_price:g} USD, an hour {self.hour_price:g} "
            "USD; demonstrations, which all ways share, have no price; best of n writes "
            f"{self.how.get('answers')} answers, its KL is the bound log n − (n−1)/n"
        )

    def figure(self, theme: str = "both") -> Figure:
        """Gold reward over what was spent, a panel for each quantity: a plotly figure."""
        from .charts.studies import equal_budget_figure

        return equal_budget_figure(self, theme)

    def save(self, file: str | Path) -> None:
        """As JSON."""
        rest = {"label_price": self.label_price, "hour_price": self.hour_price, "how": self.how}
        replace_file(Path(file), json.dumps({**rest, "traces": [asdict(t) for t in self.traces]}))

    @classmethod
    def load(cls, file: str | Path) -> EqualBudget:
        """What `save` wrote. Raises ValueError, one line, for another file."""

        def make(found: JsonObject) -> EqualBudget:
            traces = [Trace(**t) for t in found.pop("traces")]
            return cls([replace(t, points=[Point(*p) for p in t.points]) for t in traces], **found)

        return read_written(file, make, "EqualBudget.save")

    @classmethod
    def stored(cls) -> EqualBudget:
        """The study that comes with the course (`benchmarks/equal_budget.py`)."""
        return cls.load(notebooks_folder() / "course_runs" / "equal_budget.json")


# ------------------------------------------------------------------------------------ the trainings


def equal_budget(
    ways: Sequence[str] = tuple(WAYS),
    budget: float = 60,
    *,
    model: str = "mini",
    data: Data | str | Path = "stories",
    seeds: Sequence[int] = range(5),
    each: Mapping[str, Settings] | None = None,
    points: int = 3,
    prompts: int = 128,
    answers: int = 512,
    label_price: float = INPUTS["label_price"]["value"],
    hour_price: float = 0.2,
    cpu_seconds: bool = False,
    file: str | Path | None = None,
    quiet: bool = False,
) -> EqualBudget:
    """Train each way once a seed for about `budget` seconds, SFT and reward model included, and
    judge it at so many `points` of its last stage, and at the end of SFT.

    `each`: settings of a stage, or of "rejection", which samples `num_generations` answers [4] to
    `prompts` prompts [256] and learns the best by SFT. Without `max_steps` a last stage has as many
    steps as the plan says fill the budget. `prompts`: held-out ones to judge by; `answers`: how
    many best of n writes with its budget. `label_price` of a judged pair, `hour_price` of this
    machine: USD. `cpu_seconds`: count those of this process instead of the clock's, which programs
    beside it lengthen. With `file` what is there is not trained again (prices may be others), and
    each training is added as it ends. Raises ValueError, one line, for what cannot be, data without
    a gold reward, a file of other settings, a budget that ends before a way's last stage begins.
    """
    from .trainers.evaluate import held_out_prompts

    for way in ways:
        check_choice("way", way, WAYS)
    settings = {k: dict(v) for k, v in (each or {}).items()}
    for stage, own in settings.items():
        check_choice("each: stage", stage, STAGES)
        if stage == "rejection":
            check_names(own.keys() - REJECTION.keys(), "sft")
        else:
            check_names(own, stage)
    sizes = {"budget": budget, "points": points, "prompts": prompts, "answers": answers}
    if not len(ways) or not len(seeds):
        raise ValueError("give at least one way and one seed")
    for name, size in sizes.items():
        if not 0 < size < math.inf:
            raise ValueError(f"{name} must be more than 0, not {size}")
    if not (min(label_price, hour_price) >= 0 and 0 < label_price + hour_price < math.inf):
        prices = f"{label_price:g} and {hour_price:g}"
        raise ValueError(f"label_price and hour_price: not below 0, nor both 0; got {prices}")
    handle, data = load(model), load_data(data)
    if not data.has_gold:
        raise ValueError(f"{data.name} has no gold reward: only the bundled world can be compared")
    how = {"model": model, "data": data.name, "budget": budget, "each": settings}
    how |= {"points": points, "prompts": prompts, "answers": answers, "cpu_seconds": cpu_seconds}
    machine = f"{counted(os.cpu_count() or 1, 'core')}, {platform.machine()}, {platform.system()}"
    where = {"machine": machine, "versions": versions()}
    there = EqualBudget.load(file) if file and Path(file).exists() else None
    if there and (other := [k for k in how if there.how.get(k) != how[k]]):
        raise ValueError(f"{file} was made with {other[0]}={there.how.get(other[0])!r}")
    before = seconds_before(handle, data, settings, {WAYS[way] for way in ways})
    if budget <= before:
        took = f"SFT and any reward model are planned to take {before:.3g}"
        raise ValueError(f"a budget of {budget:g} seconds is too small: {took}")
    result = there or EqualBudget([], 0, 0, {**how, **where})
    result = replace(result, label_price=label_price, hour_price=hour_price)
    clock = patch.object(meter, "_now", time.process_time) if cpu_seconds else nullcontext()
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder, clock:
            of = Seed(handle, data, seed, Path(folder), settings, budget, points, answers)
            of.prompts = held_out_prompts(of.model, data, prompts, LENGTH)
            for way in (way for way in ways if seed not in result.ways.get(way, {})):
                new = Trace(way, seed, of.points_of(WAYS[way]))
                result = replace(result, traces=[*result.traces, new])
                if file:
                    result.save(file)
                if not quiet:
                    print(f"{way}, seed {seed}: {new.points[-1]}", flush=True)
    return result
