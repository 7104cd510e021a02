"""QLoRA in the stages over TRL: a base in 4 bits, adapters in fp32, and a model that was never
rounded at the end.

pytest tests/trainers/test_qlora.py
"""

import json

import pytest
import torch
from safetensors.torch import load_file

import rlhf_lab as lab
from rlhf_lab.stages import STAGES

SETTINGS = {"lora_r": 4, "load_in_4bit": True, "per_device_train_batch_size": 4, "max_steps": 2}
GROUPS = {"num_generations": 2, "response_length": 8}
MATRIX = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def data():
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'rlhf-lab[gpu]'")
    return lab.load_data("stories").first(64, test=8)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "grpo"])
def test_a_base_in_4_bits(stage, data, tmp_path):
    more = GROUPS if STAGES[stage].groups else {}
    settings = {**SETTINGS, **more, "warmup_steps": 0, "lr_scheduler_type": "constant", "seed": 0}
    plan = lab.plan(stage, "mini", data=data, hardware="here", **settings)
    run = lab.train(plan, data, out=tmp_path / "run", quiet=True)
    assert run.status == "finished"
    losses = run.series("loss")[1]
    assert losses and all(abs(loss) < 20 for loss in losses)
    weights = load_file(run.folder / "model" / "model.safetensors")
    start = getattr(lab.load("mini"), STAGES[stage].starts_from).state_dict()
    moved = (weights[MATRIX] - start[MATRIX]).abs().max()
    assert 0 < moved < 0.05  # two steps of adapters; NF4's rounding is larger
    assert torch.equal(weights["model.embed_tokens.weight"], start["model.embed_tokens.weight"])
    adapter = load_file(run.folder / "adapter" / "adapter_model.safetensors")
    assert {w.dtype for w in adapter.values()} == {torch.float32}
    if stage == "reward":
        assert weights["score.weight"].shape[0] == 1 and any("score" in name for name in adapter)
    held = {
        source: next(
            row.value
            for row in run.ledger.filter(source=source, role=STAGES[stage].roles[0])
            if (row.component, row.quantity) == ("parameters", "bytes")
        )
        for source in ("predicted", "measured")
    }
    assert held["measured"] == pytest.approx(held["predicted"], rel=0.05)


def test_rounding_is_larger_than_what_the_test_above_allows():
    """Else it would not notice a model that was merged into rounded weights."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'rlhf-lab[gpu]'")
    import bitsandbytes.functional as bnb

    model = lab.load("mini")
    layer = model.in_4bit("base").get_submodule(MATRIX.removesuffix(".weight"))
    back = bnb.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert (back - model.base.get_parameter(MATRIX)).abs().max() > 0.05


@pytest.mark.parametrize("stage", ["sft", pytest.param("reward", marks=pytest.mark.slow)])
def test_a_folder_in_4_bits_is_a_base(stage, data, tmp_path):
    """As the common "…-bnb-4bit" ones: adapters train on it, and are merged into what its weights
    read as, whole."""
    import bitsandbytes.functional as bnb

    small = tmp_path / "small"
    lab.quantize("mini", "nf4", stage="base", out=small, data=None)
    settings = {"lora_r": 4, "lora_target_modules": ["up_proj"], "max_steps": 2}
    plan = lab.plan(stage, small, data=data, hardware="here", **settings)
    assert plan.settings["load_in_4bit"] is True
    run = lab.train(plan, data, out=tmp_path / "run", quiet=True)
    held = [
        [r.value for r in run.ledger.filter(source=source) if r.component == "parameters"][0]
        for source in ("predicted", "measured")
    ]
    assert held[1] == pytest.approx(held[0], rel=0.05)
    weights = load_file(run.folder / "model" / "model.safetensors")
    layer = lab.load(small).base.get_submodule(MATRIX.removesuffix(".weight"))
    start = bnb.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert weights[MATRIX].dtype == torch.float32
    assert 0 < (weights[MATRIX] - start).abs().max() < 0.05  # rounded again it would be more
    config = json.loads((run.folder / "model" / "config.json").read_text())
    assert "quantization_config" not in config
