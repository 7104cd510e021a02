"""Parameters read off a config, against transformers' own count and peft's, digit for digit.

pytest tests/cost/test_architecture.py
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from families import CONFIGS

from rlhf_lab.cost.architecture import FAMILIES, architecture
from rlhf_lab.models import presets

SMALL = {**CONFIGS, "phi3": {**CONFIGS["llama"]}, "mixtral": {**CONFIGS["llama"]}} | {
    "qwen3_moe": {**CONFIGS["qwen3"], "moe_intermediate_size": 12, "num_experts": 6,
                  "num_experts_per_tok": 2, "num_hidden_layers": 3, "decoder_sparse_step": 2},
}  # fmt: skip
VARIANTS = {
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "qwen3 with biases": ("qwen3", {"attention_bias": True}),
    "gpt2, wide": ("gpt2", {"n_inner": 40}),
    "neox without biases": ("gpt_neox", {"attention_bias": False}),
    "opt without biases": ("opt", {"enable_bias": False}),
    "opt, norms first": ("opt", {"do_layer_norm_before": True, "word_embed_proj_dim": 16}),
    "a mixture with dense layers": ("qwen3_moe", {"mlp_only_layers": [0], "decoder_sparse_step": 1}),
}  # fmt: skip
CASES = {f: (f, {}) for f in FAMILIES} | VARIANTS


def config_of(case: str) -> dict:
    family, changes = CASES[case]
    return {"model_type": family, "vocab_size": 50, "pad_token_id": 0, **SMALL[family], **changes}


def empty(config: dict, head: str):
    """The model without its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    made = AutoConfig.for_model(**config, **({"num_labels": 1} if head == "score" else {}))
    auto = AutoModelForCausalLM if head == "lm" else AutoModelForSequenceClassification
    with torch.device("meta"):
        model = auto.from_config(made)
    return model


def count(parameters) -> int:
    return sum(p.numel() for p in parameters)


@pytest.mark.parametrize("head", ["lm", "score"])
@pytest.mark.parametrize("case", CASES)
def test_every_family_has_transformers_count(case, head):
    config = config_of(case)
    assert architecture(config).parameters(head) == count(empty(config, head).parameters())


@pytest.mark.parametrize("head", ["lm", "score"])
@pytest.mark.parametrize("name", presets())
def test_every_preset_has_transformers_count(name, head):
    config = presets()[name]
    assert architecture(config).parameters(head) == count(empty(config, head).parameters())


@pytest.mark.parametrize("targets", [None, "all-linear"])
@pytest.mark.parametrize("case", CASES)
def test_adapters_have_pefts_count(case, targets):
    from peft import LoraConfig, get_peft_model

    config = config_of(case)
    chosen = targets or list(architecture(config).lora_targets())
    model = get_peft_model(
        empty(config, "lm"), LoraConfig(r=3, target_modules=chosen, task_type="CAUSAL_LM")
    )
    theirs = count(p for p in model.parameters() if p.requires_grad)
    assert architecture(config).lora_parameters(3, targets) == theirs


def test_a_mixture_uses_its_active_experts():
    """Two of six experts in one layer of three: four stand idle, 3·h·m parameters each."""
    model = architecture(config_of("qwen3_moe"))
    h, m = 16, 12
    assert (model.experts, model.active, model.depth) == (6, 2, 3)
    assert model.parameters() - model.active_parameters() == 4 * 3 * h * m
    dense = architecture(config_of("llama"))
    assert dense.active_parameters() == dense.parameters()


def test_a_hand_count():
    """Llama, 2 layers, h=16, 2 heads of 8 reading 1, I=32, V=50: written out."""
    parts = architecture(config_of("llama")).by_part()
    assert parts == {
        "embedding": 50 * 16,
        "attention": 2 * (16 * 16 + 2 * 16 * 8 + 16 * 16),
        "mlp": 2 * 3 * 16 * 32,
        "norms": 2 * 2 * 16 + 16,
        "head": 50 * 16,
    }


def test_unknown_names_are_one_line():
    with pytest.raises(ValueError, match="model_type 'bert': choose from gemma, "):
        architecture({"model_type": "bert"})
    with pytest.raises(ValueError, match="no linear layer 'q' in llama: choose from q_proj, "):
        architecture(config_of("llama")).lora_parameters(4, ("q",))
    with pytest.raises(ValueError, match="choose from lm, score, none"):
        architecture(config_of("llama")).parameters("mlm")


def test_it_imports_nothing_heavy():
    code = ("import sys, rlhf_lab.cost.architecture; "
            "print(sorted({'torch', 'transformers', 'pandas'} & set(sys.modules)))")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
