"""What a simulation takes: a step of a stage, and its models of random weights, by role."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from ..ppo.layouts import make_roles
from ..ppo.logprobs import AnyModel
from ..stages import STAGES, Setting, Settings

if TYPE_CHECKING:
    from ..cost.setup import Setup

Config = Settings
"""A transformers config as a dict."""
PAD = 0
"""The bundled tokenizer's."""


@dataclass(frozen=True)
class Step:
    """A step to simulate: its setup, the model's transformers config, and the configs of PPO's
    critics (`reward`, `value`) or of a `teacher` where they are not the policy's."""

    setup: Setup
    config: Config
    roles: Mapping[str, Config] = field(default_factory=dict)


def models_of(step: Step) -> dict[str, AnyModel]:
    """Models by role, the trained ones first; adapters in place.

    Adapters are on the policy (in reward: the reward model), in fp32 over bf16 weights as peft
    makes them. A reference is a frozen copy, with adapters the policy without
    them. PPO has the models of its layout, and "trained" is what several of them may share.
    """
    setup, config = step.setup, step.config
    if setup.stage == "reward":
        return {"reward": _critic(setup, config, adapted=True)}
    models = {STAGES[setup.stage].roles[0]: _language_model(setup, config, adapted=True)}
    if setup.stage == "ppo":
        return _ppo_models(step, models["policy"])
    if setup.stage == "distill" and setup.distill_from == "student":
        # As many embeddings as the student has (`prepare.teacher_of`).
        taught = {**step.roles.get("teacher", config), "vocab_size": config["vocab_size"]}
        teacher = _language_model(replace(setup, lora_r=0), taught)
        models["teacher"] = teacher.requires_grad_(False)
    if "reference" in STAGES[setup.stage].roles and not setup.lora_r:
        models["reference"] = _language_model(setup, config).requires_grad_(False)
    return models


def _ppo_models(step: Step, policy: AnyModel) -> dict[str, AnyModel]:
    setup, config = step.setup, step.config
    value = reference = reward = None
    if setup.layout == "four":
        value = _critic(setup, step.roles.get("value", config))
    if setup.layout != "adapters":
        reference = _language_model(setup, config)
    if setup.layout == "adapters" and setup.reward is None and not setup.rule_reward:
        own = setup.critic_lora_r
        targets = setup.critic_lora_targets if own else setup.lora_targets
        reward = _lora(own or setup.lora_r, targets)
    elif not setup.rule_reward:
        reward = _critic(setup, step.roles.get("reward", config))
    roles = make_roles(setup.layout, policy, reference, value, reward)
    names = ("policy", "value", "reference", "reward", "trained")
    models = {name: getattr(roles, name) for name in names}
    return {name: model for name, model in models.items() if model is not None}


def by_role(models: Mapping[str, AnyModel]) -> dict[str, AnyModel]:
    """Without what holds several of them."""
    return {role: model for role, model in models.items() if role != "trained"}


def _lora(
    rank: int, targets: str | tuple[str, ...] | None, task: str = "CAUSAL_LM", **settings: Setting
) -> LoraConfig:
    modules = list(targets) if isinstance(targets, tuple) else targets
    return LoraConfig(
        task_type=task, r=rank, lora_alpha=2 * rank, target_modules=modules, **settings
    )


def _of_adapters(setup: Setup) -> dict[str, Setting]:
    return {"lora_dropout": setup.lora_dropout, "use_dora": setup.use_dora}


def _language_model(setup: Setup, config: Config, adapted: bool = False) -> AnyModel:
    return _model(setup, AutoModelForCausalLM, config, adapted)


def _critic(setup: Setup, config: Config, adapted: bool = False) -> AnyModel:
    """A reward or value model."""
    own = {"task": "SEQ_CLS", "modules_to_save": ["score"]}
    scored = {**config, "num_labels": 1}
    return _model(setup, AutoModelForSequenceClassification, scored, adapted, **own)


def _model(setup: Setup, auto: AnyModel, config: Config, adapted: bool, **own: Setting) -> AnyModel:
    """A model of random weights; `own`: settings of its adapters, where it gets any."""
    model: AnyModel = auto.from_config(
        AutoConfig.for_model(**config),
        dtype=getattr(torch, setup.dtype),
        attn_implementation="eager" if setup.eager else "sdpa",
    )
    model.config.pad_token_id = PAD
    if not adapted or not setup.lora_r:
        return model
    own |= _of_adapters(setup)
    return get_peft_model(model, _lora(setup.lora_r, setup.lora_targets, **own))
