"""The figures people study: runs overlaid, the reward–KL frontier, what was planned beside what was
measured, where the cost goes, how it grows.

    curves(run, other)                       lab.train's runs, any stages, seeds as a band
    frontier(ppo, dpo, lab.best_of_n("tiny"))
    sources(plan, lab.xray(plan), run)       predicted | simulated | measured
    stage_costs(sft, reward, ppo, dpo)       or {"full": plan, "LoRA": other}
    scaling(lab.sweep("model", names))

Each takes runs (or whatever has a `.ledger`), or a mapping of names to them, and gives a plotly
figure with its `words`. `theme`: "both" (of JupyterLab's), "light" or "dark".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from plotly.subplots import make_subplots

from ..display import format_number
from .bars import named, scaling, sources, stage_costs
from .frame import colour
from .plotly_style import (
    NOTHING,
    Figure,
    faint,
    finish,
    kept,
    legend_on_top,
    line_style,
    points_each,
    rounded,
    safe,
    symbol,
)

__all__ = ["curves", "frontier", "scaling", "sources", "stage_costs"]

METRICS = {
    "reward": ("proxy reward", "score of the reward model"),
    "gold_reward": ("gold reward", "points"),
    "kl": ("KL to the reference", "nats per response"),
    "kl_k3": ("KL to the reference (k3)", "nats per response"),
    "response_length": ("response length", "tokens"),
    "entropy": ("entropy", "nats per token"),
    "loss": ("loss", "nats"),
    "accuracy": ("pairs ranked right", "share"),
    "margin": ("implicit reward margin", "nats"),
    "eval_loss": ("held-out loss", "nats"),
    "eval_accuracy": ("held-out pairs ranked right", "share"),
    "kl_coef": ("β", "reward per nat"),
    "policy_clip_fraction": ("policy clipped", "share of tokens"),
    "value_clip_fraction": ("values clipped", "share of tokens"),
    "explained_variance": ("explained variance of the returns", "1 is perfect"),
}
"""What a metric's panel says: title, unit."""
SHOWN = ("reward", "gold_reward", "kl", "response_length", "entropy", "loss", "accuracy", "margin")
PANELS = 6
PER = {"sft": "token", "reward": "pair", "dpo": "pair"}
"""What a stage's loss is an average over."""


# -- which runs are the same but for the seed ---------------------------------------------------
@dataclass(frozen=True)
class Series:
    """One colour of a figure: a run, or runs that differ in their seed only."""

    label: str
    runs: tuple[Any, ...]

    @property
    def stage(self) -> str:
        return self.runs[0].stage


_NO_SETTING = {"seed", "data_seed", "output_dir", "logging_dir", "run_name", "report_to"}


def series_of(runs: Sequence[Any], seeds: bool = True) -> list[Series]:
    """Runs, or mappings of names to runs, as series named after what tells them apart."""
    given = list(named(runs))
    for name, run in given:
        if not (hasattr(run, "metrics") and hasattr(run, "stage")):
            raise ValueError(f"{name or type(run).__name__} is not a run: it has no metrics")
    if not given:
        raise ValueError("nothing to draw: give a run")
    alike: dict[Any, list[Any]] = {}
    for i, (name, run) in enumerate(given):
        key = (name, i) if name or not seeds else tuple(sorted(_facts(run).items()))
        alike.setdefault(key, []).append((name, run))
    groups = []
    for pairs in alike.values():
        different = len({str(run.config.get("seed")) for _, run in pairs}) == len(pairs)
        groups += [pairs] if different else [[pair] for pair in pairs]
    labels = _labels([(pairs[0][0], [run for _, run in pairs]) for pairs in groups])
    return [
        Series(label, tuple(run for _, run in pairs))
        for label, pairs in zip(labels, groups, strict=True)
    ]


def _facts(run: Any) -> dict[str, str]:
    """What a run was told, but for its seed and its place."""
    config = run.config
    told = {k: v for k, v in (config.get("settings") or {}).items() if k not in _NO_SETTING}
    return {
        k: str(v)
        for k, v in {**{n: config.get(n) for n in ("stage", "model", "data")}, **told}.items()
    }


