"""The live dashboard of a training: its curves, memory and time, drawn while it runs.

It reads the run's files and a ledger, and never a trainer. Redraws take at most `DRAWING_SHARE` of
the time. `Replay` draws a run on disk with the same charts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import ipywidgets as w
import traitlets

from ..charts.chart import ChartSize, line_chart
from ..charts.frame import Picture, grid
from ..charts.memory import role_memory_chart
from ..charts.views import ChartSpec, charts_of, known_series, metric_chart, time_stacks
from ..display import escape, format_bytes, format_number, format_seconds, table
from ..runs.health import health
from ..runs.ledger import Ledger
from ..runs.progress import Pace, notebook_display
from ..runs.run import Run
from .live import Chart, LabWidget, Showing, set_visible

DRAWING_SHARE = 0.015
"""Share of the time that goes into drawing, at most."""
SECONDS_BETWEEN = 0.2

SIZE: ChartSize = {"width": 400, "height": 230}
"""px of each chart"""
_HERE = Path(__file__).parent


class StopButton(LabWidget):
    """Ends training: by a message where the kernel listens, by an interrupt where it is busy."""

    _esm = _HERE / "stop.js"
    label = traitlets.Unicode("Stop").tag(sync=True)
    off = traitlets.Bool(False).tag(sync=True)
    clicks = traitlets.Int(0).tag(sync=True)
    kernel = traitlets.Unicode("", help="which to interrupt; empty: it listens").tag(sync=True)


class Dashboard:
    """Curves, memory and time of one training.

    `limit`: bytes of the machine's memory. `stop`: what the button calls where training runs in a
    thread; without it the button interrupts the kernel.
    """

    _picture_beside = False
    """whether a picture stands beside the widget while it lives"""

    def __init__(
        self,
        stage: str,
        model: str = "",
        *,
        limit: float | None = None,
        stop: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stage, self.model, self.limit = stage, model, limit
        self.run: Run | None = None
        self._ledger: Callable[[], Ledger] = Ledger
        self._clock, self._free_at = clock, 0.0
        self._showing: Showing | None = None
        self._last_step_drawn: float = math.inf
        self._pace, self._state = Pace(None, stage, clock), "starting"
        self._over = False  # nothing more is logged: a chart without data stays so
        self.button = StopButton(kernel="" if stop else kernel_id())
        if stop is not None:
            self.button.observe(lambda _: stop(), names="clicks")
        self.specs = charts_of(stage)
        self.charts = {spec.title: Chart(_empty(spec)) for spec in self.specs}
        self.memory, self.time = Chart(), Chart()
        self.status, self.health = w.HTML(), w.HTML()
        self.widget = self._layout()
        self.refresh(now=True)

    def _layout(self) -> w.Widget:
        head = w.HBox([self.button, self.status], layout={"align_items": "center"})
        open_charts = [self.charts[spec.title] for spec in self.specs if not spec.folded]
        folded = [self.charts[spec.title] for spec in self.specs if spec.folded]
        parts = [head, self.health, _wrapping([*open_charts, self.memory, self.time])]
        self._more = w.Accordion([_wrapping(folded)] if folded else [], selected_index=None)
        return w.VBox([*parts, self._more])

    # ------------------------------------------------------------------- called by who trains

    def display(self) -> Dashboard:
        self._showing = Showing(self.widget, self.still, self._picture_beside)
        return self

    def say(self, state: str) -> None:
        """What is going on while nothing is counted."""
        self._state = state
        self._show_status()

    def open(self, run: Run, ledger: Callable[[], Ledger] | None = None) -> None:
        """Draw this run from now on; `ledger()`: its costs so far, predicted and measured."""
        self.run, self._ledger = run, ledger or (lambda: run.ledger)
        self.refresh(now=True)

    def follow(self, total: int | None, done: int = 0) -> Dashboard:
        """Count from `done` up to `total` with `update`, until `close`."""
        self._pace, self._state = Pace(total, self.stage, self._clock, done), ""
        self.refresh(now=True)
        return self

    def update(self, n: int = 1, note: str = "") -> None:
        self._pace.count(n, note)
        self.refresh()

    def close(self) -> None:
        """The loop is over; evaluation and saving may follow."""
        self._pace.closed = True
        self.button.off = True
        self._state = "evaluating and saving"
        self.refresh(now=True)

    def kernel_waits(self, waiting: bool) -> None:
        """Whether the kernel is busy waiting for this training, so that it gets no message: the
        button then interrupts it."""
        self.button.kernel = kernel_id() if waiting else ""

    def end(self, error: str = "") -> None:
        """Put a picture in the place of the widget; nothing where there was nothing to draw."""
        self.button.off = self._over = True
        if error:
            self._state = f"failed: {error}"
        elif self.run is not None:
            self._state = f"{self.run.status}, in {self.run.folder}"
        self.refresh(now=True)
        if self._showing is not None:
            self._showing.freeze()
        self.widget.close()

    # --------------------------------------------------------------------------------- drawing

    def refresh(self, now: bool = False) -> None:
        """Draw what there is, unless the last drawing was too recent; `now` draws anyway."""
        start = self._clock()
        if start < self._free_at and not now:
            return
        self._show_status()
        if self.run is not None:
            for spec in self.specs:
                picture = metric_chart(self.run, spec, self._last_step_drawn, **SIZE)
                self.charts[spec.title].draw(picture or _empty(spec), now)
            found = health(self.run, self._last_step_drawn)
            line = f"<small>health: {escape(found.headline)}</small>"
            self.health.value = line if found.known else ""
        ledger, done = self._ledger(), self._pace.share
        self.memory.draw(role_memory_chart(ledger, self.limit, **SIZE), now)
        self.time.draw(time_stacks(ledger, 1.0 if done is None else done, **SIZE), now)
        self._show_charts(ledger)
        end = self._clock()
        self._free_at = end + max(SECONDS_BETWEEN, (end - start) / DRAWING_SHARE)

    def _show_charts(self, ledger: Ledger) -> None:
        """All while more may come; of a run that is over those that have something to show."""
        run, over = self.run, self._over
        logged = {s.title for s in self.specs if run and known_series(run, s.metrics)}
        known = logged if over else {*self.charts}
        for title, chart in self.charts.items():
            set_visible(chart, title in known)
        for chart, quantity in ((self.memory, "bytes"), (self.time, "seconds")):
            set_visible(chart, not over or bool(ledger.training(quantity=quantity)))
        folded = [spec.title for spec in self.specs if spec.folded and spec.title in known]
        set_visible(self._more, bool(folded))
        if folded:
            self._more.set_title(0, f"More: {', '.join(folded)}")

    @property
    def headline(self) -> str:
        """`ppo of tiny  12/44  27%  elapsed 0:09  ETA 0:24  reward 1.20`, in a line."""
        line = self._pace.line() if self._pace.total is not None else ""
        parts = [f"{self.stage} of {self.model}", line.removeprefix(self.stage).strip()]
        return "  ".join(filter(None, [*parts, self._state]))

    def _show_status(self) -> None:
        self.status.value = f"<b>{escape(self.headline)}</b>"

    def still(self) -> Picture:
        """All that is not folded away, as one picture."""
        charts = [self.charts[spec.title] for spec in self.specs if not spec.folded]
        visible = [c for c in (*charts, self.memory, self.time) if c.layout.display != "none"]
        pictures = [c.picture for c in visible or [self.time]]  # the headline is worth a picture
        return grid([p for p in pictures if p is not None], columns=2, title=self.headline)

    def __repr__(self) -> str:
        """The same numbers as a table."""
        rows = [] if self.run is None else last_values(self.run, self.specs)
        values = table(rows) if rows else "nothing logged yet"
        return "\n".join([self.headline, values, cost_line(self._ledger())])


class Replay(Dashboard):
    """A run on disk, as its dashboard was: a slider goes through its steps, ▶ plays them."""

    run: Run
    _picture_beside = True

    def __init__(self, run: Run, limit: float | None = None) -> None:
        super().__init__(run.stage, str(run.config.get("model", "")), limit=limit)
        last = run.last_step
        span = {"value": last, "min": 0, "max": max(last, 1)}
        self.slider = w.IntSlider(**span, description="to step", continuous_update=True)
        # The link sets the slider to the player's value as soon as a page shows them.
        play = w.Play(**span, step=max(1, last // 60), interval=200, description="play")
        w.jslink((play, "value"), (self.slider, "value"))
        self.slider.observe(self._moved, names="value")
        self.again = w.Button(description="Read again", tooltip="look for what was logged since")
        self.again.on_click(lambda _: self._read())
        head = w.HBox(
            [play, self.slider, self.again, self.status],
            layout={"align_items": "center", "flex_flow": "row wrap"},
        )
        self.widget = w.VBox([head, *self.widget.children[1:]])
        self._state, self._over = run.status, run.status != "running"
        self.open(run)

    def _moved(self, change: dict[str, int]) -> None:
        self._last_step_drawn = change["new"]
        self.refresh(now=True)
        if self._showing is not None:
            self._showing.refresh()

    def _read(self) -> None:
        """What a run that is still being written has logged since."""
        self._state, self._over = self.run.status, self.run.status != "running"
        self.slider.max = max(self.run.last_step, 1)
        self.slider.value = self.slider.max
        self.refresh(now=True)

    def _ipython_display_(self) -> None:
        self.display()


# ------------------------------------------------------------------------------------------ parts


def kernel_id() -> str:
    """Which kernel this is, as a Jupyter server names it; empty where that is not known."""
    if notebook_display() is None:
        return ""
    try:
        from ipykernel.connect import get_connection_file

        return Path(get_connection_file()).stem.removeprefix("kernel-")
    except RuntimeError:  # a kernel inside another program has no file of its own
        return ""


def last_values(run: Run, specs: tuple[ChartSpec, ...]) -> list[dict[str, str]]:
    """First and last value of every metric that has a chart."""
    rows = []
    for name, (xs, ys) in known_series(run, [n for s in specs for n in s.metrics]).items():
        first, last = format_number(ys[0]), format_number(ys[-1])
        rows.append({"metric": name, "first": first, "last": last, "step": str(xs[-1])})
    return rows


def cost_line(ledger: Ledger) -> str:
    """Memory and time in a line, predicted and measured; of several processes what one sends."""
    parts = []
    for source in ("predicted", "measured"):
        rows = ledger.filter(source=source)
        if rows:
            figures = [format_bytes(rows.peak())]
            if seconds := rows.training(quantity="seconds"):
                figures.append(format_seconds(seconds.total()))
            if sent := rows.training(quantity="sent"):
                figures.append(f"{format_bytes(sent.total())} sent")
            parts.append(f"{source}: {', '.join(figures)}")
    return "; ".join(parts)


def _empty(spec: ChartSpec) -> Picture:
    return line_chart({}, title=spec.title, x_label="step", y_label=spec.y_label, **SIZE)


def _wrapping(charts: list[Chart]) -> w.Box:
    return w.Box(charts, layout={"display": "flex", "flex_flow": "row wrap"})
