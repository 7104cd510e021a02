"""Plans: what follows from a setting must follow, published arithmetic must come out, and what
cannot be is refused in one line.

pytest tests/cost/test_plan.py
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rlhf_lab as lab
from rlhf_lab.charts.estimate import summary_row
from rlhf_lab.cost import heads
from rlhf_lab.cost.estimate import estimate
from rlhf_lab.cost.hardware import hardware
from rlhf_lab.cost.layers import PassConfig
from rlhf_lab.cost.remedies import remedies
from rlhf_lab.display import format_bytes
from rlhf_lab.models.load import presets
from rlhf_lab.stages import STAGES

LLAMA2, QWEN = "meta-llama/Llama-2-7b-hf", "Qwen/Qwen2.5-0.5B"
BASE = {"per_device_train_batch_size": 2, "prompt_length": 64, "response_length": 64, "rows": 1000}


def plan(stage="sft", name=QWEN, device="h100", **more):
    return estimate(stage, presets()[name], device, {**BASE, **more})


def part(e, component, phase=None, role=None) -> float:
    rows = e.ledger.filter(quantity="bytes", component=component)
    phase = phase or e.peak_phase.name
    return sum(r.value for r in rows if r.phase == phase and role in (None, r.role))


# --------------------------------------------------------------------------------------- states


def test_bytes_per_parameter():
    """fp32 AdamW: 4 of weights, 4 of gradients, 8 of moments; 2 + 2 + 4 in 16 bits."""
    n = 494_032_768
    for dtype, itemsize in (("float32", 4), ("bfloat16", 2)):
        e = plan(dtype=dtype)
        at = {c: part(e, c, "optimizer") for c in ("parameters", "gradients", "optimizer")}
        assert at == {
            "parameters": itemsize * n,
            "gradients": itemsize * n,
            "optimizer": 2 * itemsize * n,
        }


@pytest.mark.parametrize(
    ("sharding", "weights", "gradients", "states"),
    [
        ("zero1", 2, 2 / 8, 12 / 8),
        ("zero2", 2, 2 / 8, 12 / 8),
        ("zero3", 2 / 8, 2 / 8, 12 / 8),
    ],
)
def test_zero_shards_as_in_its_paper(sharding, weights, gradients, states):
    """Bytes per parameter on one of 8 devices (Rajbhandari et al., figure 1). ZeRO-1 and ZeRO-2
    keep the gradients of whole matrices, also of those that end in another device's part; at the
    optimizer's step ZeRO-1 needs no other ones any more."""
    n, widest = 6_738_415_616, 4096 * 32000
    e = plan(name=LLAMA2, gpus=8, sharding=sharding)
    assert part(e, "parameters", "optimizer") == pytest.approx(weights * n)
    kept = part(e, "gradients", "optimizer")
    assert gradients * n * 0.9999 <= kept <= gradients * n + 2 * 2 * widest * (sharding != "zero3")
    if sharding == "zero1":  # before that it has all, some in the bucket, and makes room for those
        there = part(e, "gradients", "backward") + part(e, "communication", "backward")
        assert there == pytest.approx(2 * n + max(2 * 500_000_000, kept), rel=1e-3)
    assert part(e, "optimizer", "optimizer") == pytest.approx(states * n)


def test_zero_2_reduces_gradients_in_buckets_of_half_a_billion_numbers():
    """DeepSpeed's `reduce_bucket_size`, at 16 bits a number, whatever the model; in backward, with
    a copy of what is in it while that is summed, or at the end a copy of what is kept. Long rows
    peak before a gradient finds no room in the bucket."""
    long, middle = (
        plan(name=LLAMA2, gpus=8, sharding="zero2", prompt_length=n, response_length=n)
        for n in (2048, 256)
    )
    assert part(long, "communication", "backward") == 2 * 500_000_000
    assert part(middle, "communication", "backward") == 2 * 2 * 500_000_000
    e = plan(name=LLAMA2, gpus=8, sharding="zero2")
    kept = part(e, "gradients", "optimizer")
    assert part(e, "communication", "backward") == pytest.approx(2 * 500_000_000 + kept)
    assert part(e, "communication", "optimizer") == 0
    small = plan(gpus=8, sharding="zero2")
    assert part(small, "communication", "backward") >= 2 * 500_000_000


def test_four_bits():
    """NF4: 4.5 bits for each number of a layer, 16 for embedding, head and norms."""
    e = plan("inference", LLAMA2, dtype="bfloat16", load_in_4bit=True)
    outside = 2 * 32000 * 4096 + 65 * 4096
    inside = 6_738_415_616 - outside
    assert part(e, "parameters") == pytest.approx(inside * 4.5 / 8 + 2 * outside)


