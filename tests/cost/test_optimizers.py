"""What the table says of an optimizer, against the state of the real one after a step.

pytest tests/cost/test_optimizers.py
"""

from __future__ import annotations

import pytest
import torch

from rlhf_lab.cost.estimate import estimate
from rlhf_lab.cost.optimizers import OPTIMIZERS
from rlhf_lab.models.load import presets

CONFIG = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


def state_bytes(name: str, folder) -> int:
    """Bytes that transformers' optimizer of this name keeps, counters of steps aside; of a factored
    one without those of vectors, which the plan leaves out."""
    from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIG))
    args = TrainingArguments(str(folder), optim=name, use_cpu=True)
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
    optimizer = cls(model.parameters(), **kwargs)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    tensors = [
        value
        for parameter, state in optimizer.state.items()
        for value in state.values()
        if parameter.dim() > 1 or not OPTIMIZERS[name].factored
    ]
    return sum(v.numel() * v.element_size() for v in tensors if torch.is_tensor(v) and v.dim())


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if "8bit" not in name])
def test_the_plan_has_the_state_of_the_real_optimizer(name, tmp_path):
    e = estimate("sft", CONFIG, "laptop", {"optim": name, "per_device_train_batch_size": 1})
    rows = e.ledger.filter(quantity="bytes", component="optimizer", phase="optimizer")
    assert sum(row.value for row in rows) == state_bytes(name, tmp_path)


def peak_of_a_step(optimizer, parameters) -> int:
    """Bytes that a step on a CPU takes and gives back, by torch's profiler; states are there."""
    from torch.profiler import ProfilerActivity, profile

    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            optimizer.step()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def matrices(dtype="float32"):
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIG))
    return [p for p in model.to(getattr(torch, dtype)).parameters() if p.dim() > 1]


def workspace(**settings) -> float:
    e = estimate("sft", CONFIG, "laptop", settings)
    return e.ledger.total(quantity="bytes", component="workspace", phase="optimizer")


def test_a_loop_over_tensors_still_has_the_quotient_of_the_one_before():
    """√v and a quotient of one matrix, the quotient of the matrix before: a step of AdamW."""
    of = matrices()
    peak = peak_of_a_step(torch.optim.AdamW([{"params": of}], foreach=False), of)
    assert workspace(optim="adamw_torch") == pytest.approx(peak, rel=1e-3)
    assert peak == pytest.approx(3 * 4 * 256 * 512, rel=1e-3), "gate, up, down are the largest"


@pytest.mark.parametrize(("dtype", "copies"), [("float32", 2), ("bfloat16", 4)])
def test_adafactor_copies_one_tensor_at_a_time_in_fp32(dtype, copies):
    """The squared gradient and its sum with ε, in 16 bits weight and gradient too, and the update
    of the matrix before."""
    from transformers.optimization import Adafactor

    of = matrices(dtype)
    adafactor = Adafactor(of, lr=1e-3, scale_parameter=False, relative_step=False)
    peak = peak_of_a_step(adafactor, of)
    assert workspace(optim="adafactor", dtype=dtype) == pytest.approx(peak, rel=0.01)
    assert peak == pytest.approx((copies + 1) * 4 * 256 * 512, rel=0.01)


def test_eight_bit_optimizers_keep_two_bytes_and_the_scales_of_blocks():
    """Two moments in a byte each, and an fp32 scale of each for 256 numbers."""
    for name in ("adamw_bnb_8bit", "paged_adamw_8bit"):
        assert OPTIMIZERS[name].state_bytes == 2 * (1 + 4 / 256)


def test_both_names_of_eight_bits_are_one_optimizer():
    """transformers' OptimizerNames has two."""
    one, other = (
        estimate("sft", presets()["Qwen/Qwen2.5-0.5B"], "h100", {"optim": name}).peak
        for name in ("adamw_bnb_8bit", "adamw_8bit")
    )
    assert one == other
