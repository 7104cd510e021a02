"""Several LoRA adapters on one base, through peft: add, load, copy, switch."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..display import first_line
from .logprobs import AnyModel

if TYPE_CHECKING:
    from peft import PeftConfig

POLICY, VALUE, REWARD = "default", "value", "reward"
"""Names of the adapters; the policy's is peft's own name of a first one."""
SCORE_FILE = "score.json"
"""Beside a reward adapter: the offset of its scores (rule 16), which a whole reward model keeps in
its config."""


def add_adapter(model: AnyModel, config: PeftConfig | None, name: str = POLICY) -> AnyModel:
    """The model with one more adapter. → the PeftModel. Raises ValueError without a LoRA config."""
    from peft import LoraConfig, get_peft_model

    _check_start(getattr(model, "peft_config", {}).get(POLICY, config))
    if hasattr(model, "peft_config"):
        if name not in model.peft_config:
            model.add_adapter(name, copy.copy(config))
        return model
    if not isinstance(config, LoraConfig):
        raise ValueError(
            "layout='adapters' trains LoRA adapters: give peft_config=LoraConfig(…) "
            "(lora_r in a plan)"
        )
    return get_peft_model(model, config)


def _check_start(config: PeftConfig | None) -> None:
    """Raises ValueError for adapters whose start is taken out of the base's weights (peft 0.21):
    with them off, what is left is not the model that was given, which is the reference."""
    start = str(getattr(config, "init_lora_weights", True))
    if start.lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise ValueError(
            f"init_lora_weights={start!r} changes the base, which is the reference here: use True, "
            "'gaussian' or 'orthogonal', or layout='four'"
        )


def add_reward_adapter(base: AnyModel, folder: AnyModel) -> tuple[Tensor, float]:
    """Add the reward adapter that lies in a folder. → weights of its head (1, h), score offset.

    A LoraConfig makes a new one, under a head of zeros: what it costs is the same. Raises
    ValueError, one line, for a folder that holds no such adapter for this base.
    """
    from peft import LoraConfig, PeftConfig, load_peft_weights, set_peft_model_state_dict

    if isinstance(folder, LoraConfig):
        add_adapter(base, folder, REWARD)
        return torch.zeros(1, base.get_output_embeddings().weight.shape[1]), 0.0
    folder = Path(folder)
    try:
        config = PeftConfig.from_pretrained(str(folder))
        weights = load_peft_weights(str(folder), device="cpu")
    except Exception as error:  # peft and safetensors raise whatever their parsers raise
        line = f"cannot load a reward adapter from {folder}: {first_line(error)}"
        raise ValueError(line) from None
    heads = [name for name in weights if name.endswith("score.weight")]
    if not isinstance(config, LoraConfig) or len(heads) != 1:
        raise ValueError(f"{folder} holds no reward adapter: a LoRA adapter with one score head")
    head = weights.pop(heads[0])
    config.modules_to_save, config.inference_mode = None, True  # a language model has no score head
    config.task_type = base.peft_config[POLICY].task_type
    misfit = f"the reward adapter in {folder} was made for another base"
    try:
        base.add_adapter(REWARD, config)
    except ValueError:  # none of its modules is there
        raise ValueError(misfit) from None
    mark = f".{REWARD}."
    shapes = {n.replace(mark, "."): p.shape for n, p in base.named_parameters() if mark in n}
    wrong = shapes.keys() ^ weights.keys() or {n for n in weights if weights[n].shape != shapes[n]}
    if wrong or head.shape[1] != base.get_output_embeddings().weight.shape[1]:
        raise ValueError(f"{misfit}: {min(wrong) if wrong else heads[0]} does not fit")
    set_peft_model_state_dict(base, weights, REWARD)
    beside = folder / SCORE_FILE
    return head, float(json.loads(beside.read_text())["score_offset"]) if beside.is_file() else 0.0


def copy_adapter(base: AnyModel, source: str, name: str) -> None:
    """Add an adapter with the settings and weights of another one, to be trained."""
    config = copy.copy(base.peft_config[source])
    config.inference_mode = False
    base.add_adapter(name, config)
    parameters = dict(base.named_parameters())
    with torch.no_grad():
        for key, parameter in parameters.items():
            if f".{name}." in key:
                parameter.copy_(parameters[key.replace(f".{name}.", f".{source}.")])


class Switch:
    """Turns one adapter of a base on; those of policy and value stay trainable throughout."""

    def __init__(self, base: AnyModel):
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.layers = [m for m in base.modules() if isinstance(m, BaseTunerLayer)]
        self.on: str | None = "unknown"

    def to(self, name: str | None) -> None:
        """Switch to an adapter, or with None to the base alone."""
        if name == self.on:
            return
        for layer in self.layers:
            layer.enable_adapters(name is not None)
            if name is not None:
                layer.set_adapter(name)
            # peft takes what is off for frozen; a graph that was built would lose its gradients.
            for part in layer.adapter_layer_names:
                for adapter, module in getattr(layer, part).items():
                    if isinstance(module, nn.Module):
                        module.requires_grad_(adapter in (POLICY, VALUE))
        self.on = name