def test_kto_passes_without_gradients_thrice():
    """The reference scores each answer and an answer to another prompt, the policy the latter:
    three passes, of half as many sequences as DPO's one, for the same number of rows."""
    kto, dpo = plan("kto"), plan("dpo")
    work = {e.setup.stage: {f.name: f.work.flops for f in e.phases} for e in (kto, dpo)}
    assert work["kto"]["reference"] == pytest.approx(1.5 * work["dpo"]["reference"])
    assert work["kto"]["backward"] == pytest.approx(0.5 * work["dpo"]["backward"])
    assert kto.peak < dpo.peak and {f.role for f in kto.phases} == {"policy", "reference"}
    assert {f.role for f in plan("kto", lora_r=8).phases} == {"policy"}


@pytest.mark.parametrize(("loss", "passes"), [("kto", 3), ("apo_zero_unpaired", 1)])
def test_only_a_loss_with_a_kl_makes_its_passes(loss, passes, tiny, tmp_path):
    """Two steps of TRL's trainer, metered: as many passes without gradients as the plan counts."""
    import trl

    from rlhf_lab.metering.callback import MeterCallback
    from rlhf_lab.metering.meter import Meter
    from rlhf_lab.trainers.trl import make_trainer

    model = tiny.lm(0)
    model.save_pretrained(tmp_path / "model")  # TRL loads the reference from there
    model, meter = type(model).from_pretrained(tmp_path / "model"), Meter("kto")
    row = {"prompt_ids": [1, 2, 3], "completion_ids": [4, 5, 6, 7, 14], "label": True}
    settings = {"loss_type": loss, "per_device_train_batch_size": 4, "max_steps": 2}
    args = trl.KTOConfig(
        output_dir=str(tmp_path),
        **{**settings, "use_cpu": True, "bf16": False, "gradient_checkpointing": False},
        **{"report_to": "none", "save_strategy": "no", "disable_tqdm": True},
    )
    callbacks = [MeterCallback(meter)]
    make_trainer("kto", model, tiny.tokenizer(), [row] * 8, [], args, callbacks).train()
    lengths = {"prompt_length": 3, "response_length": 5}
    e = estimate("kto", model.config.to_dict(), "laptop", {**settings, **lengths})
    for phase in ("reference", "forward", "backward"):
        measured, predicted = (
            ledger.total(quantity="flops", phase=phase) for ledger in (meter.ledger(), e.ledger)
        )
        assert measured == predicted > 0, phase
    forward, reference = (
        e.ledger.total(quantity="flops", phase=phase) for phase in ("forward", "reference")
    )
    assert reference == passes * forward


def test_ppo_holds_four_models():
    e = plan("ppo")
    roles = {r.role for r in e.ledger.filter(quantity="bytes", component="parameters")}
    assert roles == {"policy", "reference", "value", "reward"}
    trained = {r.role for r in e.ledger.filter(quantity="bytes", component="optimizer")}
    assert trained == {"policy", "value"}
    shared, one = plan("ppo", layout="shared"), plan("ppo", layout="adapters", lora_r=8)
    assert one.peak < shared.peak < e.peak
    assert plan("ppo", rule_reward=True).peak < e.peak


def test_the_cache_holds_keys_and_values_of_every_layer():
    """2 · layers · key-value heads · width · bytes, for each token of each sequence."""
    lengths = {"dtype": "bfloat16", "prompt_length": 100, "response_length": 29}
    tokens = (100 + 29 - 1) * 2
    e = plan("inference", LLAMA2, **lengths)
    assert part(e, "kv_cache") == 2 * 32 * 32 * 128 * 2 * tokens
    grouped = plan("inference", QWEN, **lengths)  # 2 heads for keys and values, of 14
    assert part(grouped, "kv_cache", "decode") == 2 * 24 * 2 * 64 * 2 * tokens


def test_inference_is_prefill_and_decode():
    """The same work as a rollout; decoding reads every weight for each token of a sequence."""
    common = {"dtype": "bfloat16", "prompt_length": 100, "response_length": 29}
    e, rollout = plan("inference", LLAMA2, **common), plan("ppo", LLAMA2, **common).phases[0]
    prefill, decode = e.phases
    assert (prefill.name, decode.name, rollout.name) == ("prefill", "decode", "rollout")
    assert prefill.work.flops + decode.work.flops == pytest.approx(rollout.work.flops)
    assert (prefill.tokens, decode.tokens) == (2 * 100, 2 * 29)
    assert prefill.bytes["policy", "kv_cache"] < decode.bytes["policy", "kv_cache"]
    weights = 28 * 2 * (6_738_415_616 - 32000 * 4096)  # read once a step, in two bytes
    seconds = e.seconds_of["decode", "policy"]
    assert seconds > weights / e.hardware.bandwidth
    assert decode.work.flops < prefill.work.flops and seconds > e.seconds_of["prefill", "policy"]


