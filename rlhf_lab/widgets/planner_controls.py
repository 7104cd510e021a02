"""The planner's controls: a table of them, and their widgets, which give a plan's settings.

Each control stands for one argument of `lab.plan`, under its name; `precision` stands for three.
What has no control is kept beside them (`other`), so that every setting of a plan can be given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import ipywidgets as w

from ..cost.hardware import CATALOGUE, Hardware, hardware, in_catalogue
from ..cost.setup import CHOICES
from ..display import did_you_mean, format_bytes, format_number
from ..models.load import BUNDLED, Model, presets
from ..stages import STAGES, Settings
from .live import Quiet, set_visible

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
LAYOUT_NAMES = {"four": "four models", "shared": "shared trunk", "adapters": "one base + adapters"}
ZERO = tuple((f"ZeRO-{n}", f"zero{n}") for n in (1, 2, 3))
SHARDINGS = ("copies", *ZERO, ("FSDP2", "fsdp2"))
"""`copies`: whole ones, "none" on one device and "ddp" on several."""
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
    """One control. `choices`: values, or (label, value) pairs; `off`: the value that stands for
    leaving the setting out; `when`: whether it matters, given all values; `own`: the class whose
    values it takes beside its choices."""

    name: str
    label: str
    choices: tuple[object, ...] = ()
    start: object = None
    tip: str = ""
    off: object = None
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
        known = [str(choice) for _, choice in self.pairs]
        raise ValueError(
            f"{self.name}={value!r}; {did_you_mean(value, known)}choose from {', '.join(known)}"
        )


def _label(value: object) -> str:
    if isinstance(value, (int, float)):
        return format_number(value)
    return f"{value.name} (yours)" if isinstance(value, Hardware) else model_name(value)


def model_name(model: object) -> str:
    """What a model is called: a handle's name, or the name itself."""
    return model.name if isinstance(model, Model) else str(model)


def _trains(v: Settings) -> bool:
    return STAGES[v["stage"]].trainable


def _has_value_model(v: Settings) -> bool:
    return "value" in STAGES[v["stage"]].roles


LENGTHS = doublings(16, 32768, between=True)
CONTROLS: dict[str, tuple[Control, ...]] = {
    "Job": (
        Control("stage", "Stage", tuple((spec.title, name) for name, spec in STAGES.items()),
                "ppo", "what is trained"),
        Control("model", "Model", MODELS, "Qwen/Qwen2.5-1.5B",
                "a bundled model, a preset, or another", own=Model),
        Control("path", "Its name", (), "", "a folder with a config.json, or a hub id (owner/name)",
                when=lambda v: v["model"] == ANOTHER),
    ),
    "Machine": (
        Control("hardware", "Hardware", DEVICES, "h100", "the kind of device; here: this machine",
                own=Hardware),
        Control("gpus", "Devices", doublings(1, 1024), 1, "devices in all", 1),
        Control("nodes", "Nodes", doublings(1, 128), 1, "machines they are in", 1,
                lambda v: v["gpus"] > 1),
        Control("sharding", "Sharding", SHARDINGS, "copies", "what the devices share of a model",
                "copies", _trains),
        Control("offload", "Offload", CHOICES["offload"], "none",
                "optimizer states, or weights too, in main memory", "none",
                lambda v: _trains(v) and v["sharding"] != "copies"),
    ),
    "Data": (
        Control("prompt_length", "Prompt", LENGTHS, 512, "tokens of a prompt"),
        Control("response_length", "Response", LENGTHS, 512, "tokens of a response"),
        Control("rows", "Rows", tuple(m * 10**k for k in range(2, 7) for m in (1, 2, 5)), 20_000,
                "samples, pairs or prompts of the data set"),
        Control("num_train_epochs", "Epochs", (1, 2, 3, 4, 5, 10), 1, "passes over the data set",
                when=_trains),
    ),
    "Training": (
        Control("per_device_train_batch_size", "Batch", doublings(1, 512), 8,
                "rows (or pairs) of one device in one pass"),
        Control("gradient_accumulation_steps", "Accumulate", doublings(1, 512), 1,
                "passes that make a step; PPO: passes that a rollout is made of", 1, _trains),
        Control("lora_r", "LoRA rank", (("off", 0), *doublings(1, 256)), 0,
                "rank of adapters; off: all weights are trained", 0, _trains),
        Control("load_in_4bit", "Base in 4 bits (QLoRA)", (), False, "needs a LoRA rank", False,
                lambda v: not _trains(v) or v["lora_r"] > 0),
        Control("precision", "Precision",
                tuple((label, key) for key, (label, _) in PRECISIONS.items()),
                "auto", "automatic: bf16 autocast where the device has bf16, else fp32", "auto"),
        Control("optim", "Optimizer", CHOICES["optim"], "adamw_torch_fused", "",
                "adamw_torch_fused", _trains),
        Control("gradient_checkpointing", "Recompute activations", (), False,
                "gradient checkpointing", False, _trains),
    ),
    "Rollouts": (
        Control("layout", "Layout", tuple((LAYOUT_NAMES.get(x, x), x) for x in CHOICES["layout"]),
                "four", "which models policy, reference, reward and value share",
                "four", _has_value_model),
        Control("num_mini_batches", "Minibatches", doublings(1, 64), 1,
                "optimizer steps in one pass over a rollout", when=_has_value_model),
        Control("num_ppo_epochs", "PPO epochs", (1, 2, 3, 4, 6, 8), 4, "passes over a rollout",
                when=_has_value_model),
        Control("num_generations", "Per prompt", doublings(2, 64), 4, "responses to each prompt",
                when=lambda v: STAGES[v["stage"]].groups),
    ),
}  # fmt: skip
ALL = {control.name: control for controls in CONTROLS.values() for control in controls}


