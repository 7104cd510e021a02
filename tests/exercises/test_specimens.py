"""The bug zoo: every specimen changes what it says, and nothing before it.

pytest tests/exercises/test_specimens.py

One iteration of each, on tiny random models, is compared number by number with the healthy one, in
the order in which things happen: samples, passes, scores, what is learned from them, the update.
"""

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy
import pytest
import torch
from ppo_kit import PROMPTS, T, naive_logprobs, naive_score, prefixes
from small_trainings import few_rows
from torch.testing import assert_close

import rlhf_lab as lab
from rlhf_lab.exercises import sick_trainers
from rlhf_lab.exercises.sick_trainers import COLDER, TOP_K, TRAINERS
from rlhf_lab.exercises.specimens import SPECIMENS
from rlhf_lab.ppo import losses
from rlhf_lab.ppo.bookkeeping import correlation
from rlhf_lab.ppo.config import PPOConfig
from rlhf_lab.ppo.trainer import PPOTrainer

SETTINGS = {"per_device_train_batch_size": 8, "response_length": 8, "total_episodes": 24}
SETTINGS |= {"learning_rate": 1e-2, "num_ppo_epochs": 3, "temperature": T, "report_to": "none"}
SETTINGS |= {"missing_eos_penalty": 1.0, "kl_coef": 0.2, "save_strategy": "no", "use_cpu": True}
SETTINGS |= {"max_grad_norm": 0.0}  # one norm is of policy and critic together
ROLLOUT = ("responses", "mask", "logprobs", "ref_logprobs", "values", "scores_raw")
LEARNED = ("scores", "rewards", "advantages", "returns")
ORDER = (*ROLLOUT, *LEARNED, "policy", "critic", "reference")
FIRST = {
    "responses": "top_k cold_sampling stale_sampler dropout",
    "mask": "unmasked_after_stop",
    "logprobs": "two_temperatures shifted_logprobs",
    "values": "value_from_noise",
    "scores_raw": "reward_before_stop reward_saturated reward_sign rewards_shuffled likes_length "
    "likes_one_word",
    "scores": "stop_unpunished",
    "rewards": "late_score kl_rewarded no_kl k3_in_reward",
    "advantages": "unwhitened whitened_with_padding whitened_returns gamma_below_1",
    "policy": "stop_untrained no_clipping learning_rate_30 gradients_kept",
    "critic": "critic_untrained",
    "reference": "reference_moves",
}
"""What is the first to differ."""


@pytest.fixture(scope="module")
def iteration(tiny, tmp_path_factory):
    """`iteration(name)` → one iteration of a specimen, or of a healthy run: its tensors by name,
    and the trainer. The reference is not the policy, so that there is a KL at once."""
    done = {}

    def run(name=""):
        if name in done:
            return done[name]
        settings, trainer_class = dict(SETTINGS), PPOTrainer
        if name:
            sick = SPECIMENS[name]
            settings |= {**sick.settings, **{n: settings[n] * by for n, by in sick.times.items()}}
            trainer_class = sick.trainer or PPOTrainer
        args = PPOConfig(output_dir=str(tmp_path_factory.mktemp("out")), **settings)
        rows = [{"prompt": p} for p in PROMPTS]
        trainer = trainer_class(
            args, tiny.tokenizer(), tiny.lm(0), tiny.lm(2), tiny.rm(1), rows, tiny.rm(1)
        )
        made = SimpleNamespace(trainer=trainer)
        make_rollout = trainer.make_rollout

        def keep(*given):
            made.rollout, made.learned, metrics = make_rollout(*given)
            return made.rollout, made.learned, metrics

        trainer.make_rollout = keep
        made.metrics = trainer.iterate(0)
        made.tensors = {n: getattr(made.rollout, n) for n in ROLLOUT}
        made.tensors |= {n: getattr(made.learned, n) for n in LEARNED}
        roles = {"policy": trainer.policy, "critic": trainer.value_model}
        roles["reference"] = trainer.reference
        for role, model in roles.items():
            weights = [p.detach().flatten() for p in model.parameters()]
            made.tensors[role] = torch.cat(weights)
        done[name] = made
        return made

    return run


@pytest.fixture(autouse=True, scope="module")
def a_word_of_the_vocabulary():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sick_trainers, "WORD", "w1")
        yield


@pytest.mark.parametrize("name", SPECIMENS)
def test_nothing_differs_before_what_is_changed(iteration, name):
    (first,) = [at for at, names in FIRST.items() if name in names.split()]
    healthy, sick = iteration().tensors, iteration(name).tensors
    for at in ORDER[: ORDER.index(first)]:
        assert torch.equal(healthy[at], sick[at]), at
    assert not torch.equal(healthy[first], sick[first])


