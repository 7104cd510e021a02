"""What models do between trunk and logits: as transformers' own forward passes, or refused at once.

pytest tests/ppo/test_heads.py
"""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from any_config import small_config
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import rlhf_lab as lab
from rlhf_lab.models.structure import NO_KEYS, OWN_HEADS
from rlhf_lab.ppo import logprobs
from rlhf_lab.ppo.rollout import trunk_of
from rlhf_lab.training import check_first

AFTER_THE_HEAD = {
    **dict.fromkeys((*logprobs.MULTIPLIERS, "logits_scaling"), 0.37),
    "final_logit_softcapping": 3.0,
}
"""Fields of configs that say what logits go through, and values that nobody has by default."""
TRIED = (
    "beam cohere cohere2_moe falcon_h1 gemma2 granite hyperclovax minicpm3 mpt nanochat "
    "modernbert-decoder recurrent_gemma roformer xlm-roberta"
).split()
"""Types of models, one of each kind of step."""


def a_model(family):
    """A small one with random weights, of which small sizes of the head are not."""
    config = small_config(family)
    own = AFTER_THE_HEAD | {"mamba_chunk_size": 8}
    config |= {name: value for name, value in own.items() if name in config}
    torch.manual_seed(0)
    config = AutoConfig.for_model(config.pop("model_type"), **config)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for weight in (p for p in model.parameters() if p.dim() > 1):
        torch.nn.init.normal_(weight, std=0.2)
    return model


@pytest.mark.parametrize("family", TRIED)
@torch.no_grad()
def test_logits_are_the_models_own_or_its_type_is_refused(family, monkeypatch):
    model, ids = a_model(family), torch.arange(3, 11)[None]
    theirs = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
    hidden = trunk_of(model)(input_ids=ids, use_cache=False).last_hidden_state
    if family not in OWN_HEADS:
        assert_close(logprobs.language_head(model, hidden).log_softmax(-1), theirs)
        return
    with pytest.raises(ValueError, match=f"^{family} has layers of its own .* Trainer trains it$"):
        logprobs.language_head(model, hidden)
    monkeypatch.setattr(logprobs, "check_head", lambda kind: None)
    ours = logprobs.language_head(model, hidden).log_softmax(-1)
    assert (ours - theirs).abs().max() > 0.01


HEADS = "lm_head|embed_out|head|output|output_projection|proj_out|pred_layer|lm_loss|decoder"
PLAIN = re.compile(
    rf"self\.({HEADS})\((hidden_states|outputs?\[0\]|sequence_output)(\.to\(.*?\))?\)"
    r"(\.float\(\)|\.contiguous\(\))?$"
)
"""A product of the trunk's states, and nothing more."""
RIGHT = (
    "beam cohere cohere2 cohere2_moe cohere_compass falcon_h1 gemma2 gemma3 gemma3n gemma4 "
    "gemma4_unified granite granite_swa granitemoe granitemoe_swa granitemoehybrid "
    "granitemoeshared hyperclovax nanochat vaultgemma"
).split()
"""Folders of transformers whose language models' steps are as those of `TRIED`."""
NO_LANGUAGE_MODELS = (
    "clvp csm musicgen musicgen_melody t5gemma t5gemma2 gemma4_assistant gemma4_unified_assistant"
).split()
"""They give sound, read what an encoder or another model made, and are not trained by a stage."""


def steps(folder):
    """What its language models do to get logits, beside a product of the trunk's states."""
    found = set()
    for file in folder.glob("modeling_*.py"):
        for part in re.split(r"^class ", file.read_text("utf-8"), flags=re.M)[1:]:
            if re.match(r"\w+(ForCausalLM|LMHeadModel|LMHead)\(", part):
                made = re.findall(r"^ +(?:lm_)?logits = (.+)$", part, flags=re.M)
                found |= {x for x in made if not PLAIN.match(x)}
    return found


def test_of_every_language_model_it_is_known_what_it_does_to_logits():
    """One that does more, in a later transformers, is to be tried and named here, or refused."""
    folders = (Path(transformers.__file__).parent / "models").iterdir()
    more = {folder.name for folder in folders if folder.is_dir() and steps(folder)}
    refused = {kind.replace("-", "_").removesuffix("_text") for kind in OWN_HEADS}
    assert more - refused == {*RIGHT, *NO_LANGUAGE_MODELS}


