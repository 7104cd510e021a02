"""Over-optimisation: gold reward and proxy over √KL, curves of seeds and the form that fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .frame import colour
from .plotly_style import Figure, finish, safe, translucent

if TYPE_CHECKING:
    from ..overoptimisation import Array, Band, Curve


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
    return finish(figure, words=words, plot=340, theme=theme, on_top=labels)