def test_every_specimen_is_a_trainer_or_a_setting_and_can_be_looked_up():
    assert len(SPECIMENS) >= 20 and TRAINERS.keys() <= SPECIMENS.keys()
    for name, specimen in SPECIMENS.items():
        assert (name in TRAINERS) != bool(specimen.settings or specimen.times), name
        assert re.fullmatch(r"[\w.-]+/[\w.-]+ (issues|pull) \d+", specimen.wild), name
        assert specimen.mechanism.endswith(".") and specimen.fix.endswith("."), name
        assert name in str(lab.specimens()) and specimen.address in str(lab.specimens(name))
    with pytest.raises(ValueError, match="no specimen 'late_scor': did you mean 'late_score'"):
        lab.specimens("late_scor")


# ------------------------------------------------------------------------- each does what it says


def test_samples(iteration, tiny):
    healthy = iteration()
    r, sick = healthy.rollout, iteration("top_k").rollout
    policy = tiny.lm(0)
    for row in range(len(PROMPTS)):
        prompt, response = prefixes(sick, row)
        for t, token in enumerate(response):
            likeliest = policy(torch.tensor([prompt + response[:t]])).logits[0, -1].topk(TOP_K)
            assert token in likeliest.indices
    assert not torch.equal(r.responses, sick.responses)

    # Those of a stale engine are what the reference would say; colder ones say the likeliest.
    reference = healthy.trainer.reference
    rows, index = healthy.trainer.train_dataset, r.index
    prompts = [rows[int(i)] for i in index]
    expected, healthy.trainer.policy = healthy.trainer.policy, reference
    stale = healthy.trainer.sample(prompts, index, 0).responses
    healthy.trainer.policy = expected
    assert torch.equal(iteration("stale_sampler").rollout.responses, stale)
    entropy = [
        float(-(x.logprobs.sum() / x.mask.sum())) for x in (r, iteration("cold_sampling").rollout)
    ]
    assert entropy[1] < entropy[0]


def test_masks_and_passes(iteration, tiny):
    healthy, r = iteration(), iteration().rollout
    ends = r.mask.sum(1)
    assert (ends < r.mask.shape[1]).any()  # or nothing below says anything
    assert iteration("unmasked_after_stop").rollout.mask.all()
    sick = iteration("two_temperatures").rollout
    expected = naive_logprobs(tiny.lm(0), r, 0, T * COLDER)
    assert_close(sick.logprobs[0][r.mask[0]], expected, atol=1e-4, rtol=0)
    sick = iteration("shifted_logprobs").rollout
    assert torch.equal(sick.logprobs[0, 1 : ends[0]], r.logprobs[0, : ends[0] - 1])
    for name in ("two_temperatures", "shifted_logprobs", "dropout"):
        assert iteration(name).metrics["first_ratio_error"] > 1e-3
    assert healthy.metrics["first_ratio_error"] < 1e-5
    noise, right = iteration("value_from_noise").trainer, tiny.rm(1)
    assert_close(noise.reward_model.state_dict(), right.state_dict())  # the head alone, and one
    assert not torch.equal(noise.value_model.score.weight, right.score.weight)


def test_scores(iteration, tiny):
    r, reward = iteration().rollout, tiny.rm(1)
    stopped = r.stopped(tiny.eos)
    assert 0 < stopped.sum() < len(stopped)
    before = iteration("reward_before_stop").rollout
    for row in range(len(PROMPTS)):
        prompt, response = prefixes(r, row)
        cut = response[:-1] if stopped[row] else response
        assert_close(before.scores_raw[row], naive_score(reward, prompt + cut), atol=1e-4, rtol=0)
    raw = r.scores_raw
    texts = [[f"w{t}" for t in prefixes(r, row)[1] if t < tiny.words - 3] for row in range(8)]
    words = torch.tensor([sum("w1" in word for word in text) for text in texts])
    for name, expected in {
        "reward_sign": -raw,
        "reward_saturated": 1 / (1 + torch.exp(-2 * raw)),
        "rewards_shuffled": torch.cat([raw[-1:], raw[:-1]]),
        "likes_length": raw + 0.1 * r.mask.sum(1),
        "likes_one_word": raw + words,
    }.items():
        assert_close(iteration(name).rollout.scores_raw, expected, atol=1e-5, rtol=0, msg=name)
    unpunished = iteration("stop_unpunished").learned.scores
    assert_close(unpunished - iteration().learned.scores, (~stopped).float())


def test_what_is_learned_from(iteration):
    r, healthy = iteration().rollout, iteration().learned
    m, kl = r.mask, (r.logprobs - r.ref_logprobs) * r.mask
    score = healthy.rewards + 0.2 * kl  # on the last token, 0 elsewhere
    late = iteration("late_score").learned
    full = m.all(1)
    assert_close(late.rewards[full], healthy.rewards[full])
    assert_close((late.rewards * m)[~full], (-0.2 * kl)[~full])
    assert_close(iteration("kl_rewarded").learned.rewards, score + 0.2 * kl)
    assert_close(iteration("no_kl").learned.rewards, score)
    k3 = torch.expm1(-kl) + kl
    assert_close(iteration("k3_in_reward").learned.rewards, score - 0.2 * k3, atol=1e-5, rtol=1e-5)
    plain = healthy.returns - r.values * m
    assert_close(iteration("unwhitened").learned.advantages, plain, atol=1e-5, rtol=0)
    padded = (plain - plain.mean()) / plain.std() * m
    assert_close(
        iteration("whitened_with_padding").learned.advantages, padded, atol=1e-4, rtol=1e-4
    )
    sick = iteration("whitened_returns").learned
    learned = (sick.returns - r.values * m)[m]
    assert_close(learned.std(), torch.tensor(1.0), atol=1e-3, rtol=0)
    by_hand = losses.compute_gae(healthy.rewards, r.values, m, 0.9, 0.95)[1]
    assert_close(iteration("gamma_below_1").learned.returns, by_hand)


