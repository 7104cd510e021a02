"""Presets, pad tokens, and what a handle knows without weights.

pytest tests/models/test_load.py
"""

from __future__ import annotations

import json
import re
import sys

import pytest
from families import make_folder, make_tokenizer

import rlhf_lab as lab
from rlhf_lab.cost.architecture import architecture
from rlhf_lab.models import hub
from rlhf_lab.models.names import presets, same_sizes
from rlhf_lab.models.tokenizer import load_tokenizer


def test_no_bars_of_transformers_for_what_is_on_disk(capfd):
    from transformers.utils import logging

    logging.enable_progress_bar()
    assert lab.load("mini").sft.config.model_type == "llama"
    assert "Loading" not in capfd.readouterr().err and logging.is_progress_bar_enabled()


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
    "mistralai/Mistral-7B-Instruct-v0.2": 7_241_732_096,
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
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Meta-Llama-3-70B": 70_553_706_496,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.1-405B": 405_853_388_800,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/QwQ-32B": 32_763_876_352,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": 7_615_616_512,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": 14_770_033_664,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-4B-Instruct-2507": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "Qwen/Qwen3-30B-A3B-Instruct-2507": 30_532_122_624,
    "Qwen/Qwen3-235B-A22B": 235_093_634_560,
    "Qwen/Qwen3-235B-A22B-Instruct-2507": 235_093_634_560,
    "google/gemma-2b": 2_506_172_416,
    "google/gemma-7b": 8_537_680_896,
    "google/gemma-2-2b": 2_614_341_888,
    "google/gemma-2-9b": 9_241_705_984,
    "google/gemma-2-27b": 27_227_128_320,
    "google/gemma-3-270m": 268_098_176,
    "google/gemma-3-1b-pt": 999_885_952,
    "microsoft/phi-2": 2_779_683_840,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
    "microsoft/Phi-3.5-mini-instruct": 3_821_079_552,
    "microsoft/Phi-3-medium-4k-instruct": 13_960_238_080,
    "microsoft/phi-4": 14_659_507_200,
    "microsoft/Phi-4-reasoning": 14_659_507_200,
    "microsoft/Phi-4-mini-instruct": 3_836_021_760,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "mistralai/Mistral-Nemo-Base-2407": 12_247_782_400,
    "mistralai/Ministral-8B-Instruct-2410": 8_019_808_256,
    "mistralai/Mistral-Small-24B-Base-2501": 23_572_403_200,
    "mistralai/Mistral-Large-Instruct-2407": 122_610_069_504,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "mistralai/Mixtral-8x22B-v0.1": 140_620_634_112,
    "mistralai/Mixtral-8x22B-Instruct-v0.1": 140_630_071_296,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "allenai/OLMo-2-0425-1B": 1_484_916_736,
    "allenai/OLMo-2-1124-13B": 13_716_198_400,
    "allenai/OLMo-2-0325-32B": 32_234_279_936,
    "zai-org/GLM-4-9B-0414": 9_400_279_040,
    "zai-org/GLM-4-32B-0414": 32_566_081_536,
    "zai-org/glm-4-9b-chat-hf": 9_399_951_360,
    "ibm-granite/granite-3.3-2b-instruct": 2_533_539_840,
    "ibm-granite/granite-3.3-8b-instruct": 8_170_864_640,
    "CohereLabs/c4ai-command-r-v01": 34_980_831_232,
    "CohereLabs/aya-expanse-8b": 8_028_033_024,
    "CohereLabs/c4ai-command-r7b-12-2024": 8_028_033_024,
    "01-ai/Yi-6B": 6_061_035_520,
    "01-ai/Yi-34B": 34_388_917_248,
    "bigscience/bloom-560m": 559_214_592,
    "bigscience/bloom-7b1": 7_069_016_064,
    "mosaicml/mpt-7b": 6_649_286_656,
    "bigcode/starcoder2-3b": 3_030_371_328,
    "bigcode/starcoder2-7b": 7_173_923_840,
    "stabilityai/stablelm-2-1_6b": 1_644_515_328,
    "openai-community/gpt2-large": 774_030_080,
    "facebook/opt-125m": 125_239_296,
    "facebook/opt-2.7b": 2_651_596_800,
    "facebook/opt-6.7b": 6_658_473_984,
    "facebook/opt-13b": 12_853_473_280,
}
# Those of which no count is published, of the text part or without the layers that predict further
# tokens, only a size in words (model cards and reports).
ROUNDED = {
    "meta-llama/Llama-4-Scout-17B-16E": 109e9,
    "meta-llama/Llama-4-Maverick-17B-128E": 400e9,
    "google/gemma-3-4b-pt": 3.9e9,
    "google/gemma-3-12b-pt": 11.8e9,
    "google/gemma-3-27b-pt": 27e9,
    "zai-org/GLM-4.5": 355e9,
    "zai-org/GLM-4.5-Air": 106e9,
    "openai/gpt-oss-20b": 20.9e9,
    "openai/gpt-oss-120b": 116.8e9,
    "Qwen/Qwen2.5-VL-3B-Instruct": 3.09e9,
    "Qwen/Qwen2.5-VL-7B-Instruct": 7.61e9,
    "deepseek-ai/DeepSeek-V3": 671e9,
    "tiiuae/falcon-7b": 7e9,
    "ibm-granite/granite-3.3-2b-base": 2.5e9,
    "ibm-granite/granite-3.3-8b-base": 8.2e9,
    "allenai/Olmo-3-1025-7B": 7.3e9,
    "allenai/Olmo-3-1125-32B": 32.2e9,
    "allenai/OLMo-2-1124-7B": 7.3e9,
    "deepseek-ai/DeepSeek-V2-Lite": 15.7e9,
    "facebook/opt-66b": 66e9,
    "facebook/opt-30b": 30e9,
    "Qwen/Qwen3-Next-80B-A3B-Instruct": 80e9,
    "google/gemma-3n-E4B": 6.9e9,
}


