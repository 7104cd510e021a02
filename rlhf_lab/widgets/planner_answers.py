"""What the planner's controls come to: a plan, a verdict, pictures, and what to change.

Nothing is drawn here, and nothing is computed that `plan`, the function that plans, does not
compute: a notebook (`planner.py`) and a web page (`web/planner_page.py`) show the same answers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..charts.frame import Picture
from ..cost.remedies import Remedy
from ..display import first_line, format_bytes, table
from ..models.load import Model, load
from ..runs.progress import one_line
from ..stages import Settings
from .planner_controls import Controls, Snapshot, model_name, of_plan
from .planner_link import fragment_of, page_address
from .planner_view import WIDTH, call, figures, memory_picture, remedy_text, time_picture, verdict

if TYPE_CHECKING:
    from ..planning import Plan

REMEDIES = 3
"""Changes that are shown, the best first."""
CACHED_ANSWERS = 64
"""Going back to one of them costs nothing."""
FITS = {"yes": "fits", "perhaps": "may not fit", "no": "does not fit"}
MARKS = {"yes": "✓", "perhaps": "≈", "no": "✗", "error": "⚠"}


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


class Calculator:
    """The controls, and the plan that they make. `plan`, `of`, `state`: as for a `Planner`.

    Raises ValueError, one line, for a setting that no control can show; why something cannot be
    planned is its `error`.
    """

    controls_class: type[Controls] = Controls
    width = WIDTH
    """px of the pictures"""

    def __init__(self, plan: Callable[..., Plan], of: Plan | None = None, **state: object) -> None:
        self._plan = plan
        self._handles: dict[str, Model] = {}
        self._load_errors: dict[str, str] = {}  # why other models were not found
        self._answers: dict[str, Answer] = {}
        self._offered: list[Remedy] = []  # what the buttons do
        self._before: list[Snapshot] = []  # of the controls, before each change that was applied
        settings, shown = of_plan(of) if of is not None else ({}, {})
        shown = {name: value for name, value in shown.items() if name not in state}
        self.controls = self.controls_class({**settings, **state}, self._moved, shown)

    def update(self) -> None:
        """The controls stand elsewhere: for who shows the answer."""

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
    def link(self) -> str:
        """The planner's web page, this plan in its address; `lab.planner(link)` opens it too."""
        return f"{page_address()}#{fragment_of(self.state)}"

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

    # ------------------------------------------------------------------------------------- by hand

    def _moved(self, name: str = "") -> None:
        """A person moved a control, or ("") pressed a button that moves several."""
        if name in ("model", "path"):
            self._load_errors.clear()  # named once more is looked for once more
        if name:  # there is more than one change to take back
            self._before.clear()
        self.update()

    def take(self, place: int) -> None:
        """Apply one of the changes that are offered. Raises ValueError, one line, for one that no
        control can show."""
        if place < len(self._offered):  # what the button says, whatever has moved since
            before = self.controls.snapshot()
            self.controls.apply(self._offered[place].settings)
            self._before.append(before)
            self._moved()

    def undo(self) -> None:
        """Take back the last change that a button made; nothing where there is none."""
        if self._before:
            self.controls.restore(self._before.pop())
            self._moved()

    # ------------------------------------------------------------------------------------- answers

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
            left = [f"{name} is no setting of {plan.stage}" for name in self.controls.aside]
            left += [
                f"the plan has no {n}: move the control to set them" for n in self.controls.unsaid
            ]
            sentence = "; ".join([*left, *plan.warnings, sentence])
            pictures = memory_picture(e, self.width), time_picture(e, self.width)
            return Answer(plan, "", state, sentence, pictures)
        except Exception as error:  # a name from a text field can lead anywhere
            line = first_line(error)
            known = isinstance(error, ValueError)
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
