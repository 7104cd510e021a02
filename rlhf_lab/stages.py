"""The one list of stages: what each is called, needs, holds and shows, as plain data.

Everything that differs from stage to stage is read from here: choices of the command line, the
planner, the x-ray, the ledger, charts, tables. What runs a stage is named by a dotted path
("package.module:name"), which `resolve` looks up when it is wanted: this file imports nothing of
the package, and no torch.

    STAGES["ppo"].roles           ("policy", "reference", "reward", "value")
    TRAINABLE, ONLINE             names of stages, in the order in which a project runs them

How to add one: `CONTRIBUTING.md`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

__path__ = [str(Path(__file__).with_name("_moved"))]
"""`rlhf_lab.stages` was a folder up to version 0.1: where `rlhf_lab.stages.ppo` is found."""
Setting: TypeAlias = Any
"""The value of a setting: of the type that its trainer's config says."""
Settings: TypeAlias = Mapping[str, Setting]
"""Settings by name."""
_STEP = ("forward", "backward", "optimizer")


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
    phases: tuple[str, ...] = _STEP
    charts: tuple[str, ...] = ()
    starts_from: str = "sft"
    online: bool = False
    """the policy samples responses while it is trained, which rewards score"""
    groups: bool = False
    """several responses to each prompt are compared with each other (`num_generations`)"""
    iterates: bool = False
    """counted in iterations, of several optimizer steps each"""
    resumable: bool = False
    distributed: bool = False
    """trained on several processes"""
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


_OFFLINE = {
    "logging_steps": 5,
    "logging_first_step": True,
    "per_device_eval_batch_size": 64,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 5,
    "max_length": 512,
    "per_device_train_batch_size": 32,
}
_GROUPS = {
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 32,
    "steps_per_generation": 2,
    "num_iterations": 2,
    "num_generations": 4,
    "max_steps": 176,
    "logging_steps": 4,
    "response_length": 64,
    "beta": 0.15,
    "missing_eos_penalty": 1.0,
    "disable_dropout": True,
}
"""RLOO and GRPO as much as PPO: 44 times 64 responses, each in two minibatches, twice. RLOO's β
is PPO's `kl_coef`; GRPO's reward is in standard deviations of its group."""
_PPO_CHARTS = ("reward", "gold", "kl", "kl_coef", "entropy", "clipping", "critic", "length")

