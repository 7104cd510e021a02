"""The planner's controls: a table of them, and what they stand at, which gives a plan's settings.

Each control stands for one argument of `lab.plan`, under its name; `precision` stands for three.
What has no control is kept beside them (`other`), so that every setting of a plan can be given.
Nothing is drawn here: a notebook shows the controls as widgets (`planner.py`), a web page
as its own elements (`web/planner_page.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from ..cost.fields import RENAMED
from ..cost.hardware import CATALOGUE, Hardware, hardware, in_catalogue, nodes_for
from ..cost.setup import CHOICES
from ..display import format_bytes, format_number, wrong_choice
from ..models.load import BUNDLED, Model, load, presets
from ..settings import known_settings
from ..stages import STAGES, Settings, read_table

if TYPE_CHECKING:
    from ..planning import Plan

Snapshot: TypeAlias = tuple[Settings, ...]
ANOTHER = "another…"
"""The entry of the model list that opens a field for a folder or a hub id."""
PRECISIONS: dict[str, tuple[str, Settings]] = {
    "auto": ("automatic", {}),
    "bf16": ("bf16 autocast", {"bf16": True}),
    "fp16": ("fp16 autocast", {"fp16": True}),
    "float32": ("fp32", {"bf16": False}),
    "bfloat16": ("bf16 weights", {"dtype": "bfloat16"}),
    "float16": ("fp16 weights", {"dtype": "float16"}),
}
MODELS = (*BUNDLED, *presets(), ANOTHER)
DEVICES = (
    ("this machine (here)", "here"),
    *((f"{h.name} · {format_bytes(h.memory)}", key) for key, h in CATALOGUE.items()),
)


def doublings(low: int, high: int, between: bool = False) -> tuple[int, ...]:
    """low, 2·low, 4·low, … up to high; `between`: and half as much again."""
    values = []
    while low <= high:
        values += [low, low * 3 // 2] if between and low * 3 // 2 <= high else [low]
        low *= 2
    return tuple(values)


@dataclass(frozen=True)
class Control:
    """One control. `choices`: values, or (label, value) pairs; `default`: the value that stands
    for leaving the setting out; `when`: whether it matters, given all values; `own`: the class
    whose values it takes beside its choices."""

    name: str
    label: str
    choices: tuple[object, ...] = ()
    start: object = None
    tip: str = ""
    default: object = None
    when: Callable[[Settings], bool] = lambda v: True
    own: type | None = None

    @property
    def pairs(self) -> list[tuple[str, object]]:
        """The choices as (label, value)."""
        return [c if isinstance(c, tuple) else (_label(c), c) for c in self.choices]

    @property
    def slides(self) -> bool:
        """A slider: its choices are numbers."""
        values = [value for _, value in self.pairs]
        return bool(values) and all(isinstance(v, (int, float)) for v in values)

    def pair(self, value: object) -> tuple[str, object]:
        """(label, value) of a value. Raises ValueError for one that the control cannot hold."""
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if self.slides and not number:
            raise ValueError(f"{self.name} must be a number, got {value!r}")
        for pair in self.pairs:
            if pair[1] == value:
                return pair
        if self.slides or (self.own and isinstance(value, self.own)):
            return _label(value), value
        raise wrong_choice(self.name, value, [choice for _, choice in self.pairs])


def _label(value: object) -> str:
    if isinstance(value, (int, float)):
        return format_number(value)
    return f"{value.name} (yours)" if isinstance(value, Hardware) else model_name(value)


def model_name(model: object) -> str:
    """What a model is called: a handle's name, or the name itself."""
    return model.name if isinstance(model, Model) else str(model)


LENGTHS_OF_ROWS = ("prompt_length", "response_length", "rows")
WHEN: Mapping[str, Callable[[Settings], bool]] = {
    "": lambda v: True,
    "another model": lambda v: v["model"] == ANOTHER,
    "several devices": lambda v: v["gpus"] > 1,
    "trained": lambda v: STAGES[v["stage"]].trainable,
    "trained and shared out": lambda v: WHEN["trained"](v) and v["sharding"] != "copies",
    "adapters, or not trained": lambda v: not WHEN["trained"](v) or v["lora_r"] > 0,
    "a value model": lambda v: "value" in STAGES[v["stage"]].roles,
    "groups": lambda v: STAGES[v["stage"]].groups,
}
"""When a control matters, given all values."""
OFFERED: Mapping[str, Iterable[object]] = {
    "stage": [(spec.title, name) for name, spec in STAGES.items()],
    "model": MODELS,
    "hardware": DEVICES,
    "offload": CHOICES["offload"],
    "optim": CHOICES["optim"],
    "precision": [(label, key) for key, (label, _) in PRECISIONS.items()],
}
"""Choices that other tables have."""
OWN = {"model": Model, "hardware": Hardware}


