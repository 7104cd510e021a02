"""A draft model: its plan against closed forms, and that it changes no text.

Run: pytest tests/deploy/test_drafts.py
"""

from __future__ import annotations

import math

import pytest
import torch

import rlhf_lab as lab
from rlhf_lab.cli.main import main
from rlhf_lab.cost.serving import tokens_per_pass
from rlhf_lab.cost.states import states

LENGTHS = {"prompt_length": 32, "response_length": 41, "per_device_train_batch_size": 1}
DRAFT = {"draft_model": "mini", "accepted": 0.75, "num_assistant_tokens": 3}


def flops(estimate, role: str) -> float:
    return estimate.ledger.total(quantity="flops", role=role, phase="decode")


# ------------------------------------------------------------------------------------------- plan


@pytest.mark.parametrize(("kept", "k"), [(0.0, 1), (0.5, 1), (0.8, 4), (0.95, 8), (1.0, 5)])
def test_tokens_of_a_pass_are_leviathan_s(kept, k):
    """Enumerated: i tokens are kept and the next one is not, or all k are; one more comes from the
    model each time. (1 - a^(k+1)) / (1 - a) in closed form."""
    more = {"accepted": kept, "num_assistant_tokens": k}
    s = lab.plan("inference", "small", **LENGTHS, **{**DRAFT, **more}).estimate.setup
    lengths = [(i + 1) * kept**i * (1 - kept) for i in range(k)] + [(k + 1) * kept**k]
    assert tokens_per_pass(s) == pytest.approx(math.fsum(lengths))
    if kept < 1:
        assert tokens_per_pass(s) == pytest.approx((1 - kept ** (k + 1)) / (1 - kept))


def test_flops_by_hand():
    """40 tokens after the first: the model checks 4 in a pass that brings 2.73, the draft makes 3
    passes of its own for each of them. (All rows are as long as half way through.)"""
    one, mini = (lab.plan("inference", m, **LENGTHS).estimate for m in ("small", "mini"))
    both = lab.plan("inference", "small", **LENGTHS, **DRAFT).estimate
    brought = 1 + 0.75 + 0.75**2 + 0.75**3
    assert flops(both, "policy") == pytest.approx(flops(one, "policy") * 4 / brought)
    assert flops(both, "draft") == pytest.approx(flops(mini, "policy") * 3 / brought)


def test_weights_and_caches_of_both_are_in_memory():
    one, mini = (lab.plan("inference", m, **LENGTHS).estimate for m in ("small", "mini"))
    both = lab.plan("inference", "small", **LENGTHS, **DRAFT).estimate
    for component in ("parameters", "kv_cache"):
        for role, alone in (("policy", one), ("draft", mini)):
            at = {"quantity": "bytes", "phase": "decode", "component": component}
            theirs = alone.ledger.total(**at, role="policy")
            assert both.ledger.total(**at, role=role) == pytest.approx(theirs) and theirs > 0
    held = states(mini.setup, mini.setup.model, "lm", trained=False).parameters
    assert both.peak > one.peak + held


def test_it_pays_where_it_guesses_well():
    """Of an 8B model whose draft is an eighth of it; and not where nothing is kept."""
    how = {"hardware": "h100", "dtype": "bfloat16", **LENGTHS}
    alone = lab.plan("inference", "Llama-3.1-8B", **how).estimate.serving
    per_token = []
    for kept in (0.0, 0.5, 0.9):
        more = {"draft_model": "Llama-3.2-1B", "accepted": kept, "num_assistant_tokens": 2}
        e = lab.plan("inference", "Llama-3.1-8B", **how, **more).estimate
        per_token.append(e.serving.per_token)
        assert e.serving.latency == pytest.approx(e.step_seconds) and e.serving.fits == 1
    assert per_token == sorted(per_token, reverse=True)
    assert per_token[0] > alone.per_token > per_token[-1]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"per_device_train_batch_size": 2}, "per_device_train_batch_size=1"),
        ({"num_assistant_tokens": 0}, "num_assistant_tokens must be a whole number"),
    ],
)
def test_what_cannot_be_planned_is_said(settings, line):
    with pytest.raises(ValueError, match=line):
        _ = lab.plan("inference", "small", **{**LENGTHS, **DRAFT, **settings}).estimate