def _labels(groups: list[tuple[str, list[Any]]]) -> list[str]:
    """A name for each: given, or the stage where there are several, and the settings that differ
    from others of the stage where those are few; the run's own name where that says nothing."""
    facts = [_facts(runs[0]) for _, runs in groups]
    stages = [f["stage"] for f in facts]
    labels = []
    for (name, runs), own in zip(groups, facts, strict=True):
        peers = [f for f in facts if f["stage"] == own["stage"]]
        every = dict.fromkeys(k for f in peers for k in f)
        differ = [k for k in every if len({f.get(k) for f in peers}) > 1]
        said = [own["stage"]] if len(set(stages)) > 1 else []
        if 0 < len(differ) <= 3:
            said.append(", ".join(f"{k}={own.get(k, 'default')}" for k in differ))
        elif len(peers) > 1 or not said:
            said.append(own["stage"] if len(runs) > 1 and len(peers) == 1 else runs[0].name)
        said += [f"({len(runs)} seeds)"] if len(runs) > 1 else []
        labels.append(name or " ".join(said))
    for i, label in enumerate(labels):
        if labels.count(label) > 1 and label != groups[i][1][0].name:
            labels[i] = f"{label} {groups[i][1][0].name}"
    return [
        f"{x} ({labels[:i].count(x) + 1})" if x in labels[:i] else x for i, x in enumerate(labels)
    ]


def _steps(run: Any, metric: str) -> dict[int, float]:
    """step → value, the last where a step was logged twice; what is no number is NaN."""
    if metric not in run.metric_names:
        return {}
    return {
        step: math.nan if rounded(value) is None else value
        for step, value in zip(*run.series(metric), strict=True)
    }


