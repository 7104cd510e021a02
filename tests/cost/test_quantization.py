"""Weights of fewer bits in inference: bytes against bitsandbytes', and time.

Run: pytest tests/cost/test_quantization.py
"""

from __future__ import annotations

import json

import pytest

import rlhf_lab as lab
from rlhf_lab.cost.architecture import Linear, architecture
from rlhf_lab.cost.estimate import estimate
from rlhf_lab.cost.quantization import FORMATS, file_bytes, format_of, weight_bytes
from rlhf_lab.models.load import presets

LLAMA = presets()["meta-llama/Llama-3.1-8B"]
MAP = Linear("down_proj", 1024, 512)
LENGTHS = {"prompt_length": 64, "response_length": 64, "dtype": "bfloat16"}


def decode(device: str = "h100", batch: int = 8, **more) -> float:
    asked = {**LENGTHS, "per_device_train_batch_size": batch, **more}
    return estimate("inference", LLAMA, device, asked).seconds_of["decode", "policy"]


@pytest.mark.parametrize(("name", "nested"), [("nf4", False), ("nf4_nested", True)])
def test_four_bits_are_as_many_bytes_as_bitsandbytes_keeps(name, nested):
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(MAP.outputs, MAP.inputs)
    packed, state = functional.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=nested
    )
    kept = [packed, state.absmax] + ([state.state2.absmax] if nested else [])
    assert FORMATS[name].size(MAP) == sum(t.numel() * t.element_size() for t in kept)


def test_eight_bits_keep_a_scale_for_each_row():
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, scales, _ = functional.int8_vectorwise_quant(torch.randn(512, 1024).half())
    real = sum(t.numel() * t.element_size() for t in (packed, scales))
    assert FORMATS["int8"].size(MAP) == real == 512 * 1024 + 4 * 512


