"""What the course's studies found, as plotly figures: ways at equal cost, over-optimisation, and
gold reward against the price of an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import TYPE_CHECKING

import numpy as np
from plotly.subplots import make_subplots

from ..display import format_number
from .colours import NEUTRAL
from .frame import colour
from .plotly_style import Figure, finish, line_style, rounded, safe, symbol, translucent

if TYPE_CHECKING:
    from ..equal_cost import EqualBudget
    from ..frontiers import ServingFrontier
    from ..overoptimisation import Array, Band, Curve


def _over_seeds(axis: str, points: Sequence[Sequence[float]]) -> dict[str, object]:
    """Means of points over seeds, and as bars their standard deviations: 0 for one seed."""
    spread = [stdev(seeds) if len(seeds) > 1 else 0 for seeds in points]
    bars = {"array": spread, "thickness": 1, "width": 2}
    return {axis: [rounded(mean(seeds)) for seeds in points], f"error_{axis}": bars}


QUANTITIES = {"seconds": "seconds", "flops": "FLOPs", "dollars": "USD, labels included"}


def equal_budget_figure(found: EqualBudget, theme: str = "both") -> Figure:
    """A panel for each quantity, a line for each way: the means over seeds of its points, with
    their standard deviations. Dotted: the budgets at which the ways are compared."""
    figure, words = make_subplots(1, 3, figure=Figure(), shared_yaxes=True), [found.answer]
    for column, (quantity, title) in enumerate(QUANTITIES.items(), 1):
        for i, (way, traces) in enumerate(found.ways.items()):
            by_point = list(zip(*(t.points for t in traces.values()), strict=True))
            gold = [[p.gold_reward for p in point] for point in by_point]
            spent = [mean(found.spent(p, quantity) for p in point) for point in by_point]
            figure.add_scatter(
                x=[rounded(x) for x in spent],
                **_over_seeds("y", gold),
                name=safe(way),
                legendgroup=way,
                showlegend=column == 1,
                mode="lines+markers",
                line=line_style(i),
                marker={"symbol": symbol(i), "size": 6},
                row=1,
                col=column,
            )
            last = f"{mean(gold[-1]):.2f} at {format_number(spent[-1])} {title}"
            words.append(f"{way}: gold reward {last}")
        for budget in found.budgets(quantity):
            line = {"dash": "dot", "width": 1, "color": NEUTRAL}
            figure.add_vline(budget, line=line, row=1, col=column)
        # SI's prefixes: plotly's own of a milliard is B, which is no GFLOP.
        figure.update_xaxes(title={"text": title}, exponentformat="SI", row=1, col=column)
    figure.update_yaxes(title={"text": "gold reward (0 to 10)"}, row=1, col=1)
    return finish(figure, words=words, plot=320, theme=theme, on_top=[*found.ways])


def overoptimisation(
    groups: Mapping[tuple[str, str], Sequence[Curve]],
    bands: Mapping[tuple[str, str], Band | None],
) -> Figure:
    """Left gold, right proxy, above the SFT model's. Thin: a seed each, of PPO solid, of best-of-n
    dotted; thick, with its 95 % band over seeds: the form that is fitted."""
    figure, words, labels = Figure(), ["gold reward above the SFT model's, and proxy, over √KL"], []
    names = list(dict.fromkeys(name for name, _ in groups))
    for (name, method), curves in groups.items():
        shade, d = colour(names.index(name)), bands[name, method]
        label = safe(f"{name}, {method}", 60)
        line = {"color": shade, "dash": "solid" if method == "PPO" else "dot"}
        labels.append(label)

        def add(x: Array, y: Array, axis: str = "", name: str = label, /, **how: object) -> None:
            at = {"xaxis": f"x{axis}", "yaxis": f"y{axis}", "name": name, "legendgroup": name}
            figure.add_scatter(x=x.round(3), y=y.round(3), mode="lines", **at, **how)

        if d:
            around = np.concatenate([d.mean + d.half, (d.mean - d.half)[::-1]])
            area = {"fill": "toself", "fillcolor": translucent(shade, 0.15), "line": {"width": 0}}
            add(
                np.concatenate([d.d, d.d[::-1]]), around, showlegend=False, hoverinfo="skip", **area
            )
            add(d.d, d.mean, line={**line, "width": 3})
        for c in curves:
            kl, proxy, gold = c.gains
            root, thin = np.sqrt(kl.clip(min=0)), {"line": {**line, "width": 1}, "opacity": 0.6}
            add(root, gold, showlegend=d is None and c is curves[0], **thin)
            add(root, proxy, "2", showlegend=False, **thin)
            rise, nats, fall, gain = c.turn
            words.append(
                f"{name}, {method}, seed {c.seed}: gold {rise:+.2f} at {nats:.1f} nats, then "
                f"{-fall:+.2f} while the proxy gained {gain:+.2f}"
            )
    figure.update_layout(
        xaxis={"domain": [0, 0.55], "title": {"text": "√KL to the SFT model (√nats per response)"}},
        xaxis2={"domain": [0.66, 1], "anchor": "y2", "title": {"text": "√KL"}},
        yaxis={"title": {"text": "gold reward above the SFT model's"}},
        yaxis2={"anchor": "x2", "title": {"text": "proxy score above the SFT model's"}},
    )
    return finish(figure, words=words, plot=340, on_top=labels)


def serving_frontier(found: ServingFrontier) -> Figure:
    """Left what was measured, a line for each model through its formats, means and standard
    deviations over seeds; right what is predicted of a larger model: a line for each format through
    numbers of requests in flight. Symbols are formats."""
    figure, words = Figure(), []
    shapes = {to: symbol(i) for i, to in enumerate(dict.fromkeys(p.to for p in found.points))}
    for i, name in enumerate(dict.fromkeys(p.name for p in found.points)):
        mine = [p for p in found.points if p.name == name]
        figure.add_scatter(
            **_over_seeds("x", [p.usd_per_million for p in mine]),
            **_over_seeds("y", [p.gold_reward for p in mine]),
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
    return finish(figure, words=words, plot=340, on_top=labels)
