"""The x-ray against real tensors: an exact account, torch's profiler, and counts made by hand."""

import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
from real_steps import real_step

from rlhf_lab.cost.architecture import architecture
from rlhf_lab.cost.ppo import ppo as PPO
from rlhf_lab.cost.setup import Setup
from rlhf_lab.simulate.account import FakeAccount
from rlhf_lab.simulate.models import Step, models_of
from rlhf_lab.simulate.step import simulate_step
from rlhf_lab.simulate.xray import XRay

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
    "max_position_embeddings": 2048,
}
GPT2 = {
    "model_type": "gpt2",
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "vocab_size": 1024,
    "n_positions": 1024,
    "resid_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
}
SHAPE = {"batch": 4, "prompt": 24, "response": 40, "num_ppo_epochs": 1, "padded": False}
SHAPE |= {"local_rollout_forward_batch_size": 4, "optim": "adamw_torch"}
CASES = [
    ("sft", LLAMA, {}),
    ("sft", GPT2, {"padded": True, "lora_r": 4, "gradient_accumulation_steps": 2}),
    ("sft", LLAMA, {"bf16": True, "gradient_checkpointing": True, "optim": "adamw_torch_fused"}),
    ("reward", LLAMA, {}),
    ("reward", LLAMA, {"dtype": "bfloat16", "lora_r": 4, "attn_implementation": "eager"}),
    ("dpo", LLAMA, {"padded": True}),
    ("dpo", LLAMA, {"lora_r": 4}),
    ("kto", LLAMA, {"padded": True}),
    ("kto", LLAMA, {"lora_r": 4}),
    ("kto", LLAMA, {"loss_type": "apo_zero_unpaired"}),
    ("ppo", LLAMA, {"padded": True}),
    ("ppo", LLAMA, {"gradient_checkpointing": True, "every_n_layers": 2}),
    (
        "ppo",
        LLAMA | {"model_type": "mistral", "sliding_window": 40},
        {
            "num_mini_batches": 2,
            "gradient_accumulation_steps": 2,
            "num_ppo_epochs": 2,
            "lora_r": 4,
            "local_rollout_forward_batch_size": 2,
        },
    ),
]


def setup_of(stage, config=LLAMA, device="cpu", **settings) -> Setup:
    chosen = {"gpu": device == "gpu", **SHAPE, **settings}
    return Setup(stage=stage, model=architecture(config), **chosen)


def xray(stage, config=LLAMA, **settings) -> XRay:
    return simulate_step(setup_of(stage, config, **settings), config)


def at(x: XRay, phase: str, component: str, role=None) -> float:
    """Bytes of a component at a phase's peak."""
    more = {"role": role} if role else {}
    return x.ledger.total(phase=phase, component=component, quantity="bytes", **more)


def trainables(stage, config=LLAMA, **settings) -> tuple[int, int]:
    """Numbers that are trained, and tensors."""
    models = models_of(Step(setup_of(stage, config, **settings), config)).values()
    found = [p for m in models for p in m.parameters() if p.requires_grad]
    return sum(p.numel() for p in found), len(found)


@pytest.mark.parametrize(("stage", "config", "settings"), CASES, ids=lambda c: str(c)[:40])
def test_equals_what_real_tensors_take(stage, config, settings):
    fake = xray(stage, config, **settings)
    real = real_step(setup_of(stage, config, **settings), config, by="account")
    allocator = real_step(setup_of(stage, config, **settings), config, by="profiler")
    assert fake.peak == pytest.approx(real.peak, rel=0.005)
    assert fake.peak == pytest.approx(allocator.peak, rel=0.015)
    assert fake.flops == real.flops > 0
    assert fake.ledger.pivot("role", "phase", quantity="flops") == real.ledger.pivot(
        "role", "phase", quantity="flops"
    )
    assert {r.source for r in fake.ledger} == {"simulated"}
    assert fake.ledger.peak() == fake.peak


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_gradients_and_adam_states_are_counted_by_hand(dtype):
    item = {"float32": 4, "bfloat16": 2}[dtype]
    count, tensors = trainables("sft")
    x = xray("sft", dtype=dtype)
    buffers = at(x, "optimizer", "parameters") - item * count
    assert 0 <= buffers < 100  # the rotary frequencies
    assert at(x, "optimizer", "gradients") == item * count
    assert (
        at(x, "optimizer", "optimizer") == 2 * item * count + 4 * tensors
    )  # and a step count each


