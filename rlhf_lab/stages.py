"""The one list of stages, as plain data (`stages.yaml`): what each is called, needs, holds, shows.

Everything that differs from stage to stage is read from here: choices of the command line, the
planner, the x-ray, the ledger, charts, tables. What runs a stage is named by a dotted path
("package.module:name"), which `resolve` looks up when it is wanted: this file imports nothing of
the package, and no torch.

    STAGES["ppo"].roles           ("policy", "value", "reference", "reward"), trained ones first
    TRAINABLE, ONLINE, REWARDED   names of stages, in the order in which a project runs them

How to add one: `CONTRIBUTING.md`.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

__path__ = [str(Path(__file__).with_name("_moved"))]
"""`rlhf_lab.stages` was a folder up to version 0.1: where `rlhf_lab.stages.ppo` is found."""
Setting: TypeAlias = Any
"""The value of a setting: of the type that its trainer's config says."""
Settings: TypeAlias = Mapping[str, Setting]
"""Settings by name."""


def read_table(module: str, name: str = "") -> Any:
    """The table beside a module, YAML of the module's name or the file of this name (YAML or JSON).
    YAML is read by libyaml where PyYAML has it, which is much faster. In a web page, where it has
    not, the same table is JSON (`web/build_web.py`)."""
    file = Path(module).with_name(name) if name else Path(module).with_suffix(".yaml")
    written = file if file.suffix == ".json" else file.with_suffix(".table.json")
    if written.is_file():
        return json.loads(written.read_text("utf-8"))
    import yaml

    return yaml.load(file.read_text("utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """A stage. `rows`: the part of a `Data` that it learns from (`sft`, `preferences`, `labelled`,
    `prompts`); `columns`: what such a row must have beside its prompt.

    `roles`: models that stand in memory, the trained ones first. `phases`: of one step, in their
    order. `charts`: groups of charts (`charts/views.py`), by name.
    `starts_from`: the checkpoint that its first role starts as.
    """

    name: str
    title: str
    rows: str
    columns: tuple[str, ...] = ()
    roles: tuple[str, ...]
    phases: tuple[str, ...] = ("forward", "backward", "optimizer")
    charts: tuple[str, ...] = ()
    starts_from: str = "sft"
    online: bool = False
    """the model that is trained samples responses meanwhile, and learns from them"""
    groups: bool = False
    """several responses to each prompt are compared with each other (`num_generations`)"""
    iterates: bool = False
    """counted in iterations, of several optimizer steps each"""
    xrayed: bool = True
    """one step of it runs on fake tensors"""
    loss_unit: str = ""
    """the unit of its loss, and what it is a mean over"""
    answers: int = 1
    """responses of a row that pass through the model"""
    defaults: Mapping[str, object] = field(default_factory=dict)
    """the lab's settings, chosen for the bundled model; the rest are the library's"""
    library_defaults: Mapping[str, float] = field(default_factory=lambda: {"epochs": 3.0})
    """what a plan must know of the trainer's own defaults, under the names of `cost/setup.py`"""
    config: str = ""
    """dotted path of the class of its settings"""
    train: str = ""
    """dotted path of what trains it: `train(job) -> figures`; "": it is planned only"""
    trainer: str = ""
    """dotted path of the class of TRL's trainer, for training and x-ray alike; "" for PPO"""
    tokenize: str = ""
    """dotted path of what makes rows of token ids"""
    estimate: str
    """dotted path of its phases' arithmetic: `estimate(setup) -> list of Phase`"""

    @property
    def trainable(self) -> bool:
        return bool(self.train)


def _spec(name: str, entry: Settings) -> StageSpec:
    fields: Settings = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}
    return StageSpec(name=name, **fields)


_TABLE = read_table(__file__)["stages"]
STAGES: Mapping[str, StageSpec] = MappingProxyType({n: _spec(n, x) for n, x in _TABLE.items()})
"""Every stage by name, in the order in which a project runs them (`stages.yaml`)."""
TRAINABLE = tuple(name for name, spec in STAGES.items() if spec.trainable)
ONLINE = tuple(name for name, spec in STAGES.items() if spec.online)
REWARDED = tuple(name for name in ONLINE if "reward" in STAGES[name].roles)
"""Stages in which what is sampled is scored: by a reward model, or by rules."""
XRAYED = tuple(name for name, spec in STAGES.items() if spec.trainable and spec.xrayed)


def resolve(path: str) -> Any:
    """What a dotted path names: "package.module:name"."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
