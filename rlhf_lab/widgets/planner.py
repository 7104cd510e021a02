"""The planner: move a slider, and see what a stage would take before anything runs.

    planner = Planner(lab.plan, stage="ppo", model="Qwen/Qwen2.5-7B", hardware="h100", gpus=8)
    planner                     # controls on the left, the answer on the right

The function that plans is given: this file computes nothing of its own. It imports no torch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import ipywidgets as w
import traitlets

from ..charts.frame import LARGE, Picture, grid, shortened
from ..display import escape, html_table
from ..runs.progress import notebook_display, one_line
from ..stages import Settings
from .live import STILL_SECONDS, Chart, LabWidget, Quiet, Showing, mime_bundle, set_visible
from .planner_answers import FITS, MARKS, REMEDIES, Calculator
from .planner_controls import ALL, CONTROLS, Control, Controls
from .planner_view import WIDTH, figures, no_plan_picture, remedy_text, settings_text

if TYPE_CHECKING:
    from ..planning import Plan

_HERE = Path(__file__).parent
FIGURES_SECONDS, REMEDIES_SECONDS = 0.04, 0.1
"""How long the controls rest before the figures are written, and the changes worked out."""


class CopyButton(LabWidget):
    """Text and a button that copies it; `folded`: behind its label."""

    _esm = _HERE / "copy.js"
    _css = _HERE / "planner.css"
    text = traitlets.Unicode().tag(sync=True)
    label = traitlets.Unicode().tag(sync=True)
    folded = traitlets.Bool(False).tag(sync=True)


class ControlWidgets(Controls):
    """The controls, each with its widget; `box` holds them all. Whichever moves, the widget by hand
    or the value by code, the other follows."""

    def __init__(
        self, settings: Settings, on_change: Callable[[str], None], shown: Settings | None = None
    ) -> None:
        self._quiet = Quiet()
        self.widgets = {name: _widget(control) for name, control in ALL.items()}
        self._titles = {k: w.HTML(f'<div class="lab-group">{k}</div>') for k in CONTROLS}
        parts = []
        for group, controls in CONTROLS.items():
            parts += [self._titles[group], *(self.widgets[k.name] for k in controls)]
        self.extras = w.HBox(layout=w.Layout(flex_flow="row wrap"))
        self.box = w.VBox([*parts, self.extras], layout=w.Layout(width="330px", flex="0 0 auto"))
        self.box.add_class("lab-controls")
        super().__init__(settings, on_change, shown)
        for name, widget in self.widgets.items():
            widget.observe(lambda change, name=name: self._by_hand(name, change["new"]), "value")

    def _by_hand(self, name: str, value: object) -> None:
        if not self._quiet:
            self.move(name, value)

    def _set(self, name: str, value: object) -> None:
        super()._set(name, value)
        widget, options = self.widgets[name], self.options[name]
        with self._quiet, widget.hold_sync():
            if options and list(widget.options) != options:
                widget.options = options
            widget.value = self.values[name]

    def _show_relevant(self) -> None:
        super()._show_relevant()
        for name, matters in self.relevant.items():
            set_visible(self.widgets[name], matters)
        for group, controls in CONTROLS.items():
            set_visible(self._titles[group], any(self.relevant[k.name] for k in controls))
        if [b.description for b in self.extras.children] != list(self.beside.values()):
            self.extras.children = tuple(self._extra(*item) for item in self.beside.items())

    def _extra(self, name: str, text: str) -> w.Button:
        """A setting without a control: a button that takes it back."""
        button = w.Button(description=text, layout=w.Layout(width="auto"))
        set_tooltip(button, f"take {name} back")
        button.on_click(lambda _: self.remove(name))
        return button


def _widget(control: Control) -> w.Widget:
    options = {"description": control.label, "layout": w.Layout(width="322px")}
    options["style"] = {"description_width": "88px"}
    if isinstance(control.start, bool):
        widget = w.Checkbox(value=control.start, indent=True, **options)
    elif not control.choices:
        widget = w.Text(placeholder="folder or owner/name", continuous_update=False, **options)
    else:
        kind = w.SelectionSlider if control.slides else w.Dropdown
        widget = kind(options=control.pairs, value=control.start, **options)
    set_tooltip(widget, control.tip)
    return widget


def set_tooltip(widget: w.Widget, text: str) -> None:
    """What a control means, on hover (ipywidgets 8, then 7)."""
    for name in ("tooltip", "description_tooltip"):
        if text and widget.has_trait(name):
            setattr(widget, name, text)
            return


class Planner(Calculator):
    """Controls for every setting that a cost depends on, and the plan that they make.

    `plan`: the function `plan(stage, model, hardware=…, **settings)`, such as `lab.plan`. `of`: a
    plan to begin with. `state`: arguments of the function, as a start; those without a control are
    kept and shown beside the controls. Why something cannot be planned stands in the widget.
    """

    controls_class = ControlWidgets
    controls: ControlWidgets

    def __init__(self, plan: Callable[..., Plan], of: Plan | None = None, **state: object) -> None:
        super().__init__(plan, of, **state)
        self._last_pictures: tuple[Picture, ...] = ()
        self._showing: Showing | None = None
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self.widget = self._build()
        self.update()
        self._write_figures()
        self._write_remedies()

    # ------------------------------------------------------------------------------ in a notebook

    def _ipython_display_(self) -> None:
        if notebook_display() is None:
            print(self)
            return
        self._showing = Showing(self.widget, self.still)

    def still(self) -> Picture:
        """The answer as a picture, with all figures in words."""
        answer = self._answer()
        line = answer.error or f"{self._summary()}: {FITS[answer.state]}"
        title = shortened(one_line(line), LARGE * 1.2, WIDTH - 20)
        parts = answer.pictures or self._last_pictures or (no_plan_picture(),)
        picture = grid(parts, columns=1, title=title)
        return Picture(str(picture), str(self), picture.live, picture.size)

    def freeze(self) -> dict[str, str]:
        """The answer as a static bundle, which needs no kernel; the widget gives way to it."""
        return self._showing.freeze() if self._showing else mime_bundle(self.still())

    # ---------------------------------------------------------------------------------- its parts

    def _build(self) -> w.Box:
        self.chart = Chart()
        self._pictures = w.VBox([self.chart])
        self._verdict, self._table, self._advice = w.HTML(), w.HTML(), w.HTML()
        self._buttons = [
            w.Button(layout=w.Layout(display="none", width="auto", height="auto"))
            for _ in range(REMEDIES)
        ]
        for place, button in enumerate(self._buttons):
            button.add_class("lab-remedy")
            button.on_click(lambda _, place=place: self._apply_remedy(place))
        self._code = CopyButton(label="the call that makes this plan")
        self._config = CopyButton(label="accelerate config", folded=True)
        self._undo = w.Button(description="Undo this change", icon="undo")
        self._undo.on_click(lambda _: self.undo())
        set_visible(self._undo, False)
        parts = [self._verdict, self._pictures, self._table, self._advice, *self._buttons]
        right = w.VBox(
            [*parts, self._undo, self._code, self._config],
            layout=w.Layout(flex="1 1 340px", min_width="0", max_width="640px", width="auto"),
        )
        # Where there is no room for both beside each other, the answer stands above the controls.
        flow = w.Layout(flex_flow="row wrap-reverse", align_items="flex-end")
        box = w.HBox([self.controls.box, right], layout=flow)
        box.add_class("lab-planner")
        return box

    def _moved(self, name: str = "") -> None:
        """Whatever goes wrong stands in the widget: a traceback here would end in a log that nobody
        reads."""
        try:
            super()._moved(name)
        except Exception as error:
            self._show_verdict("error", f"{type(error).__name__}: {error}")

    def _apply_remedy(self, place: int) -> None:
        try:
            self.take(place)
        except ValueError as error:
            self._show_verdict("error", str(error))

    # -------------------------------------------------------------------------------- its answers

    def update(self) -> None:
        """Show the plan of the controls: verdict and pictures at once, figures a moment later,
        what to change when they rest. So a page that draws has nothing else to do, and a slider
        that is dragged does not wait for what takes longest."""
        answer = self._answer()
        set_visible(self._undo, bool(self._before))
        self._show_verdict(answer.state, answer.error or answer.sentence)
        if answer.pictures and answer.pictures is not self._last_pictures:
            self._last_pictures = answer.pictures
            self.chart.draw(grid(answer.pictures, columns=1), now=True)
        self._set_stale(bool(answer.error))
        self._later(FIGURES_SECONDS, self._write_figures)
        self._later(REMEDIES_SECONDS, self._write_remedies)
        if self._showing is not None:
            self._later(1.1 * STILL_SECONDS, self._showing.refresh)

    def _set_stale(self, stale: bool) -> None:
        """Grey out an answer that is not the controls' any more."""
        for part in (self._pictures, self._table, *self._buttons):
            (part.add_class if stale else part.remove_class)("lab-stale")
        for button in self._buttons:
            button.disabled = stale

    def _write_figures(self) -> None:
        """Write the figures, and what can be copied."""
        answer = self._answer()
        self._code.text = self.code
        if answer.plan is not None:
            self._table.value = html_table(figures(answer.plan.estimate))
            try:
                self._config.text = answer.plan.accelerate_config()
            except ValueError as error:
                self._config.text = f"# {error}\n"

    def _later(self, seconds: float, work: Callable[[], None]) -> None:
        """Do this when the controls have rested so long; at once where no loop runs."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return work()
        if timer := self._timers.pop(work.__name__, None):
            timer.cancel()
        self._timers[work.__name__] = loop.call_later(seconds, work)

    def _write_remedies(self) -> None:
        """Write the best changes on the buttons."""
        answer = self._answer()
        if answer.error:
            return
        self._offered = self.cheaper()
        title = "To make it cheaper:" if answer.state == "yes" else "To make it fit:"
        self._advice.value = f'<div class="lab-group">{title}</div>' if self._offered else ""
        for remedy, button in zip(self._offered, self._buttons):
            button.description = remedy_text(remedy)
            set_tooltip(button, settings_text(remedy.settings))
        for place, button in enumerate(self._buttons):
            set_visible(button, place < len(self._offered))

    def _show_verdict(self, state: str, sentence: str) -> None:
        text = f"<b>{MARKS[state]}</b> {escape(one_line(sentence))}"
        self._verdict.value = f'<div class="lab-verdict {state}" role="status">{text}</div>'