def test_every_preset_has_a_published_size_to_hold_it_to():
    assert presets().keys() == PUBLISHED.keys() | ROUNDED.keys()
    assert not PUBLISHED.keys() & ROUNDED.keys()


@pytest.mark.parametrize("name", [*PUBLISHED, *ROUNDED])
def test_a_preset_is_the_model_that_was_published(name):
    """Its config has exactly the published number of parameters (which transformers counts alike:
    tests/cost/test_architecture.py), or is within 2 % of what is said of it."""
    model = lab.load(name.split("/")[1])  # the short name will do
    read = architecture(model.config_dict())
    if name in PUBLISHED:
        assert read.parameters() == PUBLISHED[name]
    else:
        assert read.parameters() == pytest.approx(ROUNDED[name], rel=0.02)
    assert read.context >= 1024


def test_every_name_of_a_preset_is_a_hub_id_of_its_own():
    """And leads to the preset's sizes under its own name, so that its own weights are trained."""
    names = list(same_sizes())
    assert len(names) == len({name.lower() for name in names}) and len(names) >= 200
    for name in names:
        model = lab.load(name)
        assert model.paths["base"] == name and model.config_dict() == presets()[same_sizes()[name]]


SHORT = {
    "Qwen2.5-7B-Instruct": "Qwen/Qwen2.5-7B-Instruct",
    "llama-2-13b": "meta-llama/Llama-2-13b-hf",
    "Llama-3-8B-Instruct": "meta-llama/Meta-Llama-3-8B-Instruct",
    "llama-3.1-8b-instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "mixtral-8x7b": "mistralai/Mixtral-8x7B-v0.1",
    "gemma-3-4b": "google/gemma-3-4b-pt",
    "phi-4": "microsoft/phi-4",
    "deepseek-r1": "deepseek-ai/DeepSeek-R1",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
}


@pytest.mark.parametrize("name", SHORT)
def test_a_short_name_is_enough(name):
    assert lab.load(name).paths["base"] == SHORT[name]


NEAR = {
    "Qwen3": "did you mean Qwen/Qwen3-",
    "Qwen/Qwen3-9B": "did you mean Qwen/Qwen3-8B",
    "Qwen2.5-7B-Instuct": "did you mean Qwen/Qwen2.5-7B-Instruct",
    "mistralai/Mixtral-8x8B-v0.1": "did you mean mistralai/Mixtral-8x7B-v0.1",
    "nobody/nothing-at-all": "neither a folder here nor in the hub's cache",
}


@pytest.mark.parametrize("name", NEAR)
def test_an_unknown_name_is_refused_at_once_with_near_ones(name, monkeypatch):
    """Without importing transformers, which takes seconds."""
    monkeypatch.setattr(hub, "hub_reachable", lambda: False)
    monkeypatch.setitem(sys.modules, "transformers", None)  # an import would fail
    with pytest.raises(ValueError, match=re.escape(NEAR[name])) as error:
        lab.plan("sft", name)
    assert "\n" not in str(error.value)


def test_a_name_that_the_hub_does_not_know_comes_with_near_ones(monkeypatch):
    def unknown(path: str, **_: object) -> None:
        raise OSError(f"{path} is not a valid model identifier")

    monkeypatch.setattr(hub, "hub_reachable", lambda: True)
    with pytest.raises(ValueError, match="did you mean Qwen/Qwen3-8B.*not a valid model") as error:
        hub.fetch(unknown, "Qwen/Qwen3-9B", "config")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="from Qwen/Qwen3-8B: Qwen/Qwen3-8B is not"):
        hub.fetch(unknown, "Qwen/Qwen3-8B", "config")  # a known name has no near one


def test_a_config_in_the_hubs_cache_is_read_there(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "hub_reachable", lambda: False)
    folder = tmp_path / "models--some--one"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    config = {"model_type": "llama", "hidden_size": 8}
    (folder / "snapshots" / "abc" / "config.json").write_text(json.dumps(config))
    assert lab.load("some/one").config_dict() == config


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


def test_an_empty_name_is_not_the_folder_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="no model ''"):
        lab.load("")
    assert lab.load(".").paths["base"] == "."
