"""The planner of the web page (`web/`): what a browser asks, and the answer as plain values.

    page = Page(lab.plan)
    page.open("stage=sft&gpus=8")       # what stands behind the `#` of the address
    page.move("gpus", 3)                # the fourth choice of that control

Each returns the whole state to draw, as JSON: the controls, the verdict, the picture, the figures,
the link. `advice` works out what takes longer, when the controls rest. A browser has no disk and
asks no hub: "here" and models by folder or hub id are left to the notebook.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable

from rlhf_lab.charts.frame import grid
from rlhf_lab.models.load import Model
from rlhf_lab.runs.progress import one_line
from rlhf_lab.stages import STAGES
from rlhf_lab.widgets.planner_answers import MARKS, Calculator
from rlhf_lab.widgets.planner_controls import ANOTHER, CONTROLS, MODELS, Control, Controls
from rlhf_lab.widgets.planner_link import fragment_of, settings_of
from rlhf_lab.widgets.planner_view import WIDTH, figures, remedy_text, settings_text

NOT_HERE = "a web page knows the bundled models and those of the list; lab.planner takes any other"
NO_MACHINE = "“here” is the machine that Python runs on, and a web page has none: choose a device"


class PageControls(Controls):
    """The controls, without what a browser cannot have."""

    left_out = (ANOTHER, "here")

    def _set(self, name: str, value: object) -> None:
        if (name, value) == ("hardware", "here"):
            raise ValueError(NO_MACHINE)
        super()._set(name, value)


class Page(Calculator):
    """A planner that a browser shows; every method returns JSON."""

    controls_class = PageControls
    _problem = ""  # of the address

    def _handle(self, model: str | Model) -> Model:
        if model not in MODELS:
            raise ValueError(f"{model!r}: {NOT_HERE}")
        return super()._handle(model)

    def open(self, fragment: str, width: int = WIDTH) -> str:
        """Start anew with the settings of an address, pictures so wide (px). Its problem, if it has
        one, is the verdict until a control moves."""
        self._before.clear()
        self._answers.clear()
        self.width, self._problem = width, ""
        try:
            self.controls = PageControls(settings_of(fragment), self._moved)
        except Exception as error:  # an address can say anything
            self.controls = PageControls({}, self._moved)
            self._problem = one_line(f"this address is no plan: {error}")
        return self.show()

    def move(self, name: str, value: int | bool | str) -> str:
        """A control was moved: to the number of a choice, to on or off, or to a text."""
        self._problem = ""
        options = self.controls.options[name]
        self.controls.move(name, options[int(value)][1] if options else value)
        return self.show()

    def remove(self, name: str) -> str:
        """Take back a setting that has no control."""
        self.controls.remove(name)
        return self.show()

    def press(self, place: int) -> str:
        """Apply an offered change; -1 takes the last one back."""
        self.undo() if place < 0 else self.take(place)
        return self.show()

    def show(self) -> str:
        """What there is to draw."""
        answer = self._answer()
        picture = grid(answer.pictures, columns=1) if answer.pictures else None
        state, line = answer.state, answer.error or answer.sentence
        if self._problem:
            state, line = "error", self._problem
        shown = {
            "controls": {
                group: [self._control(k) for k in controls] for group, controls in CONTROLS.items()
            },
            "extras": self.controls.beside,
            "state": state,
            "verdict": f"{MARKS[state]} {one_line(line)}",
            "svg": picture and base64.b64encode(zlib.compress(picture.live.encode())).decode(),
            "figures": figures(answer.plan.estimate) if answer.plan else [],
            "undo": bool(self._before),
            "code": self.code,
            "fragment": fragment_of(self.state),
        }
        return json.dumps(shown)

    def _control(self, control: Control) -> dict[str, object]:
        name, options = control.name, self.controls.options[control.name]
        value = self.controls.values[name]
        kind = "list" if options else "box" if isinstance(control.start, bool) else "text"
        return {
            "name": name,
            "label": control.label,
            "tip": control.tip,
            "kind": "slider" if control.slides else kind,
            "choices": [label for label, _ in options],
            "value": [v for _, v in options].index(value) if options else value,
            "shown": self.controls.relevant[name],
        }

    def advice(self) -> str:
        """What to change, and the files that realise the plan."""
        self._offered = self.cheaper()
        plan = self._answer().plan
        files = {}
        if plan is not None:
            files["accelerate.yaml"] = _text_of(plan.accelerate_config)
            if STAGES[plan.stage].trainer:
                files["trl.yaml"] = _text_of(plan.trl_config)
        fits = self._answer().state == "yes"
        shown = {
            "title": "To make it cheaper" if fits else "To make it fit",
            "remedies": [[remedy_text(r), settings_text(r.settings)] for r in self._offered],
            "files": files,
        }
        return json.dumps(shown)

    def ledger(self) -> str:
        """Every figure of the plan, to the last digit: a row a line, as `Ledger.load` reads it."""
        return self.plan.ledger.to_jsonl()


def _text_of(write: Callable[[], str]) -> str:
    """A file's text; where it cannot be written, the line why."""
    try:
        return write()
    except ValueError as error:
        return f"# {error}\n"