_RLOO = StageSpec(
    name="rloo",
    title="RLOO",
    rows="prompts",
    roles=("policy", "reference", "reward"),
    phases=("rollout", "old_logprobs", "reference", "score", *_STEP),
    charts=_PPO_CHARTS,
    online=True,
    groups=True,
    xrayed=False,
    defaults=_GROUPS,
    library_defaults={"epochs": 3.0, "samples_per_prompt": 2, "beta": 0.05},
    config="rlhf_lab.trainers.online:RLOOConfig",
    trainer="rlhf_lab.trainers.online:RLOOTrainer",
    train="rlhf_lab.trainers.online:train",
    tokenize="rlhf_lab.data.tokenize:prompt_rows",
    estimate="rlhf_lab.cost.online:rloo_grpo",
)
_SPECS = (
    StageSpec(
        name="sft",
        title="SFT",
        rows="sft",
        columns=("completion",),
        roles=("policy",),
        charts=("loss",),
        starts_from="base",
        loss_unit="nats per token",
        defaults={**_OFFLINE, "learning_rate": 1e-3, "num_train_epochs": 1},
        config="trl:SFTConfig",
        train="rlhf_lab.trainers.job:train_policy",
        trainer="trl:SFTTrainer",
        tokenize="rlhf_lab.data.tokenize:sft_rows",
        estimate="rlhf_lab.cost.offline:sft",
    ),
    StageSpec(
        name="reward",
        title="reward model",
        rows="preferences",
        columns=("chosen", "rejected"),
        roles=("reward",),
        charts=("pair_loss", "pair_accuracy"),
        loss_unit="nats per pair",
        answers=2,
        defaults={**_OFFLINE, "learning_rate": 4e-4, "num_train_epochs": 2},
        config="trl:RewardConfig",
        train="rlhf_lab.trainers.reward:train",
        trainer="trl:RewardTrainer",
        tokenize="rlhf_lab.data.tokenize:whole_pair_rows",
        estimate="rlhf_lab.cost.offline:reward",
    ),
    StageSpec(
        name="ppo",
        title="PPO",
        rows="prompts",
        roles=("policy", "value", "reference", "reward"),
        phases=("rollout", "old_logprobs", "reference", "value", "score", "advantage", *_STEP),
        charts=_PPO_CHARTS,
        online=True,
        iterates=True,
        resumable=True,
        distributed=True,
        defaults={
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 64,
            "num_mini_batches": 2,
            "num_ppo_epochs": 2,
            "max_steps": 44,
            "response_length": 64,
            "temperature": 1.0,
            "kl_coef": 0.15,
            "missing_eos_penalty": 1.0,
            "report_to": "none",
            "local_rollout_forward_batch_size": 32,
        },
        config="rlhf_lab.ppo.config:PPOConfig",
        train="rlhf_lab.trainers.ppo:train",
        tokenize="rlhf_lab.data.tokenize:prompt_rows",
        estimate="rlhf_lab.cost.ppo:ppo",
    ),
    StageSpec(
        name="dpo",
        title="DPO",
        rows="preferences",
        columns=("chosen", "rejected"),
        roles=("policy", "reference"),
        phases=("reference", *_STEP),
        charts=("dpo_loss", "dpo_accuracy", "dpo_margin", "drift", "gold"),
        loss_unit="nats per pair",
        answers=2,
        defaults={**_OFFLINE, "learning_rate": 3e-4, "num_train_epochs": 1, "beta": 0.5},
        config="trl:DPOConfig",
        train="rlhf_lab.trainers.job:train_policy",
        trainer="rlhf_lab.trainers.trl:TokenizedDPOTrainer",
        tokenize="rlhf_lab.data.tokenize:pair_rows",
        estimate="rlhf_lab.cost.offline:dpo",
    ),
    StageSpec(
        name="kto",
        title="KTO",
        rows="labelled",
        columns=("completion", "label"),
        roles=("policy", "reference"),
        phases=("reference", *_STEP),
        charts=("kto_loss", "dpo_margin", "drift", "gold"),
        loss_unit="0 to 1, per answer",
        defaults={**_OFFLINE, "learning_rate": 3e-4, "num_train_epochs": 1, "beta": 0.5},
        config="trl:KTOConfig",
        train="rlhf_lab.trainers.job:train_policy",
        trainer="rlhf_lab.trainers.kto:TokenizedKTOTrainer",
        tokenize="rlhf_lab.data.tokenize:labelled_rows",
        estimate="rlhf_lab.cost.offline:kto",
    ),
    _RLOO,
    replace(
        _RLOO,
        name="grpo",
        title="GRPO",
        library_defaults={"epochs": 3.0, "samples_per_prompt": 8},
        config="rlhf_lab.trainers.online:GRPOConfig",
        trainer="rlhf_lab.trainers.online:GRPOTrainer",
    ),
    StageSpec(
        name="inference",
        title="inference",
        rows="prompts",
        roles=("policy",),
        phases=("prefill", "decode"),
        xrayed=False,
        defaults={"per_device_train_batch_size": 64, "response_length": 64},
        library_defaults={"epochs": 1.0},
        estimate="rlhf_lab.cost.generation:inference",
    ),
)
STAGES: Mapping[str, StageSpec] = MappingProxyType({spec.name: spec for spec in _SPECS})
"""Every stage by name, in the order in which a project runs them. PPO and DPO hold the policy
nearer to the reference (`kl_coef`, `beta`) than is best for the reward alone: further out the
language begins to break."""
TRAINABLE = tuple(name for name, spec in STAGES.items() if spec.trainable)
ONLINE = tuple(name for name, spec in STAGES.items() if spec.online)
XRAYED = tuple(name for name, spec in STAGES.items() if spec.trainable and spec.xrayed)


def resolve(path: str) -> Any:
    """What a dotted path names: "package.module:name"."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