def test_the_share_that_is_kept_is_asked_for_at_once():
    for kept in (None, 1.5, -0.1):
        with pytest.raises(ValueError, match=f"accepted={kept}: say which share of its tokens"):
            lab.plan("inference", "small", **{**DRAFT, "accepted": kept})


def test_the_command_line_plans_one(capsys):
    given = "inference --model small --draft-model mini --set accepted=.75".split()
    assert main(["plan", *given]) == 0
    said = capsys.readouterr().out
    assert "3.05 tokens a pass by a draft" in said and "decode   draft" in said


# ------------------------------------------------------------------------------------------- text


def guesses(draft, k: int):
    """transformers' settings for k guesses, always."""
    how = draft.generation_config
    how.num_assistant_tokens, how.num_assistant_tokens_schedule = k, "constant"
    how.assistant_confidence_threshold = 0.0
    return draft


def same_or_tied(model, ids, told, made) -> bool:
    """Whether two greedy texts are equal, or first differ where the two best logits are a tie."""
    n = min(told.shape[1], made.shape[1])
    unlike = (told[0, :n] != made[0, :n]).nonzero()
    if not len(unlike):
        return told.shape == made.shape
    best = model(told[:, : unlike[0, 0]]).logits[0, -1].topk(2).values
    return bool(best[0] - best[1] < 1e-4)


def test_greedy_text_is_the_same_with_a_draft_and_with_every_attention():
    model, eager, draft = lab.load("small").sft, lab.load("small").sft, lab.load("mini").sft
    eager.set_attn_implementation("eager")
    tokenizer, passes = lab.load("small").tokenizer, []
    hook = model.model.register_forward_hook(lambda *_: passes.append(1))
    how = {"do_sample": False, "max_new_tokens": 32}
    told = {}
    for animal, k in (("mouse", 1), ("wolf", 5)):
        text = f"Write a funny story about a {animal} and a key in the cave.\n"
        ids = tokenizer(text, return_tensors="pt").input_ids
        told[animal] = model.generate(ids, **how)
        alone, passes[:] = len(passes), []
        made = model.generate(ids, assistant_model=guesses(draft, k), **how)
        assert same_or_tied(model, ids, told[animal], made)
        assert k == 1 or len(passes) < alone, "the draft saved passes"
        assert same_or_tied(model, ids, told[animal], eager.generate(ids, **how))
        passes.clear()
    hook.remove()


def test_sampling_with_a_draft_keeps_the_distribution(tiny):
    """Two tokens, 450 times: as often as the model's own probabilities say, which are enumerated,
    and not as the draft's say (chi-squared; 30 degrees of freedom are exceeded by 60 once in 1,000
    draws)."""
    model, draft = tiny.lm(0), guesses(tiny.lm(1, num_hidden_layers=1), 2)
    for one in (model, draft):
        one.generation_config.update(top_k=0, eos_token_id=None)
    ids = torch.tensor([[1, 2, 3]])

    def exact(one):
        first = one(ids).logits[0, -1].softmax(-1)
        pairs = torch.cat([ids.expand(16, -1), torch.arange(16)[:, None]], 1)
        return (first[:, None] * one(pairs).logits[:, -1].softmax(-1)).flatten()

    def chi_squared(counts, p, n):
        often = p * n > 8
        p = torch.cat([p[often], p[~often].sum()[None]])
        seen = torch.cat([counts[often], counts[~often].sum()[None]])
        return ((seen - n * p) ** 2 / (n * p)).sum().item(), int(often.sum())

    n, counts = 450, torch.zeros(256)
    torch.manual_seed(0)
    with torch.no_grad():
        for _ in range(n):
            how = {"do_sample": True, "max_new_tokens": 2, "assistant_model": draft}
            a, b = model.generate(ids, **how)[0, 3:].tolist()
            counts[16 * a + b] += 1
        (value, bins), (other, _) = (chi_squared(counts, exact(m), n) for m in (model, draft))
    assert value < bins + 4 * (2 * bins) ** 0.5 < other