def test_adapters_are_fp32_over_bf16_weights():
    settings = {"dtype": "bfloat16", "lora_r": 4}
    count, tensors = trainables("sft", **settings)
    x = xray("sft", **settings)
    assert 0 < count < 40_000
    assert at(x, "optimizer", "gradients") == 4 * count
    assert at(x, "optimizer", "optimizer") == 8 * count + 4 * tensors
    assert x.peak < xray("sft", dtype="bfloat16").peak


def test_a_shared_trunk_is_passed_once():
    """Policy and value in one pass: no phase of the value model, and the plan's FLOPs."""
    from rlhf_lab.cost.estimate import estimate

    x = xray("ppo", layout="shared")
    phases = {row.phase for row in x.ledger.filter(quantity="flops")}
    assert phases.isdisjoint({"value"}) and "old_logprobs" in phases
    planned = estimate(
        "ppo",
        LLAMA,
        "laptop",
        {
            "layout": "shared",
            "prompt_length": SHAPE["prompt"],
            "response_length": SHAPE["response"],
            "per_device_train_batch_size": SHAPE["batch"],
            "num_ppo_epochs": 1,
            "local_rollout_forward_batch_size": 4,
        },
    )
    assert planned.ledger.total(quantity="flops") == x.flops


def test_checkpointing_and_masks_show():
    plain = xray("reward")
    saved = xray("reward", gradient_checkpointing=True)
    assert at(saved, "backward", "activations") < at(plain, "backward", "activations")
    assert saved.flops > plain.flops  # the layers are run twice
    assert xray("reward", padded=True).peak > plain.peak


def test_dpo_with_adapters_has_no_second_model():
    full, lora = xray("dpo"), xray("dpo", lora_r=4)
    assert at(full, "backward", "parameters", "reference") > 0
    assert not at(lora, "backward", "parameters", "reference")
    for x in (full, lora):
        assert x.ledger.total(phase="reference", role="reference", quantity="flops") > 0


def test_ppo_holds_four_models_and_a_cache():
    lengths = {"prompt": 2, "response": 62}  # the peak of the rollout is its end
    x = xray("ppo", GPT2, **lengths)
    roles = set(x.ledger.pivot("role", "component", quantity="bytes", phase="forward"))
    assert {"policy", "value", "reference", "reward"} <= roles
    full = 2 * 3 * 64 * 4 * SHAPE["batch"] * 63  # the last token is sampled, not read
    assert full * 62 / 63 <= at(x, "rollout", "kv_cache") <= full * (1 + 1 / 6)  # one is copied
    assert set(x.ledger.pivot("phase", "role", quantity="flops")) == {
        "rollout",
        "old_logprobs",
        "reference",
        "score",
        "value",
        "forward",
        "backward",
    }
    more = xray("ppo", GPT2, num_ppo_epochs=3, **lengths)
    forward = {"phase": "forward", "quantity": "flops"}
    assert more.ledger.total(**forward) == 3 * x.ledger.total(**forward)
    assert more.peak == x.peak


def test_a_gpu_differs_where_it_must():
    cpu, gpu = xray("sft"), xray("sft", device="gpu")
    count, _ = trainables("sft")
    assert at(gpu, "optimizer", "workspace") == pytest.approx(4 * count, rel=0.01)  # foreach
    assert at(cpu, "optimizer", "workspace") < 4 * count * 0.6  # one tensor after another
    assert gpu.flops < cpu.flops  # the head scores the response only
    assert gpu.peak % 512 == 0