class Controls:
    """The widgets, the settings that they show, and those that were given beside them (`other`).

    `box`: the widget that holds them all. `on_change` is called with a control's name after a
    person moved it. Raises ValueError, one line, for a setting that no control can show.
    """

    def __init__(self, settings: Settings, on_change: Callable[[str], None]) -> None:
        self.other: dict[str, object] = {}
        self._on_change, self._quiet = on_change, Quiet()
        self.widgets = {name: _widget(control) for name, control in ALL.items()}
        self._titles = {k: w.HTML(f'<div class="lab-group">{k}</div>') for k in CONTROLS}
        parts = []
        for group, controls in CONTROLS.items():
            parts += [self._titles[group], *(self.widgets[k.name] for k in controls)]
        self.extras = w.HBox(layout=w.Layout(flex_flow="row wrap"))
        self.box = w.VBox([*parts, self.extras], layout=w.Layout(width="330px", flex="0 0 auto"))
        self.box.add_class("lab-controls")
        self._set_all(settings)
        self._show_relevant()
        for name, widget in self.widgets.items():
            widget.observe(lambda change, name=name: self._moved(name), names="value")

    # ------------------------------------------------------------------------------------- reading

    @property
    def values(self) -> Settings:
        """Every control's value, whether it matters or not."""
        return {name: widget.value for name, widget in self.widgets.items()}

    def settings(self) -> dict[str, object]:
        """The arguments of `lab.plan`: controls that matter and are not off, and `other`."""
        v = self.values
        settings = {
            name: v[name]
            for name, control in ALL.items()
            if control.when(v) and (control.off is None or v[name] != control.off)
        }
        if "path" in settings:
            settings["model"] = settings.pop("path").strip().removesuffix("/config.json")
        settings |= PRECISIONS[settings.pop("precision", "auto")][1]
        if v["gpus"] > 1 and "sharding" not in settings:
            alone = self.other.get("tensor_parallel") == v["gpus"]
            settings["sharding"] = "none" if alone else "ddp"
        spec = STAGES[v["stage"]]
        if spec.trainable and not spec.online:  # the trainer cuts where the plan ends
            settings["max_length"] = v["prompt_length"] + v["response_length"]
        return {**settings, **self.other}

    def apply(self, settings: Settings) -> None:
        """Move the controls to these settings, without a call of `on_change`. Nothing moves where
        a setting cannot be shown: then it raises ValueError, one line."""
        before, other = self.values, dict(self.other)
        with self._quiet:
            try:
                self._set_all(settings)
            except ValueError:
                self.other = other
                for name, value in before.items():
                    self._set(name, value)
                raise
            finally:
                self._show_relevant()

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
        lengths = self.widgets["prompt_length"].value + self.widgets["response_length"].value
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
        control, widget = ALL[name], self.widgets[name]
        if isinstance(control.start, bool) and not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}")
        if not control.choices:
            widget.value = value
            return
        pair = control.pair(value)
        with widget.hold_sync():
            if pair not in widget.options:
                options = [pair, *widget.options]
                widget.options = sorted(options, key=lambda o: o[1]) if control.slides else options
            widget.value = pair[1]

    # ------------------------------------------------------------------------------- moved by hand

    def _moved(self, name: str) -> None:
        if self._quiet:
            return
        with self._quiet:
            if name in ("gpus", "hardware"):
                self._set_nodes()
            self._show_relevant()
        self._on_change(name)

    def _set_nodes(self) -> None:
        """As many nodes as the devices need."""
        gpus = self.widgets["gpus"].value
        try:
            each = hardware(self.widgets["hardware"].value).devices_per_node
        except ValueError:  # a damaged calibration: the plan raises it
            return
        nodes = -(-gpus // each)
        if gpus % nodes == 0:
            self._set("nodes", nodes)

    def _show_relevant(self) -> None:
        """Show what matters now, and nothing else."""
        v = self.values
        if v["gpus"] == 1 and v["nodes"] != 1:
            self._set("nodes", 1)
        for group, controls in CONTROLS.items():
            relevant = [k.when(v) for k in controls]
            for control, matters in zip(controls, relevant):
                set_visible(self.widgets[control.name], matters)
            set_visible(self._titles[group], any(relevant))
        texts = {name: f"{name}={value!r}  ✕" for name, value in self.other.items()}
        if [b.description for b in self.extras.children] != list(texts.values()):
            self.extras.children = tuple(self._extra(*item) for item in texts.items())

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


def set_tooltip(widget: w.Widget, text: str) -> None:
    """What a control means, on hover (ipywidgets 8, then 7)."""
    for name in ("tooltip", "description_tooltip"):
        if text and widget.has_trait(name):
            setattr(widget, name, text)
            return
