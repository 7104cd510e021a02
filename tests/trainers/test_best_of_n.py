"""Best-of-n: its estimator against every subset there is, its bound against small worlds.

pytest tests/trainers/test_best_of_n.py
"""

from __future__ import annotations

import math
from itertools import combinations, product

import pytest
import torch
from ppo_kit import naive_score

import rlhf_lab as lab
from rlhf_lab import studies
from rlhf_lab.cli.main import main
from rlhf_lab.data.tokenize import encode_prompt
from rlhf_lab.ppo.losses import kl_bound
from rlhf_lab.ppo.texts import sample_ids
from rlhf_lab.trainers.best_of_n import draw, expected_best, order_weights

pytestmark = pytest.mark.usefixtures("few_stories")


@pytest.mark.parametrize("n", range(1, 8))
def test_every_subset_is_counted(n):
    """The mean over all subsets of n of 7 of what the highest-scored member is worth."""
    made = torch.Generator().manual_seed(n)
    scores = torch.randn(3, 7, generator=made, dtype=torch.float64)
    values = torch.randn(3, 7, generator=made, dtype=torch.float64)
    found = expected_best(scores, values, n)
    for row in range(3):
        kept = [
            float(values[row, max(some, key=lambda i: float(scores[row, i]))])
            for some in combinations(range(7), n)
        ]
        assert float(found[row]) == pytest.approx(sum(kept) / len(kept), abs=1e-12)


def test_equal_scores_are_settled_by_the_order_of_sampling():
    scores, values = torch.zeros(1, 4), torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    pairs = [max(pair) for pair in combinations((1.0, 2.0, 3.0, 4.0), 2)]
    assert float(expected_best(scores, values, 2)) == pytest.approx(sum(pairs) / 6)


def test_weights_are_a_distribution_that_leans_upwards():
    for n in (1, 3, 16):
        weights = order_weights(16, n)
        assert float(weights.sum()) == pytest.approx(1)
    assert order_weights(16, 1).tolist() == pytest.approx([1 / 16] * 16)
    assert order_weights(16, 16).tolist() == [0.0] * 15 + [1.0]
    with pytest.raises(ValueError, match="best of 5 out of 4 samples: choose 1 to 4"):
        order_weights(4, 5)


def test_the_bound_holds_and_is_reached():
    """Best of n among m equally likely answers with different scores, its KL by enumeration."""
    assert kl_bound(1) == 0

    def kl(m, n):
        won = [0] * m
        for drawn in product(range(m), repeat=n):
            won[max(drawn)] += 1
        return sum(w / m**n * math.log(w / m**n * m) for w in won if w)

    for n in (2, 3):
        few, more = kl(3, n), kl(60, n)
        assert few < more < kl_bound(n)
        assert more == pytest.approx(kl_bound(n), rel=0.05)  # hardly an answer comes twice


def test_a_mean_and_its_standard_error():
    """Variance 2 of two values: the error of their mean is √(2 / 2)."""
    assert studies._mean(torch.tensor([1.0, 3.0])) == (2.0, 1.0)


def test_what_is_drawn_is_what_is_scored(tiny):
    policy, reward_model, tokenizer = tiny.lm(0), tiny.rm(1), tiny.tokenizer()
    prompts = ["w1 w2", "w3"]
    drawn = draw(
        policy,
        tokenizer,
        reward_model,
        prompts,
        5,
        max_new_tokens=6,
        gold_reward=lambda p, r: len(p) + 100 * len(r.split()),
    )
    sampled = sample_ids(policy, tokenizer, prompts, samples=5, max_new_tokens=6, seed=99)
    assert {r[-1] == tiny.eos for row in sampled for r in row} == {True, False}
    assert drawn.scores.shape == drawn.golds.shape == drawn.tokens.shape == (2, 5)
    for row, prompt in enumerate(prompts):
        ids = [encode_prompt(tokenizer, prompt) + r for r in sampled[row]]
        # The sampled ids as they are, to the last: what was cut is given no end.
        scores = [float(naive_score(reward_model, whole)) for whole in ids]
        assert drawn.scores[row].tolist() == pytest.approx(scores, abs=1e-5)
        assert drawn.golds[row].tolist() == [
            len(prompt) + 100 * len(t.split()) for t in drawn.texts[row]
        ]
    assert len({t for row in drawn.texts for t in row}) > 2
    assert 1 <= int(drawn.tokens.min()) and int(drawn.tokens.max()) <= 6


def test_the_table_of_the_bundled_model():
    """More samples: more reward, more gold here, and in proportion more tokens and FLOPs."""
    found = lab.best_of_n(n=(4, 1, 2), prompts=48, quiet=True)
    one, two, four = found.points
    assert (one.n, two.n, four.n) == (1, 2, 4) and found.prompts == 48 and found.samples == 4
    assert one.reward < two.reward < four.reward and one.gold_reward < four.gold_reward
    assert (one.kl_bound, four.kl_bound) == (0, pytest.approx(math.log(4) - 0.75))
    assert four.tokens == pytest.approx(4 * one.tokens) and 20 < one.tokens < 64
    assert four.flops == pytest.approx(2 * two.flops) and two.flops > 2 * one.flops
    # 2 per weight and token sampled, and as much again to score it; the head is read once each.
    weights = 3 * (4 * 96 * 96 + 3 * 96 * 256)
    prompt = lab.plan("ppo", "tiny").estimate.setup.prompt
    assert 2 * weights * one.tokens < one.flops < 2 * weights * (one.tokens + prompt) * 1.6
    text = str(found)
    assert "at most 0.64" in text and "48 held-out prompts, 4 responses" in text
    assert "<table" in found._repr_html_()


def test_on_the_command_line(capsys, tmp_path):
    assert main(["best-of-n", "-n", "1", "2", "--prompts", "8", "--quiet"]) == 0
    assert "best of" in capsys.readouterr().out
    bare = lab.load("tiny").paths["base"]
    assert main(["best-of-n", "--model", bare, "--quiet"]) == 2
    printed = capsys.readouterr().err
    assert "needs a reward model" in printed and printed.count("\n") == 1
    with pytest.raises(ValueError, match="whole numbers of at least 1"):
        lab.best_of_n(n=(0, 2))
