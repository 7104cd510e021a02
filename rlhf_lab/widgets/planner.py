"""The planner: move a slider, and see what a stage would take before anything runs.

    planner = Planner(lab.plan, stage="ppo", model="Qwen/Qwen2.5-7B", hardware="h100", gpus=8)
    planner                     # controls on the left, the answer on the right
    planner.plan                # what it shows, ready for lab.train
    planner.state               # the arguments that bring it back: also those of lab.plan
    planner.code                # the same as a line of Python

The function that plans is given: this file computes nothing of its own. It imports no torch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import ipywidgets as w
import traitlets

from ..charts.frame import LARGE, Picture, shortened
from ..cost.remedies import Remedy
from ..display import escape, format_bytes, html_table, table
from ..models.load import Model, load
from ..runs.progress import notebook_display, one_line
from ..stages import Settings
from .live import STILL_SECONDS, Chart, LabWidget, Showing, grid, mime_bundle, set_visible
from .planner_controls import Controls, model_name, set_tooltip
from .planner_view import (
    WIDTH,
    call,
    figures,
    memory_picture,
    no_plan_picture,
    remedy_text,
    settings_text,
    time_picture,
    verdict,
)

if TYPE_CHECKING:
    from ..planning import Plan

REMEDIES = 3
"""Changes that are shown, the best first."""
FIGURES_SECONDS, REMEDIES_SECONDS = 0.04, 0.1
"""How long the controls rest before the figures are written, and the changes worked out."""
CACHED_ANSWERS = 64
"""Going back to one of them costs nothing."""
FITS = {"yes": "fits", "perhaps": "may not fit", "no": "does not fit"}
MARKS = {"yes": "✓", "perhaps": "≈", "no": "✗", "error": "⚠"}
_HERE = Path(__file__).parent


class CopyButton(LabWidget):
    """Text and a button that copies it; `folded`: behind its label."""

    _esm = _HERE / "copy.js"
    _css = _HERE / "planner.css"
    text = traitlets.Unicode().tag(sync=True)
    label = traitlets.Unicode().tag(sync=True)
    folded = traitlets.Bool(False).tag(sync=True)


@dataclass
class Answer:
    """What one setting of the controls comes to: a plan, or the line why there is none (`error`).

    `state` and `sentence`: the verdict. `pictures`: memory and time. `remedies`: None until they
    are asked for, since they take longer than all the rest.
    """

    plan: Plan | None = None
    error: str = ""
    state: str = "error"
    sentence: str = ""
    pictures: tuple[Picture, ...] = ()
    remedies: list[Remedy] | None = None


class Planner:
    """Controls for every setting that a cost depends on, and the plan that they make.

    `plan`: the function `plan(stage, model, hardware=…, **settings)`, such as `lab.plan`. `state`:
    its arguments, as a start; those without a control are kept and shown beside the controls.
    Raises ValueError, one line, for a setting that no control can show; why something cannot be
    planned stands in the widget.
    """

    def __init__(self, plan: Callable[..., Plan], **state: object) -> None:
        self._plan = plan
        self._handles: dict[str, Model] = {}
        self._load_errors: dict[str, str] = {}  # why other models were not found
        self._answers: dict[str, Answer] = {}
        self._last_pictures: tuple[Picture, ...] = ()
        self._showing: Showing | None = None
        self._offered: list[Remedy] = []  # what the buttons do
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self.controls = Controls(state, self._moved)
        self.widget = self._build()
        self.update()
        self._write_figures()
        self._write_remedies()

    # ---------------------------------------------------------------------------------- to read

    @property
    def state(self) -> dict[str, object]:
        """What brings this planner back: `lab.planner(**state)`; `lab.plan` takes it too."""
        return self.controls.settings()

    @property
    def code(self) -> str:
        """The line of Python that makes the plan."""
        return call(self.state)

    @property
    def plan(self) -> Plan:
        """The plan that is shown. Raises ValueError, in the words of the widget, where there is
        none."""
        answer = self._answer()
        if answer.plan is None:
            raise ValueError(answer.error)
        return answer.plan

    @property
    def error(self) -> str:
        """Why there is no plan; "" where there is one."""
        return self._answer().error

    def cheaper(self) -> list[Remedy]:
        """The three best changes (`cost/remedies.py`); none where there is no plan."""
        answer = self._answer()
        if answer.remedies is None:
            answer.remedies = answer.plan.cheaper()[:REMEDIES] if answer.plan else []
        return answer.remedies

    def apply(self, **settings: object) -> None:
        """Move the controls: `planner.apply(lora_r=16)`. Raises ValueError, one line, for a setting
        that no control can show."""
        self.controls.apply(settings)
        self.update()

    def __repr__(self) -> str:
        answer = self._answer()
        if answer.plan is None:
            return f"Planner({self._summary()}: {one_line(answer.error)})"
        e = answer.plan.estimate
        sizes = f"{format_bytes(e.peak)} of {format_bytes(e.hardware.memory)}"
        return f"Planner({self._summary()}: {sizes}, {FITS[answer.state]})"

    def _summary(self) -> str:
        """Stage, model and machine: `ppo, Qwen/Qwen2.5-7B, 8 x h100`."""
        state, device = self.state, self.state["hardware"]
        devices = f"{state['gpus']} x " if "gpus" in state else ""
        where = f"{devices}{getattr(device, 'name', device)}"
        return f"{state['stage']}, {one_line(model_name(state['model']))}, {where}"

    def __str__(self) -> str:
        answer = self._answer()
        if answer.error:
            return f"{self!r}\n{self.code}"
        figures_table = table(figures(self.plan.estimate))
        changes = "".join(f"\n  {remedy_text(r)}" for r in self.cheaper())
        advice = f"What to change:{changes}" if changes else ""
        return "\n".join([repr(self), answer.sentence, figures_table, advice, self.code])

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
        parts = [self._verdict, self._pictures, self._table, self._advice, *self._buttons]
        right = w.VBox(
            [*parts, self._code, self._config],
            layout=w.Layout(flex="1 1 420px", min_width="0", max_width="640px", width="auto"),
        )
        box = w.HBox([self.controls.box, right], layout=w.Layout(flex_flow="row wrap"))
        box.add_class("lab-planner")
        return box

    def _moved(self, name: str = "") -> None:
        """A person moved a control. Whatever goes wrong stands in the widget: a traceback here
        would end in a log that nobody reads."""
        if name in ("model", "path"):
            self._load_errors.clear()  # named once more is looked for once more
        try:
            self.update()
        except Exception as error:
            self._show_verdict("error", f"{type(error).__name__}: {error}")

    def _apply_remedy(self, place: int) -> None:
        if place < len(self._offered):  # what the button says, whatever has moved since
            try:
                self.controls.apply(self._offered[place].settings)
            except ValueError as error:
                self._show_verdict("error", str(error))
                return
            self._moved()

    # -------------------------------------------------------------------------------- its answers

    def update(self) -> None:
        """Show the plan of the controls: verdict and pictures at once, figures a moment later,
        what to change when they rest. So a page that draws has nothing else to do, and a slider
        that is dragged does not wait for what takes longest."""
        answer = self._answer()
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

    def _answer(self) -> Answer:
        """The answer to the settings of the controls, computed once."""
        settings = self.state
        key = repr({**settings, "model": model_name(settings["model"])})
        if key in self._answers:
            return self._answers[key]
        answer = self._compute_answer(settings)
        if not answer.error:
            while len(self._answers) >= CACHED_ANSWERS:
                del self._answers[next(iter(self._answers))]
            self._answers[key] = answer
        return answer

    def _compute_answer(self, settings: Settings) -> Answer:
        try:
            plan = self._plan(**{**settings, "model": self._handle(settings["model"])})
            e = plan.estimate
            state, sentence = verdict(e)
            return Answer(plan, "", state, sentence, (memory_picture(e), time_picture(e)))
        except Exception as error:  # a name from a text field can lead anywhere
            line = (str(error).strip().splitlines() or [""])[0]
            known = isinstance(error, ValueError) and line
            return Answer(error=line if known else f"{type(error).__name__}: {line}")

    def _handle(self, model: str | Model) -> Model:
        """The model's handle. One that had to be looked for is looked for once: it may take seconds
        to find on the hub, or not to."""
        if isinstance(model, Model):
            return model
        if not model:
            raise ValueError("name a model: a folder with a config.json, or a hub id (owner/name)")
        if model in self._load_errors:
            raise ValueError(self._load_errors[model])
        if model not in self._handles:
            try:
                handle = load(model)
                handle.config_dict()
            except ValueError as error:
                self._load_errors[model] = str(error)
                raise
            self._handles[model] = handle
        return self._handles[model]
