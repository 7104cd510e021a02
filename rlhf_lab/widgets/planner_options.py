"""What the planner can be asked: a table of controls, and settings as a line of Python.

Each control stands for one argument of `lab.plan`, under its name; `precision` stands for three.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Protocol, TypeAlias

from ..cost.hardware import CATALOGUE, Hardware
from ..cost.setup import CHOICES
from ..display import did_you_mean, format_number
from ..models.load import Model
from ..stages import STAGES, Settings

if TYPE_CHECKING:
    from ..cost.estimate import Estimate
    from ..cost.remedies import Remedy

Values: TypeAlias = Settings
"""Settings by name, as a user gives them: numbers, names, a model's handle, a device."""


class PlanLike(Protocol):
    """What the widgets read of a plan (`planning.Plan`)."""

    @property
    def stage(self) -> str: ...
    @property
    def model(self) -> Model: ...
    @property
    def hardware(self) -> str | Hardware: ...
    @property
    def estimate(self) -> Estimate: ...
    def cheaper(self) -> list[Remedy]: ...
    def accelerate_config(self) -> str: ...


ANOTHER = "another…"
"""The entry of the model list that opens a field for a folder or a hub id."""
PRECISIONS: dict[str, tuple[str, Values]] = {
    "auto": ("automatic", {}),
    "bf16": ("bf16 autocast", {"bf16": True}),
    "fp16": ("fp16 autocast", {"fp16": True}),
    "float32": ("fp32", {"bf16": False}),
    "bfloat16": ("bf16 weights", {"dtype": "bfloat16"}),
    "float16": ("fp16 weights", {"dtype": "float16"}),
}
LAYOUT_NAMES = {"four": "four models", "shared": "shared trunk", "adapters": "one base + adapters"}
SHARDINGS = (
    ("copies", "copies"),
    ("ZeRO-1", "zero1"),
    ("ZeRO-2", "zero2"),
    ("ZeRO-3", "zero3"),
    ("FSDP2", "fsdp2"),
)
"""`copies`: whole ones, "none" on one device and "ddp" on several."""
SETTINGS_OF_PRECISION = ("dtype", "bf16", "fp16")


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
    leaving the setting out; `when`: whether it matters, given all values."""

    name: str
    label: str
    choices: tuple[object, ...] = ()
    start: object = None
    tip: str = ""
    off: object = None
    when: Callable[[Values], bool] = lambda v: True

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
        if self.slides:
            return _label(value), value
        known = [str(choice) for _, choice in self.pairs]
        raise ValueError(
            f"{self.name}={value!r}; {did_you_mean(value, known)}choose from {', '.join(known)}"
        )


def _label(value: object) -> str:
    return format_number(value) if isinstance(value, (int, float)) else str(value)


def _trains(v: Values) -> bool:
    return STAGES[v["stage"]].trainable


def _sharded(v: Values) -> bool:
    return _trains(v) and bool(v["sharding"] != "copies")


def _has_value_model(v: Values) -> bool:
    return "value" in STAGES[v["stage"]].roles


LENGTHS = doublings(16, 32768, between=True)
CONTROLS: dict[str, tuple[Control, ...]] = {
    "Job": (
        Control("stage", "Stage", tuple((spec.title, name) for name, spec in STAGES.items()),
                "ppo", "what is trained"),
        Control("model", "Model", (), "Qwen/Qwen2.5-1.5B", "a bundled model, a preset, or another"),
        Control("path", "Its name", (), "", "a folder with a config.json, or a hub id (owner/name)",
                when=lambda v: v["model"] == ANOTHER),
    ),
    "Machine": (
        Control("hardware", "Hardware", (), "h100", "the kind of device; here: this machine"),
        Control("gpus", "Devices", doublings(1, 1024), 1, "devices in all", 1),
        Control("nodes", "Nodes", doublings(1, 128), 1, "machines they are in", 1,
                lambda v: v["gpus"] > 1),
        Control("sharding", "Sharding", SHARDINGS, "copies", "what the devices share of a model",
                "copies", _trains),
        Control("offload", "Offload", CHOICES["offload"], "none",
                "optimizer states, or weights too, in main memory", "none", _sharded),
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


# ---------------------------------------------------------------------------------------- in words


def model_name(model: object) -> str:
    """What a model is called: a handle's name, or the name itself."""
    return model.name if isinstance(model, Model) else str(model)


def hardware_name(device: object) -> str:
    """The catalogue's short name where it is the catalogue's, else the device's own."""
    return str(getattr(device, "name", device))


def call(settings: Values) -> str:
    """The line of Python that makes this plan."""
    rest = {k: v for k, v in settings.items() if k not in ("stage", "model")}
    arguments = [
        _literal(settings["stage"]),
        _literal(model_name(settings["model"])),
        *(f"{k}={_literal(v)}" for k, v in rest.items()),
    ]
    return f"lab.plan({', '.join(arguments)})"


def _literal(value: object) -> str:
    """A value as Python; a device as the catalogue's with figures of one's own."""
    if not isinstance(value, Hardware):
        plain = isinstance(value, str) and not set(repr(value)[1:-1]) & set("\"'\\")
        return f'"{value}"' if plain else repr(value)
    figures = value.to_dict()
    for key, known in sorted(CATALOGUE.items(), key=lambda item: item[1].name != value.name):
        own = {
            f.name: figures[f.name]
            for f in fields(Hardware)
            if getattr(known, f.name) != getattr(value, f.name)
        }
        if known.with_(**own) == value:
            changes = "".join(f", {k}={v!r}" for k, v in own.items())
            return f'lab.hardware("{key}"{changes})'
    return _literal(value.name)
