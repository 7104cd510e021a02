"""Solutions that are the exercises' own, against TRL's, PyTorch's, and the planner's.

pytest tests/exercises/test_formulas.py

TRL's formulas are taken as the statements that its trainers run, out of the installed source: no
trainer has to be built for them.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import rlhf_lab as lab
from rlhf_lab import zoo
from rlhf_lab.cost.architecture import architecture
from rlhf_lab.exercises import formulas
from rlhf_lab.exercises.book import EXERCISES
from rlhf_lab.overoptimisation import terms

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 3,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


@functools.cache
def trl_lines(file):
    folder = Path(importlib.util.find_spec("trl").origin).parent / "trainer"
    return [line.strip() for line in (folder / f"{file}.py").read_text("utf-8").splitlines()]


def trl_statement(file, begins):
    """The statement, of one line, of a trainer of TRL that begins so; of several the first."""
    found = [line for line in trl_lines(file) if line.startswith(begins)]
    assert found, f"{file} of TRL has no statement {begins}"
    return found[0]


def run(space, *statements):
    for file, begins in statements:
        exec(trl_statement(file, begins), space)
    return space


def some(*sizes):
    return torch.randn(*sizes, dtype=torch.float64)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(3)


def test_bradley_terry_is_that_of_trl():
    chosen, rejected, margin = some(5), some(5), some(5)
    space = {"nn": torch.nn, "rewards_chosen": chosen, "rewards_rejected": rejected}
    space["inputs"] = {"margin": margin}
    run(
        space,
        (
            "reward_trainer",
            "loss = -nn.functional.logsigmoid(rewards_chosen - rewards_rejected - inputs[",
        ),
    )
    assert_close(formulas.bradley_terry_loss(chosen, rejected, margin), space["loss"])


def test_dpo_is_that_of_trl():
    a, b, c, d = (some(6) for _ in range(4))
    space = {
        "F": F,
        "self": SimpleNamespace(beta=0.3),
        "chosen_scores": a - c,
        "rejected_scores": b - d,
    }
    run(
        space,
        ("dpo_trainer", "delta_score ="),
        ("dpo_trainer", "per_sequence_loss = -F.logsigmoid(self.beta * delta_score)"),
    )
    loss, margins = formulas.dpo_loss(a, b, c, d, 0.3)
    assert_close(loss, space["per_sequence_loss"].mean())
    assert_close(margins, 0.3 * space["delta_score"])


def test_kto_is_that_of_trl():
    for shift in (2.0, -2.0):  # the KL estimate is positive, and is clamped
        logps, ref, kl_logps, ref_kl = some(8), some(8), some(8) + shift, some(8)
        good = torch.arange(8) % 3 == 0
        gather = SimpleNamespace(gather_for_metrics=lambda x: x)
        space = {
            "F": F,
            "self": SimpleNamespace(beta=0.4, accelerator=gather),
            "KL_logps": kl_logps,
            "ref_KL_logps": ref_kl,
            "chosen_logratios": (logps - ref)[good],
            "rejected_logratios": (logps - ref)[~good],
        }
        run(
            space,
            ("kto_trainer", "kl = (KL_logps"),
            ("kto_trainer", "kl = self.accelerator"),
            ("kto_trainer", "chosen_losses = 1 - F.sigmoid(self.beta * (chosen_logratios - kl))"),
            ("kto_trainer", "rejected_losses = 1 - F.sigmoid(self.beta * (kl"),
        )
        theirs = torch.cat([space["chosen_losses"], space["rejected_losses"]]).mean()
        assert_close(formulas.kto_loss(logps, ref, kl_logps, ref_kl, good, 0.4), theirs)


def test_rloo_is_that_of_trl():
    scores = some(3, 4)
    space = {"torch": torch, "rewards": scores.flatten(), "num_generations": 4}
    run(
        space,
        ("rloo_trainer", "grouped_rewards ="),
        ("rloo_trainer", "scorable_counts ="),
        ("rloo_trainer", "grouped_sum ="),
        ("rloo_trainer", "baselines = (grouped_sum"),
        ("rloo_trainer", "baselines = baselines.view"),
        ("rloo_trainer", "advantages = rewards - baselines"),
    )
    assert_close(formulas.rloo_advantages(scores).flatten(), space["advantages"])


def test_grpo_is_that_of_trl():
    scores = some(3, 4)
    space = {"torch": torch, "rewards": scores.flatten(), "num_generations": 4}
    space["nanstd"] = lambda x, dim: x.std(dim)  # TRL's own, where nothing is NaN
    run(
        space,
        ("grpo_trainer", "mean_grouped_rewards = torch.nanmean"),
        ("grpo_trainer", "mean_grouped_rewards = mean_grouped_rewards.repeat"),
        ("grpo_trainer", "std_rewards = nanstd(rewards.view"),
        ("grpo_trainer", "std_rewards = std_rewards.repeat"),
        ("grpo_trainer", "advantages = rewards - mean_grouped_rewards"),
        ("grpo_trainer", "advantages = advantages / (std_rewards + 1e-4)"),
    )
    assert_close(formulas.grpo_advantages(scores).flatten(), space["advantages"])


def test_logprobs_loss_and_entropy_are_pytorchs():
    logits, tokens = some(3, 5, 7), torch.randint(7, (3, 5))
    mask = torch.rand(3, 5) > 0.3
    theirs = -F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    assert_close(formulas.next_token_logprobs(logits, tokens), theirs)
    labels = tokens.masked_fill(~mask, -100)[:, 1:]
    loss = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels)
    assert_close(formulas.sft_loss(logits, tokens, mask), loss)
    entropy = torch.distributions.Categorical(logits=logits).entropy()[mask].mean()
    assert_close(formulas.token_entropy(logits, mask), entropy)


def test_the_accuracy_ceiling_is_what_the_best_guess_reaches():
    p = torch.rand(4, dtype=torch.float64)
    labels = torch.rand(200_000, 4, dtype=torch.float64) < p
    reached = ((p > 0.5) == labels).double().mean()
    assert abs(formulas.accuracy_ceiling(p) - reached) < 0.005


def test_parameters_are_the_planners():
    whole, fewer = architecture(CONFIG), architecture({**CONFIG, "num_hidden_layers": 2})
    layer = formulas.layer_parameters(64, 96, 4, 2, 16)
    assert layer == whole.parameters() - fewer.parameters()
    adapters = whole.lora_parameters(8, ["q_proj", "k_proj", "v_proj", "o_proj"])
    assert 3 * formulas.lora_parameters(64, 4, 2, 16, 8) == adapters


def test_the_cache_is_the_planners():
    per_position = 2 * architecture(CONFIG).cached  # bf16
    assert formulas.kv_cache_bytes(3, 2, 16, 10, 7) == 10 * 7 * per_position


def test_memory_is_the_planners():
    plan = lab.plan("ppo", "tiny", hardware="a100-80gb", bf16=True)
    kept = ("parameters", "gradients", "optimizer")
    rows = [r for r in plan.ledger if r.quantity == "bytes" and r.phase == "optimizer"]
    held = {
        role: sum(r.value for r in rows if r.role == role and r.component in kept)
        for role in ("policy", "value", "reference", "reward")
    }
    sizes = {r.role: int(r.value) // 4 for r in rows if r.component == "parameters"}
    assert formulas.ppo_bytes(**sizes, frozen_width=4) == sum(held.values())
    assert formulas.training_bytes(sizes["policy"], 0) == held["policy"]
    assert formulas.training_bytes(0, sizes["reward"]) == held["reward"]


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_shares_are_the_planners(zero):
    """What is kept in the optimizer's step. ZeRO-1 has whole gradients until then."""
    sharding = f"zero{zero}" if zero else "ddp"
    plan = lab.plan("sft", "Qwen/Qwen2.5-7B", hardware="h100", gpus=8, sharding=sharding)
    count = plan.estimate.setup.model.parameters()

    kept = plan.ledger.filter(phase="optimizer", component=("parameters", "gradients", "optimizer"))
    planned = kept.total(quantity="bytes")  # of DDP in fp32: the same 16 bytes without a copy
    assert formulas.sharded_bytes(count, 8, zero) == pytest.approx(planned, rel=0.02)
    whole = formulas.sharded_bytes(count, 8, 1) - formulas.sharded_bytes(count, 8, 2)
    assert whole == pytest.approx(2 * count * 7 / 8)