def test_groups_of_128_have_a_scale_and_a_zero():
    assert FORMATS["awq"].size(MAP) == 1024 * 512 / 2 + (1024 * 512 // 128) * (2 + 0.5)


def test_embedding_head_and_norms_stay_in_16_bits():
    model = architecture(LLAMA)
    outside = 2 * 128256 * 4096 + 65 * 4096
    inside = model.parameters() - outside
    rows = 32 * (4096 + 2 * 1024 + 4096 + 2 * 14336 + 4096)
    assert weight_bytes(model, "int8", 2) == inside + 4 * rows + 2 * outside
    with_head = weight_bytes(model, "int8_weight_only", 2)
    head = 128256 * 4096
    assert with_head == inside + 2 * rows + 2 * outside - head + 2 * 128256


def test_what_a_kernel_reads_and_writes():
    """Fused: small weights. Else they are written out once, at half the speed, and read whole."""
    nf4, size, whole = FORMATS["nf4"], 1024 * 512 * 4.5 / 8, 1024 * 512 * 2
    assert nf4.moved(MAP, 16, 2) == (size, 0.0)
    assert nf4.moved(MAP, 17, 2) == (whole, 2 * (size + whole))
    assert FORMATS["awq"].moved(MAP, 10_000, 2) == (FORMATS["awq"].size(MAP), 0.0)


def test_dequantising_costs_time():
    """transformers and bitsandbytes: neither NF4 nor LLM.int8 decodes at the speed of bf16. On an
    H100 bitsandbytes measured 1.36 and 3.3 times as long (benchmarking/README.md, 8B, batch 1)."""
    plain = decode(batch=1)
    assert decode(batch=1, load_in_4bit=True) / plain == pytest.approx(1.36, rel=0.15)
    assert decode(batch=1, load_in_8bit=True) / plain == pytest.approx(3.35, rel=0.15)
    nested = decode(batch=1, load_in_4bit=True, use_bnb_nested_quant=True)
    assert nested > decode(batch=1, load_in_4bit=True)
    # Many rows: weights are written out in 16 bits, and the copy takes memory for a moment.
    few, many = (
        estimate(
            "inference",
            LLAMA,
            "rtx4090",
            {**LENGTHS, "per_device_train_batch_size": n, "load_in_4bit": True},
        )
        for n in (16, 17)
    )
    assert many.seconds_of["decode", "policy"] > 1.1 * few.seconds_of["decode", "policy"]
    copies = [e.phases[1].bytes["policy", "activations"] for e in (few, many)]
    assert copies[1] - copies[0] > 4096 * 14336 * 2 * 0.9


def test_fused_four_bits_are_faster_where_weights_are_read():
    """An engine: AWQ decodes a single request faster, and takes a prompt in no faster."""
    e = {
        q: estimate(
            "inference",
            LLAMA,
            "h100",
            {**LENGTHS, "engine": "vllm", "quantization": q, "prompt_length": 4096},
        )
        for q in ("none", "awq", "fp8")
    }
    one = {q: x.serving_at(1) for q, x in e.items()}
    assert one["awq"].per_token < one["fp8"].per_token < one["none"].per_token
    assert one["awq"].prefill > 0.95 * one["none"].prefill
    assert one["fp8"].prefill < 0.8 * one["none"].prefill
    old = estimate(
        "inference", LLAMA, "a100", {**LENGTHS, "quantization": "fp8", "prompt_length": 4096}
    )
    plain = estimate(
        "inference", LLAMA, "a100", {**LENGTHS, "engine": "vllm", "prompt_length": 4096}
    )
    assert old.serving_at(1).prefill == pytest.approx(plain.serving_at(1).prefill, rel=0.05)


@pytest.mark.parametrize(
    ("stage", "settings", "line"),
    [
        ("inference", {"quantization": "awqq"}, "did you mean 'awq'"),
        (
            "inference",
            {"quantization": "awq", "engine": "transformers"},
            "awq are planned with engine=vllm",
        ),
        ("inference", {"quantization": "int8", "engine": "vllm"}, "engine=transformers"),
        ("inference", {"load_in_4bit": True, "load_in_8bit": True}, "choose one"),
        ("sft", {"quantization": "awq"}, "planned for inference, not sft"),
    ],
)
def test_what_cannot_be_is_one_line(stage, settings, line):
    with pytest.raises(ValueError, match=line) as error:
        estimate(stage, LLAMA, "h100", {**LENGTHS, **settings})
    assert "\n" not in str(error.value)


def test_a_base_in_8_bits_trains_adapters():
    """A byte a weight and four a row; the backward pass writes the weights out, one at a time, and
    keeps what each map has read."""

    def plan(**more):
        settings = {"hardware": "a100", "prompt_length": 256, "response_length": 256}
        settings |= {"per_device_train_batch_size": 4, "dtype": "bfloat16", "lora_r": 16}
        return lab.plan("sft", "Llama-2-7b-hf", **settings, **more).estimate

    def held(e):
        return sum(size for (_, what), size in e.phases[0].bytes.items() if what == "parameters")

    whole, eight, four = plan(), plan(load_in_8bit=True), plan(load_in_4bit=True)
    model = whole.setup.model
    inside = [(layer.count, x) for layer in model.layers for x in layer.linears]
    numbers = sum(n * x.inputs * x.outputs for n, x in inside)
    rows = sum(n * x.outputs for n, x in inside)
    assert held(whole) - held(eight) == pytest.approx(2 * numbers - (numbers + 4 * rows), rel=1e-6)
    assert held(four) < held(eight) < held(whole)
    assert four.peak < eight.peak < whole.peak
    assert eight.step_seconds > whole.step_seconds and four.step_seconds > whole.step_seconds
    with pytest.raises(ValueError, match="load_in_8bit trains adapters only: set lora_r"):
        _ = lab.plan("sft", "Llama-2-7b-hf", hardware="a100", load_in_8bit=True).estimate


@pytest.mark.parametrize(
    ("said", "name"),
    [
        (None, "none"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}, "int8"),
        ({"load_in_4bit": True, "bnb_4bit_use_double_quant": True}, "nf4_nested"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4"),
        ({"load_in_4bit": True, "llm_int8_skip_modules": ["lm_head", "vision_tower"]}, "nf4"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "gptq", "bits": 8, "group_size": 32}, "gptq_8_g32"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8_blocks"),
        ({"quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}}, "torchao_int8"),
    ],
)
def test_a_checkpoint_says_what_it_is_in(said, name):
    config = LLAMA | ({} if said is None else {"quantization_config": said})
    assert format_of(config) == name
    with pytest.raises(ValueError, match="a format that is not modelled: .*hqq"):
        format_of(LLAMA | {"quantization_config": {"quant_method": "hqq"}})


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ({"quant_method": "gptq", "bits": 3}, 'gptq", "group_size": 128, "bits": 3'),
        ({"quant_method": "gptq", "bits": 4, "group_size": 16}, "gptq"),
        (
            {"quant_method": "gptq", "bits": 4, "dynamic": {"-:.*moe": {}}},
            "gptq of a part.*dynamic",
        ),
        ({"load_in_4bit": True, "llm_int8_skip_modules": ["model.layers.1.mlp"]}, "layers.1.mlp"),
        ({"quant_type": {"default": {"_type": "Int4WeightOnlyConfig", "group_size": 128}}}, "Int4"),
    ],
)
def test_what_is_planned_as_nothing_else_is_refused(said, line):
    with pytest.raises(ValueError, match=line):
        format_of(LLAMA | {"quantization_config": said})


def test_packed_weights_are_as_many_bytes_as_in_their_layout():
    """qweight and qzeros are int32, scales 16 bits (vLLM's auto_gptq.py and auto_awq.py)."""
    for name, bits, group in (("gptq", 4, 128), ("gptq_8_g32", 8, 32), ("gptq_4_row", 4, 1024)):
        packed, groups = 32 // bits, MAP.inputs // group
        words = MAP.inputs // packed * MAP.outputs + groups * MAP.outputs // packed
        assert FORMATS[name].size(MAP) == 4 * words + 2 * groups * MAP.outputs


NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def folder(at, said, **more):
    at.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], **LLAMA, "quantization_config": said, **more}
    (at / "config.json").write_text(json.dumps(config))
    return at


