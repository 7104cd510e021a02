"""The meter against witnesses that know nothing of it: a counter over every step, the profiler."""

import gc
import random
from collections import Counter

import pytest
import torch
from profiled import allocated_peak
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import _get_current_dispatch_mode

from rlhf_lab.metering.flop_counter import FlopCounter
from rlhf_lab.metering.meter import Meter, NoMeter

PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9", "w10 w11", "w2", "w3 w3", "w12 w1", "w8 w9 w1 w4"]


def profiled_peak(work) -> int:
    """The profiler's peak of Total Allocated on the CPU while `work()` runs, in bytes.

    It knows what is allocated while it is on, so `work` makes its models itself.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        result = work()
    del result
    return allocated_peak(prof)


def steps(tiny, meter, shapes, accumulate=1, width=64):
    """Train a small Llama on batches of these (rows, length), metered by hand."""
    model = tiny.lm(0, hidden_size=width, intermediate_size=2 * width)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    meter.watch("policy", model, optimizer)
    for number, (rows, length) in enumerate(shapes, 1):
        ids = torch.randint(0, tiny.words, (rows, length))
        meter.hold(ids)
        shape = rows * length, rows * length**2
        with meter.phase("forward", "policy", shape, ids.numel()):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        with meter.phase("backward", "policy", shape):
            loss.backward()
        del loss
        if number % accumulate == 0:
            with meter.phase("optimizer", "policy"):
                optimizer.step()
                optimizer.zero_grad()
    meter.close()
    return model, optimizer


def counted(meter) -> dict:
    """(phase, role) → passes that were counted."""
    return {at: fits[at[1]].counted for at, fits in meter._passes.fits.items() if fits}


def bytes_of(meter, **labels) -> float:
    return meter.ledger().total(quantity="bytes", **labels)


# ------------------------------------------------------------------------------------- the ledger


def test_a_block_within_a_block_is_taken_out_of_the_outer_one(tiny):
    """Seconds and FLOPs: DPO's reference pass lies within the forward phase."""
    a, meter = torch.randn(64, 64), Meter("dpo")
    ticks = iter([0.0, 1.0, 4.0, 10.0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlhf_lab.metering.meter._now", lambda: next(ticks))
        with meter.phase("forward", "policy", (64,), 64):
            a @ a
            with meter.phase("reference", "reference", (64,), 32):
                a @ a @ a
    assert dict(meter.seconds) == {("forward", "policy"): 7.0, ("reference", "reference"): 3.0}
    assert dict(meter.flops) == {
        ("forward", "policy"): 2 * 64**3,
        ("reference", "reference"): 4 * 64**3,
    }
    ledger = meter.ledger()
    assert ledger.pivot("phase", "role", quantity="tokens")["forward"] == {"policy": 64.0}
    assert {r.source for r in ledger} == {"measured"}


def test_what_counting_took_is_not_the_phases_time(tiny):
    """A counted pass of 9 s, then two of 1 and 2 s for 10 and 20 tokens: .1 s a token, for the
    first one's 10 tokens too. With no other to go by, its own 9 s."""
    a, meter = torch.randn(8, 8), Meter("sft")
    ticks = iter([0.0, 9.0, 20.0, 21.0, 30.0, 32.0])
    seconds = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlhf_lab.metering.meter._now", lambda: next(ticks))
        for tokens in (10, 10, 20):
            with meter.phase("forward", "policy", (8,), tokens):
                a @ a
            seconds.append(meter.seconds["forward", "policy"])
    assert seconds == [pytest.approx(s) for s in (9.0, 2.0, 4.0)]
    assert meter.clock["forward", "policy"] == 12.0


def test_without_a_watched_model_no_bytes_are_claimed_and_the_resident_set_is_kept():
    meter = Meter("sft")
    with meter.phase("forward", "policy"):
        torch.ones(1000).sum()
    with meter.phase("backward", "policy", tokens=5):
        pass
    meter.count("backward", "policy", 5)
    ledger = meter.ledger()
    assert {r.quantity for r in ledger} == {"seconds", "tokens"}
    assert ledger.total(quantity="tokens", phase="backward") == 10
    assert meter.peak > 20 * 2**20  # a process with torch in it


def test_no_meter_has_the_interface_and_measures_nothing(tiny):
    meter = NoMeter("ppo")
    steps(tiny, meter, [(2, 5)])
    meter.count("forward", "policy", 1)
    with meter.phase("rollout", "policy", calls=tiny.lm(0)):
        pass
    assert len(meter.ledger()) == 0 and meter.peak == 0
    public = {n for n in dir(Meter) if not n.startswith("_")}
    assert public <= set(dir(meter))


def test_an_interrupt_leaves_no_mode_behind(tiny):
    """Within a block, and between two of them while tensors are tracked."""
    meter, model = Meter("sft"), tiny.lm(0)
    optimizer = torch.optim.AdamW(model.parameters())
    meter.watch("policy", model, optimizer)
    with pytest.raises(KeyboardInterrupt), meter.phase("forward", "policy", (1,)):
        assert _get_current_dispatch_mode() is not None
        raise KeyboardInterrupt
    assert _get_current_dispatch_mode() is None
    meter = Meter("sft")
    meter.watch("policy", model, optimizer)
    with meter.phase("forward", "policy", (1,)):
        pass
    assert _get_current_dispatch_mode() is not None  # it waits for backward
    open_block = meter.phase("backward", "policy", (1,))
    open_block.__enter__()
    meter.close()
    open_block.__exit__(None, None, None)  # the block's own end comes too late: harmless
    assert _get_current_dispatch_mode() is None
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


# ------------------------------------------------------------------------------------------ FLOPs


def test_flops_of_many_shapes_equal_counting_every_step(tiny):
    """40 steps of random shapes: two features, so two counted passes a phase at most."""
    chance = random.Random(0)
    shapes = [(chance.randint(1, 9), chance.randint(2, 30)) for _ in range(40)]
    meter = Meter("sft", memory=False)
    with FlopCounter() as every:
        steps(tiny, meter, shapes)
    assert sum(meter.flops.values()) == every.total > 0
    assert counted(meter) == {
        ("forward", "policy"): 2,
        ("backward", "policy"): 2,
    }


@pytest.fixture
def ppo(tiny, tmp_path):
    """`ppo(meter, …)` → a PPOTrainer on four tiny models; prompts and responses vary in length."""
    from rlhf_lab.ppo.config import PPOConfig
    from rlhf_lab.ppo.trainer import PPOTrainer

    def make(meter, width=16, **changes):
        settings = {
            "output_dir": str(tmp_path),
            "response_length": 12,
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 3,
            "gradient_accumulation_steps": 2,
            "num_mini_batches": 2,
            "num_ppo_epochs": 2,
            "local_rollout_forward_batch_size": 4,
            "total_episodes": 48,
            "report_to": "none",
        }
        settings = PPOConfig(**{**settings, **changes})
        shape = {"hidden_size": width, "intermediate_size": 2 * width}
        return PPOTrainer(
            settings,
            tiny.tokenizer(),
            tiny.lm(0, **shape),
            None,
            tiny.rm(1, **shape),
            [{"prompt": p} for p in PROMPTS],
            tiny.rm(1, **shape),
            meter=meter,
        )

    return make


def test_flops_of_a_whole_ppo_run_equal_counting_every_step(ppo):
    """Every product of eight iterations, decoding included, from a few counted passes."""
    meter = Meter("ppo")
    trainer = ppo(
        meter,
        num_mini_batches=1,
        per_device_train_batch_size=12,
        gradient_accumulation_steps=1,
        local_rollout_forward_batch_size=12,  # as the update: the same rows are padded alike
    )
    with FlopCounter() as every:
        trainer.train()
    assert sum(meter.flops.values()) == every.total > 0
    assert {at for at, n in meter.flops.items() if n} == {
        ("rollout", "policy"),
        ("old_logprobs", "policy"),
        ("reference", "reference"),
        ("value", "value"),
        ("score", "reward"),
        ("forward", "policy"),
        ("backward", "policy"),
        ("forward", "value"),
        ("backward", "value"),
    }
    assert max(counted(meter).values()) <= 6
    flops = meter.flops
    assert flops["old_logprobs", "policy"] == flops["reference", "reference"]
    # An iteration's two epochs pass through both models again, on the same rows.
    assert flops["forward", "policy"] == 2 * flops["old_logprobs", "policy"]
    assert flops["forward", "value"] == 2 * flops["value", "value"]
    for role in ("policy", "value"):
        assert 1.9 < flops["backward", role] / flops["forward", role] < 2.5


# ----------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    "shapes",
    [
        pytest.param([(4, 24)] * 4, id="one-shape"),
        pytest.param([(4, 12), (4, 12), (4, 13), (4, 24), (4, 20), (4, 40)], id="growing"),
    ],
)
def test_tensors_peak_where_the_profiler_says(tiny, shapes):
    """The peak of a run of which few steps were tracked: within 0.1 % of the allocator's."""
    meter = Meter("sft", share=1.0)
    peak = profiled_peak(lambda: steps(tiny, meter, shapes))
    assert meter.ledger().peak() == pytest.approx(peak, rel=1e-3)


def test_one_step_tells_what_later_ones_will_hold(tiny):
    """No step held the optimizer's state while tensors were tracked: it is added."""
    once, more = Meter("sft"), Meter("sft")
    steps(tiny, once, [(4, 24)])
    peak = profiled_peak(lambda: steps(tiny, more, [(4, 24)] * 3))
    assert once.ledger().peak() == more.ledger().peak() == pytest.approx(peak, rel=1e-3)


def test_accumulated_gradients_are_in_the_peak(tiny):
    meter = Meter("sft")
    peak = profiled_peak(lambda: steps(tiny, meter, [(4, 24)] * 8, accumulate=4))
    assert meter.ledger().peak() == pytest.approx(peak, rel=1e-3)
    parameters = bytes_of(meter, phase="backward", component="parameters")
    gradients = bytes_of(meter, phase="forward", component="gradients")
    assert gradients == pytest.approx(parameters, rel=1e-3)  # all but the model's few buffers


def test_components_of_a_step_by_hand(tiny):
    """Parameters, gradients and Adam's two moments, each as large as the parameters."""
    meter = Meter("sft")
    model, optimizer = steps(tiny, meter, [(4, 24)] * 3)
    size = 4 * sum(p.numel() for p in model.parameters())
    tensors = len(list(model.parameters()))
    step = meter.ledger().pivot("role", "component", quantity="bytes", phase="optimizer")
    parts = step["policy"]
    buffers = sum(b.untyped_storage().nbytes() for b in model.buffers())
    assert parts["parameters"] == size + buffers
    assert parts["gradients"] == size
    assert parts["optimizer"] == 2 * size + 4 * tensors  # and a step count each
    forward = meter.ledger().pivot("role", "component", quantity="bytes", phase="forward")
    assert forward["policy"]["logits"] == 4 * 4 * 24 * tiny.words
    assert forward[""]["activations"] == 8 * 4 * 24  # the batch's ids


def test_few_steps_are_tracked(tiny, monkeypatch):
    """Steps of one shape are tracked once; larger ones again, as far as `share` allows."""
    entered = Counter()
    from rlhf_lab.metering.memory_tracker import MemoryTracker

    real = MemoryTracker.__enter__
    monkeypatch.setattr(
        MemoryTracker, "__enter__", lambda self: (entered.update(["on"]), real(self))[1]
    )
    steps(tiny, Meter("sft"), [(4, 24)] * 10)
    assert entered["on"] == 2  # a step, and the optimizer once its state exists
    entered.clear()
    steps(tiny, Meter("sft", share=0.0), [(4, n) for n in range(20, 30)])
    assert entered["on"] == 2
    entered.clear()
    steps(tiny, Meter("sft", share=1.0), [(4, n) for n in (20, 20, 30, 30, 40, 40)])
    assert entered["on"] == 4


def test_ppo_peaks_where_the_profiler_says(ppo):
    """Four models, rollouts and updates; by role, and within 1 % of the allocator."""
    meter = Meter("ppo", share=1.0)

    def run():
        trainer = ppo(meter, width=64, total_episodes=24)
        trainer.train()
        return trainer

    peak = profiled_peak(run)
    ledger = meter.ledger()
    assert ledger.peak() == pytest.approx(peak, rel=0.01)
    size = {
        r: ledger.total(quantity="bytes", phase="rollout", component="parameters", role=r)
        for r in ("policy", "reference", "reward", "value")
    }
    assert size["policy"] == size["reference"] > 0 < size["reward"] == size["value"]
    assert ledger.total(quantity="bytes", phase="rollout", component="kv_cache") > 0
    # two layers, keys and values, 6 rows of at most 5 + 12 tokens, 64 wide, fp32; one layer twice
    most = 4 * 2 * 6 * (5 + 12) * 64 * (2 + 1)
    assert ledger.total(quantity="bytes", phase="rollout", component="kv_cache") <= most
