"""Parameters read off a config, against transformers' own count and peft's, digit for digit.

pytest tests/cost/test_architecture.py
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from families import CONFIGS

from rlhf_lab.cost.architecture import SIZES, architecture
from rlhf_lab.cost.families import FAMILIES
from rlhf_lab.models.load import presets

LLAMA = CONFIGS["llama"]
EIGHT = {**LLAMA, "head_dim": 8}
EXPERTS = {"num_local_experts": 6, "num_experts_per_tok": 2}
ROUTED = {"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
QWEN_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
GROUPS = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
LATENT = {
    **{k: v for k, v in LLAMA.items() if k != "num_key_value_heads"},
    **{"kv_lora_rank": 6, "q_lora_rank": 10, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8},
    **{"v_head_dim": 6, "num_hidden_layers": 3, "n_shared_experts": 2},
    **ROUTED,
    **GROUPS,
}
SMALL = {
    **CONFIGS,
    **dict.fromkeys("phi3 olmo olmo2 olmo3 granite cohere cohere2 stablelm phi".split(), LLAMA),
    **dict.fromkeys("smollm3 arcee starcoder2".split(), LLAMA),
    **dict.fromkeys("cwm seed_oss ernie4_5 ministral3 exaone4 glm glm4".split(), EIGHT),
    **dict.fromkeys("mixtral granitemoe phimoe".split(), {**LLAMA, **EXPERTS}),
    "vaultgemma": CONFIGS["gemma2"],
    "falcon": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2},
    "mpt": {"d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 96},
    "qwen3_moe": {**EIGHT, **QWEN_EXPERTS, "num_hidden_layers": 3, "decoder_sparse_step": 2},
    "qwen2_moe": {
        **LLAMA,
        **QWEN_EXPERTS,
        "num_hidden_layers": 3,
        "mlp_only_layers": [1],
        "shared_expert_intermediate_size": 20,
    },
    "olmoe": {**LLAMA, "num_experts": 6, "num_experts_per_tok": 2},
    "flex_olmo": {**LLAMA, "num_experts": 6, "num_experts_per_tok": 2},
    "gpt_oss": {**EIGHT, **EXPERTS},
    "minimax_m2": {**EIGHT, **EXPERTS},
    "granitemoeshared": {**LLAMA, **EXPERTS, "shared_intermediate_size": 20},
    "llama4_text": {
        **EIGHT,
        "num_local_experts": 6,
        "num_hidden_layers": 4,
        "interleave_moe_layer_step": 2,
        "intermediate_size_mlp": 40,
    },
    "glm4_moe": {**EIGHT, **ROUTED, **GROUPS, "num_hidden_layers": 3, "n_shared_experts": 2},
    "deepseek_v3": LATENT,
    "deepseek_v2": {k: v for k, v in LATENT.items() if k != "q_lora_rank"},
}
VARIANTS = {
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "qwen3 with biases": ("qwen3", {"attention_bias": True}),
    "gpt2, wide": ("gpt2", {"n_inner": 40}),
    "neox without biases": ("gpt_neox", {"attention_bias": False}),
    "opt without biases": ("opt", {"enable_bias": False}),
    "opt, norms first": ("opt", {"do_layer_norm_before": True, "word_embed_proj_dim": 16}),
    "falcon, many heads": ("falcon", {"multi_query": False, "bias": True}),
    "falcon, new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 1}),
    "falcon, one after the other": ("falcon", {"parallel_attn": False, "ffn_hidden_size": 40}),
    "stablelm, side by side": ("stablelm", {"use_parallel_residual": True, "use_qkv_bias": True}),
    "stablelm, norms of heads": ("stablelm", {"qk_layernorm": True}),
    "phi, norms of heads": ("phi", {"qk_layernorm": True}),
    "cohere, norms of heads": ("cohere", {"use_qk_norm": True}),
    "glm without biases": ("glm4", {"attention_bias": False}),
    "glm, norms of heads": ("glm4_moe", {"use_qk_norm": True, "attention_bias": True}),
    "experts with a biased head": ("phimoe", {"lm_head_bias": True, "attention_bias": True}),
    "llama4, named layers": ("llama4_text", {"moe_layers": [0, 1, 3]}),
    "latent queries too": ("deepseek_v2", {"q_lora_rank": 10, "attention_bias": True}),
    "latent, not queries": ("deepseek_v3", {"q_lora_rank": None}),
    "a mixture, one dense": ("qwen3_moe", {"mlp_only_layers": [0], "decoder_sparse_step": 1}),
    "a mixture, all dense": ("qwen3_moe", {"mlp_only_layers": [0, 1, 2]}),
}
CASES = {f: (f, {}) for f in FAMILIES} | VARIANTS
TASK = {"lm": "CAUSAL_LM", "score": "SEQ_CLS"}


def config_of(case: str) -> dict:
    family, changes = CASES[case]
    return {"model_type": family, "vocab_size": 50, "pad_token_id": 0, **SMALL[family], **changes}


def empty(config: dict, head: str):
    """The model without its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    own = AutoConfig.for_model(**config, **({"num_labels": 1} if head == "score" else {}))
    auto = AutoModelForCausalLM if head == "lm" else AutoModelForSequenceClassification
    with torch.device("meta"):
        model = auto.from_config(own)
    return model


