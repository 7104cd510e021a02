"""What the planner can be asked: a table of controls, and settings as a line of Python.

Each control stands for one argument of `lab.plan`, under its name; `precision` stands for three.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..cost.hardware import CATALOGUE, Hardware
from ..cost.setup import CHOICES
from ..display import did_you_mean, format_number
from ..models.load import Model
from ..stages import ONLINE

ANOTHER = "another…"
"""The entry of the model list that opens a field for a folder or a hub id."""
PRECISIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "auto": ("automatic", {}),
    "bf16": ("bf16 autocast", {"bf16": True}),
    "fp16": ("fp16 autocast", {"fp16": True}),
    "float32": ("fp32", {"bf16": False}),
    "bfloat16": ("bf16 weights", {"dtype": "bfloat16"}),
    "float16": ("fp16 weights", {"dtype": "float16"}),
}
STAGE_NAMES = {
    "sft": "SFT",
    "reward": "reward model",
    "dpo": "DPO",
    "ppo": "PPO",
    "rloo": "RLOO",
    "grpo": "GRPO",
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
OFFLINE = ("sft", "reward", "dpo")
SETTINGS_OF_PRECISION = ("dtype", "bf16", "fp16")

Values = Mapping[str, Any]


def doublings(low: int, high: int, between: bool = False) -> tuple[int, ...]:
    """low, 2·low, 4·low, … up to high; `between`: and half as much again."""
    found = []
    while low <= high:
        found += [low, low * 3 // 2] if between and low * 3 // 2 <= high else [low]
        low *= 2
    return tuple(found)


@dataclass(frozen=True)
class Control:
    """One control. `choices`: values, or (label, value) pairs; `off`: the value that is as good as
    not said; `when`: whether it matters, given all values; `slides`: a slider of numbers."""

    name: str
    label: str
    choices: tuple = ()
    start: Any = None
    tip: str = ""
    off: Any = None
    slides: bool = False
    when: Callable[[Values], bool] = lambda v: True

    @property
    def pairs(self) -> list[tuple[str, Any]]:
        """The choices as (label, value)."""
        return [
            c if isinstance(c, tuple) else (c if isinstance(c, str) else format_number(c), c)
            for c in self.choices
        ]

    def pair(self, value: Any) -> tuple[str, Any]:
        """How a value reads. Raises ValueError for one that the control cannot hold."""
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if self.slides and not number:
            raise ValueError(f"{self.name} must be a number, got {value!r}")
        for said, held in self.pairs:
            if held == value:
                return said, held
        if self.slides:
            return format_number(value), value
        known = [held for _, held in self.pairs]
        raise ValueError(
            f"{self.name}={value!r}; {did_you_mean(value, known)}choose from {', '.join(known)}"
        )


def _training(v: Values) -> bool:
    return v["stage"] != "inference"


def _sharded(v: Values) -> bool:
    return _training(v) and v["sharding"] != "copies"


def _ppo(v: Values) -> bool:
    return v["stage"] == "ppo"


LENGTHS = doublings(16, 32768, between=True)
CONTROLS: dict[str, tuple[Control, ...]] = {
    "Job": (
        Control(
            "stage",
            "Stage",
            tuple((STAGE_NAMES.get(s, s), s) for s in CHOICES["stage"]),
            "ppo",
            "what is trained",
        ),
        Control("model", "Model", (), "Qwen/Qwen2.5-1.5B", "a bundled model, a preset, or another"),
        Control(
            "path",
            "Its name",
            (),
            "",
            "a folder with a config.json, or a hub id (owner/name)",
            when=lambda v: v["model"] == ANOTHER,
        ),
    ),
    "Machine": (
        Control("hardware", "Hardware", (), "h100", "the kind of device; here: this machine"),
        Control("gpus", "Devices", doublings(1, 1024), 1, "devices in all", 1, True),
        Control(
            "nodes",
            "Nodes",
            doublings(1, 128),
            1,
            "machines they are in",
            1,
            True,
            lambda v: v["gpus"] > 1,
        ),
        Control(
            "sharding",
            "Sharding",
            SHARDINGS,
            "copies",
            "what the devices share of a model",
            "copies",
            when=_training,
        ),
        Control(
            "offload",
            "Offload",
            CHOICES["offload"],
            "none",
            "optimizer states, or weights too, in main memory",
            "none",
            when=_sharded,
        ),
    ),
    "Data": (
        Control("prompt_length", "Prompt", LENGTHS, 512, "tokens of a prompt", slides=True),
        Control("response_length", "Response", LENGTHS, 512, "tokens of a response", slides=True),
        Control(
            "rows",
            "Rows",
            tuple(m * 10**k for k in range(2, 7) for m in (1, 2, 5)),
            20_000,
            "samples, pairs or prompts of the data set",
            slides=True,
        ),
        Control(
            "num_train_epochs",
            "Epochs",
            (1, 2, 3, 4, 5, 10),
            1,
            "passes over the data set",
            slides=True,
            when=_training,
        ),
    ),
    "Training": (
        Control(
            "per_device_train_batch_size",
            "Batch",
            doublings(1, 512),
            8,
            "rows (or pairs) of one device in one pass",
            slides=True,
        ),
        Control(
            "gradient_accumulation_steps",
            "Accumulate",
            doublings(1, 512),
            1,
            "passes that make a step; PPO: passes that a rollout is made of",
            1,
            True,
            _training,
        ),
        Control(
            "lora_r",
            "LoRA rank",
            (("off", 0), *doublings(1, 256)),
            0,
            "rank of adapters; off: all weights are trained",
            0,
            True,
            _training,
        ),
        Control(
            "load_in_4bit",
            "Base in 4 bits (QLoRA)",
            (),
            False,
            "needs a LoRA rank",
            False,
            when=lambda v: v["stage"] == "inference" or v["lora_r"] > 0,
        ),
        Control(
            "precision",
            "Precision",
            tuple((said, key) for key, (said, _) in PRECISIONS.items()),
            "auto",
            "automatic: bf16 autocast where the device has bf16, else fp32",
            "auto",
        ),
        Control(
            "optim",
            "Optimizer",
            CHOICES["optim"],
            "adamw_torch_fused",
            "",
            "adamw_torch_fused",
            when=_training,
        ),
        Control(
            "gradient_checkpointing",
            "Recompute activations",
            (),
            False,
            "gradient checkpointing",
            False,
            when=_training,
        ),
    ),
    "Rollouts": (
        Control(
            "layout",
            "Layout",
            tuple((LAYOUT_NAMES.get(x, x), x) for x in CHOICES["layout"]),
            "four",
            "who plays policy, reference, reward and value",
            "four",
            when=_ppo,
        ),
        Control(
            "num_mini_batches",
            "Minibatches",
            doublings(1, 64),
            1,
            "optimizer steps in one pass over a rollout",
            slides=True,
            when=_ppo,
        ),
        Control(
            "num_ppo_epochs",
            "PPO epochs",
            (1, 2, 3, 4, 6, 8),
            4,
            "passes over a rollout",
            slides=True,
            when=_ppo,
        ),
        Control(
            "num_generations",
            "Per prompt",
            doublings(2, 64),
            4,
            "responses to each prompt",
            slides=True,
            when=lambda v: v["stage"] in ONLINE and v["stage"] != "ppo",
        ),
    ),
}
ALL = {control.name: control for controls in CONTROLS.values() for control in controls}


# ---------------------------------------------------------------------------------------- in words


def model_name(model: Any) -> str:
    """What a model is called: a handle's name, or the name itself."""
    return model.name if isinstance(model, Model) else str(model)


def hardware_name(which: Any) -> str:
    """The catalogue's short name where it is the catalogue's, else the device's own."""
    return str(getattr(which, "name", which))


def call(said: Values) -> str:
    """The line of Python that makes this plan."""
    rest = {k: v for k, v in said.items() if k not in ("stage", "model")}
    words = [
        _literal(said["stage"]),
        _literal(model_name(said["model"])),
        *(f"{k}={_literal(v)}" for k, v in rest.items()),
    ]
    return f"lab.plan({', '.join(words)})"


def _literal(value: Any) -> str:
    """A value as Python; a device as the catalogue's with figures of one's own."""
    if not isinstance(value, Hardware):
        plain = isinstance(value, str) and not set(repr(value)[1:-1]) & set("\"'\\")
        return f'"{value}"' if plain else repr(value)
    made = value.to_dict()
    for key, known in sorted(CATALOGUE.items(), key=lambda item: item[1].name != value.name):
        own = {
            f.name: made[f.name]
            for f in fields(Hardware)
            if getattr(known, f.name) != getattr(value, f.name)
        }
        if known.with_(**own) == value:
            said = "".join(f", {k}={v!r}" for k, v in own.items())
            return f'lab.hardware("{key}"{said})'
    return _literal(value.name)
