"""Runs overlaid, a panel for each metric: a plotly figure.

curves(run, other)                lab.train's runs, any stages, seeds as a band
curves({"full": run, "LoRA": other}, metrics=["kl"])

Runs that differ in their seed only are one line of a figure; here is which they are, and what they
are called. Figures take runs, or mappings of names to runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from plotly.subplots import make_subplots

from ..display import format_number, numbered
from ..runs.run import Run
from ..stages import STAGES, read_table
from .frame import colour, thinned_indices
from .ledgers import named
from .plotly_style import Figure, finish, line_style, rounded, safe, symbol, translucent

METRICS: dict[str, list[str]] = read_table(__file__, "metrics.yaml")
"""The title and the unit of a metric's panel."""
DEFAULT_METRICS = (
    *("reward", "gold_reward", "kl", "response_length", "entropy", "loss", "accuracy", "margin"),
)
MAX_DEFAULT_PANELS = 6
MOST_POINTS, FEWEST_POINTS, ALL_POINTS = 400, 24, 2500
"""Of a curve; the last is what all curves of a figure share, about 45 KB."""
MAX_MARKED_POINTS = 40
"""Longer curves have no markers."""


def curves(
    *runs: object, metrics: Sequence[str] | None = None, seeds: bool = True, theme: str = "both"
) -> Figure:
    """Runs over each other, a panel for each metric, all over the same steps.

    Runs that differ in their seed only are one line, their mean, in a band from the lowest to the
    highest (`seeds=False`: a line each); it ends where the first of them does. `metrics`: names
    that the runs logged; without, the first six of DEFAULT_METRICS that they have. Long curves keep
    their peaks. Raises ValueError for a metric that no run has. `theme`: "both" (of JupyterLab's),
    "light" or "dark".
    """
    series = series_of(runs, seeds)
    names = _metrics(series, metrics)
    columns = min(2, len(names))
    rows = math.ceil(len(names) / columns)
    height = 215 * rows
    figure = make_subplots(
        rows,
        columns,
        figure=Figure(),
        shared_xaxes="all",
        subplot_titles=[METRICS.get(n, (safe(n), ""))[0] for n in names],
        vertical_spacing=52 / height if rows > 1 else 0,
        horizontal_spacing=0.12,
    )
    count = len(names) * sum(3 if len(s.runs) > 1 else 1 for s in series)
    most = min(MOST_POINTS, max(FEWEST_POINTS, ALL_POINTS // count))
    words, in_legend = ["Runs over their steps"], set()
    for place, name in enumerate(names):
        panel = {"row": place // columns + 1, "col": place % columns + 1}
        for i, s in enumerate(series):
            lines = [points for points in (steps_of(run, name) for run in s.runs) if points]
            if not lines:
                continue
            listed = s.label not in in_legend
            style = {"legendgroup": s.label, "name": safe(s.label), "showlegend": listed, **panel}
            in_legend.add(s.label)
            words.append(f"{name}, {s.label}: {_draw(figure, lines, i, most, style)}")
        figure.update_yaxes(title={"text": _unit(name, series)}, **panel)
    for column in range(1, columns + 1):
        last = max(p for p in range(len(names)) if p % columns == column - 1) // columns + 1
        figure.update_xaxes(
            title={"text": _step_name(series)}, showticklabels=True, row=last, col=column
        )
    figure.update_layout(hovermode="x unified", annotations=[{"font": {"size": 13}}] * len(names))
    labels = [s.label for s in series]
    return finish(figure, words=words, plot=height, theme=theme, on_top=labels, below=24)


def _metrics(series: Sequence[Series], given: Sequence[str] | None) -> list[str]:
    """The metrics to draw, each of which some run has logged."""
    logged = dict.fromkeys(n for s in series for run in s.runs for n in run.metric_names)
    if not logged:
        raise ValueError("nothing to draw: these runs have logged nothing yet")
    for name in given or ():
        if name not in logged:
            raise ValueError(f"no metric {name!r} in these runs; they have: {', '.join(logged)}")
    usual = [n for n in DEFAULT_METRICS if n in logged] or list(logged)
    return list(dict.fromkeys(given)) if given else usual[:MAX_DEFAULT_PANELS]


def _draw(
    figure: Figure,
    lines: Sequence[Mapping[int, float]],
    i: int,
    most: int,
    style: Mapping[str, object],
) -> str:
    """One series in one panel, thinned to `most` points; → its first and last value in words."""
    steps = sorted(lines[0]) if len(lines) == 1 else sorted(set.intersection(*map(set, lines)))
    if not steps:
        return "no step in common"
    values = [[line[x] for line in lines] for x in steps]
    known = [all(map(math.isfinite, v)) for v in values]
    low, high, mean = (
        [rounded(pick(v)) if real else None for v, real in zip(values, known, strict=True)]
        for pick in (min, max, lambda v: math.fsum(v) / len(v))
    )
    several = len(lines) > 1
    thinned = thinned_indices(*([mean, low, high] if several else [mean]), at_most=most)
    xs = [steps[j] for j in thinned]
    mean, low, high = ([column[j] for j in thinned] for column in (mean, low, high))
    if several:
        _draw_band(figure, xs, low, high, i, style)
    marked = len(xs) <= MAX_MARKED_POINTS
    ranges = [
        f"({format_number(a)} to {format_number(b)})" if a is not None else ""
        for a, b in zip(low, high, strict=True)
    ]
    figure.add_scatter(
        x=xs,
        y=mean,
        mode="lines+markers" if marked else "lines",
        line=line_style(i),
        marker={"symbol": symbol(i), "size": 6} if marked else None,
        customdata=ranges if several else None,
        hovertemplate="%{y:.4g}" + (" %{customdata}" if several else ""),
        **style,
    )
    first, last = (format_number(v) for v in (mean[0], mean[-1]))
    band = f" (seeds: {format_number(low[-1])} to {format_number(high[-1])})" if several else ""
    return f"{first} at step {xs[0]}, {last} at step {xs[-1]}{band}"


def _draw_band(
    figure: Figure,
    xs: Sequence[int],
    low: Sequence[float | None],
    high: Sequence[float | None],
    i: int,
    style: Mapping[str, object],
) -> None:
    """From the lowest seed to the highest, there along the highs and back along the lows."""
    whole = [(x, a, b) for x, a, b in zip(xs, low, high, strict=True) if a is not None]
    figure.add_scatter(
        x=[x for x, *_ in whole] + [x for x, *_ in reversed(whole)],
        y=[b for *_, b in whole] + [a for _, a, _ in reversed(whole)],
        mode="lines",
        line={"width": 0},
        fill="toself",
        fillcolor=translucent(colour(i), 0.2),
        hoverinfo="skip",
        **{**style, "showlegend": False},
    )


def _unit(metric: str, series: Sequence[Series]) -> str:
    """The unit of a metric; of a loss, that of its stages."""
    if metric in ("loss", "eval_loss"):
        specs = (STAGES.get(s.stage) for s in series)
        units = dict.fromkeys(spec.loss_unit for spec in specs if spec and spec.loss_unit)
        return " or ".join(units).replace(" or nats per ", " or ") or METRICS[metric][1]
    return METRICS[metric][1] if metric in METRICS else "value"


def _step_name(series: Sequence[Series]) -> str:
    """What the steps of the runs count: optimizer steps, or iterations of several."""
    specs = [STAGES.get(s.stage) for s in series]
    iterating = dict.fromkeys(spec.title for spec in specs if spec and spec.iterates)
    if not iterating:
        return "optimizer step"
    if all(spec and spec.iterates for spec in specs):
        return "iteration"
    return f"optimizer step ({', '.join(iterating)}: iteration)"


# -- which runs are one line ------------------------------------------------------------------
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
        if not isinstance(run, Run):
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


def _settings(run: Run) -> dict[str, str]:
    """A run's stage, model, data and settings, without its seed and its place."""
    config = run.config
    settings = {k: v for k, v in (config.get("settings") or {}).items() if k not in _NO_SETTING}
    settings |= {f"{k}_model": path for k, path in config.get("models", {}).items()}
    names = ("stage", "model", "data", "specimen")
    whole = {n: config[n] for n in names if n in config} | settings
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
    return numbered(labels)


def steps_of(run: Run, metric: str) -> dict[int, float]:
    """step → value, the last where a step was logged twice; what is no number is NaN."""
    if metric not in run.metric_names:
        return {}
    return {
        step: math.nan if rounded(value) is None else value
        for step, value in zip(*run.series(metric), strict=True)
    }