def count(parameters) -> int:
    return sum(p.numel() for p in parameters)


@pytest.mark.parametrize("head", ["lm", "score"])
@pytest.mark.parametrize("case", CASES)
def test_every_family_has_transformers_count(case, head):
    config = config_of(case)
    if head == "score" and not FAMILIES[config["model_type"]].reward_head:
        with pytest.raises(ValueError, match="Unrecognized configuration class"):
            empty(config, head)
        return
    assert architecture(config).parameters(head) == count(empty(config, head).parameters())


PRESETS = {json.dumps({**c, "max_position_embeddings": 0}): name for name, c in presets().items()}
"""Of those that differ in their context alone, the last."""


@pytest.mark.parametrize("name", PRESETS.values())
def test_every_preset_has_transformers_count(name):
    """Of its decoder, which is all there is of most."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = presets()[name]
    whole = AutoConfig.for_model(**config)
    own = whole.get_text_config(decoder=True)
    with torch.device("meta"):
        if type(own) in AutoModelForCausalLM._model_mapping:
            model = AutoModelForCausalLM.from_config(own)
        else:
            model = AutoModelForImageTextToText.from_config(whole)
            model = torch.nn.ModuleList([model.get_decoder(), model.get_output_embeddings()])
    assert architecture(config).parameters() == count(model.parameters())


def adapted(case: str, targets, head: str = "lm"):
    """peft's model, r=3; a score head as the reward stage has it, trained whole."""
    from peft import LoraConfig, get_peft_model

    whole = {"modules_to_save": ["score"]} if head == "score" else {}
    lora = LoraConfig(r=3, target_modules=targets, task_type=TASK[head], **whole)
    return get_peft_model(empty(config_of(case), head), lora)


