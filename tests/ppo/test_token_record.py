"""What is recorded of tokens: texts that add up to the response, and figures checked by hand.

Run: pytest tests/ppo/test_token_record.py
"""

import json
from dataclasses import replace

import pytest
import torch
from families import make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_lab.ppo import losses
from rlhf_lab.ppo.rollout import Advantages, Rollout, concat_prompt_response
from rlhf_lab.ppo.sampling import pad_prompts
from rlhf_lab.ppo.texts import decode, score_tokens, token_record, token_texts


def rollout(tiny, responses):
    """Responses of made-up figures: log π = −0.1, −0.2, …; log π_ref 0.05 lower; V = 1, 2, …"""
    ids, attention = pad_prompts([[1, 2]] * len(responses), tiny.pad)
    width = max(map(len, responses))
    padded = torch.tensor([r + [tiny.pad] * (width - len(r)) for r in responses])
    mask = losses.response_mask(padded, tiny.eos)
    ids, attention = concat_prompt_response(ids, attention, padded, mask, tiny.pad)
    place = torch.arange(1.0, width + 1).expand(len(responses), -1)
    logprobs, values = -0.1 * place * mask, place * mask
    r = Rollout(
        torch.arange(len(responses)),
        ids,
        attention,
        padded,
        mask,
        logprobs,
        (logprobs - 0.05 * place) * mask,
        values,
        torch.tensor([2.0, -1.0])[: len(responses)],
    )
    rewards = losses.token_rewards(r.logprobs - r.ref_logprobs, r.scores_raw, mask, beta=0.1)
    advantages, returns = losses.compute_gae(rewards, values, mask)
    return r, Advantages(r.scores_raw, rewards, losses.whiten(advantages, mask), returns)


def test_a_record_by_hand(tiny):
    tokenizer = tiny.tokenizer()
    r, adv = rollout(tiny, [[3, 4, tiny.eos], [5, 6, 7, 8]])
    first, second = token_record(tokenizer, r, adv)
    assert first["text"] == ["w3", " w4", "<eos>"] and first["special"] == [2]
    assert first["logprob"] == [-0.1, -0.2, -0.3]
    assert first["log_ratio"] == [0.05, 0.1, 0.15]
    assert first["value"] == [1.0, 2.0, 3.0]
    assert first["reward"] == [-0.005, -0.01, 1.985]  # −β·KL, and the score 2 on the last
    # δ = r + V' − V backwards: −1.015, then 0.99 and 0.995, each with 0.95 of what follows.
    plain = [0.995 + 0.95 * (0.99 + 0.95 * -1.015), 0.99 + 0.95 * -1.015, -1.015]
    assert first["return"] == pytest.approx([p + v for p, v in zip(plain, (1, 2, 3))], abs=6e-4)
    assert first["advantage"] == pytest.approx(adv.advantages[0, :3].tolist(), rel=5e-4)
    assert second["text"] == ["w5", " w6", " w7", " w8"] and second["special"] == []
    assert [len(v) for k, v in second.items() if k != "special"] == [4] * 7
    assert decode(tokenizer, r.responses, r.mask) == ["w3 w4", "w5 w6 w7 w8"]


def test_a_few_rows_are_those_rows(tiny):
    r, adv = rollout(tiny, [[3, 4, tiny.eos], [5, 6, 7, 8]])
    one = torch.tensor([1])
    (record,) = token_record(tiny.tokenizer(), r.rows(one), adv.rows(one))
    assert record == token_record(tiny.tokenizer(), r, adv)[1]


def test_without_advantages_there_are_none_in_the_record(tiny):
    r, _ = rollout(tiny, [[3, tiny.eos]])
    (record,) = token_record(tiny.tokenizer(), r)
    assert set(record) == {"text", "special", "logprob", "log_ratio", "value"}


def test_numbers_are_short_and_16_bits_are_fine(tiny):
    r, adv = rollout(tiny, [[3, 4, 5, tiny.eos]])
    logprobs = r.logprobs / 7
    r = replace(r, values=r.values.bfloat16() / 3, logprobs=logprobs, ref_logprobs=logprobs + 1e-7)
    (record,) = token_record(tiny.tokenizer(), r, adv)
    assert record["logprob"] == [-0.01429, -0.02857, -0.04286, -0.05714]
    assert record["log_ratio"] == [0.0] * 4  # fp32's own noise
    assert len(json.dumps(record)) < 60 * 4 + 200


def test_an_empty_response_has_an_empty_record(tiny):
    r, adv = rollout(tiny, [[3, 4, tiny.eos]])
    r = replace(r, mask=torch.zeros_like(r.mask))
    (record,) = token_record(tiny.tokenizer(), r, adv)
    assert record["text"] == [] and record["reward"] == []


# -- texts ------------------------------------------------------------------------------------
BYTES = {}


def byte_level():
    return BYTES.setdefault("", make_tokenizer("qwen2", True))


def test_a_character_of_several_tokens_belongs_to_the_last():
    tokenizer = byte_level()
    texts, special = token_texts(tokenizer, tokenizer("aé!")["input_ids"])
    assert (texts, special) == (["a", "", "é", "!"], [])


def test_a_character_that_was_cut_off_is_not_lost():
    tokenizer = byte_level()
    ids = tokenizer("aé")["input_ids"][:2]
    assert token_texts(tokenizer, ids)[0] == ["a", tokenizer.decode(ids)[1:]]
    assert token_texts(tokenizer, [])[0] == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=6) | st.just("<|im_end|>") | st.binary(max_size=3), max_size=4))
def test_tokens_add_up_to_what_the_tokenizer_decodes(parts):
    """Any ids, also such as are no text at all: that is what a young policy samples."""
    tokenizer = byte_level()
    ids = []
    for part in parts:
        ids += tokenizer(part)["input_ids"] if isinstance(part, str) else list(part)
    texts, special = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    plain = "".join(t for k, t in enumerate(texts) if k not in special)
    assert plain == tokenizer.decode(ids, skip_special_tokens=True)
    assert [texts[k] for k in special] == ["<|im_end|>"] * len(special)


# -- two models, afterwards -------------------------------------------------------------------
def test_scoring_a_response_by_hand(tiny):
    tokenizer, policy, reference = tiny.tokenizer(), tiny.lm(0), tiny.lm(5)
    found = score_tokens(policy, reference, tokenizer, "w1 w2", "w3 w4")
    assert found["text"] == ["w3", " w4", "<eos>"] and found["special"] == [2]
    ids = torch.tensor([[1, 2, 3, 4, tiny.eos]])
    with torch.no_grad():
        new, old = (torch.log_softmax(m(ids).logits[0].float(), -1) for m in (policy, reference))
    by_hand = [float(new[t - 1, ids[0, t]]) for t in (2, 3, 4)]
    against = [float(old[t - 1, ids[0, t]]) for t in (2, 3, 4)]
    assert found["logprob"] == pytest.approx(by_hand, rel=1e-3)
    difference = [a - b for a, b in zip(by_hand, against)]
    assert found["log_ratio"] == pytest.approx(difference, rel=1e-3, abs=1e-4)
    assert max(map(abs, difference)) > 0.1  # two models that differ


def test_a_model_does_not_differ_from_itself(tiny):
    policy = tiny.lm(0)
    found = score_tokens(policy, policy, tiny.tokenizer(), "w1", [3, 4, 5])
    assert found["log_ratio"] == [0.0, 0.0, 0.0] and found["special"] == []
    assert set(score_tokens(policy, None, tiny.tokenizer(), "w1", "w3")) == {
        "text",
        "special",
        "logprob",
    }