def _control(
    name: str, when: str = "", doubled: Sequence[int] = (), between: bool = False, **entry: Any
) -> Control:
    """A control as `controls.yaml` has it."""
    listed = OFFERED.get(name, entry.pop("choices", ()))
    choices = [tuple(c) if isinstance(c, list) else c for c in listed]
    choices += doublings(doubled[0], doubled[1], between) if doubled else ()
    return Control(name, choices=tuple(choices), when=WHEN[when], own=OWN.get(name), **entry)


CONTROLS: dict[str, tuple[Control, ...]] = {
    group: tuple(_control(name, **entry) for name, entry in entries.items())
    for group, entries in read_table(__file__, "controls.yaml").items()
}
"""By group, in the order in which they stand."""
ALL = {control.name: control for controls in CONTROLS.values() for control in controls}


class Controls:
    """What the controls stand at (`values`), what each offers (`options`, as (label, value)), which
    of them matter now (`relevant`), and settings that were given beside them (`other`).

    `on_change` is called with a control's name after a person moved it. `shown`: what controls show
    and `settings` leaves out, as the plan does that they were opened with, until they move. Raises
    ValueError, one line, for a setting that no control can show.
    """

    left_out: tuple[object, ...] = ()
    """Choices that are not offered."""

    def __init__(
        self, settings: Settings, on_change: Callable[[str], None], shown: Settings | None = None
    ) -> None:
        self.other: dict[str, object] = {}
        self.shown: dict[str, object] = {}
        self.values: dict[str, Any] = {name: control.start for name, control in ALL.items()}
        self.options: dict[str, list[tuple[str, Any]]] = {
            name: [pair for pair in control.pairs if pair[1] not in self.left_out]
            for name, control in ALL.items()
        }
        self.relevant: dict[str, bool] = {}
        self._on_change, shown = on_change, shown or {}
        self._set_all({**{n: x for n, x in shown.items() if x is not None}, **settings})
        self.shown = {name: self.values[name] for name in shown}
        self._unknown = [name for name, value in shown.items() if value is None]
        self._show_relevant()

    # ------------------------------------------------------------------------------------- reading

    def settings(self) -> dict[str, object]:
        """The arguments of `lab.plan`: controls that matter and are not off, and `other`."""
        v = self.values
        settings = {
            name: v[name]
            for name, control in ALL.items()
            if control.when(v) and (control.default is None or v[name] != control.default)
            if name not in self.shown or v[name] != self.shown[name]
        }
        if "path" in settings:
            settings["model"] = settings.pop("path").strip().removesuffix("/config.json")
        settings |= PRECISIONS[settings.pop("precision", "auto")][1]
        if v["gpus"] > 1 and v["nodes"] == 1 != self._nodes():
            settings["nodes"] = 1  # on purpose: a plan would take more
        if v["gpus"] > 1 and "sharding" not in settings:
            alone = self.other.get("tensor_parallel") == v["gpus"]
            settings["sharding"] = "none" if alone else "ddp"
        spec = STAGES[v["stage"]]
        lengths = {"prompt_length", "response_length"} <= settings.keys()
        if lengths and spec.trainable and not spec.online:  # the trainer cuts where the plan ends
            settings["max_length"] = v["prompt_length"] + v["response_length"]
        aside = self.aside
        return {**settings, **{n: x for n, x in self.other.items() if n not in aside}}

    @property
    def aside(self) -> list[str]:
        """Names of `other` that only other stages have: they wait for one of those."""
        elsewhere = frozenset[str]().union(*map(known_settings, STAGES))
        mine = known_settings(self.values["stage"])
        return [name for name in self.other if name in elsewhere - mine]

    @property
    def unsaid(self) -> list[str]:
        """Sizes that the plan does not know, so that what their controls show does not count."""
        return [n for n in LENGTHS_OF_ROWS if n in self._unknown and n in self.shown]

    def apply(self, settings: Settings) -> None:
        """Move the controls to these settings, without a call of `on_change`. Nothing moves where
        a setting cannot be shown: then it raises ValueError, one line."""
        before = self.snapshot()
        try:
            self._set_all(settings)
            self._keep_shown(settings)
        except ValueError:
            self.restore(before)
            raise
        finally:
            self._show_relevant()

    def snapshot(self) -> Snapshot:
        """Values of the controls, settings beside them, and what they show of a plan."""
        return dict(self.values), dict(self.other), dict(self.shown)

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to what a `snapshot` has."""
        values, other, shown = snapshot
        self.other, self.shown = dict(other), dict(shown)
        for name, value in values.items():
            self._set(name, value)
        self._show_relevant()

    def _keep_shown(self, moved: Iterable[str]) -> None:
        """What is still the plan's after these have moved: of lengths all or none, and nothing
        after another stage or model."""
        moved = {*moved}
        if moved & {"stage", "model", "path"}:
            self.shown.clear()
        for name in (*moved, *(LENGTHS_OF_ROWS if moved & {*LENGTHS_OF_ROWS} else ())):
            self.shown.pop(name, None)

    def remove(self, name: str) -> None:
        """Take back a setting that has no control."""
        self.other.pop(name, None)
        self._moved(name)

    # ------------------------------------------------------------------------------------- writing

    def _set_all(self, settings: Settings) -> None:
        rest = dict(settings)
        names = [name for name in ("dtype", "bf16", "fp16") if name in rest]
        precision: Settings = {name: rest.pop(name) for name in names}
        if precision:
            self._set("precision", _precision(precision))
        if "max_completion_length" in rest:  # TRL's name of it
            rest["response_length"] = rest.pop("max_completion_length")
        if rest.get("sharding") in ("none", "ddp"):
            rest["sharding"] = "copies"
        if isinstance(device := rest.get("hardware"), str):
            here = device.strip().lower() == "here"
            rest["hardware"] = "here" if here else in_catalogue(device) or hardware(device)
        if "model" in rest:
            self._set_model(rest.pop("model"))
        for name in [n for n in rest if n in ALL and n not in ("path", "precision")]:
            self._set(name, rest.pop(name))
        if "gpus" in settings and "nodes" not in settings:
            self._set_nodes()
        lengths = self.values["prompt_length"] + self.values["response_length"]
        if rest.get("max_length") == lengths:
            del rest["max_length"]
        self.other |= rest

    def _set_model(self, model: object) -> None:
        """Choose a handle, a name of the list (without its owner, too), or one for the field."""
        if not isinstance(model, Model):
            name, short = str(model), {n.split("/")[-1].lower(): n for n in MODELS}
            model = name if name in MODELS else short.get(name.lower(), ANOTHER)
            if model == ANOTHER:
                self._set("path", name)
        self._set("model", model)

    def _set(self, name: str, value: object) -> None:
        control, options = ALL[name], self.options[name]
        if isinstance(control.start, bool) and not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}")
        if not control.choices:
            self.values[name] = value
            return
        pair = control.pair(value)
        if pair not in options:
            options.insert(0, pair)
            if control.slides:
                options.sort(key=lambda option: option[1])
        self.values[name] = pair[1]

    # ------------------------------------------------------------------------------- moved by hand

    def move(self, name: str, value: object) -> None:
        """What a hand does. Raises ValueError, one line, for a value that it cannot hold."""
        self._set(name, value)
        self._moved(name)

    def _moved(self, name: str) -> None:
        self._keep_shown([name])
        if name in ("gpus", "hardware"):
            self._set_nodes()
        self._show_relevant()
        self._on_change(name)

    def _set_nodes(self) -> None:
        """As many nodes as the devices need."""
        self._set("nodes", self._nodes())

    def _nodes(self) -> int:
        try:
            device = hardware(self.values["hardware"])
        except ValueError:  # a damaged calibration: the plan raises it
            return int(self.values["nodes"])
        return nodes_for(self.values["gpus"], device)

    def _show_relevant(self) -> None:
        """Find what matters now, and show nothing else."""
        v = self.values
        if v["gpus"] == 1 and v["nodes"] != 1:
            self._set("nodes", 1)
        self.relevant = {name: control.when(v) for name, control in ALL.items()}

    @property
    def beside(self) -> dict[str, str]:
        """Settings without a control, each as it is shown: the text of what takes it back."""
        return {name: f"{name}={value!r}  ✕" for name, value in self.other.items()}


def of_plan(plan: Plan) -> tuple[dict[str, object], dict[str, object]]:
    """→ the settings that open the planner with a plan, all of them, and what else the controls
    show: sizes that the plan has from its data, and its trainer's defaults."""
    name, setup = plan.model.name, plan.estimate.setup
    listed = name in MODELS and load(name).paths == plan.model.paths
    settings: dict[str, object] = {"stage": plan.stage, "model": name if listed else plan.model}
    settings |= {"hardware": plan.hardware, **plan.settings}
    own = {n: getattr(setup, RENAMED.get(n, n), None) for n in ALL if n not in settings}
    return settings, {name: value for name, value in own.items() if name != "path"}


def _precision(settings: Settings) -> str:
    """The choice of `PRECISIONS` that `dtype`, `bf16` and `fp16` amount to."""
    dtype: str = settings.get("dtype") or "float32"
    autocast = [name for name in ("bf16", "fp16") if settings.get(name)]
    if dtype == "float32":
        off = "bf16" in settings or "fp16" in settings
        return autocast[0] if autocast else "float32" if off else "auto"
    if autocast:
        raise ValueError(
            f"bf16/fp16 autocast works on fp32 weights: leave it out with dtype={dtype!r}"
        )
    return dtype