def trained(model) -> int:
    return count(p for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("head", TASK)
@pytest.mark.parametrize("targets", [None, "all-linear"])
@pytest.mark.parametrize("case", CASES)
def test_adapters_have_pefts_count(case, targets, head):
    model = architecture(config_of(case))
    if head == "score" and not model.facts.reward_head:
        return
    if targets is None and not model.facts.lora_defaults:
        with pytest.raises(ValueError, match="peft has no default targets for"):
            model.lora_parameters(3, None, head)
        with pytest.raises(ValueError, match="target_modules"):  # peft's NoMatching… is one too
            adapted(case, None, head)
        return
    ours = model.lora_parameters(3, targets, head)
    assert ours == trained(adapted(case, targets, head))
    # The names that "all-linear" stands for come to the same, for us and for peft.
    names = model.lora_targets(targets)
    assert model.lora_parameters(3, names, head) == ours == trained(adapted(case, [*names], head))


@pytest.mark.parametrize("case", CASES)
def test_each_name_has_pefts_count(case):
    """Every map alone, and the language model's head, which only its own name adapts."""
    model = architecture(config_of(case))
    linears = [linear for _, linear in model._linears() if linear.targets] + [model.lm_head]
    for names in dict.fromkeys(linear.targets for linear in linears):
        assert model.lora_parameters(3, names) == trained(adapted(case, [*names])), names


def test_a_score_head_is_trained_and_not_adapted():
    llama = architecture(config_of("llama"))
    assert llama.lora_parameters(3, "all-linear", "score") == 16 + llama.lora_parameters(
        3, "all-linear", "none"
    )
    with pytest.raises(ValueError, match="no linear layer 'score' in llama"):
        llama.lora_parameters(3, ["score"], "score")
    with pytest.raises(ValueError, match="no linear layer 'lm_head' in llama"):
        llama.lora_parameters(3, ["lm_head"], "score")


def test_ranks_of_a_mixture():
    """The experts' joint gate and up proj has the ranks of both: 2 · 6 experts · 3 · (16 + 24)."""
    model = architecture(config_of("qwen3_moe"))
    names = model.lora_targets("all-linear")
    dense, sparse = (layer.linears[4:] for layer in model.layers)
    assert [x.rank(3, names) for x in sparse] == [3, 6, 3]
    assert [x.lora_parameters(3, names) for x in sparse] == [66, 2 * 6 * 3 * 40, 6 * 3 * 28]
    assert [x.rank(3, names) for x in dense] == [0, 0, 0]  # peft takes their names for the experts'


def test_opts_projections_are_linear_maps_of_the_embedding():
    model = architecture(config_of("opt"))
    assert [(x.name, x.inputs, x.outputs) for x in model.outer] == [
        ("project_in", 8, 16),
        ("project_out", 16, 8),
    ]
    assert model.by_part()["embedding"] == 50 * 8 + (96 + 2) * 16 + 2 * 8 * 16
    assert architecture(config_of("opt, norms first")).outer == ()


def test_a_mixture_has_experts_in_its_sparse_layers():
    """Two of six experts, of h·m parameters in each of three matrices, in one layer of three."""
    model = architecture(config_of("qwen3_moe"))
    h, m = 16, 12
    assert (model.experts, model.active, model.depth) == (6, 2, 3)
    experts = [x for layer in model.layers for x in layer.linears if x.copies > 1]
    assert sum(x.parameters for x in experts) == 6 * 3 * h * m


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


@pytest.mark.parametrize("family", FAMILIES)
def test_a_field_left_out_is_the_classs_or_an_error(family):
    """Each in turn: never another number than transformers has."""
    whole = config_of(family)
    full = empty(whole, "lm").config.to_dict()
    assert architecture(full) == architecture(whole)
    for name in full.keys() - {"model_type", "pad_token_id"}:
        config = {k: v for k, v in full.items() if k != name}
        try:
            ours = architecture(config).parameters()
        except ValueError as error:
            assert name in str(error) and name in SIZES or "does not divide" in str(error), error
        else:
            assert ours == count(empty(config, "lm").parameters()), name


@pytest.mark.parametrize("tied", [True, False])
def test_a_nested_config_is_its_text_config(tied):
    """Gemma 3 with images: the language model's parameters, the head tied as the outer config
    says, where the published text_config leaves out what the class has."""
    from transformers import AutoConfig, AutoModelForCausalLM

    text = {
        "model_type": "gemma3_text",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
    }
    vision = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = {
        "model_type": "gemma3",
        "text_config": text,
        "vision_config": vision,
        "mm_tokens_per_image": 4,
        "tie_word_embeddings": tied,
    }
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    theirs = count(
        p for n, p in model.named_parameters() if "language_model" in n or "lm_head" in n
    )
    assert architecture(config).parameters() == theirs
    assert architecture(model.config.to_dict()) == architecture(config)
    assert architecture({k: v for k, v in config.items() if k[:3] != "tie"}).tied


BAD = {
    "bert": ({"model_type": "bert"}, "model_type 'bert': not a decoder alone"),
    "near": ({"model_type": "lama"}, "'lama': transformers .* not know it; did you mean '"),
    "own code": (
        {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}},
        "does not know it; its code comes with the model .auto_map., and is not read here$",
    ),
    "whole line": (
        {"model_type": "zamba2", "num_hidden_layers": 6},
        "validator 'validate_layer_type': ValueError: `num_hidden_layers` .6. must be equal to",
    ),
    "no type": ({"hidden_size": 4}, "model_type '': transformers .* does not know it"),
    "no dict": ("llama", "a config is a dict, got str"),
    "no size": ({"hidden_size": None}, "the llama config has no hidden_size"),
    "a word": ({"hidden_size": "16"}, "has hidden_size='16', no whole number above 0"),
    "a part": ({"hidden_size": 16.5}, "has hidden_size=16.5, no whole number above 0"),
    "a switch": ({"num_hidden_layers": True}, "num_hidden_layers=True, no whole number"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads=0, no whole number above 0"),
    "uneven": ({"hidden_size": 17}, "hidden_size=17, which num_attention_heads=2 does not divide"),
    "uneven keys": ({"num_key_value_heads": 3}, "=2, which num_key_value_heads=3 does not divide"),
    "uneven gpt2": ({"model_type": "gpt2", "n_embd": 16, "n_head": 3, "n_layer": 1}, "n_embd=16, "),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_config_is_one_line(case):
    config, line = BAD[case]
    if case not in ("no dict", "no type"):
        config = {**config_of("llama"), **config}
    with pytest.raises(ValueError, match=line) as error:
        architecture(config)
    assert "\n" not in str(error.value)


def test_a_given_head_dim_needs_no_even_share():
    assert architecture(config_of("llama") | {"hidden_size": 17, "head_dim": 8}).head_dim == 8


def test_unknown_names_are_one_line():
    llama, mixtral = (architecture(config_of(family)) for family in ("llama", "mixtral"))
    with pytest.raises(ValueError, match="no linear layer 'q' in llama: choose from q_proj, "):
        llama.lora_parameters(4, ("q",))
    with pytest.raises(ValueError, match="'gate_up_proj' in mixtral: choose from .* gate, w1, w3"):
        mixtral.lora_parameters(4, ["gate_up_proj"])
    with pytest.raises(ValueError, match="fuses w1 and w3 into gate_up_proj: name w3 too, or nei"):
        mixtral.lora_parameters(4, ["q_proj", "w1"])
    with pytest.raises(ValueError, match="targets='q_proj': choose \"all-linear\" or a list"):
        llama.lora_parameters(4, "q_proj")
    with pytest.raises(ValueError, match="choose from lm, score, none"):
        llama.parameters("mlm")
    with pytest.raises(ValueError, match="choose from lm, score, none"):
        llama.lora_parameters(4, head="mlm")


def test_it_imports_nothing_heavy():
    code = (
        "import sys, rlhf_lab.cost.architecture; "
        "print(sorted({'torch', 'transformers', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
