"""The charts of a run: which metrics share one, its axis, its caption; its time as bars.

The dashboard, a replay and report.html draw the same charts from here. `stages.py` names those of
each stage.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..cost.estimate import SCORING
from ..runs.ledger import AROUND, Ledger
from ..runs.run import Run
from ..stages import STAGES
from .chart import ChartSize, Reference, bar_chart, line_chart
from .frame import Picture

if TYPE_CHECKING:
    from typing_extensions import Unpack

SCORING_PHASES = {*SCORING, "advantage"}
"""Phases that are one colour in a stack: there are fewer colours than phases."""


@dataclass(frozen=True)
class ChartSpec:
    """A chart of a run: the metrics that share it, its axis, and a caption: what to see in it."""

    metrics: tuple[str, ...]
    y_label: str
    caption: str
    title: str = ""
    """the first metric's name, where it has no other"""
    reference: str = ""
    """the setting or summary figure drawn as a line, with its name in `REFERENCES`"""
    folded: bool = False
    """whether a dashboard folds it away"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "title", self.title or self.metrics[0].replace("_", " "))


LABELS = {"clipfrac": "policy clipped", "vf_clipfrac": "values clipped"}
"""What a legend calls a metric whose own name is a paper's abbreviation."""
REFERENCES = {"accuracy_ceiling": "best possible", "kl_target": "target KL"}

CHARTS: Mapping[str, ChartSpec] = {
    "loss": ChartSpec(
        ("loss", "eval_loss"),
        "loss (nats per token)",
        "It falls, then flattens; where a held-out curve turns up, the model starts to memorise.",
        title="loss",
    ),
    "pair_loss": ChartSpec(
        ("loss", "eval_loss"),
        "loss (nats per pair)",
        "ln 2 = 0.69 is a coin's toss; below it, the model has learned to tell the two apart.",
        title="loss",
    ),
    "pair_accuracy": ChartSpec(
        ("accuracy", "eval_accuracy"),
        "share of pairs ranked right",
        "The annotator's own noise sets a ceiling; the gap below it is the model's error.",
        title="accuracy",
        reference="accuracy_ceiling",
    ),
    "reward": ChartSpec(
        ("reward", "score"),
        "reward of a response (the reward model's unit)",
        "The proxy that PPO climbs: it should rise, and its rise alone proves nothing. "
        "The score is what is learned from: the reward normalised, clipped, and with penalties.",
        title="proxy reward",
    ),
    "gold": ChartSpec(
        ("gold_reward",),
        "gold reward",
        "What we really want, and no training sees: if it falls while the proxy climbs, "
        "the reward model is being gamed.",
    ),
    "kl": ChartSpec(
        ("kl", "kl_k3"),
        "KL to the reference (nats per response)",
        "How far the policy has drifted; the two estimates agree while the drift is small.",
        title="KL to the reference",
        reference="kl_target",
    ),
    "drift": ChartSpec(
        ("kl",),
        "KL to the reference (nats per response)",
        "How far the policy has moved from the model it started as.",
        title="KL to the reference",
    ),
    "kl_coef": ChartSpec(
        ("kl_coef",),
        "β (reward per nat)",
        "A fixed β is a flat line; an adaptive one rises while the KL is above its target.",
        title="KL coefficient",
    ),
    "entropy": ChartSpec(
        ("entropy",),
        "entropy (nats per token)",
        "A slow fall is learning; a plunge towards 0 is a policy that says one thing only.",
        folded=True,
    ),
    "clipping": ChartSpec(
        ("clipfrac", "vf_clipfrac"),
        "share of tokens clipped",
        "A few per cent is normal; a large share says that the steps are too big.",
        title="clipping",
        folded=True,
    ),
    "critic": ChartSpec(
        ("explained_variance",),
        "explained variance of the returns",
        "1 is a perfect critic, 0 is no better than a constant, below 0 it misleads.",
        folded=True,
    ),
    "length": ChartSpec(
        ("response_length",),
        "response length (tokens)",
        "A reward that climbs with the length may be paying for the length.",
        folded=True,
    ),
    "dpo_loss": ChartSpec(
        ("loss",),
        "loss (nats per pair)",
        "It starts at ln 2 = 0.69, where policy and reference are the same model.",
    ),
    "dpo_accuracy": ChartSpec(
        ("accuracy",),
        "share of pairs ranked right",
        "How often the policy's implicit reward prefers the answer that was chosen.",
        reference="accuracy_ceiling",
    ),
    "dpo_margin": ChartSpec(
        ("margin",),
        "implicit reward margin (nats)",
        "Chosen minus rejected: it keeps growing after the accuracy has stopped.",
    ),
    "kto_loss": ChartSpec(
        ("loss",),
        "loss (of an answer, 0 to 1)",
        "It starts at 0.5, where policy and reference are the same model, and falls as good "
        "answers become likelier than under the reference, and bad ones less likely.",
    ),
}
"""Every chart by the name that `stages.py` gives it."""


