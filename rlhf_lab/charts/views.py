"""The charts of a run: which metrics share one, its axis, its caption; its time as bars.

The dashboard, a replay and report.html draw the same charts from here (`charts.yaml`). `stages.py`
names those of each stage.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..cost.estimate import SCORING
from ..runs.figures import gloss
from ..runs.ledger import Ledger
from ..runs.run import Run
from ..stages import STAGES, read_table
from .chart import ChartSize, Reference, bar_chart, line_chart
from .frame import Picture

if TYPE_CHECKING:
    from typing_extensions import Unpack

SCORING_PHASES = {*SCORING, "advantage"}
"""Phases that are one colour in a stack: a small legend has no room for all."""


@dataclass(frozen=True)
class ChartSpec:
    """A chart of a run: the metrics that share it, its axis, and a caption: what to see in it."""

    metrics: tuple[str, ...]
    y_label: str
    caption: str
    title: str = ""
    """the first metric's name, where it has no other"""
    references: tuple[str, ...] = ()
    """settings or summary figures drawn as lines, with their names in `REFERENCES`"""
    folded: bool = False
    """whether a dashboard folds it away"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "references", tuple(self.references))
        object.__setattr__(self, "title", self.title or self.metrics[0].replace("_", " "))


LABELS = {"clipfrac": "policy clipped", "vf_clipfrac": "values clipped"}
"""What a legend calls a metric whose own name is a paper's abbreviation."""
REFERENCES = {
    "accuracy_ceiling": "best possible",
    "accuracy": "held-out pairs, after training",
    "kl_target": "target KL",
}

CHARTS: Mapping[str, ChartSpec] = {
    name: ChartSpec(**{**fields, "metrics": tuple(fields["metrics"])})
    for name, fields in read_table(__file__, "charts.yaml").items()
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
    given = {**run.config.get("settings", {}), **run.summary}
    levels: list[Reference] = [
        (given[n], REFERENCES[n])
        for n in chart.references
        if isinstance(given.get(n), (int, float))
    ]
    return line_chart(
        {LABELS.get(name, name): points for name, points in known.items()},
        title=chart.title,
        x_label="step",
        y_label=chart.y_label,
        references=levels,
        hints={LABELS.get(name, name): f"{name}: {gloss(name)}" for name in known},
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
    return bar_chart(stacks, y_label="seconds (measured)", kind="role", **_TIME, **size)


def time_stacks(ledger: Ledger, share: float = 1.0, **size: Unpack[ChartSize]) -> Picture:
    """Seconds of training, stacked by phase: predicted beside measured. `share`: of the run that is
    done, for which the prediction is shown."""
    stacks: dict[str, dict[str, float]] = {}
    for source, times in (("predicted", share), ("measured", 1.0)):
        for row in ledger.training(quantity="seconds", source=source):
            phase = "scoring" if row.phase in SCORING_PHASES else row.phase or "other"
            bar = stacks.setdefault(source, {})
            bar[phase] = bar.get(phase, 0.0) + row.value * times
    return bar_chart(stacks, y_label="seconds so far", kind="phase", **_TIME, **size)
