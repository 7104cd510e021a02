"""What a plan will cost, would cost and did cost: predicted, simulated and measured, side by side.

plan = lab.plan("ppo", "tiny")
lab.compare(plan, lab.xray(plan), lab.train(plan))
lab.sweep("model", ["Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-7B"], stage="sft")
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cost.estimate import Estimate, estimate
from .cost.hardware import Hardware
from .cost.hardware import hardware as hardware
from .cost.setup import EXTRA, Setup
from .data.lengths import planned_lengths
from .display import Display, format_number, html_table, table
from .models.load import ADAPTER_FILE, BUNDLED, Model, load
from .runs.ledger import AROUND, ONLINE, SOURCES, Ledger

if TYPE_CHECKING:
    from .simulate.xray import XRay

TRAINED_AS_PLANNED = {
    "prompt_length",
    "response_length",
    "padded_prompt",
    "padded_response",
    "padded_update",
    "padded_scoring",
    "mean_tokens",
    "mean_response",
    "rows",
    "padded",
}
"""Settings that describe the data; the other ones of `EXTRA` change how a run would be made."""


def predict(plan: Any, data: Any = None) -> Estimate:
    """The prediction of a plan, for rows as long as those of `data` (a `Data`).

    Without data, and without a length in its settings, a bundled model is planned for the bundled
    stories; another for rows as long as `max_length` or its context.
    """
    model, settings = plan.model, dict(plan.settings)
    if "prompt_length" not in settings and data is not None:
        settings = {**planned_lengths(plan.stage, model, data, settings), **settings}
    elif "prompt_length" not in settings and model.name in BUNDLED:
        settings = {**_lengths_of_stories(plan.stage, model, settings), **settings}
    roles = {}
    learned = plan.stage in ONLINE and not settings.get("rule_reward")
    if learned and settings.get("layout") == "adapters" and "reward_adapter" in model.paths:
        settings |= _judge_rank(model.paths["reward_adapter"])
    elif learned and "reward" in model.paths:
        roles["reward"] = model.config_dict("reward")
        if plan.stage == "ppo":  # the value model starts on the SFT model where it has to
            roles["value"] = model.config_dict("sft" if model.foreign_reward else "reward")
    return estimate(plan.stage, model.config_dict(), plan.hardware, settings, **roles)


def _judge_rank(folder: str) -> dict[str, Any]:
    """What the plan must know of a reward adapter, like which the value adapter is made."""
    said = json.loads((Path(folder) / ADAPTER_FILE).read_text())
    return {"critic_lora_r": said["r"], "critic_lora_targets": _hashable(said["target_modules"])}


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def predicted(plan: Any, data: Any, quiet: bool = True) -> Ledger:
    """The prediction's rows; none, and unless `quiet` a line that says why, for what the cost model
    does not know: a run is worth having without."""
    try:
        return predict(plan, data).ledger
    except ValueError as error:
        if not quiet:
            print(f"{plan.stage}: no prediction ({error})", flush=True)
        return Ledger()


_STORIES: dict[tuple, dict[str, float]] = {}


def _lengths_of_stories(stage: str, model: Model, settings: Mapping[str, Any]) -> dict[str, float]:
    """Lengths of the bundled data, looked up once."""
    from .data.load import load_data

    asked = (
        "per_device_train_batch_size",
        "response_length",
        "max_length",
        "num_mini_batches",
        "gradient_accumulation_steps",
        "steps_per_generation",
    )
    key = (stage, model.name, *(settings.get(name) for name in asked))
    if key not in _STORIES:
        data = load_data("stories")
        _STORIES[key] = planned_lengths(stage, model, data, settings)
    return _STORIES[key]


def unplannable(settings: Mapping[str, Any]) -> str | None:
    """A setting that can be planned and that `train` does not do from here; None where all can."""
    plain = {
        "gpus": 1,
        "nodes": 1,
        "sharding": "none",
        "offload": "none",
        "tensor_parallel": 1,
        "dtype": "float32",
        "loss": "fused",
        "pairs_together": True,
        "samples_per_prompt": 1,
        "ema": False,
        "joint_update": True,
        "attn_implementation": "sdpa",
        "adapter_dtype": "float32",
    }
    if settings.get("layout") != "adapters":  # one base that may be in 4 bits
        plain |= {"load_in_4bit": False, "use_bnb_nested_quant": False}
    for name, value in settings.items():
        if name in EXTRA.keys() - TRAINED_AS_PLANNED and value != plain.get(name, value):
            return f"{name}={value!r} is planned only: train() does not do it yet"
    return None


def calibrate(seconds: float = 20) -> Hardware:
    """Measure this machine, keep the figures for later plans ("here"), and return them."""
    from .metering.calibrate import calibrate as measure

    return measure(seconds=seconds)


# ------------------------------------------------------------------------------------------- x-ray


def xray(plan: Any) -> XRay:
    """The plan's step through the real code under fake tensors: exact bytes and FLOPs, no weights.

    Bytes are those of the longest rows. FLOPs are of the whole run (of one step where the number of
    steps is not known), at rows of average length, so that they compare with plan and run.
    """
    e = plan.estimate if hasattr(plan, "estimate") else plan
    if e.setup.load_in_4bit:
        raise ValueError(
            "no x-ray of load_in_4bit: fake tensors cannot be quantised; the plan and "
            "a run know what it takes"
        )
    seen = _simulate_step(e, e.setup)
    usual = e.usual_setup
    counted = seen if usual == e.setup else _simulate_step(e, usual)
    like = {
        phase: x for phases, s in e.like_setups for x in [_simulate_step(e, s)] for phase in phases
    }
    times = (e.steps or 1) * e.setup.replicas
    rows = [r for r in seen.ledger if r.quantity != "flops"]
    rows += [
        replace(r, value=r.value * times, low=None, high=None)
        for x in {id(x): x for x in (counted, *like.values())}.values()
        for r in x.ledger
        if r.quantity == "flops" and like.get(r.phase, counted) is x
    ]
    return replace(seen, ledger=Ledger(rows))


def _simulate_step(e: Estimate, s: Setup) -> XRay:
    from .simulate.step import simulate_step

    return simulate_step(
        s.stage,
        dict(e.config),
        batch=s.batch,
        prompt=s.prompt,
        response=s.response,
        dtype=s.dtype,
        bf16=s.bf16 or s.fp16,
        lora_r=s.lora_r,
        lora_targets=s.lora_targets,
        gradient_checkpointing=s.gradient_checkpointing,
        optim=s.optim,
        padded=s.padded,
        attn_implementation="eager" if s.eager else "sdpa",
        gradient_accumulation_steps=s.gradient_accumulation_steps,
        num_mini_batches=s.num_mini_batches,
        num_ppo_epochs=s.num_ppo_epochs,
        local_rollout_forward_batch_size=s.local_rollout_forward_batch_size,
        device="gpu" if s.gpu else "cpu",
        layout=s.layout,
        critic_lora_r=s.critic_lora_r,
        critic_lora_targets=s.critic_lora_targets,
        own_reward=s.reward is not None,
        rule_reward=s.rule_reward,
        **{f"{name}_config": dict(config) for name, config in e.roles.items()},
    )


# ----------------------------------------------------------------------------------------- compare


@dataclass
class Comparison:
    """One table: a row for each phase and quantity, a column for each source."""

    ledger: Ledger
    rows: list[dict[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        return table(self.rows)

    def __repr__(self) -> str:
        return str(self)

    def _shown(self) -> Display:
        return Display(str(self), html_table(self.rows), self.picture())

    def _repr_html_(self) -> str:
        return self._shown()._repr_html_()

    def _ipython_display_(self) -> None:
        self._shown()._ipython_display_()

    def picture(self):
        """Memory of each phase, predicted, simulated and measured: an SVG."""
        from .charts.memory import memory_chart

        return memory_chart(self.ledger)

    def figure(self, quantity: str = "bytes"):
        """The sources beside each other by phase, with the bands they claim: a plotly figure."""
        from .charts.bars import sources

        return sources(self, quantity=quantity)


def compare(*things: Any) -> Comparison:
    """Plans, x-rays and runs (whatever has a `.ledger`) in one table and one picture."""
    ledger, rows = _together(things), []
    for quantity, unit in (
        ("bytes", "B"),
        ("flops", "FLOP"),
        ("seconds", "s"),
        ("tokens", "tokens"),
    ):
        found = {
            s: {p: sum(line.values()) for p, line in _by_phase(ledger, quantity, s).items()}
            for s in SOURCES
        }
        for phase in dict.fromkeys(p for line in found.values() for p in line):
            rows.append(
                {
                    "phase": phase or "all",
                    "quantity": quantity,
                    **{s: format_number(found[s].get(phase), unit) for s in SOURCES},
                    "predicted / real": _ratio(found, phase),
                }
            )
    return Comparison(ledger, rows)


def _together(things: Iterable[Any]) -> Ledger:
    """All rows; what an earlier thing says of a stage from a source is not said twice."""
    ledger, said = Ledger(), set()
    for thing in things:
        new = [r for r in thing.ledger if (r.stage, r.source) not in said]
        ledger.extend(new)
        said |= {(r.stage, r.source) for r in new}
    return ledger


def _by_phase(ledger: Ledger, quantity: str, source: str) -> dict[str, dict[str, float]]:
    """→ {phase: {role and component: value}} of one source."""
    out: dict[str, dict[str, float]] = {}
    for row in ledger.filter(quantity=quantity, source=source):
        line = out.setdefault(row.phase, {})
        name = " ".join(x for x in (row.role, row.component) if x) or "all"
        line[name] = line.get(name, 0.0) + row.value
    return out


def _ratio(found: Mapping[str, Mapping[str, float]], phase: str) -> str:
    predicted = found["predicted"].get(phase)
    real = found["measured"].get(phase) or found["simulated"].get(phase)
    return f"{predicted / real:.2f}" if predicted and real else ""


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


@dataclass
class Sweep:
    """A series over one axis. `points`: x, and by quantity what was predicted and measured."""

    axis: str
    stage: str
    points: list[dict[str, float]]

    def exponent(self, quantity: str = "flops", source: str = "predicted") -> float:
        """Slope of a straight line through the points on log-log paper (least squares)."""
        pairs = [
            (math.log(p["x"]), math.log(p[f"{quantity} {source}"]))
            for p in self.points
            if p.get(f"{quantity} {source}")
        ]
        if len(pairs) < 2:
            raise ValueError(f"no line through {len(pairs)} point(s) of {quantity} {source}")
        mx, my = (sum(v) / len(pairs) for v in zip(*pairs, strict=True))
        spread = sum((x - mx) ** 2 for x, _ in pairs)
        return sum((x - mx) * (y - my) for x, y in pairs) / spread

    def answer(self) -> str:
        """What the exponent says, in words."""
        found = self.exponent("flops")
        text = f"FLOPs of a step grow with {self.axis} to the power {found:.2f}"
        if self.axis == "model":
            text += (
                ": linear in parameters at a fixed amount of data. Quadratic only when the "
                "data grow with the model, as in compute-optimal pretraining (Hoffmann et "
                f"al., 2203.15556): then {1 + found:.2f}"
            )
        return text

    def __repr__(self) -> str:
        return f"{table(self.rows)}\n{self.answer()}"

    @property
    def rows(self) -> list[dict[str, str]]:
        units = {"bytes": "B", "flops": "FLOP", "seconds": "s"}
        return [
            {
                self.axis: format_number(p["x"]),
                **{k: format_number(v, units[k.split()[0]]) for k, v in p.items() if k != "x"},
            }
            for p in self.points
        ]

    def _repr_html_(self) -> str:
        return f"{html_table(self.rows)}<p>{self.answer()}</p>"

    def figure(self, quantity: str = "flops"):
        """Predicted and measured on log-log paper, a plotly figure."""
        from .charts.figures import scaling

        return scaling(self, quantity, x_title=f"{self.axis} ({AXES.get(self.axis, '')})")


def sweep(
    axis: str,
    values: Sequence[Any],
    *,
    stage: str = "sft",
    model: Any = "tiny",
    run: bool = False,
    data: Any = "stories",
    hardware: Any = "here",
    **settings: Any,
) -> Sweep:
    """Plan (and with `run`, train) a series over one setting, or over "model"; fit the exponent.

    Predictions and measurements are of one step, so that series of different lengths compare.
    Raises ValueError for fewer than two values.
    """
    from .planning import plan as make_plan
    from .planning import train

    if len(values) < 2:
        raise ValueError(f"a series over {axis} needs two values at least, got {list(values)}")
    points = []
    for value in values:
        said = dict(settings) if axis == "model" else {**settings, axis: value}
        plan = make_plan(stage, value if axis == "model" else model, hardware=hardware, **said)
        e = plan.estimate
        point = {
            "x": float(e.setup.model.parameters() if axis == "model" else value),
            "bytes predicted": e.peak,
            "flops predicted": e.flops,
            "seconds predicted": e.step_seconds,
        }
        if axis in ("rows", "max_steps"):  # these change how often, not what a step costs
            for name in ("flops predicted", "seconds predicted"):
                point[name] *= e.steps or 1
        if run:
            point |= _measured(train(plan, data, quiet=True), axis)
        points.append(point)
    return Sweep(axis, stage, points)


def _measured(run: Any, axis: str) -> dict[str, float]:
    """Bytes, and FLOPs and seconds of a step (of the run, along rows and steps), as measured."""
    ledger = run.ledger.filter(source="measured")
    steps = 1 if axis in ("rows", "max_steps") else max(1, run.last_step)
    training = [r for r in ledger if r.phase not in AROUND]
    out = {"bytes measured": ledger.peak()}
    for quantity in ("flops", "seconds"):
        out[f"{quantity} measured"] = (
            sum(r.value for r in training if r.quantity == quantity) / steps
        )
    return out


# ----------------------------------------------------------------------------------------- project


@dataclass
class Project:
    """The whole project: a plan of each stage, and what they cost together."""

    stages: dict[str, Estimate]

    @property
    def hours(self) -> float | None:
        return _total(e.hours for e in self.stages.values())

    @property
    def money(self) -> float | None:
        return _total(e.money for e in self.stages.values())

    @property
    def ledger(self) -> Ledger:
        return Ledger(row for e in self.stages.values() for row in e.ledger)

    @property
    def rows(self) -> list[dict[str, str]]:
        from .charts.estimate import summary_row

        total = {
            "stage": "all",
            "time": format_number(_seconds(self.hours), "s"),
            "money": format_number(self.money, "USD"),
        }
        return [*(summary_row(e) for e in self.stages.values()), total]

    def __repr__(self) -> str:
        return table(self.rows)

    def _repr_html_(self) -> str:
        return html_table(self.rows)


def _total(values: Iterable[float | None]) -> float | None:
    found = list(values)
    return None if any(v is None for v in found) else math.fsum(found)


def _seconds(hours: float | None) -> float | None:
    return None if hours is None else hours * 3600


def project(
    model: Any = "tiny",
    *,
    hardware: Any = "here",
    stages: Sequence[str] = ("sft", "reward", "ppo"),
    each: Mapping[str, Mapping[str, Any]] | None = None,
    **settings: Any,
) -> Project:
    """Plan several stages of one model: settings for all of them, and `each` stage's own."""
    from .planning import plan

    handle = load(model)
    return Project(
        {
            s: plan(
                s, handle, hardware=hardware, **{**settings, **(each or {}).get(s, {})}
            ).estimate
            for s in stages
        }
    )
