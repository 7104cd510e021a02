"""Over-optimisation: gold reward and proxy over √KL, curves of seeds and the form that fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .frame import colour
from .plotly_style import Figure, finish, safe, translucent

if TYPE_CHECKING:
    from ..overoptimisation import Band, Curve


def overoptimisation(
    groups: Mapping[tuple[str, str], Sequence[Curve]],
    bands: Mapping[tuple[str, str], Band | None],
    theme: str = "both",
) -> Figure:
    """Left gold, right proxy, above the SFT model's. Thin: a seed each, of PPO solid, of best-of-n
    dotted; thick, with its 95 % band over seeds: the form that is fitted."""
    figure, words, labels = Figure(), ["gold reward above the SFT model's, and proxy, over √KL"], []
    names = list(dict.fromkeys(name for name, _ in groups))
    for (name, method), curves in groups.items():
        shade, label = colour(names.index(name)), safe(f"{name}, {method}", 60)
        line = {"color": shade, "dash": "solid" if method == "PPO" else "dot"}
        mine = {"name": label, "legendgroup": label}
        labels.append(label)
        if d := bands[name, method]:
            figure.add_scatter(
                x=np.concatenate([d.d, d.d[::-1]]).round(3),
                y=np.concatenate([d.mean + d.half, (d.mean - d.half)[::-1]]).round(3),
                fill="toself",
                fillcolor=translucent(shade, 0.15),
                line={"width": 0},
                hoverinfo="skip",
                showlegend=False,
                **mine,
            )
            y = d.mean.round(3)
            figure.add_scatter(x=d.d.round(3), y=y, line={**line, "width": 3}, **mine)
        for c in curves:
            kl, proxy, gold = c.gains
            root = np.sqrt(kl.clip(min=0)).round(3)
            for y, axis in ((gold, ""), (proxy, "2")):
                figure.add_scatter(
                    x=root,
                    y=y.round(3),
                    xaxis=f"x{axis}",
                    yaxis=f"y{axis}",
                    line={**line, "width": 1},
                    opacity=0.6,
                    hovertemplate=f"seed {c.seed}: %{{y:.3g}} at √%{{x:.3g}}",
                    showlegend=d is None and not axis and c is curves[0],
                    **mine,
                )
            rise, nats, fall, gain = c.turn
            words.append(
                f"{name}, {method}, seed {c.seed}: gold {rise:+.2f} at {nats:.1f} nats, then "
                f"{-fall:+.2f} while the proxy gained {gain:+.2f}"
            )
    figure.update_traces(mode="lines")
    title = "√KL to the SFT model (√nats per response)"
    figure.update_layout(
        xaxis={"domain": [0, 0.55], "title": {"text": title}},
        xaxis2={"domain": [0.66, 1], "anchor": "y2", "title": {"text": "√KL"}},
        yaxis={"title": {"text": "gold reward above the SFT model's"}},
        yaxis2={"anchor": "x2", "title": {"text": "proxy score above the SFT model's"}},
    )
    return finish(figure, words=words, plot=340, theme=theme, on_top=labels)
