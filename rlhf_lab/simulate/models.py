"""The models that a simulation trains: of random weights, by role, adapters in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

PAD = 0
"""The bundled tokenizer's."""


def models_of(setup: Any) -> dict[str, nn.Module]:
    """Models by role, the trained ones first; adapters in place."""
    from transformers import AutoModelForCausalLM as Language
    from transformers import AutoModelForSequenceClassification as Critic

    if setup.stage == "reward":
        return {"reward": _model(setup, Critic, setup.config, adapted=True)}
    models = {"policy": _model(setup, Language, setup.config, adapted=True)}
    if setup.stage == "ppo":
        return _ppo_models(setup, models["policy"])
    if setup.stage == "dpo" and not setup.lora_r:
        models["reference"] = _model(setup, Language, setup.config).requires_grad_(False)
    return models


def _ppo_models(setup: Any, policy: nn.Module) -> dict[str, nn.Module]:
    """The roles of PPO in the layout; "trained" holds what several of them may share."""
    from transformers import AutoModelForCausalLM as Language
    from transformers import AutoModelForSequenceClassification as Critic

    from ..ppo.layouts import make_roles

    value = reference = None
    if setup.layout == "four":
        value = _model(setup, Critic, setup.value_config or setup.config)
    if setup.layout != "adapters":
        reference = _model(setup, Language, setup.config)
    if setup.rule_reward:
        reward = None
    elif setup.layout == "adapters" and not setup.own_reward:
        reward = _lora(
            setup,
            setup.critic_lora_r or setup.lora_r,
            setup.critic_lora_targets if setup.critic_lora_r else setup.lora_targets,
        )
    else:
        reward = _model(setup, Critic, setup.reward_config or setup.config)
    roles = make_roles(setup.layout, policy, reference, value, reward)
    made = {
        "policy": roles.policy,
        "value": roles.value,
        "reference": roles.reference,
        "reward": roles.reward,
        "trained": roles.trained,
    }
    return {role: model for role, model in made.items() if model is not None}


def by_role(models: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Without what holds several of them."""
    return {role: model for role, model in models.items() if role != "trained"}


def _lora(setup: Any, rank: int, targets: Any, task: str = "CAUSAL_LM", **settings: Any):
    from peft import LoraConfig

    targets = targets if isinstance(targets, str) else list(targets)
    return LoraConfig(
        task_type=task, r=rank, lora_alpha=2 * rank, target_modules=targets, **settings
    )


def _model(setup: Any, auto: Any, config: dict, adapted: bool = False) -> nn.Module:
    from transformers import AutoConfig

    critic = {"num_labels": 1} if "Sequence" in auto.__name__ else {}
    model = auto.from_config(
        AutoConfig.for_model(**{**config, **critic}),
        dtype=getattr(torch, setup.dtype),
        attn_implementation=setup.attn_implementation,
    )
    model.config.pad_token_id = PAD
    if adapted and setup.lora_r:
        from peft import get_peft_model

        whole = {"modules_to_save": ["score"]} if critic else {}
        task = "SEQ_CLS" if critic else "CAUSAL_LM"
        model = get_peft_model(model, _lora(setup, setup.lora_r, setup.lora_targets, task, **whole))
    return model