def test_a_folder_in_4_bits_is_planned_as_what_it_is(tmp_path):
    """A base in 4 bits is the usual start of QLoRA."""
    asked = {"hardware": "rtx4090", "lora_r": 16, **LENGTHS}
    small = folder(tmp_path / "nf4", {**NF4, "bnb_4bit_use_double_quant": True})
    dense = lab.plan("sft", "Llama-3.1-8B", load_in_4bit=True, use_bnb_nested_quant=True, **asked)
    assert lab.plan("sft", small, **asked).peak == dense.peak
    eight = folder(tmp_path / "int8", {"load_in_8bit": True})
    assert lab.plan("dpo", eight, **asked).settings["load_in_8bit"]
    head = folder(tmp_path / "head", {**NF4, "llm_int8_skip_modules": ["lm_head"]})
    assert lab.plan("sft", head, **asked).settings["use_bnb_nested_quant"] is False
    with pytest.raises(ValueError, match="so would be a new score head: .* do not name score"):
        lab.plan("reward", head, **asked)
    with pytest.raises(ValueError, match="load_in_4bit=False: .* is in nf4_nested already"):
        lab.plan("sft", small, load_in_4bit=False, **asked)


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "mxfp4", "hqq", "bitsandbytes"])
def test_what_is_not_trained_is_refused_with_its_format(method, tmp_path):
    said = NF4 if method == "bitsandbytes" else {"quant_method": method, "bits": 4}
    small = folder(tmp_path / "small", said)
    for stage, lora in (("sft", 16), ("ppo", 16), ("sft", 0)):
        if lora and method == "bitsandbytes":
            continue
        with pytest.raises(ValueError, match=rf"in fewer bits \({method}\).*the model that it was"):
            lab.plan(stage, small, hardware="h100", lora_r=lora)


def test_other_roles_are_whole(tmp_path):
    """They are loaded in full beside a base in 4 bits, and planned so; files in 4 bits are not."""
    scores = folder(tmp_path / "rm", NF4, architectures=["LlamaForSequenceClassification"])
    for stage in ("ppo", "grpo"):
        with pytest.raises(ValueError, match="which of a reward model are not planned"):
            lab.plan(stage, "Llama-3.1-8B", reward_model=scores, hardware="h100")
    with pytest.raises(ValueError, match="which of a teacher model are not planned"):
        lab.plan("distill", "Llama-3.1-8B", teacher_model=folder(tmp_path / "t", NF4))
    settings = {**LENGTHS, "lora_r": 16, "load_in_4bit": True}
    for stage, more in (("grpo", {}), ("ppo", {"layout": "adapters"})):
        e = estimate(stage, LLAMA, "h100", {**settings, **more}, reward=LLAMA)
        held = e.phases[0].bytes["reward", "parameters"]
        assert held == architecture(LLAMA).parameters("score") * 2


def test_a_file_is_its_numbers_and_a_small_header():
    model = architecture(LLAMA)
    for name in ("nf4", "torchao_int8"):
        numbers = weight_bytes(model, name, 2)
        assert 0 < file_bytes(model, name, 2) / numbers - 1 < 1e-4
    plain = file_bytes(model, "none", 2)
    assert plain == pytest.approx(16_060_556_376, rel=1e-4)  # meta-llama/Llama-3.1-8B on the hub