def test_a_ring_sends_what_the_planner_counts():
    plan = lab.plan("sft", "tiny", hardware="h100", gpus=8, sharding="ddp")
    (backward,) = (phase for phase in plan.estimate.phases if phase.name == "backward")
    gradients = 4 * plan.estimate.setup.model.parameters()
    assert formulas.ring_bytes(gradients, 8) == pytest.approx(backward.sent.bytes(8))


def test_flops_are_those_that_pytorch_counts():
    """A layer's products by hand: no norms, no rotations, which are hardly any."""
    hidden, inner, heads, kv_heads, width, rows, length = 64, 96, 4, 2, 16, 2, 24
    shapes = [(hidden, heads * width), (hidden, kv_heads * width), (hidden, kv_heads * width)]
    shapes += [(heads * width, hidden), (hidden, inner), (hidden, inner), (inner, hidden)]
    q, k, v, o, gate, up, down = matrices = [some(*shape).requires_grad_() for shape in shapes]
    x = some(rows, length, hidden).requires_grad_()

    def split(y):
        y = y.unflatten(-1, (-1, width)).transpose(1, 2)
        return y.repeat_interleave(heads // y.shape[1], dim=1)

    with FlopCounterMode(display=False) as counter:
        attention = (split(x @ q) @ split(x @ k).transpose(2, 3)).softmax(-1) @ split(x @ v)
        y = attention.transpose(1, 2).flatten(2) @ o
        (((y @ gate) * (y @ up)) @ down).sum().backward()
    parameters = sum(m.numel() for m in matrices)
    norms = 2 * hidden
    assert parameters + norms == formulas.layer_parameters(hidden, inner, heads, kv_heads, width)
    ours = formulas.training_flops(parameters, rows * length, 1, heads, width, length)
    assert ours == counter.get_total_flops()


def test_decoding_takes_the_time_of_reading():
    speed = formulas.decode_speed(1e9, 1e8, 10, 1e12)
    assert speed == pytest.approx(10 / 2e-3)
    assert formulas.decode_speed(1e9, 0, 20, 1e12) == pytest.approx(2 * 10 / 1e-3)


def test_best_of_n_is_the_kl_of_a_continuous_score():
    """Of n uniform scores the largest has the density n·x^(n−1), whose KL is an integral."""
    x = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000
    for n in (1, 2, 8):
        density = n * x ** (n - 1)
        kl = (density * density.log()).nan_to_num(0.0).mean()
        assert EXERCISES["best_of_n_kl"].function(n) == pytest.approx(float(kl), abs=1e-5)


def test_a_million_tokens_cost_what_the_planner_says():
    plan = lab.plan("inference", "Qwen/Qwen2.5-7B", hardware="h100")
    seen, price = plan.estimate.serving, plan.estimate.hardware.price
    planned = formulas.usd_per_million(seen.tokens_per_second, price)
    assert planned == pytest.approx(seen.usd_per_million)


def test_static_batches_by_playing_them():
    """Every row still running takes a step together, until the batch has none."""
    lengths, steps = torch.tensor([3, 9, 2, 2, 7, 1, 5]), 0
    for start in range(0, len(lengths), 3):
        left = lengths[start : start + 3].clone()
        while (left > 0).any():
            left -= 1
            steps += 1
    assert formulas.static_steps(lengths, 3) == steps == 9 + 7 + 5


@pytest.mark.parametrize(("accepted", "drafted"), [(0.0, 3), (0.6, 1), (0.8, 5), (1.0, 4)])
def test_tokens_of_a_pass_by_all_ways_that_it_can_end(accepted, drafted):
    """i tokens accepted and the next one not, or all of them; one of the large model's own."""
    ends = [accepted**i * (1 - accepted) for i in range(drafted)] + [accepted**drafted]
    assert sum(ends) == pytest.approx(1)
    expected = sum(chance * (tokens + 1) for tokens, chance in enumerate(ends))
    assert formulas.tokens_per_pass(accepted, drafted) == pytest.approx(expected)


def test_a_curve_leaves_its_band_where_the_specimens_say_that_theirs_do():
    """By the stored runs, whose iterations the benchmark has counted: the one by which four seeds
    in five have left."""
    for name, one in zoo.stored()["specimens"].items():
        if one["first"] is None:
            continue
        low, middle, high = (torch.tensor(end) for end in zoo.stored()["healthy"][one["first"]])
        left = sorted(
            int(formulas.leaves_band(torch.tensor(curve), m[: len(curve)], w[: len(curve)]))
            for curve in one["curves"][one["first"]]
            for m, w in [(middle, (high - low) / 2)]
        )
        seeds = len(left)
        left = [at for at in left if at]
        assert left[-(-4 * seeds // 5) - 1] == one["iteration"], name
    inside, width = torch.zeros(3), torch.tensor(1.0)
    assert formulas.leaves_band(inside, inside, width) == 0


@pytest.mark.parametrize(("alpha", "beta"), [(0.9, 0.5), (0.3, 0.2), (1.0, 1.0)])
def test_gold_is_highest_where_no_other_kl_is_higher(alpha, beta):
    kl = np.linspace(0.01, 30, 300_000)
    gold = terms(np.sqrt(kl), "PPO") @ np.array([alpha, beta])
    assert formulas.gold_peak(alpha, beta) == pytest.approx(kl[gold.argmax()], abs=1e-3)