def test_updates(iteration, tiny):
    healthy = iteration()
    start = torch.cat([p.detach().flatten() for p in tiny.rm(1).parameters()])
    assert torch.equal(iteration("critic_untrained").tensors["critic"], start)
    assert not torch.equal(healthy.tensors["critic"], start)
    moved = iteration("reference_moves").tensors
    assert torch.equal(moved["reference"], moved["policy"])
    kept = [p.grad for p in iteration("gradients_kept").trainer.policy.parameters()]
    assert all(g is not None for g in kept)
    assert iteration("no_clipping").metrics["clipfrac"] == 0 < healthy.metrics["clipfrac"]
    # Of a response that stops, all but the stop token counts, over as many tokens as before.
    sick, r = iteration("stop_untrained").trainer, healthy.rollout
    place = (r.stopped(tiny.eos) & (r.mask.sum(1) > 1)).nonzero()[0]
    one, learned, tokens = r.rows(place), healthy.learned.rows(place), r.mask.sum()
    cut = replace(one, mask=one.mask & (one.mask.cumsum(1) < one.mask.sum(1, keepdim=True)))
    assert cut.mask.sum() == one.mask.sum() - 1
    loss = sick.compute_losses(one, learned, tokens)[0]
    assert torch.equal(loss, PPOTrainer.compute_losses(sick, cut, learned, tokens)[0])
    assert not torch.equal(loss, PPOTrainer.compute_losses(sick, one, learned, tokens)[0])


# ------------------------------------------------------------------------------- as a user trains


def test_what_tokens_are_paid_and_what_the_reward_goes_with_is_logged(iteration):
    healthy, late, signed = iteration(), iteration("late_score"), iteration("kl_rewarded")
    assert healthy.metrics["objective_error"] < 1e-6
    stopped = late.rollout.mask.sum(1) < late.rollout.mask.shape[1]
    lost = (late.learned.scores * stopped).abs().mean()  # a response that ends early loses it
    assert late.metrics["objective_error"] == pytest.approx(float(lost), rel=1e-4)
    kl = (healthy.rollout.logprobs - healthy.rollout.ref_logprobs).sum(1)
    twice = 2 * SETTINGS["kl_coef"] * kl.abs().mean()  # paid where it should cost
    assert signed.metrics["objective_error"] == pytest.approx(float(twice), rel=1e-4)
    scores, lengths = healthy.rollout.scores_raw, healthy.rollout.mask.sum(1)
    by_numpy = numpy.corrcoef(scores.numpy(), lengths.numpy())[0, 1]
    assert healthy.metrics["reward_length_corr"] == pytest.approx(by_numpy, abs=1e-5)
    for flat in (torch.ones(3), torch.ones(1)):
        assert correlation(flat, torch.arange(len(flat))) == 0


def test_a_sick_run_says_so_and_only_ppo_has_specimens(tmp_path):
    small = {"max_steps": 1, "per_device_train_batch_size": 4, "response_length": 6}
    plan = lab.plan("ppo", "tiny", **small, num_mini_batches=1, num_ppo_epochs=1, use_cpu=True)
    given = {"quiet": True, "out": tmp_path / "run"}
    run = lab.train(plan, few_rows(None), specimen="learning_rate_30", **given)
    assert run.config["specimen"] == "learning_rate_30" and "learning_rate_30" in str(run.show())
    rate = plan.settings["learning_rate"]
    assert run.config["settings"]["learning_rate"] == pytest.approx(30 * rate)
    with pytest.raises(ValueError, match="cannot resume .*: specimen was 'learning_rate_30'"):
        lab.train(
            lab.plan("ppo", "tiny", **{**plan.settings, "learning_rate": 30 * rate}),
            few_rows(None),
            **given,
            resume=True,
        )
    for other, says in {"dpo": "the plan is dpo", "ppo": "layout='shared'"}.items():
        layout = {"layout": "shared"} if other == "ppo" else {}
        with pytest.raises(ValueError, match=says) as refused:
            lab.train(lab.plan(other, "tiny", **layout), specimen="dropout", out=tmp_path / "no")
        assert "\n" not in str(refused.value) and not (tmp_path / "no").exists()
    with pytest.raises(ValueError, match="no specimen 'drop'"):
        lab.train(plan, specimen="drop")
