"""Which runs are one line of a figure: those that differ in their seed only; and what it is called.

Figures take runs, or mappings of names to runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from ..runs.run import Run
from .ledgers import named
from .plotly_style import rounded


@dataclass(frozen=True)
class Series:
    """One colour of a figure: a run, or runs that differ in their seed only."""

    label: str
    runs: tuple[Run, ...]

    @property
    def stage(self) -> str:
        return self.runs[0].stage


_NO_SETTING = {"seed", "data_seed", "output_dir", "logging_dir", "run_name", "report_to"}


def series_of(runs: Iterable[object], seeds: bool = True) -> list[Series]:
    """Runs, or mappings of names to runs, as series named after what tells them apart.

    `seeds`: runs that differ in their seed only are one series. Raises ValueError for what is no
    run.
    """
    alike: dict[object, list[tuple[str, Run]]] = {}
    for i, (name, run) in enumerate(named(runs)):
        if not _is_run(run):
            raise ValueError(f"{name or type(run).__name__} is not a run: it has no metrics")
        key = (name, i) if name or not seeds else tuple(sorted(_settings(run).items()))
        alike.setdefault(key, []).append((name, run))
    if not alike:
        raise ValueError("nothing to draw: give a run")
    groups: list[list[tuple[str, Run]]] = []
    for pairs in alike.values():
        different = len({str(run.config.get("seed")) for _, run in pairs}) == len(pairs)
        groups += [pairs] if different else [[pair] for pair in pairs]
    labels = _labels([(pairs[0][0], [run for _, run in pairs]) for pairs in groups])
    return [
        Series(label, tuple(run for _, run in pairs))
        for label, pairs in zip(labels, groups, strict=True)
    ]


def _is_run(thing: object) -> TypeGuard[Run]:
    return hasattr(thing, "metrics") and hasattr(thing, "stage")


def _settings(run: Run) -> dict[str, str]:
    """A run's stage, model, data and settings, without its seed and its place."""
    config = run.config
    settings = {k: v for k, v in (config.get("settings") or {}).items() if k not in _NO_SETTING}
    whole = {**{n: config.get(n) for n in ("stage", "model", "data")}, **settings}
    return {name: str(value) for name, value in whole.items()}


def _labels(groups: Sequence[tuple[str, Sequence[Run]]]) -> list[str]:
    """A name for each group: given, or the stage where there are several, and the settings that
    differ from others of the stage where there are at most three; else the run's own name."""
    settings = [_settings(runs[0]) for _, runs in groups]
    stages = [s["stage"] for s in settings]
    labels: list[str] = []
    for (name, runs), own in zip(groups, settings, strict=True):
        peers = [s for s in settings if s["stage"] == own["stage"]]
        every = dict.fromkeys(k for s in peers for k in s)
        differ = [k for k in every if len({s.get(k) for s in peers}) > 1]
        parts = [own["stage"]] if len(set(stages)) > 1 else []
        if 0 < len(differ) <= 3:
            parts.append(", ".join(f"{k}={own.get(k, 'default')}" for k in differ))
        elif len(peers) > 1 or not parts:
            parts.append(own["stage"] if len(runs) > 1 and len(peers) == 1 else runs[0].name)
        parts += [f"({len(runs)} seeds)"] if len(runs) > 1 else []
        labels.append(name or " ".join(parts))
    for i, label in enumerate(labels):
        if labels.count(label) > 1 and label != groups[i][1][0].name:
            labels[i] = f"{label} {groups[i][1][0].name}"
    return [
        f"{x} ({labels[:i].count(x) + 1})" if x in labels[:i] else x for i, x in enumerate(labels)
    ]


def steps_of(run: Run, metric: str) -> dict[int, float]:
    """step → value, the last where a step was logged twice; what is no number is NaN."""
    if metric not in run.metric_names:
        return {}
    return {
        step: math.nan if rounded(value) is None else value
        for step, value in zip(*run.series(metric), strict=True)
    }
