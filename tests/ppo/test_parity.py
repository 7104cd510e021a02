"""Our trainer set as TRL's is, for the parity benchmark: only the place of the score differs.

pytest tests/ppo/test_parity.py
"""

import importlib
from pathlib import Path

import pytest
import torch
from ppo_kit import PROMPTS, close, one_later, one_rollout

from rlhf_lab.ppo import losses
from rlhf_lab.ppo.trainer import PPOTrainer


@pytest.fixture
def as_trl(make, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    trainer = make(total_episodes=8)
    trainer.__class__ = importlib.import_module("ppo_parity_setup").as_trl(PPOTrainer)
    return trainer


def test_the_score_comes_one_later_where_padding_exists(make, as_trl):
    ours, ours_adv, _ = one_rollout(make(), beta=0.0)
    r, adv, _ = one_rollout(as_trl, beta=0.0)
    assert torch.equal(r.responses, ours.responses) and not r.mask.all()
    place = one_later(r.mask).sum(1) - 1
    assert (place - (r.mask.sum(1) - 1)).tolist() == (~r.mask.all(1)).long().tolist()
    expected = torch.zeros(r.mask.shape).scatter(1, place[:, None], adv.scores[:, None])
    close(adv.rewards, expected)
    close(adv.scores, ours_adv.scores)
    close(r.values * r.mask, ours.values)
    assert r.values[one_later(r.mask) & ~r.mask].all(), "the critic is asked there too"
    advantages, returns = losses.compute_gae(adv.rewards, r.values, one_later(r.mask))
    close(adv.returns, returns)
    close(adv.advantages, losses.whiten(advantages, r.mask))


def test_the_value_loss_is_a_mean_over_the_longer_mask(make, as_trl):
    """Before the first step values are those of the rollout: the loss is ½(V − R)²."""
    r, adv, _ = one_rollout(as_trl)
    mask = one_later(r.mask)
    as_trl.args.num_ppo_epochs = 1
    expected = 0.5 * losses.masked_mean((r.values - adv.returns) ** 2, mask)
    close(as_trl.update(r, adv, 0)["vf_loss"], expected)
    again, _, _ = one_rollout(make())
    assert len(again.ids) == len(PROMPTS), "outside of it everything is as it was"
    assert not again.values[~again.mask].any()
