"""Studies over plans and runs: x-ray, sweep, best-of-n.

plan = lab.plan("ppo", "tiny")
lab.sweep("model", ["Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-7B"], stage="sft")
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from .cost.estimate import Estimate
from .cost.hardware import Hardware
from .cost.setup import Setup
from .data.load import Data, load_data
from .display import Tabled, by_surface, counted, format_number, is_number
from .models.load import Model, load
from .planning import Plan, predict
from .planning import plan as make_plan
from .runs.ledger import Ledger
from .runs.progress import Progress
from .runs.run import Run
from .stages import read_table
from .training import train

if TYPE_CHECKING:
    from torch import Tensor

    from .charts.plotly_style import Figure
    from .simulate.xray import XRay
    from .stages import Setting


def xray(plan: Plan | Estimate) -> XRay:
    """The plan's step through the real code under fake tensors: exact bytes and FLOPs, no weights.

    Bytes are those of the longest rows. FLOPs are of the whole run (of one step where the number of
    steps is not known), at rows of average length, so that they compare with plan and run.
    """
    from .simulate.step import simulate_step

    e = plan.estimate if isinstance(plan, Plan) else plan
    notes = tuple(plan.warnings) if isinstance(plan, Plan) else ()
    for name, why in NO_XRAY.items():
        value = getattr(e.setup, name)
        if value != getattr(Setup, name):
            raise ValueError(
                f"no x-ray of {name}={value!r}: {why}; the plan and a run know what it takes"
            )
    notes += tuple(
        f"the x-ray shows one device alone, without {name}={getattr(e.setup, name)!r}"
        for name in _XRAY["between_devices"].split()
        if getattr(e.setup, name) not in (getattr(Setup, name), "ddp")  # copies hold the same
    )
    eager = "the x-ray runs operations one by one, without torch_compile"
    notes += (eager,) * e.compiles[0]
    seen = simulate_step(e.setup, e.config, e.roles)
    usual = e.usual_setup
    counted = seen if usual == e.setup else simulate_step(usual, e.config, e.roles)
    like = {
        phase: x
        for phases, s in e.bucketed_setups
        for x in [simulate_step(s, e.config, e.roles)]
        for phase in phases
    }
    times = (e.steps or 1) * e.setup.replicas
    rows = [r for r in seen.ledger if r.quantity != "flops"]
    rows += [
        replace(r, value=r.value * times, low=None, high=None)
        for x in {id(x): x for x in (counted, *like.values())}.values()
        for r in x.ledger
        if r.quantity == "flops" and like.get(r.phase, counted) is x
    ]
    return replace(seen, ledger=Ledger(rows), notes=notes, steps=e.steps or 1)


_XRAY = read_table(__file__)
NO_XRAY = {name: why for why, names in _XRAY["refused"].items() for name in names.split()}
"""Fields of a `Setup` of which only the default can be simulated, and why."""


# ------------------------------------------------------------------------------------------- sweep

AXES = {
    "model": "parameters",
    "prompt_length": "tokens",
    "response_length": "tokens",
    "per_device_train_batch_size": "rows",
    "rows": "rows",
    "max_steps": "steps",
    "gpus": "devices",
}


@dataclass(repr=False)
class Sweep(Tabled):
    """A series over one axis. `points`: x, and by quantity what was predicted and measured."""

    axis: str
    stage: str
    points: list[dict[str, float]]
    labels: list[str] | None = None
    """the values where they are no numbers, as "none", "ddp": there x only counts"""

    def exponent(self, quantity: str = "flops", source: str = "predicted") -> float:
        """Slope of a straight line through the points on log-log paper (least squares), which has
        no place for 0. Raises ValueError where there is none: too few points, or values that are no
        numbers."""
        if self.labels:
            raise ValueError(
                f"no line over {self.axis}: {', '.join(self.labels)} are no numbers; the points "
                "are in .rows, and lab.compare({name: plan, …}) shows plans side by side"
            )
        pairs = [
            (math.log(p["x"]), math.log(p[f"{quantity} {source}"]))
            for p in self.points
            if p["x"] > 0 and p.get(f"{quantity} {source}")
        ]
        if len(pairs) < 2:
            raise ValueError(f"no line through {len(pairs)} point(s) of {quantity} {source}")
        return statistics.linear_regression(*zip(*pairs, strict=True)).slope

    def answer(self) -> str:
        """What the exponent says, in words; of values that are no numbers, the least ones."""
        if self.labels:
            least = [
                f"{name.split()[0]} of {self.labels[values.index(min(values))]}"
                for name in ("bytes predicted", "seconds predicted")
                if (values := [p[name] for p in self.points])
            ]
            return f"least {', least '.join(least)}"
        drawn = sum(p["x"] > 0 for p in self.points)
        if drawn < 2:
            return f"no power law over {self.axis}: 0 has no place on log-log paper"
        found = self.exponent("flops")
        text = f"FLOPs of a step grow with {self.axis} to the power {found:.2f}"
        text += " (0 left out)" * (drawn < len(self.points))
        if self.axis == "model":
            text += (
                ": linear in parameters at a fixed amount of data. Quadratic only when the "
                "data grow with the model, as in compute-optimal pretraining (Hoffmann et "
                f"al., 2203.15556): then {1 + found:.2f}"
            )
        return text

    @property
    def notes(self) -> Sequence[str]:
        return (self.answer(),)

    @property
    def rows(self) -> list[dict[str, str]]:
        units = {"bytes": "B", "flops": "FLOP", "seconds": "s"}
        shown = self.labels or [format_number(p["x"]) for p in self.points]
        return [
            {
                self.axis: x,
                **{k: format_number(v, units[k.split()[0]]) for k, v in p.items() if k != "x"},
            }
            for x, p in zip(shown, self.points, strict=True)
        ]

    def figure(self, quantity: str = "flops") -> Figure:
        """Predicted and measured on log-log paper, a plotly figure. Raises ValueError for values
        that are no numbers."""
        if self.labels:
            self.exponent()
        from .charts.cost_bars import scaling

        return scaling(self, quantity, x_title=f"{self.axis} ({AXES.get(self.axis, '')})")


def sweep(
    axis: str,
    values: Sequence[Setting],
    *,
    stage: str = "sft",
    model: str | Path | Model = "tiny",
    run: bool = False,
    data: Data | str | Path = "stories",
    hardware: Hardware | str = "here",
    **settings: Setting,
) -> Sweep:
    """Plan (and with `run`, train) a series over one setting, or over "model", "hardware" or
    "stage"; fit the exponent where its values are numbers.

    Predictions and measurements are of one step, so that series of different lengths compare.
    Raises ValueError for fewer than two values.
    """
    if len(values) < 2:
        raise ValueError(f"a series over {axis} needs two values at least, got {list(values)}")
    points: list[dict[str, float]] = []
    numbers = axis == "model" or all(map(is_number, values))
    for value in values:
        asked = {**settings, "stage": stage, "model": model, "hardware": hardware, axis: value}
        planned = make_plan(asked.pop("stage"), asked.pop("model"), **asked)
        e = planned.estimate
        x = e.setup.model.parameters() if axis == "model" else value
        point = {
            "x": float(x if numbers else len(points)),
            "bytes predicted": e.peak,
            "flops predicted": e.flops,
            "seconds predicted": e.step_seconds,
        }
        if axis in ("rows", "max_steps"):  # these change how often, not what a step costs
            for name in ("flops predicted", "seconds predicted"):
                point[name] *= e.steps or 1
        if run:
            measured = train(planned, data, quiet=True)
            point |= _measured(measured, axis)
        points.append(point)
    return Sweep(axis, stage, points, None if numbers else list(map(str, values)))


def _measured(run: Run, axis: str) -> dict[str, float]:
    """Bytes, and FLOPs and seconds of a step (of the run, along rows and steps), as measured."""
    ledger = run.ledger.filter(source="measured")
    steps = 1 if axis in ("rows", "max_steps") else max(1, run.last_step)
    out = {"bytes measured": ledger.peak()}
    for quantity in ("flops", "seconds"):
        out[f"{quantity} measured"] = ledger.training(quantity=quantity).total() / steps
    return out


# -------------------------------------------------------------------------------------- best of n


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


@dataclass(repr=False)
class BestOfN(Tabled):
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

    @property
    def notes(self) -> Sequence[str]:
        prompts, samples = counted(self.prompts, "held-out prompt"), self.samples
        drawn = f"{prompts}, {counted(samples, 'response')} to each"
        return (f"{drawn}; means over all subsets of n, ± the standard error over prompts",)


def best_of_n(
    model: str | Path | Model = "tiny",
    data: Data | str | Path = "stories",
    n: int | Sequence[int] = (1, 2, 4, 8, 16),
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
    from .launch.launcher import prepare_process
    from .ppo.losses import kl_bound
    from .trainers.best_of_n import draw, expected_best
    from .trainers.evaluate import held_out_prompts

    prepare_process()
    model, data = load(model), load_data(data)
    counts = sorted({n} if isinstance(n, int) else set(n))
    _check(model, counts, prompts, response_length)
    kept = held_out_prompts(model, data, prompts, response_length)
    bar = None if quiet else Progress(len(kept) * counts[-1], "best-of-n")
    drawn = draw(
        model.sft,
        model.tokenizer,
        model.reward,
        kept,
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
    costs = planned_flops(model, data, response_length, length)
    points = []
    for count in counts:
        reward = _mean(expected_best(drawn.scores, drawn.scores, count))
        gold: tuple[float | None, float | None] = (None, None)
        if drawn.golds is not None:
            gold = _mean(expected_best(drawn.scores, drawn.golds, count))
        flops = count * (costs[0] + (costs[1] if count > 1 else 0)) if costs else None
        points.append(BestOf(count, *reward, *gold, kl_bound(count), count * length, flops))
    return BestOfN(model.name, len(kept), counts[-1], points)


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
            f"best-of-n needs a reward model: train one first (rlhf-lab train reward --model "
            f"{model.name}) and "
            + by_surface("use model.with_stage('reward', FOLDER)", "give --reward-model FOLDER")
        )


def _mean(values: Tensor) -> tuple[float, float]:
    """→ mean over prompts, and its standard error."""
    count = len(values)
    variance = float(values.var()) if count > 1 else math.nan
    return float(values.mean()), math.sqrt(variance / count)


def planned_flops(
    model: Model, data: Data, response_length: int, length: float
) -> tuple[float, float] | None:
    """FLOPs of sampling a response of average length, and of scoring it, as planned for PPO."""
    try:
        e = predict(
            make_plan("ppo", model, response_length=response_length, mean_response=length), data
        )
    except ValueError:
        return None  # the cost model does not know this architecture
    of = {f.name: f.work.flops * f.times / e.setup.rollout_batch for f in e.average}
    return of["rollout"], of["score"]
