"""Where rewards come from: models with a tokenizer of their own, functions, mixtures; rule 16.

pytest tests/ppo/test_rewards.py
"""

from types import SimpleNamespace

import pytest
import torch
from families import make_tokenizer
from ppo_kit import PROMPTS, RESPONSES, close, naive_score, one_rollout, scored

from rlhf_lab.models.tokenizer import CHAT_TEMPLATE
from rlhf_lab.ppo import losses
from rlhf_lab.ppo.rewards import Rewards, weighted

FAMILY = "gpt2"
"""Of the foreign reward model: absolute positions, 42 tokens, w0 … w39 with ids of their own."""


@pytest.fixture
def foreign(tiny):
    """A reward model of another architecture, with another vocabulary; eos is not the policy's."""
    tokenizer = make_tokenizer(FAMILY, with_pad=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    model = tiny.rm(5, FAMILY, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    return SimpleNamespace(tokenizer=tokenizer, model=model)


def score_by_hand(foreign, prompt, response, stopped):
    """Decode → tokenise again → an unpadded forward pass, by hand and for one row. 13, 14 and 15
    are the policy's special tokens, which no text has."""
    words = " ".join(f"w{i}" for i in response if i < 13)
    ids = foreign.tokenizer(prompt)["input_ids"]
    ids += foreign.tokenizer(words)["input_ids"] + [foreign.tokenizer.eos_token_id] * stopped
    return naive_score(foreign.model, ids)


def with_foreign(make, tiny, foreign, **settings):
    return make(
        models={"reward_model": foreign.model, "value_model": tiny.rm(1)},
        extra={"reward_processing_class": foreign.tokenizer},
        **settings,
    )


# ---------------------------------------------------------------------------- another vocabulary


def test_a_foreign_reward_model_reads_the_text_in_its_own_tokens(make, tiny, foreign):
    """Early end, end at the limit, no end: eos of its own only where the response had stopped."""
    raw = scored(with_foreign(make, tiny, foreign), RESPONSES).scores_raw
    cut = [[5], [6, 7], [8, 9, 10]]
    for row, stopped in enumerate((True, True, False)):
        close(raw[row], score_by_hand(foreign, PROMPTS[row], cut[row], stopped))
    as_if_stopped = score_by_hand(foreign, PROMPTS[2], cut[2], True)
    assert abs(raw[2] - as_if_stopped) > 1e-3, "an eos that was never sampled would show"
    assert abs(raw[0] - raw[1]) > 1e-3


@pytest.mark.parametrize("stop_token", ["eos", None])
def test_a_foreign_reward_model_in_training_end_to_end(make, tiny, foreign, stop_token):
    """Three iterations; every score of every rollout is that of a naive witness."""
    before = [p.clone() for p in foreign.model.parameters()]
    trainer = with_foreign(make, tiny, foreign, stop_token=stop_token)
    start = trainer.policy.state_dict()["lm_head.weight"].clone()
    make_rollout, seen = trainer.make_rollout, []

    def recorded(*args):
        seen.append(make_rollout(*args))
        return seen[-1]

    trainer.make_rollout = recorded
    history = trainer.train().log_history
    assert len(seen) == len(history) == 3
    for (r, *_), logged in zip(seen, history, strict=True):
        expected = []
        for row in range(8):
            response = r.responses[row][r.mask[row]].tolist()
            prompt = PROMPTS[int(r.index[row])]
            stopped = stop_token is not None and 14 in response
            expected.append(score_by_hand(foreign, prompt, response, stopped))
        close(r.scores_raw, torch.stack(expected))
        assert logged["reward"] == pytest.approx(float(torch.stack(expected).mean()), abs=1e-5)
    assert not torch.equal(trainer.policy.state_dict()["lm_head.weight"], start)
    assert all(map(torch.equal, foreign.model.parameters(), before))


def test_prompts_that_are_conversations_or_ids(tiny, foreign):
    """A conversation goes through the reward model's own template; ids are decoded first."""
    rewards = Rewards(foreign.model, None, tiny.tokenizer(), None, foreign.tokenizer, tiny.eos)
    talk = [{"role": "user", "content": "w1 w2"}]
    rows = [{"prompt": talk}, {"input_ids": [3, 4]}]
    ids = mask = torch.ones(2, 1, dtype=torch.long)
    responses = torch.tensor([[5, 14], [6, 14]])
    with torch.no_grad():
        scores = rewards.score(ids, mask, responses, responses > 0, rows, 1)
    written = foreign.tokenizer.apply_chat_template(
        talk, tokenize=False, add_generation_prompt=True
    )
    close(scores[0], score_by_hand(foreign, written, [5], True))
    close(scores[1], score_by_hand(foreign, "w3 w4", [6], True))


def test_the_same_vocabulary_needs_no_text(make, tiny, monkeypatch):
    """An equal tokenizer changes no bit, and nothing is decoded."""
    plain, *_ = one_rollout(make())
    trainer = make(extra={"reward_processing_class": tiny.tokenizer()})
    monkeypatch.setattr(trainer.tokenizer, "batch_decode", lambda *a, **k: pytest.fail("decoded"))
    same, *_ = one_rollout(trainer)
    assert torch.equal(same.scores_raw, plain.scores_raw)


def test_a_text_that_the_reward_model_cannot_hold_is_refused(tiny, foreign):
    foreign.model.config.n_positions = 4
    rewards = Rewards(foreign.model, None, tiny.tokenizer(), None, foreign.tokenizer, tiny.eos)
    responses = torch.tensor([[5, 6, 14]])
    with pytest.raises(ValueError, match="'model' takes 4 tokens.* is 5 in its tokenizer"):
        rewards.score(responses, responses > 0, responses, responses > 0, [{"prompt": "w1 w2"}], 1)


# ------------------------------------------------------------------------------------- mixtures


def first(completions, **kwargs):
    return [float(len(c.split())) for c in completions]


def test_a_mixture_weighted_by_hand(make, tiny, foreign):
    """The reward model, a function, and a second reward model with a tokenizer of its own."""

    def second(completions, **kwargs):
        return [None, 4.0, None, *[1.0] * (len(completions) - 3)]

    extra = {
        "reward_funcs": [first, foreign.model, second],
        "reward_processing_class": [None, foreign.tokenizer],
    }
    trainer = make(extra=extra, reward_weights=[2.0, 0.5, -1.0, 3.0])
    r, _, metrics = one_rollout(trainer)
    parts = torch.zeros(4, 8)
    for row in range(8):
        response = r.responses[row][r.mask[row]].tolist()
        parts[0, row] = naive_score(trainer.reward_model, r.ids[row][r.attention[row]].tolist())
        parts[1, row] = len([t for t in response if t < 13])
        parts[2, row] = score_by_hand(foreign, PROMPTS[row], response, 14 in response)
        parts[3, row] = [0.0, 4.0, 0.0, 1, 1, 1, 1, 1][row]
    expected = (torch.tensor([2.0, 0.5, -1.0, 3.0])[:, None] * parts).sum(0)
    close(r.scores_raw, expected, atol=1e-4)
    assert metrics["reward"] == metrics["score"] == pytest.approx(float(expected.mean()), abs=1e-4)
    assert metrics["rewards/model"] == pytest.approx(float(parts[0].mean()), abs=1e-5)
    assert metrics["rewards/first"] == pytest.approx(float(parts[1].mean()))
    assert metrics["rewards/GPT2ForSequenceClassification"] == pytest.approx(
        float(parts[2].mean()), abs=1e-4
    )
    assert metrics["rewards/second"] == pytest.approx(9 / 6), "None is left out of the mean"
    assert not foreign.model.training and not any(
        p.requires_grad for p in foreign.model.parameters()
    )


def test_where_no_source_applies():
    nan = float("nan")
    one, two = torch.tensor([1.0, nan, nan]), torch.tensor([2.0, 5.0, nan])
    assert weighted([one, two], [3.0, 2.0]).tolist()[:2] == [7.0, 10.0]
    assert weighted([one, two], [3.0, 2.0]).isnan().tolist() == [False, False, True]
    assert weighted([one], [1.0]) is one


def test_functions_alone_train(make):
    """No reward model: the reward that a function gives is what PPO learns to get."""

    def likes_w1(completions, **kwargs):
        return [float(c.split().count("w1")) for c in completions]

    trainer = make(
        models={"reward_model": None},
        extra={"reward_funcs": likes_w1},
        total_episodes=160,
        kl_coef=0.0,
    )
    history = trainer.train().log_history
    rewards = [h["reward"] for h in history]
    assert sum(rewards[-5:]) > sum(rewards[:5]) + 2
    assert [h["rewards/likes_w1"] for h in history] == rewards


def test_conversations_are_answered_in_messages(make, tiny):
    """GRPOTrainer hands a conversation's completion over as a list of one message."""
    got = []

    def keep(prompts, completions, **kwargs):
        got.extend(completions)
        return [0.0] * len(completions)

    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    rows = [{"prompt": [{"role": "user", "content": p}]} for p in PROMPTS]
    extra = {"reward_funcs": keep, "train_dataset": rows, "processing_class": tokenizer}
    r, *_ = one_rollout(make(extra=extra))
    texts = tokenizer.batch_decode(
        [x[m].tolist() for x, m in zip(r.responses, r.mask, strict=True)], skip_special_tokens=True
    )
    assert got == [[{"role": "assistant", "content": s}] for s in texts]


# ------------------------------------------------------------------------------ normalisation (16)


def test_rule_16_scores_have_mean_0_and_variance_1_at_the_start():
    """By hand: 1, 3, 5, 7 have mean 4 and variance 5. Equal scores are only shifted."""
    scores = torch.tensor([1.0, 3.0, 5.0, 7.0])
    mean, std = losses.score_constants(scores)
    assert mean == 4.0 and std == pytest.approx(5**0.5)
    close(losses.normalised_scores(scores, mean, std, None), (scores - 4) / 5**0.5)
    close(losses.normalised_scores(scores, mean, std, 1.0), [-1.0, -1 / 5**0.5, 1 / 5**0.5, 1.0])
    assert losses.normalised_scores(scores, None, None, None) is scores
    assert losses.normalised_scores(scores, None, None, 4.0).tolist() == [1.0, 3.0, 4.0, 4.0]
    assert losses.score_constants(torch.full((3,), 2.0)) == (2.0, 1.0)


def test_rule_16_the_constants_of_the_first_rollout_are_kept(make):
    """The second rollout is normalised with the first one's; penalties come after, unscaled."""
    settings = {"normalize_scores": True, "missing_eos_penalty": 10.0}
    trainer, plain = make(**settings), make()
    one, one_adv, metrics = one_rollout(trainer, 0)
    raw = [one_rollout(plain, i)[0].scores_raw.double() for i in range(2)]
    stopped = (one.responses == 14).any(1)
    assert stopped.any() and not stopped.all()
    mean, std = raw[0].mean(), raw[0].var(correction=0).sqrt()
    close(one_adv.scores, (raw[0] - mean) / std - 10.0 * ~stopped)
    assert metrics["reward"] == pytest.approx(float(mean), abs=1e-5)
    assert metrics["score"] == pytest.approx(-10.0 * float((~stopped).double().mean()), abs=1e-5)
    two, two_adv, _ = one_rollout(trainer, 1)
    close(two_adv.scores, (raw[1] - mean) / std - 10.0 * ~(two.responses == 14).any(1))


def test_rule_16_constants_survive_a_restart(make):
    trainer = make(normalize_scores=True)
    assert trainer.rewards.state_dict() == {"mean": None, "std": None}
    one_rollout(trainer, 0)
    state = trainer.rewards.state_dict()
    again = make(normalize_scores=True)
    again.rewards.load_state_dict(state)
    assert torch.equal(one_rollout(again, 1)[1].scores, one_rollout(trainer, 1)[1].scores)
    fresh = make(normalize_scores=True)
    assert not torch.equal(one_rollout(fresh, 1)[1].scores, one_rollout(trainer, 1)[1].scores)


def test_scores_are_clipped_after_normalisation(make):
    _, clipped, _ = one_rollout(make(normalize_scores=True, score_clip=1.0))
    _, free, _ = one_rollout(make(normalize_scores=True))
    close(clipped.scores, free.scores.clamp(-1.0, 1.0))
    assert (free.scores.abs() > 1.0).any() and (free.scores.abs() < 1.0).any()


# ---------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "value, says",
    [
        ([float("nan")] * 8, "odd gave nan for row 0"),
        ([0.0] * 7 + [float("inf")], "inf for row 7"),
        (3.0, "odd must give a list"),
        (["good"] * 8, "odd must give a list"),
    ],
)
def test_what_is_no_reward_names_function_and_row(make, value, says):
    def odd(**kwargs):
        return value

    with pytest.raises(ValueError, match=says) as error:
        one_rollout(make(extra={"reward_funcs": odd}))
    assert "\n" not in str(error.value)


def test_sources_that_cannot_be_are_refused_in_one_line(make, tiny):
    with pytest.raises(ValueError, match=r"1 number for 2 sources of reward \(model, first\)"):
        make(extra={"reward_funcs": first}, reward_weights=[1.0])
    with pytest.raises(ValueError, match="neither a function nor a reward model"):
        make(extra={"reward_funcs": ["gold"]})
    with pytest.raises(ValueError, match="2 tokenizers for 1 reward models"):
        make(extra={"reward_processing_class": [None, None]})
    with pytest.raises(ValueError, match="has 3 labels"):
        make(models={"reward_model": tiny.rm(1, num_labels=3)})
    with pytest.raises(ValueError, match="no `score` head"):
        make(models={"reward_model": tiny.lm(1)})
    with pytest.raises(ValueError, match="score_clip must be above 0"):
        make(score_clip=0.0)
