"""Every decoder that the installed transformers registers: its parameters, adapters and plans.

Each config class is tried at a small size, and (slow) at its default one: parameters as the real
model has them, built without weights, and a plan; or one honest line.

pytest tests/cost/test_any_config.py            # a minute
pytest tests/cost/test_any_config.py -m slow    # the default sizes of all
"""

from __future__ import annotations

import json

import pytest
import torch
from any_config import FEWER, TYPES, count, default_config, small_config, whole_model
from transformers import AutoConfig

from rlhf_lab.cost.architecture import architecture
from rlhf_lab.cost.estimate import BANDS, estimate
from rlhf_lab.cost.families import FAMILIES
from rlhf_lab.models import structure

LENGTHS = {"prompt_length": 32, "response_length": 32, "per_device_train_batch_size": 2}


HONEST = (
    "not a decoder alone",
    "the blt config has no hidden_size",  # several models in one
    # Two classes whose defaults no published model has: heads that do not divide, no active expert.
    "the glm4_moe config has hidden_size=4096, which num_attention_heads=96 does not divide",
    "the deepseek_v2 config has no num_experts_per_tok",
)
"""All that is said of a decoder that transformers can build, instead of a plan."""


@pytest.fixture(autouse=True)
def kept_apart(tmp_path_factory, monkeypatch):
    """What is read off models here is kept in a folder of the test's own."""
    monkeypatch.setenv("RLHF_LAB_HOME", str(tmp_path_factory.getbasetemp() / "lab"))


def check(config: dict) -> None:
    """Parameters as the real model has them, and plans; or one line that says what it is."""
    try:
        read = architecture(config)
    except ValueError as error:
        line = str(error)
        assert "\n" not in line and config["model_type"] in line
        assert any(words in line for words in HONEST), line
        return
    assert read.parameters() == count(whole_model(json.dumps(config, default=str)))
    assert read.depth > 0 and read.context >= 64
    for stage in ("sft", "ppo"):
        e = estimate(stage, config, "h100", LENGTHS)
        assert e.peak > 2 * read.parameters() and e.step_seconds > 0 and e.flops > 0
        low, high = e.memory_band
        rough = any("its matrices are known" in line for line in e.caveats)
        assert rough == (read.family not in FAMILIES)
        usual = BANDS["memory"]["one device"]
        if rough:  # of a tiny model's peak the activations may be no part
            assert low <= usual[0] + 1e-9 and high >= usual[1] - 1e-9
        else:
            assert e.memory_band == tuple(usual)


@pytest.mark.parametrize("family", TYPES)
def test_every_decoder_at_a_small_size(family):
    config = small_config(family)
    if config is None:
        pytest.skip("transformers makes no small one of it")
    check(config)


SAMPLED = "bamba gemma3n_text gemma4_text glm4 granitemoehybrid kimi_linear qwen3_next rwkv".split()


@pytest.mark.parametrize(
    "family", [f if f in SAMPLED else pytest.param(f, marks=pytest.mark.slow) for f in TYPES]
)
def test_every_decoder_at_its_default_size(family):
    config = default_config(family)
    if config is None:
        pytest.skip("transformers makes none of its defaults")
    check(config)


@pytest.mark.parametrize("family", [f for f in TYPES if f not in FAMILIES])
def test_adapters_of_what_was_read_off_are_pefts(family):
    """On every linear map: as many parameters as peft trains."""
    from peft import LoraConfig, get_peft_model

    config = small_config(family)
    try:
        read = None if config is None else architecture(config)
    except ValueError:
        read = None
    if read is None:
        pytest.skip("no decoder")
    whole_model.cache_clear()  # peft changes the model
    model = whole_model(json.dumps(config, default=str))
    lora = LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM")
    try:
        adapted = get_peft_model(model, lora)
    except Exception as error:
        pytest.skip(f"peft does not adapt it: {error}")
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    whole_model.cache_clear()
    assert read.lora_parameters(3, "all-linear") == trained


def test_what_was_read_off_is_kept(monkeypatch, tmp_path):
    """The second time nothing is built; a damaged file is written anew."""
    monkeypatch.setenv("RLHF_LAB_HOME", str(tmp_path))
    structure._kept.cache_clear()
    config = small_config("qwen3_next")
    first = json.loads(json.dumps(structure.structure_of(config)))
    (file,) = (tmp_path / "structures").iterdir()
    structure._kept.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(structure, "_build", None)
        assert structure.structure_of(config) == first
    file.write_text("{")
    structure._kept.cache_clear()
    read = structure.structure_of(config)
    assert json.loads(json.dumps(read)) == json.loads(file.read_text()) == first


def test_a_config_is_read_as_transformers_writes_it(tmp_path):
    """Granite 4's has an infinite number, which JSON has not."""
    own = AutoConfig.for_model("granitemoehybrid", **FEWER)
    own.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "__float__" in json.dumps(written)
    assert architecture(written).parameters() == architecture(own.to_dict()).parameters()


def test_a_mixtures_experts_are_counted_and_the_active_ones_work():
    """Qwen3-Next, small: 6 experts of 48 · 64 · 3 in each layer, of which a token passes 2."""
    read = architecture(small_config("qwen3_next"))
    assert (read.experts, read.active) == (6, 2)
    experts = [x for layer in read.layers for x in layer.linears if x.copies > 1]
    assert {x.parameters for x in experts} == {6 * 64 * 96, 6 * 48 * 64}


IMAGES = {
    "qwen2_5_vl": "qwen2",
    "gemma3": "gemma3_text",
    "llama4": "llama4_text",
    "mistral3": "mistral",
    "paligemma": "gemma",
    "idefics3": "llama",
}


@pytest.mark.parametrize("family", IMAGES)
def test_a_model_with_images_is_planned_by_its_text_part(family):
    """As many parameters as its decoder has with its head, and the answer says so first."""
    from transformers import AutoModelForImageTextToText

    own = AutoConfig.for_model(family)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(own)
    alone = torch.nn.ModuleList([model.get_decoder(), model.get_output_embeddings()])
    read = architecture(own.to_dict())
    assert read.family == IMAGES[family]
    assert read.parameters() == count(alone)
    first = estimate("sft", own.to_dict(), "h100", LENGTHS).caveats[0]
    assert first.startswith("planned by its text part: its vision part is not counted")


NOT_DECODERS = {
    "bert": "not a decoder alone",
    "bart": "not a decoder alone",
    "whisper": "not a decoder alone",
    "vit": "not a decoder alone",
    "qwen9": "transformers .* does not know it; did you mean 'qwen",
    "openelm": "transformers [0-9.]+ does not know it$",
    "": "model_type '': transformers .* does not know it",
}


@pytest.mark.parametrize("family", NOT_DECODERS)
def test_what_is_no_decoder_is_one_line(family):
    with pytest.raises(ValueError, match=NOT_DECODERS[family]) as error:
        architecture({"model_type": family, "hidden_size": 64})
    assert "\n" not in str(error.value)
