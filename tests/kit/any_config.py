"""A small config, and the default one, of every decoder that transformers registers."""

from __future__ import annotations

import json
from functools import cache

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

TYPES = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
SMALL = (
    dict.fromkeys("vocab_size".split(), 99)
    | dict.fromkeys("hidden_size n_embd d_model".split(), 64)
    | dict.fromkeys("intermediate_size intermediate_size_mlp ffn_dim ffn_hidden_size".split(), 96)
    | dict.fromkeys("num_hidden_layers n_layer n_layers num_layers".split(), 4)
    | dict.fromkeys("num_attention_heads n_head n_heads".split(), 4)
    | dict.fromkeys("num_key_value_heads num_kv_heads num_experts_per_tok".split(), 2)
    | dict.fromkeys("head_dim kv_lora_rank v_head_dim q_lora_rank".split(), 16)
    | dict.fromkeys("qk_rope_head_dim qk_nope_head_dim".split(), 8)
    | dict.fromkeys("num_experts num_local_experts n_routed_experts".split(), 6)
    | dict.fromkeys("moe_intermediate_size shared_expert_intermediate_size".split(), 48)
    | {"max_position_embeddings": 128, "n_positions": 128, "max_seq_len": 128}
    | {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "pad_token_id": 0}
)
"""Fields that a class has get these sizes; where it cannot be made of them, only some."""
FEWER = {k: v for k, v in SMALL.items() if v in (4, 99, 0)}


def small_config(family: str, sizes: dict[str, int] = SMALL) -> dict | None:
    """A small config of the class as a dict; None where transformers can make none."""
    for tried in (sizes, FEWER):
        try:
            fields = AutoConfig.for_model(family).to_dict()
            own = {name: size for name, size in tried.items() if name in fields}
            made = AutoConfig.for_model(family, **own).to_dict()
            whole_model(json.dumps(made, default=str))
        except Exception:  # what a class raises for sizes that do not go together
            continue
        return made
    return None


def default_config(family: str) -> dict | None:
    """The class's own sizes; None where it has none that it can build."""
    try:
        made = AutoConfig.for_model(family).to_dict()
        whole_model(json.dumps(made, default=str))
    except Exception:
        return None
    return made


@cache
def whole_model(config: str):
    """The real decoder, without weights."""
    logging.set_verbosity_error()
    fields = json.loads(config)
    whole = AutoConfig.for_model(fields.pop("model_type"), **fields)
    own = whole.get_text_config(decoder=True)
    own.tie_word_embeddings = whole.tie_word_embeddings  # the whole model's word holds
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(own)


def count(model) -> int:
    return sum(p.numel() for p in model.parameters())