@pytest.mark.parametrize(("stage", "settings"), [("sft", {}), ("dpo", {"lora_r": 4})])
def test_no_library_warns_of_a_name_that_the_user_never_gave(stage, settings):
    """transformers renamed gradient_checkpointing; TRL and peft still use the old name."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        xray(stage, gradient_checkpointing=True, **settings)
    assert not [str(x.message) for x in said if "gradient_checkpointing" in str(x.message)]


def test_the_process_is_left_as_it_was():
    from accelerate.state import AcceleratorState

    backward, state = torch.Tensor.backward, dict(AcceleratorState._shared_state)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    xray("ppo", bf16=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.Tensor.backward is backward
    assert AcceleratorState._shared_state == state
    x = torch.randn(5, requires_grad=True)
    torch.nn.functional.silu(x).sum().backward()
    assert x.grad.isfinite().all()


def test_masks_select_what_they_would():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), FakeAccount(response=3):
        mask = torch.ones(4, 7, dtype=torch.bool)
        x = torch.ones(4, 7, 5, requires_grad=True)
        assert x[mask].shape == (12, 5)
        x[mask].sum().backward()
        assert x.grad.shape == x.shape
        assert mask[0].nonzero().shape == (7, 1)
        assert bool(mask.all()) and not bool(mask.sum() < 2)


@pytest.mark.parametrize(
    ("stage", "settings", "says"),
    [
        ("rlhf", {}, "sft, reward"),
        ("rloo", {}, "choose from sft, reward"),
    ],
)
def test_what_cannot_be_is_one_line(stage, settings, says):
    with pytest.raises(ValueError, match=says) as error:
        xray(stage, **settings)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_7b_step_is_quick_and_small():
    code = """
import json, time
import torch
from rlhf_lab.cost.architecture import architecture
from rlhf_lab.cost.setup import Setup
from rlhf_lab.simulate.step import simulate_step
from trl import SFTTrainer
from rlhf_lab.models.load import presets
start = time.perf_counter()
config = presets()["meta-llama/Llama-2-7b-hf"]
x = simulate_step(Setup(stage="sft", model=architecture(config), batch=1, prompt=512, response=512,
                        dtype="bfloat16", padded=False, optim="adamw_torch"), config)
rss = [1024 * int(line.split()[1]) for line in open("/proc/self/status") if "VmHWM" in line][0]
print(json.dumps([time.perf_counter() - start, rss, x.peak, x.ledger.total(
    component="parameters", phase="forward", quantity="bytes")]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    seconds, rss, peak, parameters = json.loads(done.stdout.splitlines()[-1])
    print(
        f"a 7B step: {seconds:.1f} s, {rss / 2**30:.2f} GiB resident, peak {peak / 2**30:.1f} GiB"
    )
    assert seconds < 60
    assert rss < 1 << 30
    assert parameters == pytest.approx(2 * 6_738_415_616, rel=1e-6)
    assert 50 < peak / 2**30 < 80


@pytest.mark.parametrize(
    ("phase", "again"), [("forward", False), ("backward", False), ("backward", True)]
)
def test_a_plan_of_ppo_gives_each_role_what_the_real_step_does(phase, again):
    """Activations are of the model whose graph holds them, in both passes, and where layers run
    again in backward (`again`)."""
    setup = setup_of("ppo", GPT2, gradient_checkpointing=again)
    planned = {f.name: f for f in PPO(setup)}[phase]
    real = real_step(setup, GPT2, by="account").ledger
    for role in ("policy", "value"):
        mine = sum(size for (who, _), size in planned.bytes.items() if who == role)
        theirs = real.total(phase=phase, role=role, quantity="bytes")
        assert mine == pytest.approx(theirs, rel=0.08), role