# -- curves -------------------------------------------------------------------------------------
def curves(
    *runs: Any, metrics: Sequence[str] | None = None, seeds: bool = True, theme: str = "both"
) -> Figure:
    """Runs over each other, a panel for each metric, all over the same steps.

    Runs that differ in their seed only are one line, their mean, in a band from the lowest to the
    highest (`seeds=False`: a line each); it ends where the first of them does. `metrics`: names
    that the runs logged; without, the first six of SHOWN that they have. Long curves keep their
    peaks. Raises ValueError for a metric that no run has.
    """
    found = series_of(runs, seeds)
    names = _metrics(found, metrics)
    columns = min(2, len(names))
    rows = math.ceil(len(names) / columns)
    height = 215 * rows
    titles = [METRICS.get(n, (safe(n), ""))[0] for n in names]
    figure = make_subplots(
        rows,
        columns,
        figure=Figure(),
        shared_xaxes="all",
        subplot_titles=titles,
        vertical_spacing=52 / height if rows > 1 else 0,
        horizontal_spacing=0.12,
    )
    most = points_each(len(names) * sum(3 if len(s.runs) > 1 else 1 for s in found))
    words, in_legend = ["Runs over their steps"], set()
    for place, name in enumerate(names):
        at = {"row": place // columns + 1, "col": place % columns + 1}
        for i, s in enumerate(found):
            lines = [points for points in (_steps(run, name) for run in s.runs) if points]
            if not lines:
                continue
            style = {
                "legendgroup": s.label,
                "name": safe(s.label),
                "showlegend": s.label not in in_legend,
            }
            in_legend.add(s.label)
            words.append(f"{name}, {s.label}: {_draw(figure, lines, i, most, style, at)}")
        figure.update_yaxes(title={"text": _unit(name, found)}, **at)
    for column in range(1, columns + 1):
        last = max(p for p in range(len(names)) if p % columns == column - 1) // columns + 1
        figure.update_xaxes(
            title={"text": _step_name(found)}, showticklabels=True, row=last, col=column
        )
    figure.update_layout(hovermode="x unified", annotations=[{"font": {"size": 13}}] * len(names))
    finish(figure, words=words, plot=height, theme=theme)
    return legend_on_top(figure, [s.label for s in found], below=24)


def _metrics(found: Sequence[Series], asked: Sequence[str] | None) -> list[str]:
    logged = dict.fromkeys(n for s in found for run in s.runs for n in run.metric_names)
    if not logged:
        raise ValueError("nothing to draw: these runs have logged nothing yet")
    for name in asked or ():
        if name not in logged:
            raise ValueError(f"no metric {name!r} in these runs; they have: {', '.join(logged)}")
    usual = [n for n in SHOWN if n in logged] or list(logged)
    return list(dict.fromkeys(asked)) if asked else usual[:PANELS]


def _draw(
    figure: Figure, lines: list[dict[int, float]], i: int, most: int, style: dict, at: dict
) -> str:
    """One series in one panel; → its first and last value in words."""
    steps = sorted(lines[0]) if len(lines) == 1 else sorted(set.intersection(*map(set, lines)))
    values = [[line[x] for line in lines] for x in steps]
    low, high = (
        [rounded(pick(v)) if all(map(math.isfinite, v)) else None for v in values]
        for pick in (min, max)
    )
    mean = [rounded(math.fsum(v) / len(v)) if all(map(math.isfinite, v)) else None for v in values]
    if not steps:
        return "no step in common"
    several = len(lines) > 1
    keep = kept(*([mean, low, high] if several else [mean]), at_most=most)
    xs, mean, low, high = ([column[j] for j in keep] for column in (steps, mean, low, high))
    if several:
        whole = [(x, a, b) for x, a, b in zip(xs, low, high, strict=True) if a is not None]
        figure.add_scatter(
            x=[x for x, *_ in whole] + [x for x, *_ in reversed(whole)],
            y=[b for *_, b in whole] + [a for _, a, _ in reversed(whole)],
            mode="lines",
            line={"width": 0},
            fill="toself",
            fillcolor=faint(colour(i), 0.2),
            hoverinfo="skip",
            **{**style, "showlegend": False},
            **at,
        )
    marked = len(xs) <= 40
    figure.add_scatter(
        x=xs,
        y=mean,
        mode="lines+markers" if marked else "lines",
        line=line_style(i),
        marker={"symbol": symbol(i), "size": 6} if marked else None,
        customdata=[
            f"({format_number(a)} to {format_number(b)})" if a is not None else ""
            for a, b in zip(low, high, strict=True)
        ]
        if several
        else None,
        hovertemplate="%{y:.4g}" + (" %{customdata}" if several else ""),
        **style,
        **at,
    )
    ends = [format_number(v) for v in (mean[0], mean[-1])]
    band = f" (seeds: {format_number(low[-1])} to {format_number(high[-1])})" if several else ""
    return f"{ends[0]} at step {xs[0]}, {ends[1]} at step {xs[-1]}{band}"


def _unit(metric: str, found: Sequence[Series]) -> str:
    if metric in ("loss", "eval_loss"):
        units = dict.fromkeys(PER[s.stage] for s in found if s.stage in PER)
        return f"nats per {' or '.join(units)}" if units else METRICS[metric][1]
    return METRICS[metric][1] if metric in METRICS else "value"


def _step_name(found: Sequence[Series]) -> str:
    online = {s.stage == "ppo" for s in found}
    if len(online) > 1:
        return "optimizer step (PPO: iteration)"
    return "iteration" if online == {True} else "optimizer step"


# -- the frontier ---------------------------------------------------------------------------------
def frontier(
    *things: Any,
    reward: str = "gold_reward",
    kl: str = "kl",
    root: bool = False,
    theme: str = "both",
) -> Figure:
    """Reward over the distance from the reference: how much a method gets for its nats.

    `things`: runs, mappings of names to runs, and results of `lab.best_of_n`. A run that logged
    both figures is a path, its points growing with the steps, in what it sampled while it trained;
    its end point, large and named, is held out (the run's summary). An SFT run is the reference
    itself. Best-of-n stands at its bound log n − (n−1)/n, at most which it can have moved. `root`:
    over √KL, the axis on which Gao, Schulman and Hilton (Scaling Laws for Reward Model
    Overoptimization, arXiv 2210.10760) find simple laws; an estimate below 0 stands at 0.
    """
    given = list(named(things))
    tables = [(name, t) for name, t in given if hasattr(t, "points")]
    runs = [{name: t} if name else t for name, t in given if not hasattr(t, "points")]
    found = series_of(runs) if runs else []
    title, unit = METRICS.get(reward, (safe(reward), ""))
    words, figure, drawn = [f"{title} over {kl}"], Figure(), 0

    def x(nats: float) -> float | None:
        return rounded(math.sqrt(max(nats, 0.0)) if root else nats)

    for i, s in enumerate(found):
        lines = [*_paths(figure, s, i, reward, kl, x)]
        words += lines or [f"{s.label}: no {reward} and {kl}"]
        drawn += len(lines)
    for i, (name, t) in enumerate(tables, len(found)):
        lines = [*_best_of(figure, name or "best of n", t, i, reward, x)]
        words += lines or [f"{name or 'best of n'}: no {reward}"]
        drawn += len(lines)
    if not drawn:
        raise ValueError(f"nothing to draw: no run has {reward!r} and {kl!r}")
    words += _starts(figure, found, reward)
    right = max(v for t in figure.data for v in t.x if v is not None)
    for t in figure.data:  # a name near the right edge stands on the other side
        if t.mode == "markers+text" and t.x[0] > 0.7 * right:
            t.textposition = t.textposition.replace("center", "left")
    nats = "√nats" if root else "nats"
    figure.update_xaxes(
        title={"text": f"{'√' if root else ''}KL to the reference ({nats} per response)"}
    )
    figure.update_yaxes(title={"text": f"{title} ({unit})" if unit else title})
    figure.update_layout(hovermode="closest")
    finish(figure, words=words, plot=340, theme=theme)
    return legend_on_top(figure, [t.name for t in figure.data if t.showlegend is not False])


def _paths(figure: Figure, s: Series, i: int, reward: str, kl: str, x: Any) -> Iterator[str]:
    """The path of a series, and where each run ended; → words."""
    style = {"legendgroup": s.label, "name": safe(s.label)}
    path = _path(s, reward, kl)
    if path:
        steps, nats, rewards = zip(*path, strict=True)
        size = [
            round(3 + 6 * (step - steps[0]) / max(steps[-1] - steps[0], 1), 1) for step in steps
        ]
        figure.add_scatter(
            x=[x(v) for v in nats],
            y=list(map(rounded, rewards)),
            mode="lines+markers",
            **style,
            line={**line_style(i), "width": 1.3},
            customdata=steps,
            cliponaxis=False,
            marker={"symbol": symbol(i), "size": size, "opacity": 0.75, "line": {"width": 0}},
            hovertemplate="step %{customdata}: %{y:.4g} at %{x:.3g}",
        )
        yield (
            f"{s.label}, step {steps[-1]}: {reward} {format_number(rewards[-1])} at "
            f"{format_number(nats[-1])} nats"
        )
    # An SFT model is the reference: it has moved by nothing.
    ends = [
        (0.0 if run.stage == "sft" else run.summary.get(kl), run.summary.get(reward))
        for run in s.runs
    ]
    ends = [end for end in ends if all(rounded(v) is not None for v in end)]
    if ends:
        figure.add_scatter(
            x=[x(v) for v, _ in ends],
            y=[rounded(v) for _, v in ends],
            mode="markers+text",
            text=[safe(s.label, 26)] + [""] * (len(ends) - 1),
            cliponaxis=False,
            textposition="bottom center" if i % 2 else "top center",
            showlegend=not path,
            **style,
            marker={
                "symbol": symbol(i),
                "size": 13,
                "color": colour(i),
                "line": {"width": 1.5, "color": NOTHING},
            },
            hovertemplate="held out: %{y:.4g} at %{x:.3g}",
        )
    for nats, value in ends:
        yield (
            f"{s.label}, held out: {reward} {format_number(value)} at {format_number(nats)} nats"
        )


def _starts(figure: Figure, found: Sequence[Series], reward: str) -> Iterator[str]:
    """Where the runs began, at no distance from the reference; → words."""
    said = (
        rounded(run.summary.get(f"before/{reward}"))
        for s in found
        if s.stage != "sft"
        for run in s.runs
    )
    values = [v for v in dict.fromkeys(said) if v is not None]
    if values:
        figure.add_scatter(
            x=[0] * len(values),
            y=values,
            mode="markers",
            name="before training",
            cliponaxis=False,
            marker={"symbol": "star", "size": 12, "color": NOTHING},
            hovertemplate="held out: %{y:.4g}",
        )
        yield f"before training: {reward} {', '.join(map(format_number, values))}"


def _path(s: Series, reward: str, kl: str) -> list[tuple[int, float, float]]:
    """Step, KL and reward: a mean over the runs, where all of them know both."""
    both = [(_steps(run, kl), _steps(run, reward)) for run in s.runs]
    steps = set.intersection(*(set(nats) & set(rewards) for nats, rewards in both))
    count = len(both)
    path = [
        (
            step,
            math.fsum(n[step] for n, _ in both) / count,
            math.fsum(r[step] for _, r in both) / count,
        )
        for step in sorted(steps)
    ]
    path = [point for point in path if all(map(math.isfinite, point))]
    if not path:
        return []
    _, nats, rewards = zip(*path, strict=True)
    return [path[j] for j in kept(nats, rewards, at_most=120)]


def _best_of(figure: Figure, name: str, table: Any, i: int, reward: str, x: Any) -> Iterator[str]:
    fields = {"reward": ("reward", "reward_error"), "gold_reward": ("gold_reward", "gold_error")}
    value, error = fields.get(reward, ("", ""))
    points = [p for p in table.points if rounded(getattr(p, value, None)) is not None]
    if not points:
        return
    figure.add_scatter(
        x=[x(p.kl_bound) for p in points],
        y=[rounded(getattr(p, value)) for p in points],
        error_y={
            "type": "data",
            "thickness": 1.2,
            "width": 3,
            "array": [rounded(getattr(p, error)) or 0 for p in points],
        },
        mode="lines+markers+text",
        name=safe(f"{name} (KL: at most)"),
        line=line_style(i),
        text=[f"n={p.n}" for p in points],
        textposition="top left",
        cliponaxis=False,
        marker={"symbol": symbol(i), "size": 8},
        hovertemplate="%{text}: %{y:.4g} at no more than %{x:.3g}",
    )
    yield f"{name}: " + "; ".join(
        f"n={p.n} {reward} {format_number(getattr(p, value))} at no more than "
        f"{format_number(p.kl_bound)} nats"
        for p in points
    )
