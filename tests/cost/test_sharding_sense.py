"""What holds of every sharded plan: more devices, offload, longer rows, and what to change.

pytest tests/cost/test_sharding_sense.py
"""

from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_lab.charts.estimate import remedy_rows
from rlhf_lab.cost.estimate import Estimate, estimate
from rlhf_lab.cost.remedies import remedies
from rlhf_lab.models.load import presets

STAGES = st.sampled_from(("sft", "reward", "dpo", "ppo", "grpo"))
MODELS = ("Qwen/Qwen2.5-0.5B", "meta-llama/Llama-3.1-8B", "meta-llama/Llama-2-7b-hf")
DRAWN = {
    "stage": STAGES,
    "model": st.sampled_from(MODELS),
    "sharding": st.sampled_from(("zero1", "zero2", "zero3", "fsdp2")),
    "gpus": st.integers(2, 12),
    "accumulation": st.sampled_from((1, 4)),
    "lora": st.sampled_from((0, 8)),
}


def drawn(stage, model, sharding, gpus, accumulation, lora, **more) -> Estimate:
    asked = {
        "sharding": sharding,
        "gpus": gpus,
        "gradient_accumulation_steps": accumulation,
        "lora_r": lora,
        "num_generations": 2,
        "per_device_train_batch_size": 2,
        "prompt_length": 512,
        "response_length": 512,
        "gradient_checkpointing": True,
        "rows": 9600,
    }
    return estimate(stage, presets()[model], "h100", asked | more)


@settings(max_examples=40, deadline=None)
@given(**DRAWN, more=st.integers(1, 8))
def test_more_gpus_never_need_more_bytes_each_nor_more_compute(more, gpus, **at):
    few, many = drawn(gpus=gpus, **at), drawn(gpus=gpus + more, **at)
    assert many.peak <= few.peak * (1 + 1e-9)
    # An epoch's last step, of GRPO all steps of its last generation, may be fuller than the rows
    # are, and GRPO leaves out an epoch's last prompts where they do not fill one.
    last = few.setup.epochs * (few.setup.updates if few.setup.stage == "grpo" else 1)
    per_row = [e.flops * e.steps * e.setup.replicas for e in (few, many)]
    assert per_row[1] <= per_row[0] * (1 + last / few.steps + last / many.steps)


@settings(max_examples=40, deadline=None)
@given(**DRAWN)
def test_sharding_never_needs_more_than_copies(sharding, **at):
    """In mixed precision, and what is of constant size set aside: ZeRO's bucket with its copy, and
    the weights of 10⁹ numbers that ZeRO-3 lets live on beside its part of them."""
    copies = drawn(sharding="ddp", **at)
    constant = {"reduce_bucket_size": 1}
    if sharding == "zero3":
        constant["stage3_max_live_parameters"] = 1
    shared = drawn(sharding=sharding, **constant, **at)
    assert shared.peak <= copies.peak


@settings(max_examples=30, deadline=None)
@given(**DRAWN, what=st.sampled_from(("optimizer", "all")))
def test_offload_is_never_faster_nor_needs_more(what, sharding, **at):
    what = {"fsdp2": "all", "zero3": what}.get(sharding, "optimizer")
    here, away = drawn(sharding=sharding, **at), drawn(sharding=sharding, offload=what, **at)
    assert away.step_seconds >= here.step_seconds
    assert away.peak <= here.peak


@settings(max_examples=30, deadline=None)
@given(**DRAWN, more=st.integers(1, 200))
def test_longer_is_never_cheaper(more, **at):
    short, long = drawn(**at), drawn(**at, response_length=512 + more)
    assert long.peak >= short.peak and long.flops > short.flops
    assert long.step_seconds >= short.step_seconds * (1 - 1e-9)


@settings(max_examples=15, deadline=None)
@given(**DRAWN)
def test_no_remedy_is_worse_in_everything(**at):
    e = drawn(**at)
    for r in remedies(e):
        saved = r.saves_bytes, r.saves_hours, r.saves_money
        assert any(x is not None and x > 0 for x in saved), r
    for row in remedy_rows(remedies(e)):
        assert not any("−" in x or "-" in x for x in (row["memory"], row["time"], row["money"]))
        assert row["memory"].endswith((" less", " more", "the same"))