# ------------------------------------------------------------------------------------------ work


def test_flops_are_six_per_parameter_and_token():
    """2 forward and 4 backward for each weight of a matrix (Kaplan et al., 2001.08361), TRL's head
    8 instead of 6 (it computes the logits again), and attention; GPUs score the response alone."""
    e = plan(name=LLAMA2, dtype="bfloat16")
    tokens, scored = 2 * 128, 2 * 64
    matrices = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    scores = 32 * 2 * 128 * 128 * 4096 * (4 + 10)  # two products forward, five backward
    expected = 6 * matrices * tokens + 8 * 4096 * 32000 * scored + scores
    assert e.flops == pytest.approx(expected, rel=1e-6)


def test_steps_hours_and_money():
    e = plan(gpus=4, gradient_accumulation_steps=2, num_train_epochs=3, rows=1000)
    assert e.steps == 189  # three times 63: an epoch's 1000 rows in steps of 2 · 2 · 4, rounded up
    assert e.gpu_hours == pytest.approx(4 * e.hours)
    assert e.money == pytest.approx(e.gpu_hours * hardware("h100").price)
    dear = estimate("sft", presets()[QWEN], hardware("h100", price=10.0), {**BASE, "gpus": 4})
    assert dear.money == pytest.approx(10.0 * dear.gpu_hours)
    halved = plan("inference", gpus=2, tensor_parallel=2, sharding="none")
    assert halved.gpu_hours == pytest.approx(2 * halved.hours), "two devices hold one model"
    unknown = estimate(
        "sft", presets()[QWEN], "h100", {k: v for k, v in BASE.items() if k != "rows"}
    )
    assert unknown.hours is None and unknown.money is None


@pytest.mark.parametrize("stage", STAGES)
def test_a_ledger_adds_up_to_the_plan(stage):
    e = plan(stage, num_generations=2)
    assert e.ledger.peak() == pytest.approx(e.peak)
    assert e.ledger.total(quantity="seconds") == pytest.approx(e.steps * e.step_seconds)
    assert e.ledger.total(quantity="flops") == pytest.approx(e.steps * e.flops)
    assert all(r.low <= r.value <= r.high for r in e.ledger)


@settings(max_examples=60, deadline=None)
@given(
    stage=st.sampled_from(("sft", "reward", "dpo", "kto", "ppo")),
    batch=st.integers(1, 8),
    length=st.integers(8, 300),
    more=st.integers(1, 8),
    lora=st.sampled_from((0, 8)),
    checkpoint=st.booleans(),
    dtype=st.sampled_from(("float32", "bfloat16")),
    gpu=st.booleans(),
)
def test_more_costs_more(stage, batch, length, more, lora, checkpoint, dtype, gpu):
    """Longer responses and larger batches never need less memory, arithmetic or time."""
    common = {
        "dtype": dtype,
        "lora_r": lora,
        "gradient_checkpointing": checkpoint,
        "bf16": False,
        "device": "h100" if gpu else "laptop",
    }
    small = plan(stage, per_device_train_batch_size=batch, response_length=length, **common)
    for change in (
        {"response_length": length + more},
        {"per_device_train_batch_size": batch + more},
    ):
        large = plan(
            stage,
            **{"per_device_train_batch_size": batch, "response_length": length, **common, **change},
        )
        assert large.peak >= small.peak and large.flops > small.flops
        assert large.step_seconds >= small.step_seconds * 0.999


# -------------------------------------------------------------------------------------- remedies


def test_remedies_save_what_they_claim_and_come_ranked():
    e = plan("ppo", LLAMA2, "a100-80", per_device_train_batch_size=8)
    assert not e.fits
    ranked = remedies(e)
    assert ranked and ranked[0].fits
    assert [r.fits for r in ranked] == sorted((r.fits for r in ranked), reverse=True)
    for r in ranked:
        assert r.saves_bytes == pytest.approx(e.peak - r.estimate.peak)
        assert r.saves_money == pytest.approx(e.money - r.estimate.money)
    changes = [r for r in ranked if "stage" not in r.settings]
    for r in changes:  # the settings it names are all it takes
        assert e.changed(**r.settings).peak == r.estimate.peak


def test_a_plan_that_fits_is_only_made_cheaper():
    e = plan("sft", QWEN)
    assert e.fits
    assert all(r.saves_bytes > 0 or r.saves_hours > 0 for r in remedies(e))