@pytest.mark.parametrize("stage", ["ppo", "sft", "distill", "reward"])
def test_a_head_that_does_more_is_refused_when_it_is_planned(stage, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "roformer", **sizes}))
    if stage == "reward":  # which has a head of its own
        assert lab.plan(stage, tmp_path)
        return
    for model, more in ((tmp_path, {}), ("tiny", {"teacher_model": tmp_path})):
        if model == tmp_path or stage == "distill":
            with pytest.raises(ValueError, match="^roformer has layers of its own"):
                lab.plan(stage, model, **more)


def outputs(folder):
    """Per class of language models of a folder, whether its outputs have `past_key_values`."""
    for file in folder.glob("modeling_*.py"):
        for part in re.split(r"^class ", file.read_text("utf-8"), flags=re.M)[1:]:
            if named := re.match(r"(\w+)\(", part):
                yield named[1], re.search(r"^ +past_key_values=", part, flags=re.M) is not None


def test_models_without_keys_and_values_are_refused_when_planned(tmp_path):
    """They are those whose language models, as transformers has them, put none into outputs."""
    folders = (Path(transformers.__file__).parent / "models").iterdir()
    keeps = {name: kept for folder in folders for name, kept in outputs(folder)}
    without = {kind for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if not keeps[name]}
    assert without - {*OWN_HEADS, *NO_LANGUAGE_MODELS} == NO_KEYS
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    for more in ({}, {"lora_r": 4}):
        with pytest.raises(
            ValueError, match="^mamba keeps no keys and values .* Trainer trains it$"
        ):
            lab.plan("sft", tmp_path, **more)


@pytest.mark.parametrize("family", ["mamba", "ctrl", "codegen", "olmoe", "llama"])
def test_plan_and_training_agree_on_what_has_a_score_head(family, tmp_path, monkeypatch):
    """transformers' own class of it has a `score`, or the plan says first what training refuses."""
    monkeypatch.setenv("RLHF_LAB_HOME", str(tmp_path / "lab"))
    config = small_config(family)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        try:
            made = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(**config))
        except ValueError:  # no class of it
            made = None
    plan = lab.plan("reward", tmp_path, prompt_length=8, response_length=8)
    line = f"{family}: transformers has no class of it with a score head"
    assert any(w.startswith(line) for w in plan.warnings) == (not hasattr(made, "score"))
    if hasattr(made, "score"):
        check_first(plan)
        return
    with pytest.raises(ValueError, match=f"^{line}"):
        lab.train(plan)


@pytest.mark.parametrize("targets", [None, "all-linear", ["q_proj", "out_proj"]])
def test_adapters_that_peft_refuses_on_state_spaces_are_refused_when_planned(targets, tmp_path):
    config = small_config("falcon_h1")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="^lora_r: peft puts no adapters on out_proj of falcon_h1"):
        lab.plan("sft", tmp_path, lora_r=4, lora_target_modules=targets)
    assert lab.plan("sft", tmp_path, lora_r=4, lora_target_modules=["q_proj"])


@pytest.mark.parametrize("family", ["phimoe", "llama4_text", "mixtral"])
def test_routers_that_adapters_fail_on_are_refused_when_planned(family, tmp_path):
    """The first pass of a small model tells."""
    config = small_config(family)
    (tmp_path / "config.json").write_text(json.dumps(config))
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(a_model(family), lora)
    ids = torch.arange(3, 11)[None]
    if family == "mixtral":
        assert model(input_ids=ids) and lab.plan("sft", tmp_path, lora_r=4)
        return
    with pytest.raises(AttributeError, match="'tuple' object"):
        model(input_ids=ids)
    with pytest.raises(ValueError, match=f"^lora_r: peft puts no adapters on router of {family}"):
        lab.plan("sft", tmp_path, lora_r=4)
    assert lab.plan("sft", tmp_path, lora_r=4, lora_target_modules=["q_proj", "v_proj"])


@torch.no_grad()
def test_a_trunk_whose_name_transformers_has_wrong():
    """Llama 4's text model names a part that only the whole model has (transformers 5.23)."""
    small = {"hidden_size": 32, "intermediate_size": 32, "intermediate_size_mlp": 32}
    small |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    small |= {"head_dim": 8, "vocab_size": 64, "num_local_experts": 2, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama4_text", **small)).eval()
    ids = torch.arange(3, 11)[None]
    hidden = trunk_of(model)(input_ids=ids).last_hidden_state
    assert_close(logprobs.language_head(model, hidden), model(input_ids=ids).logits)
