"""A chart that lives in a notebook: Python draws it again and again, the page shows the last one.

    chart = Chart()
    showing = Showing(chart, lambda: chart.picture, beside=False)
    for step in range(1000):
        ...
        chart.draw(lambda: line_chart(...))      # costs nothing when it is too early to redraw
    showing.freeze()                             # a picture that stays when the kernel is gone

The picture is a synced trait, deflated: a page that is reloaded asks the kernel for it and has the
whole history back. Nothing here waits for a message from the page (ipykernel delivers none while a
cell runs) and no thread is started: the last picture is sent by the next `draw` or by `flush`.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import anywidget
import ipywidgets
import traitlets

from ..charts.frame import Picture
from ..runs.progress import DisplayHandle, notebook_display

PictureSource: TypeAlias = Picture | Callable[[], Picture]
"""A picture, or what draws it when there is time to."""

SECONDS_BETWEEN = 0.2
# What the wire carries for one chart: 13 kB/s and ten seconds' worth at once make 0.91 MB in the
# busiest minute; the rest of a megabyte is for the script itself.
BYTES_PER_SECOND, CREDIT_SECONDS = 13_000, 10.0
ENVELOPE = 1_500  # bytes that Jupyter's protocol puts around each message
DRAWING_SHARE = 0.02  # of the time goes into drawing, at most: training comes first
STILL_SECONDS = 2.0
NOTE = "A picture of the last state. Run the cell for its controls."
# For a widget, or a progress bar, that no kernel has JupyterLab says "Loading widget…" for ever.
UNLOADED = (
    "<style>.jp-Notebook:has(.lab-still) .lm-Panel.jp-OutputArea-output:not(:has(*)) "
    "{ display: none; }</style>"
)
_HERE = Path(__file__).parent


class LabWidget(anywidget.AnyWidget):
    """A widget of ours: it reads the same every time, so that a saved notebook does not change."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class Chart(LabWidget):
    """Shows a picture of `chart.py` and redraws it; pointer, arrow keys and touch read values.

    `clock` (seconds) is there for tests.
    """

    _esm = _HERE / "chart.js"
    _css = _HERE / "chart.css"
    svg = traitlets.Bytes(help="the live picture, deflated").tag(sync=True)

    def __init__(
        self,
        picture: PictureSource | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        **traits: object,
    ) -> None:
        self._clock = clock
        self._source: PictureSource | None = None
        self._waiting = False
        self._free_at = -math.inf  # when the next redraw may be sent
        self._paid_until = -math.inf  # when the bytes sent so far have been paid for
        super().__init__(**traits)
        if picture is not None:
            self.draw(picture, now=True)

    @property
    def picture(self) -> Picture | None:
        """The last picture given, sent or not."""
        if callable(self._source):
            self._source = self._source()
        return self._source

    def draw(self, picture: PictureSource, now: bool = False) -> None:
        """Show this picture (or what this function draws) as soon as the wire is free.

        At most five a second and 1 MB a minute; one that comes too early is kept, and only the
        last one is ever drawn. `now` sends it whatever went before.
        """
        self._source, self._waiting = picture, True
        if now or self._clock() >= self._free_at:
            self.flush()

    def flush(self) -> None:
        """Send the last picture, if it has not been sent."""
        if not self._waiting:
            return
        self._waiting = False
        start = time.thread_time()
        picture = self.picture
        if picture is None:
            return
        packed = zlib.compress(picture.live.encode())
        self.svg = packed
        drawing = time.thread_time() - start
        now = self._clock()
        seconds = (len(packed) + ENVELOPE) / BYTES_PER_SECOND
        self._paid_until = max(self._paid_until, now - CREDIT_SECONDS) + seconds
        pause = max(SECONDS_BETWEEN, drawing / DRAWING_SHARE)
        self._free_at = max(now + pause, self._paid_until)


def mime_bundle(picture: Picture | None) -> dict[str, str]:
    """What a picture is in a saved notebook: an image, and its last values in words."""
    return {"text/plain": "no picture yet"} if picture is None else picture._repr_mimebundle_()


class Quiet:
    """`with quiet:` around changes that nobody is to react to; inside, it is true."""

    def __init__(self) -> None:
        self._depth = 0

    def __bool__(self) -> bool:
        return self._depth > 0

    def __enter__(self) -> None:
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1


def set_visible(widget: ipywidgets.Widget, visible: bool) -> None:
    display = None if visible else "none"
    if widget.layout.display != display:
        widget.layout.display = display


# -- in a notebook ----------------------------------------------------------------------------
class _Alive(LabWidget):
    """An invisible sign that a widget lives, so that the page hides the picture beside it."""

    _esm = 'export default { render({ el }) { el.classList.add("lab-alive"); } };'
    _css = _HERE / "chart.css"


class _WithNote(ipywidgets.VBox):  # type: ignore[misc]  # ipywidgets has no types
    def __repr__(self) -> str:
        """Where no widget is drawn, as on GitHub, this stands under the picture."""
        return NOTE


class Showing:
    """A widget on the page, so that a saved notebook, reopened without a kernel, shows `still()`.

    `beside`: keep a hidden picture beside the widget from the start, for one that stays (call
    `refresh` when it changes). Without, the widget stands alone until `freeze`: a run that ends.
    Outside a notebook the picture's words are printed.
    """

    def __init__(
        self, widget: ipywidgets.Widget, still: Callable[[], Picture | None], beside: bool = True
    ) -> None:
        self._still = still
        self._refreshed_at = time.monotonic()
        self._picture: DisplayHandle | None = None  # of each output, while it may change
        self._widget: DisplayHandle | None = None
        display = notebook_display()
        if display is None:
            print(mime_bundle(still())["text/plain"])
            return
        if beside:
            self._picture = display(self._marked(), raw=True, display_id=True)
            widget = _WithNote([widget, _Alive()])
        self._widget = display(widget, display_id=True)

    def _marked(self) -> dict[str, str]:
        """The picture with a mark, by which chart.css finds it, and a note."""
        picture = self._still()
        if picture is None or not all(picture.size):
            return mime_bundle(picture)
        html = f"{picture.image('lab-still')}\n<div><small>{NOTE}</small></div>{UNLOADED}"
        return {"text/html": html, "text/plain": picture.words}

    def refresh(self, now: bool = False) -> None:
        """Let the saved picture follow the widget: every two seconds at most, or `now`."""
        at = time.monotonic()
        if self._picture and (now or at - self._refreshed_at >= STILL_SECONDS):
            self._refreshed_at = at
            self._picture.update(self._marked(), raw=True)

    def freeze(self) -> dict[str, str]:
        """Replace the widget by its picture, for good; → the picture as a static bundle."""
        bundle = mime_bundle(self._still())
        if self._picture and self._widget:
            self._picture.update(bundle, raw=True)
            self._widget.update({}, raw=True)  # nothing to show there, nothing to save
        elif self._widget:
            self._widget.update(bundle, raw=True)
        self._picture = self._widget = None
        return bundle

    def _ipython_display_(self) -> None:
        """It is on the page already: as the last value of a cell it shows nothing more."""
