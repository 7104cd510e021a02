"""Helpers of the tests of PPO: rollouts, naive log-probabilities, ways to break a rule."""

import pytest
import torch
from torch.testing import assert_close

from rlhf_lab.ppo.losses import response_mask
from rlhf_lab.ppo.rollout import Samples
from rlhf_lab.ppo.sampling import generate, pad_prompts, positions_of, row_keys

PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9", "w10 w11", "w2", "w3 w3", "w12 w1", "w8 w9 w1 w4"]
PROMPT_IDS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [10, 11]]
ARCHITECTURES = ["llama", "gpt2"]  # rotary and learned absolute positions
T = 0.7
RESPONSES = [[5, 14, 15], [6, 7, 14], [8, 9, 10]]  # early, exactly at the limit, never
must_fail = pytest.raises(AssertionError)  # the check, once the rule is broken


def keys_of(n):
    return row_keys(0, 0, torch.arange(n), torch.zeros(n, dtype=torch.long))


def respond(tiny, model, length=8, prompts=PROMPT_IDS):
    """→ prompt ids, prompt mask, responses, response mask."""
    ids, mask = pad_prompts(prompts, tiny.pad)
    responses = generate(
        model,
        ids,
        mask,
        keys_of(len(prompts)),
        max_new_tokens=length,
        stop_token_ids=tiny.eos,
        pad_token_id=tiny.pad,
    )
    return ids, mask, responses, response_mask(responses, tiny.eos)


def one_rollout(trainer, iteration=0, beta=0.05):
    """→ the rollout of all eight prompts, in their order, its advantages, and its metrics."""
    return trainer.make_rollout(torch.arange(len(PROMPTS)), iteration, beta)


def scored(trainer, responses):
    """The rollout of hand-made responses to the first prompts."""
    rows = trainer.train_dataset[: len(responses)]
    prompts = [trainer.tokenizer(r["prompt"])["input_ids"] for r in rows]
    ids, mask = pad_prompts(prompts, trainer.tokenizer.pad_token_id)
    samples = Samples(torch.arange(len(rows)), ids, mask, torch.tensor(responses))
    with torch.no_grad():
        return trainer.score(samples, rows)


def prefixes(r, row):
    """(prompt, response): the real tokens of one row as lists, without any padding."""
    real = r.ids[row][r.attention[row]].tolist()
    n = int(r.mask[row].sum())
    return real[: len(real) - n], real[len(real) - n :]


def response_logits(model, ids, mask, length):
    """Logits of the last `length` tokens by the model's own forward pass of padded rows, with a
    mask. → (b, length, vocab)."""
    whole = model(
        input_ids=ids.masked_fill(~mask, 0),
        attention_mask=mask,
        use_cache=False,
        position_ids=positions_of(mask),
        logits_to_keep=length + 1,
    )
    return whole.logits[:, :-1]


@torch.no_grad()
def naive_logprobs(model, r, row, temperature=T):
    """log π of each real token of a row: one unpadded forward pass per token."""
    prompt, response = prefixes(r, row)
    out = []
    for t, token in enumerate(response):
        logits = model(torch.tensor([prompt + response[:t]])).logits[0, -1]
        out.append(torch.log_softmax(logits / temperature, 0)[token])
    return torch.stack(out)


@torch.no_grad()
def naive_score(model, tokens):
    """The head at the last token of one unpadded sequence."""
    return model.score(model.base_model(torch.tensor([tokens])).last_hidden_state[0, -1])[0]


def one_later(mask):
    """A mask with one more position where padding exists: where TRL puts the score. (b, t)"""
    return torch.cat([torch.ones_like(mask[:, :1]), mask[:, :-1]], 1)


def close(a, b, atol=2e-5):
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    assert_close(a, b, atol=atol, rtol=0)


def swap(monkeypatch, where, name, new):
    """Replace `where.name` by `new(the original)`."""
    monkeypatch.setattr(where, name, new(getattr(where, name)))


def check_step_0(trainer):
    """At every iteration the first minibatch has ratio 1 and KL 0; the reference's KL starts 0."""
    history = trainer.train().log_history
    assert len(history) == 3
    for h in history:
        assert h["first_ratio_error"] < 1e-5
        assert abs(h["first_approxkl"]) < 1e-9
    assert abs(history[0]["kl"]) < 1e-5
    assert history[-1]["kl"] > 1e-3, "the policy must have moved, or the check says nothing"