# -------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"lora_r": -1}, "lora_r=-1: choose a rank of 1 or more, or 0 for the whole model"),
        ({"gpus": 8, "nodes": 3}, "gpus=8 do not spread over nodes=3: choose 2 nodes"),
        (
            {"gpus": 8, "tensor_parallel": 3},
            "tensor_parallel=3 must divide gpus=8 and the 14 heads: choose 2",
        ),
        ({"optim": "adamw"}, "optim='adamw': did you mean 'adamw_torch'? choose from "),
        ({"sharding": "zero4", "gpus": 2}, "sharding='zero4': did you mean"),
        ({"dtype": "bf16"}, "dtype='bf16'"),
        (
            {"prompt_length": 40_000},
            "prompt_length + response_length = 40064: qwen2 here takes 32768",
        ),
        ({"load_in_4bit": True}, "load_in_4bit trains adapters only: set lora_r"),
        ({"bf16": True, "fp16": True}, "bf16 and fp16: choose one"),
        ({"bf16": True, "dtype": "bfloat16"}, "autocast works on fp32 weights"),
        ({"per_device_train_batch_size": 0}, "batch must be a whole number of at least 1, got 0"),
        ({"gpus": 1.5}, "gpus must be a whole number"),
    ],
)
def test_what_cannot_be_is_one_line(more, line):
    with pytest.raises(ValueError) as error:
        plan(**more)
    assert line in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_both_names_of_checkpointing_are_one_setting(stage):
    """transformers 5.23 calls `gradient_checkpointing` `activation_checkpointing`."""
    old, new, without = (
        lab.plan(stage, "Qwen/Qwen2.5-0.5B", hardware="h100", **setting).estimate
        for setting in ({"gradient_checkpointing": True}, {"activation_checkpointing": True}, {})
    )
    assert new.ledger.peak() == old.ledger.peak() < without.ledger.peak()


def test_ppo_refuses_minibatches_that_do_not_divide():
    with pytest.raises(
        ValueError, match="rollout batch of 6 does not split into num_mini_batches=4: choose 3"
    ):
        plan("ppo", per_device_train_batch_size=6, num_mini_batches=4)
    with pytest.raises(ValueError, match="layout='adapters' needs a rank: set lora_r"):
        plan("ppo", layout="adapters")


def test_unknown_devices_and_families_name_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'a100"):
        plan(device="a10000")
    with pytest.raises(ValueError, match="model_type 'lama'.*llama"):
        estimate("sft", {"model_type": "lama"}, "h100", BASE)


def test_sizes_of_pieces_are_those_of_the_code_that_runs():
    from trl.kernels import chunked_logprob

    from rlhf_lab.metering.memory_tracker import GPU_BLOCK
    from rlhf_lab.ppo import logprobs

    assert (heads.BLOCK, heads.PIECE) == (logprobs.BLOCK, logprobs.PIECE)
    assert heads.FUSED_ROWS == chunked_logprob.TOKEN_CHUNK_SIZE
    assert PassConfig(1, 1, gpu=True).block == GPU_BLOCK


def test_the_planner_loads_nothing_heavy():
    code = (
        "import sys, rlhf_lab.cost.estimate, rlhf_lab.cost.remedies, rlhf_lab.planning; "
        "print(sorted({'torch', 'transformers', 'pandas', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("sharding", ["zero3", "fsdp2"])
def test_sharded_inference_is_refused_in_one_line(sharding):
    """Gathering weights for every token would be most of its time, and is not modelled."""
    with pytest.raises(ValueError, match="of inference is not modelled"):
        lab.plan("inference", "Qwen/Qwen2.5-7B", hardware="h100", gpus=2, sharding=sharding)
    assert lab.plan("inference", "Qwen/Qwen2.5-7B", hardware="h100", gpus=2).estimate.step_seconds


def test_what_is_further_from_fitting_is_no_advice():
    """plan.md 11: DPO instead of PPO needed 39 GiB more, where neither fits."""
    e = plan("ppo", LLAMA2, gpus=8, sharding="zero3", per_device_train_batch_size=64)
    assert not e.fits
    assert all(r.fits or r.saves_bytes > 0 for r in remedies(e))


def test_a_chain_of_changes_names_no_step_that_a_later_one_contains():
    """ "LoRA, rank 16 + ... + QLoRA" said the same thing twice."""
    e = plan("ppo", LLAMA2, device="rtx4090", per_device_train_batch_size=4)
    chains = [r.does for r in remedies(e) if " + " in r.does]
    assert chains and all("QLoRA" in c and "LoRA, rank 16" not in c for c in chains)


def test_a_plan_that_fails_by_its_margin_says_so():
    """The peak is below the card's memory, its upper end is not."""
    e = plan("sft", LLAMA2, gpus=8, sharding="zero3")
    room = (e.peak + e.needed) / 2
    tight = replace(e, hardware=replace(e.hardware, memory=room))
    assert not tight.fits and tight.peak < room
    assert f"no: may need {format_bytes(e.needed)}, " in summary_row(tight)["fits"]
    small = replace(e, hardware=replace(e.hardware, memory=e.peak / 2))
    assert summary_row(small)["fits"].startswith(f"no: {e.hardware.name} has ")
