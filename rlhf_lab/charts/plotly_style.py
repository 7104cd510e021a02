"""How plotly figures look, their content in words, and what a notebook keeps of them.

In JupyterLab a figure is saved as data only, which JupyterLab's own extension draws: no copy of
plotly.js (5 MB) goes into the notebook. The background is transparent and text mid-grey, so that a
saved figure reads in the light theme and in the dark one. Names, which may be anybody's, are shown
letter by letter.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence

import plotly.graph_objects as go

from ..display import SI, check_choice
from ..runs.ledger import UNITS
from ..stages import read_table
from .frame import COLOURS, DASHES, GREY_GRID, GREY_TEXT, colour, text_width

MIME = "application/vnd.plotly.v1+json"
_DRAWN_BY_JUPYTER = {"plotly_mimetype", "jupyterlab", "vscode", "nteract"}
_CONFIG = {"displaylogo": False}
"""Not responsive: JupyterLab resizes figures itself; with both they vanish when themes change."""

_LOOKS = read_table(__file__, "looks.yaml")
THEMES = {
    "both": (GREY_TEXT, GREY_GRID),
    "light": ("#222222", "#DDDDDD"),
    "dark": ("#E6E6E6", "#3F3F3F"),
}
"""Text and grid."""
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "pentagon")
DIGITS = 5


class Figure(go.Figure):  # type: ignore[misc]  # plotly has no types
    """A plotly figure that has its content in words, and that keeps notebooks small."""

    @property
    def words(self) -> str:
        """The figure's content as plain text."""
        return str(self.layout.meta or "")

    def __repr__(self) -> str:
        return self.words or str(super().__repr__())

    def _repr_mimebundle_(
        self, include: object = None, exclude: object = None, **options: object
    ) -> dict[str, object]:
        if not _jupyter_draws():
            return dict(super()._repr_mimebundle_(include, exclude, **options))
        return {MIME: {**json.loads(self.to_json()), "config": _CONFIG}, "text/plain": self.words}

    def _ipython_display_(self) -> None:
        if not _jupyter_draws():  # Colab has its own way, a terminal opens a browser
            super()._ipython_display_()
            return
        from IPython.display import display

        display(self._repr_mimebundle_(), raw=True)  # type: ignore[no-untyped-call]

    def show(self, *args: object, **options: object) -> None:
        """plotly's `show`; without arguments the figure looks as it does at the end of a cell."""
        if args or options or not _jupyter_draws():
            super().show(*args, **options)
        else:
            self._ipython_display_()


def _jupyter_draws() -> bool:
    """Whether plotly found itself in JupyterLab; before 7.0 it adds "+notebook" there, which is the
    copy of plotly.js."""
    import plotly.io as pio

    return bool(_DRAWN_BY_JUPYTER & set(str(pio.renderers.default).split("+")))


ABOVE, BELOW = 34, 48
"""px around the plot: for the buttons that appear on hovering, for ticks and the axis' title."""


def finish(
    figure: Figure,
    *,
    words: Sequence[str],
    plot: int,
    theme: str = "both",
    on_top: Sequence[str] = (),
    below: int = 6,
) -> Figure:
    """Add the looks that all figures share, and its `words`. `plot`: height without margins, px.

    `on_top`: the entries of a legend that stands above the plot, `below`: px between the two.
    """
    check_choice("theme", theme, THEMES)
    text, grid = THEMES[theme]
    figure.update_layout(_LOOKS["layout"])
    figure.update_layout(
        template=go.layout.Template(),
        height=plot + ABOVE + BELOW,
        font_color=text,
        margin={"t": ABOVE, "b": BELOW},
        hoverlabel_bordercolor=text,
        modebar={"color": text, "activecolor": COLOURS[0]},
        meta="\n".join(plain(line) for line in words),
    )
    axis = {"gridcolor": grid, "zerolinecolor": grid, "linecolor": text, "tickcolor": text}
    figure.update_xaxes(_LOOKS["axis"] | _LOOKS["x"], **axis)
    figure.update_yaxes(_LOOKS["axis"], showgrid=True, **axis)
    if on_top:
        _put_legend_on_top(figure, on_top, plot, below)
    return figure


def _put_legend_on_top(figure: Figure, labels: Sequence[str], plot: int, below: int) -> None:
    """Above the plot, whose width it leaves alone; entries stand in columns as wide as the
    longest."""
    widest = max(text_width(html.unescape(safe(x)), 12) for x in labels) + 50
    room = ABOVE + 20 * math.ceil(len(labels) / max(1, 600 // widest)) + below
    figure.update_layout(
        height=plot + room + BELOW,
        margin={"t": room},
        legend={"orientation": "h", "x": 0, "y": 1 + below / plot, "yanchor": "bottom"},
    )


# -- words and numbers ------------------------------------------------------------------------
_READ = {c: f"&#{ord(c)};" for c in "<>&$%{}"}


def plain(text: object) -> str:
    """One line without control characters: a terminal would obey them."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))


def safe(text: object, room: int = 40) -> str:
    """A text, as plotly shows it letter by letter, cut where it is longer than `room`.

    plotly reads a subset of HTML, entities, TeX between dollars and %{…} in hover texts.
    """
    line = " ".join(str(text).split())
    line = line if len(line) <= room else line[: room - 1].rstrip() + "…"
    return "".join(_READ.get(c, c) for c in plain(line))


def rounded(value: float | None) -> float | None:
    """Five digits are more than a screen shows; None, a gap, for what is no number."""
    known = value is not None and math.isfinite(value) and abs(value) < 1e200
    return float(f"{value:.{DIGITS}g}") if known else None


_SIZES = {
    **_LOOKS["units"],
    "sent": _LOOKS["units"]["bytes"],
    "flops": [(size, size, f"{prefix}FLOP") for size, prefix in SI],
    "tokens": [(size, size, f"{prefix} tokens") for size, prefix in SI],
}


def unit_of(quantity: str, top: float) -> tuple[str, float]:
    """→ the unit in which an axis up to `top` reads well, and its size."""
    for least, size, name in _SIZES.get(quantity, ()):
        if top >= least:
            return name.strip(), size
    return UNITS[quantity], 1.0


# -- series -----------------------------------------------------------------------------------
def line_style(index: int) -> dict[str, object]:
    """Colour and dash of a series; forty before a pair repeats."""
    dash = DASHES[index % len(DASHES)]
    return {
        "color": colour(index),
        "width": 2,
        "dash": ",".join(f"{n}px" for n in dash.split()) or "solid",
    }


def symbol(index: int) -> str:
    return SYMBOLS[index % len(SYMBOLS)]


def translucent(hex_colour: str, opacity: float) -> str:
    """The colour with an opacity, from 0 to 1."""
    red, green, blue = (int(hex_colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"
