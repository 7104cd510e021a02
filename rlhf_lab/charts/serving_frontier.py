"""Gold reward against dollars per million tokens, and a larger model's price of speed."""

from __future__ import annotations

from statistics import mean, stdev
from typing import TYPE_CHECKING

from ..display import format_number
from .colours import NEUTRAL
from .plotly_style import Figure, finish, line_style, rounded, safe, symbol

if TYPE_CHECKING:
    from ..frontiers import ServingFrontier


def serving_frontier(found: ServingFrontier, theme: str = "both") -> Figure:
    """Left what was measured, a line for each model through its formats, means and standard
    deviations over seeds; right what is predicted of a larger model: a line for each format through
    numbers of requests in flight."""
    figure, words = Figure(), []
    names = dict.fromkeys(p.name for p in found.points)
    formats = list(dict.fromkeys(p.to for p in found.points))
    for i, name in enumerate(names):
        mine = [p for p in found.points if p.name == name]
        columns = [p.usd_per_million for p in mine], [p.gold_reward for p in mine]
        errors = [
            {"type": "data", "thickness": 1, "width": 2, "array": list(map(_spread, column))}
            for column in columns
        ]
        x, y = ([rounded(mean(values)) for values in column] for column in columns)
        figure.add_scatter(
            x=x,
            y=y,
            error_x=errors[0],
            error_y=errors[1],
            name=safe(name),
            mode="lines+markers",
            line={**line_style(i), "width": 1.3},
            marker={"size": 9, "symbol": [symbol(formats.index(p.to)) for p in mine]},
            text=[safe(p.to) for p in mine],
            hovertemplate="%{text}: %{y:.4g} at $%{x:.4g}",
        )
        words += [
            f"{name} in {p.to}: gold reward {format_number(mean(p.gold_reward))} at "
            f"{format_number(mean(p.usd_per_million), 'USD')} per million tokens"
            for p in mine
        ]
    for to in dict.fromkeys(row[0] for row in found.predicted):
        rows = [row for row in found.predicted if row[0] == to]
        place = formats.index(to) if to in formats else len(formats)
        figure.add_scatter(
            x=[rounded(usd) for *_, usd, _ in rows],
            y=[rounded(1000 * seconds) for *_, seconds in rows],
            name=safe(to),
            mode="lines+markers",
            line={"width": 1.3, "color": NEUTRAL},
            marker={"size": 9, "symbol": symbol(place)},
            text=[f"{n} in flight" for _, n, _, _ in rows],
            hovertemplate="%{text}: %{y:.3g} ms at $%{x:.3g}",
            xaxis="x2",
            yaxis="y2",
        )
        _, n, usd, seconds = rows[-1]
        words.append(
            f"{found.larger} in {to} on {found.hardware}, {n} in flight, predicted: "
            f"{format_number(usd, 'USD')} per million tokens, {format_number(seconds, 's')} each"
        )
    figure.update_layout(
        xaxis={"domain": [0, 0.56], "title": {"text": "USD per million tokens, measured here"}},
        yaxis={"title": {"text": "gold reward (0 to 10)"}},
        xaxis2={"domain": [0.68, 1], "anchor": "y2", "type": "log"},
        yaxis2={"anchor": "x2", "type": "log", "title": {"text": "ms per token, predicted"}},
    )
    larger = f"the same, {safe(found.larger)} on {safe(found.hardware)}"
    figure.update_layout(xaxis2={"title": {"text": larger}})
    labels = [str(t.name) for t in figure.data]
    return finish(figure, words=words, plot=340, theme=theme, on_top=labels)


def _spread(values: tuple[float, ...]) -> float:
    return stdev(values) if len(values) > 1 else 0.0