def charts_of(stage: str) -> tuple[ChartSpec, ...]:
    """The charts of a stage; those of a stage that has none of its own: its loss."""
    names = STAGES[stage].charts if stage in STAGES else ()
    return tuple(CHARTS[name] for name in names or ("loss",))


# -- curves -----------------------------------------------------------------------------------
def known_series(
    run: Run, names: Sequence[str], upto: float = math.inf
) -> dict[str, tuple[list[int], list[float]]]:
    """Series of those names with at least one real value, up to a step."""
    known = {}
    for name in (n for n in names if n in run.metric_names):
        xs, ys = run.series(name)
        count = sum(x <= upto for x in xs)
        if any(map(math.isfinite, ys[:count])):
            known[name] = xs[:count], ys[:count]
    return known


def metric_chart(
    run: Run, chart: ChartSpec, upto: float = math.inf, **size: Unpack[ChartSize]
) -> Picture | None:
    """A chart up to a step; None where the run has logged nothing of it."""
    known = known_series(run, chart.metrics, upto)
    if not known:
        return None
    value = {**run.config.get("settings", {}), **run.summary}.get(chart.reference)
    levels: list[Reference] = []
    if isinstance(value, (int, float)):
        levels.append((value, REFERENCES[chart.reference]))
    return line_chart(
        {LABELS.get(name, name): points for name, points in known.items()},
        title=chart.title,
        x_label="step",
        y_label=chart.y_label,
        references=levels,
        **size,
    )


# -- time -------------------------------------------------------------------------------------
_TIME = {"title": "time by phase", "unit": "s"}


def time_chart(run: Run, **size: Unpack[ChartSize]) -> Picture | None:
    """Measured seconds by phase, stacked by role, an average over ranks; None without any."""
    rows = run.ledger.filter(quantity="seconds", source="measured")
    if not rows:
        return None
    ranks = len({row.rank for row in rows})
    stacks = {
        phase or "other": {role or "all models": s / ranks for role, s in roles.items()}
        for phase, roles in rows.pivot("phase", "role").items()
    }
    return bar_chart(stacks, y_label="seconds (measured)", **_TIME, **size)


def time_stacks(ledger: Ledger, share: float = 1.0, **size: Unpack[ChartSize]) -> Picture:
    """Seconds of training, stacked by phase: predicted beside measured. `share`: of the run that is
    done, for which the prediction is shown."""
    stacks: dict[str, dict[str, float]] = {}
    for source, times in (("predicted", share), ("measured", 1.0)):
        for row in ledger.filter(quantity="seconds", source=source):
            if row.phase not in AROUND:
                phase = "scoring" if row.phase in SCORING_PHASES else row.phase or "other"
                bar = stacks.setdefault(source, {})
                bar[phase] = bar.get(phase, 0.0) + row.value * times
    return bar_chart(stacks, y_label="seconds so far", **_TIME, **size)
