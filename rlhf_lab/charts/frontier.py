"""How much reward a method gets for its distance from the reference: a plotly figure.

frontier(ppo, dpo, lab.best_of_n("tiny"))
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

from ..display import format_number
from .colours import NEUTRAL
from .curves import METRICS, Series, series_of, steps_of
from .frame import colour, thinned_indices
from .ledgers import named
from .plotly_style import Figure, finish, line_style, rounded, safe, symbol

if TYPE_CHECKING:
    from ..studies import BestOfN


class _Axes(NamedTuple):
    """Which figures are drawn over each other, and whether KL is drawn as its root."""

    reward: str
    kl: str
    root: bool

    def x(self, nats: float) -> float | None:
        return rounded(math.sqrt(max(nats, 0.0)) if self.root else nats)

    @property
    def x_title(self) -> str:
        return f"{'√' * self.root}KL to the reference ({'√' * self.root}nats per response)"


def frontier(
    *things: object,
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
    `theme`: "both" (of JupyterLab's), "light" or "dark".
    """
    tables: list[tuple[str, BestOfN]] = []
    runs: list[object] = []
    for name, thing in named(things):
        if _is_best_of_n(thing):
            tables.append((name or "best of n", thing))
        else:
            runs.append({name: thing} if name else thing)
    series = series_of(runs) if runs else []
    axes, figure = _Axes(reward, kl, root), Figure()
    title, unit = METRICS.get(reward, (safe(reward), ""))
    words = [f"{title} over {kl}"]
    for i, s in enumerate(series):
        lines = [*_add_path(figure, s, i, axes), *_add_ends(figure, s, i, axes)]
        words += lines or [f"{s.label}: no {reward} and {kl}"]
    for i, (name, table) in enumerate(tables, len(series)):
        words += list(_add_best_of_n(figure, name, table, i, axes)) or [f"{name}: no {reward}"]
    if not figure.data:
        raise ValueError(f"nothing to draw: no run has {reward!r} and {kl!r}")
    words += _add_starts(figure, series, reward)
    figure.update_xaxes(title={"text": axes.x_title})
    figure.update_yaxes(title={"text": f"{title} ({unit})" if unit else title})
    figure.update_layout(hovermode="closest")
    labels = [t.name for t in figure.data if t.showlegend is not False]
    return finish(figure, words=words, plot=340, theme=theme, on_top=labels)


def _is_best_of_n(thing: object) -> TypeGuard[BestOfN]:
    return hasattr(thing, "points")


def _add_path(figure: Figure, s: Series, i: int, axes: _Axes) -> Iterator[str]:
    """The path of a series while it trained; → words."""
    path = _path(s, axes)
    if not path:
        return
    steps, nats, rewards = zip(*path, strict=True)
    size = [round(3 + 6 * (step - steps[0]) / max(steps[-1] - steps[0], 1), 1) for step in steps]
    figure.add_scatter(
        x=[axes.x(v) for v in nats],
        y=list(map(rounded, rewards)),
        mode="lines+markers",
        name=safe(s.label),
        legendgroup=s.label,
        line={**line_style(i), "width": 1.3},
        customdata=steps,
        cliponaxis=False,
        marker={"symbol": symbol(i), "size": size, "opacity": 0.75, "line": {"width": 0}},
        hovertemplate="step %{customdata}: %{y:.4g} at %{x:.3g}",
    )
    end = f"{format_number(rewards[-1])} at {format_number(nats[-1])} nats"
    yield f"{s.label}, step {steps[-1]}: {axes.reward} {end}"


def _add_ends(figure: Figure, s: Series, i: int, axes: _Axes) -> Iterator[str]:
    """Where each run of a series ended, on held-out prompts; → words."""
    ends: list[tuple[float, float]] = []
    for run in s.runs:
        # An SFT model is the reference: it has moved by nothing.
        nats = 0.0 if run.stage == "sft" else run.summary.get(axes.kl, math.nan)
        reward = run.summary.get(axes.reward, math.nan)
        if rounded(nats) is not None and rounded(reward) is not None:
            ends.append((nats, reward))
    if not ends:
        return
    figure.add_scatter(
        x=[axes.x(v) for v, _ in ends],
        y=[rounded(v) for _, v in ends],
        mode="markers",
        cliponaxis=False,
        name=safe(s.label),
        legendgroup=s.label,
        showlegend=not any(t.legendgroup == s.label for t in figure.data),
        marker={
            **{"symbol": symbol(i), "size": 13, "color": colour(i)},
            "line": {"width": 1.5, "color": NEUTRAL},
        },
        hovertemplate="held out: %{y:.4g} at %{x:.3g}",
    )
    for nats, value in ends:
        end = f"{format_number(value)} at {format_number(nats)} nats"
        yield f"{s.label}, held out: {axes.reward} {end}"


def _add_starts(figure: Figure, series: Sequence[Series], reward: str) -> Iterator[str]:
    """Where the runs began, at no distance from the reference; → words."""
    starts = (
        rounded(run.summary.get(f"before/{reward}"))
        for s in series
        if s.stage != "sft"
        for run in s.runs
    )
    values = [v for v in dict.fromkeys(starts) if v is not None]
    if values:
        figure.add_scatter(
            x=[0] * len(values),
            y=values,
            mode="markers",
            name="before training",
            cliponaxis=False,
            marker={"symbol": "star", "size": 12, "color": NEUTRAL},
            hovertemplate="held out: %{y:.4g}",
        )
        yield f"before training: {reward} {', '.join(map(format_number, values))}"


def _path(s: Series, axes: _Axes) -> list[tuple[int, float, float]]:
    """Step, KL and reward: a mean over the runs, where all of them know both."""
    both = [(steps_of(run, axes.kl), steps_of(run, axes.reward)) for run in s.runs]
    steps = set.intersection(*(set(nats) & set(rewards) for nats, rewards in both))
    path = [
        (
            step,
            math.fsum(nats[step] for nats, _ in both) / len(both),
            math.fsum(rewards[step] for _, rewards in both) / len(both),
        )
        for step in sorted(steps)
    ]
    path = [point for point in path if all(map(math.isfinite, point))]
    if not path:
        return []
    _, nats, rewards = zip(*path, strict=True)
    return [path[j] for j in thinned_indices(nats, rewards, at_most=120)]


def _add_best_of_n(figure: Figure, name: str, table: BestOfN, i: int, axes: _Axes) -> Iterator[str]:
    """Best of several n at the KL that each can have moved at most; → words."""
    fields = {"reward": ("reward", "reward_error"), "gold_reward": ("gold_reward", "gold_error")}
    value, error = fields.get(axes.reward, ("", ""))
    points = [p for p in table.points if rounded(getattr(p, value, None)) is not None]
    if not points:
        return
    errors = [rounded(getattr(p, error)) or 0 for p in points]
    figure.add_scatter(
        x=[axes.x(p.kl_bound) for p in points],
        y=[rounded(getattr(p, value)) for p in points],
        error_y={"type": "data", "thickness": 1.2, "width": 3, "array": errors},
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
        f"n={p.n} {axes.reward} {format_number(getattr(p, value))} at no more than "
        f"{format_number(p.kl_bound)} nats"
        for p in points
    )
