"""Presets, pad tokens, and what a handle knows without weights.

pytest tests/models/test_load.py
"""

from __future__ import annotations

import json

import pytest
from families import make_folder, make_tokenizer

import rlhf_lab as lab
from rlhf_lab.models.load import presets
from rlhf_lab.models.tokenizer import load_tokenizer

# Parameters as their makers publish them (model cards; Pythia: Biderman et al. 2023, table 1).
PUBLISHED = {
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "TinyLlama/TinyLlama-1.1B": 1_100_048_384,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "openai-community/gpt2": 124_439_808,
    "openai-community/gpt2-medium": 354_823_168,
    "openai-community/gpt2-xl": 1_557_611_200,
    "EleutherAI/pythia-70m": 70_426_624,
    "EleutherAI/pythia-160m": 162_322_944,
    "EleutherAI/pythia-410m": 405_334_016,
    "EleutherAI/pythia-1b": 1_011_781_632,
    "EleutherAI/pythia-1.4b": 1_414_647_808,
    "EleutherAI/pythia-2.8b": 2_775_208_960,
    "EleutherAI/pythia-6.9b": 6_857_302_016,
    "EleutherAI/pythia-12b": 11_846_072_320,
    "facebook/opt-350m": 331_196_416,
    "facebook/opt-1.3b": 1_315_758_080,
}


def test_every_preset_has_a_published_size_to_hold_it_to():
    assert presets().keys() == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_is_the_model_that_was_published(name):
    """Its config, without weights, has exactly the published number of parameters."""
    import torch
    from transformers import AutoModelForCausalLM

    model = lab.load(name.split("/")[1])  # the short name will do
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(model.config)
    assert sum(p.numel() for p in built.parameters()) == PUBLISHED[name]
    assert model.context >= 1024


def test_a_preset_is_planned_without_a_hub():
    plan = lab.plan("ppo", "Qwen2.5-7B", kl_coef=0.1)
    assert plan.model.config.hidden_size == 3584


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_pad_token_is_one_that_no_text_uses(family, tmp_path):
    """<unk> will not do where a text can hold it; GPT-2's eos never does."""
    make_tokenizer(family, with_pad=False).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.pad_token == "<|pad|>"
    assert (
        tokenizer.pad_token_id
        not in tokenizer("w1 never-heard ? <|pad", return_tensors=None)["input_ids"]
    )


def test_room_is_made_for_a_new_pad_token(tmp_path):
    """GPT-2's embeddings grow by the one row; a saved model and its tokenizer agree again."""
    model = lab.load(make_folder(tmp_path / "m", "gpt2", with_pad=False))
    grown, size = model.base, model.config.vocab_size
    assert grown.get_input_embeddings().num_embeddings == len(model.tokenizer) == size + 1
    assert grown.config.pad_token_id == model.tokenizer.pad_token_id == size
    grown.save_pretrained(tmp_path / "n")
    model.tokenizer.save_pretrained(tmp_path / "n")
    again = lab.load(tmp_path / "n")
    assert again.base.get_input_embeddings().num_embeddings == size + 1
    assert again.reward.get_input_embeddings().num_embeddings == size + 1


def test_lora_trains_adapters_and_leaves_a_whole_model(tmp_path):
    """Saved adapters load with plain peft, the merged model with plain transformers: the same."""
    import torch
    from families import rows
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = lab.load(make_folder(tmp_path / "m", "llama"))
    data = lab.load_data(rows())
    for stage in ("sft", "reward", "ppo", "dpo"):
        more = {"response_length": 6} if stage == "ppo" else {}
        plan = lab.plan(stage, model, max_steps=2, seed=0, lora_r=2, learning_rate=1e-2, **more)
        run = lab.train(plan, data, out=tmp_path / stage, quiet=True)
        assert (run.folder / "adapter" / "adapter_model.safetensors").is_file()
        # DPO's reference is the model without adapters, not a second set of them.
        assert not (run.folder / "adapter" / "ref").exists()
        if stage in ("sft", "reward"):
            model = model.with_stage(stage, run.model_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "sft" / "model").eval()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    adapted = PeftModel.from_pretrained(base, tmp_path / "sft" / "adapter").eval()
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, adapted(ids).logits, atol=1e-5)
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
        assert not torch.allclose(merged(ids).logits, base(ids).logits, atol=1e-3)


def test_mistral_commons_own_tokenizer_is_passed_over(tmp_path, monkeypatch):
    """Where mistral-common is installed, transformers hands its tokenizer out, which knows neither
    chat templates nor new tokens: the folder's other files are read instead."""
    from transformers import AutoTokenizer

    class MistralCommonBackend:
        eos_token_id = 2

    real = AutoTokenizer.from_pretrained

    def load(path, *, mistral_format=None, **settings):
        return MistralCommonBackend() if mistral_format is None else real(path, **settings)

    make_tokenizer("llama", with_pad=True).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", load)
    assert load_tokenizer(tmp_path).chat_template.startswith("{{ bos_token }}")


@pytest.mark.parametrize(
    ("config", "stops"),
    [
        ({"eos_token_id": [41, 7]}, [41, 7]),
        ({"eos_token_id": 7}, [7]),
        ({"eos_token_id": 2, "_from_model_config": True}, []),  # the default of a class
        ({}, []),
        (None, []),
    ],
)
def test_row_2_the_generation_configs_stop_tokens_are_known(config, stops, tmp_path):
    make_tokenizer("llama", with_pad=True).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    if config is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path).stop_token_ids == stops
