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
    numbers of requests in flight. Symbols are formats."""
    figure, words = Figure(), []
    shapes = {to: symbol(i) for i, to in enumerate(dict.fromkeys(p.to for p in found.points))}
    for i, name in enumerate(dict.fromkeys(p.name for p in found.points)):
        mine = [p for p in found.points if p.name == name]
        line: dict[str, object] = {}
        for axis, of in (
            ("x", [p.usd_per_million for p in mine]),
            ("y", [p.gold_reward for p in mine]),
        ):
            spread = [stdev(values) if len(values) > 1 else 0.0 for values in of]
            line[axis] = [rounded(mean(values)) for values in of]
            line[f"error_{axis}"] = {"array": spread, "thickness": 1, "width": 2}
        figure.add_scatter(
            **line,
            name=safe(name),
            line={**line_style(i), "width": 1.3},
            marker={"size": 9, "symbol": [shapes[p.to] for p in mine]},
            text=[safe(p.to) for p in mine],
            hovertemplate="%{text}: %{y:.4g} at $%{x:.4g}",
        )
        words += [
            f"{name} in {p.to}: gold reward {format_number(mean(p.gold_reward))} at "
            f"${mean(p.usd_per_million):.3g} per million tokens"
            for p in mine
        ]
    where = f"{found.larger} on {found.hardware}"
    for to in dict.fromkeys(p.to for p in found.predicted):
        points = [p for p in found.predicted if p.to == to]
        figure.add_scatter(
            x=[rounded(p.usd_per_million) for p in points],
            y=[rounded(1000 * p.seconds) for p in points],
            name=safe(to),
            line={"width": 1.3, "color": NEUTRAL},
            marker={"size": 9, "symbol": shapes[to]},
            text=[f"{p.requests} in flight" for p in points],
            hovertemplate="%{text}: %{y:.3g} ms at $%{x:.3g}",
            xaxis="x2",
            yaxis="y2",
        )
        last = points[-1]
        words.append(
            f"{where} in {to}, {last.requests} in flight, predicted: "
            f"${last.usd_per_million:.3g} per million, {format_number(last.seconds, 's')} a token"
        )
    figure.update_traces(mode="lines+markers")
    figure.update_layout(
        xaxis={"domain": [0, 0.56], "title": {"text": "USD per million tokens, measured here"}},
        yaxis={"title": {"text": "gold reward (0 to 10)"}},
        xaxis2={"domain": [0.68, 1], "anchor": "y2", "type": "log"},
        yaxis2={"anchor": "x2", "type": "log", "title": {"text": "ms per token, predicted"}},
    )
    figure.update_layout(xaxis2={"title": {"text": f"the same, {safe(where)}"}})
    labels = [str(t.name) for t in figure.data]
    return finish(figure, words=words, plot=340, theme=theme, on_top=labels)
