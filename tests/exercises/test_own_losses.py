"""A student's functions train: `lab.train(plan, losses={"gae": my_gae})`.

pytest tests/exercises/test_own_losses.py
"""

from __future__ import annotations

import pytest
import torch
from small_trainings import few_rows

import rlhf_lab as lab
from rlhf_lab.exercises import own_losses
from rlhf_lab.ppo import losses

SMALL = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "num_mini_batches": 2,
    "num_ppo_epochs": 1,
    "response_length": 6,
    "whiten_rewards": True,
    "save_strategy": "no",
    "use_cpu": True,
}
calls: list[str] = []


def my_gae(rewards, values, mask, gamma, lam):
    """The recursion of the solution, one row at a time."""
    calls.append("gae")
    advantages = torch.zeros_like(values)
    for row, n in enumerate(mask.sum(1).tolist()):
        after_a = after_v = torch.zeros((), dtype=values.dtype)
        for t in reversed(range(n)):
            delta = rewards[row, t] + gamma * after_v - values[row, t]
            after_a, after_v = delta + gamma * lam * after_a, values[row, t]
            advantages[row, t] = after_a
    return advantages, advantages + values * mask


def counted(name):
    function = getattr(losses, name)

    def mine(*arguments):
        calls.append(name)
        return function(*arguments)

    return mine


def wrong_gae(rewards, values, mask, gamma, lam):
    return my_gae(rewards, values, mask, gamma, 1.0)


@pytest.fixture(scope="module")
def data():
    return few_rows(None)


@pytest.fixture(scope="module")
def plan():
    return lab.plan("ppo", "mini", **SMALL)


@pytest.fixture(scope="module")
def library(plan, data, tmp_path_factory):
    return lab.train(plan, data, out=tmp_path_factory.mktemp("runs") / "library", quiet=True)


def test_training_with_ones_own_functions_is_the_librarys_run(plan, data, library, tmp_path):
    own = {"gae": my_gae}
    own |= {name: counted(name) for name in ("pg_loss", "vf_loss", "whiten", "token_rewards")}
    calls.clear()
    run = lab.train(plan, data, losses=own, out=tmp_path / "own", quiet=True)
    assert set(calls) == {"gae", "pg_loss", "vf_loss", "whiten", "token_rewards"}
    assert calls.count("gae") > 2 and len(run.metrics) == len(library.metrics) > 0
    assert without_time(run.metrics) == without_time(library.metrics)
    recorded = {"compute_gae": "my_gae", **{n: "mine" for n in own if n != "gae"}}
    assert run.config["losses"] == recorded and "losses" not in library.config

    # Going on needs the same functions; a finished run is handed back as it is.
    with pytest.raises(ValueError, match="cannot resume .*: losses was .*my_gae.* is None now"):
        lab.train(plan, data, out=run.folder, resume=True, quiet=True)
    assert lab.train(plan, data, losses=own, out=run.folder, resume=True, quiet=True).config


def without_time(metrics):
    return [{k: v for k, v in line.items() if "second" not in k} for line in metrics]


@pytest.mark.parametrize(
    ("stage", "given", "says"),
    [
        ("ppo", {"gae": wrong_gae}, "gae would leave the rules: λ is not used"),
        ("ppo", {"vf_loss": lambda *x: None}, "vf_loss would leave the rules: it is not solved"),
        ("ppo", {"geae": my_gae}, "ppo takes no 'geae' of yours: did you mean 'gae'"),
        ("ppo", {"k1": torch.sub}, "ppo takes no 'k1' of yours"),
        ("dpo", {"gae": my_gae}, "dpo takes no 'gae' of yours: .*ppo takes token_rewards"),
    ],
)
def test_what_does_not_pass_or_fit_is_refused_before_a_run_is_made(stage, given, says, tmp_path):
    planned = lab.plan(stage, "mini")
    with pytest.raises(ValueError, match=says) as refused:
        lab.train(planned, losses=given, out=tmp_path / "none")
    assert "\n" not in str(refused.value) and not (tmp_path / "none").exists()


def test_every_function_that_the_trainer_takes_is_an_exercise():
    solutions = {n: getattr(losses, n) for n in losses.REPLACEABLE}
    assert set(own_losses("ppo", solutions)) == set(losses.REPLACEABLE)
    with pytest.raises(AttributeError, match="masked_mean is none of"):
        _ = losses.LossFunctions({}).masked_mean


def test_the_trainer_may_call_by_name_and_leave_out_defaults():
    mine = own_losses("ppo", {"whiten": lambda x, m, s: losses.whiten(x, m, s)})["whiten"]
    x, m = torch.randn(2, 3), torch.ones(2, 3).bool()
    assert torch.equal(mine(x, m), losses.whiten(x, m))
    assert torch.equal(mine(x, mask=m, shift_mean=False), losses.whiten(x, m, False))
