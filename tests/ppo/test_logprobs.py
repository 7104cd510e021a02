"""Fused log-probabilities against torch's own functions, heads against the models themselves."""

import pytest
import torch
from families import FAMILIES, make_folder
from ppo_kit import one_rollout, response_logits, swap
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from rlhf_lab.data import lengths
from rlhf_lab.ppo import logprobs, rollout, trainer
from rlhf_lab.ppo.executor import Executor
from rlhf_lab.ppo.logprobs import logprobs_and_entropy
from rlhf_lab.ppo.sampling import pad_prompts

N, VOCABULARY, T = 7, 11, 0.7


def leaves(dtype=torch.float64):
    """Hidden states and a head, so that the logits are no leaf, as in a model."""
    g = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(N, 5, generator=g), torch.randn(VOCABULARY, 5, generator=g)
    tokens = torch.randint(0, VOCABULARY, (N,), generator=g)
    return hidden.to(dtype).requires_grad_(), head.to(dtype).requires_grad_(), tokens


@pytest.mark.parametrize("block", [1, 3 * VOCABULARY, 10**6], ids=["a row", "three rows", "all"])
def test_values_and_gradients_are_those_of_categorical(monkeypatch, block):
    monkeypatch.setattr(logprobs, "BLOCK", block)
    found = []
    for fused in (True, False):
        hidden, head, tokens = leaves()
        logits = hidden @ head.T
        if fused:
            logp, entropy = logprobs_and_entropy(logits, tokens, T)
        else:
            p = torch.distributions.Categorical(logits=logits / T)
            logp, entropy = p.log_prob(tokens), p.entropy().detach()
        (logp * torch.arange(1, N + 1)).sum().backward()
        found.append((logp, entropy, hidden.grad, head.grad))
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


def test_16_bit_logits_are_worked_on_in_32_bits():
    hidden, head, tokens = leaves(torch.bfloat16)
    logits = hidden @ head.T
    exact = torch.distributions.Categorical(logits=logits.detach().double() / T)
    logp, entropy = logprobs_and_entropy(logits, tokens, T)
    assert logp.dtype == entropy.dtype == torch.float32
    assert_close(logp.detach().double(), exact.log_prob(tokens), atol=1e-5, rtol=0)
    logp.sum().backward()
    assert hidden.grad.dtype == torch.bfloat16


def test_the_gradient_takes_the_place_of_the_logits():
    hidden, head, tokens = leaves()
    logits = hidden @ head.T
    place, seen = logits.data_ptr(), []
    logits.register_hook(lambda grad: seen.append(grad.data_ptr()))
    logprobs_and_entropy(logits, tokens, T)[0].sum().backward()
    assert seen == [place]


def test_an_entropy_has_no_gradient():
    hidden, head, tokens = leaves()
    assert not logprobs_and_entropy(hidden @ head.T, tokens, T)[1].requires_grad


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_trunk_and_head_are_the_whole_model(tmp_path, family):
    """Every family's own forward pass gives the same logits, soft caps included."""
    model = AutoModelForCausalLM.from_pretrained(make_folder(tmp_path, family)).eval()
    ids, mask = pad_prompts([[1, 2, 3, 4, 5, 6], [7, 8, 9, 10]], 0)
    hidden = rollout.response_hidden_states(model, ids, mask, mask[:, -3:])
    ours = logprobs.language_head(model, hidden).view(2, 3, -1)
    assert_close(ours, response_logits(model, ids, mask, 3), atol=1e-5, rtol=1e-5)


# -------------------------------------------------------------------------------------- padding


def test_a_minibatch_is_as_wide_as_its_longest_row(make, monkeypatch):
    """Short rows lose the padding that only longer rows needed, and padding gets no logits."""
    trainer = make()
    r, adv, _ = one_rollout(trainer)
    lengths = r.attention.sum(1)
    short = torch.argsort(lengths)[:3]
    first, first_adv = r.rows(short), adv.rows(short)
    widths, logits = [], []

    def passed(forward):
        return lambda *x: widths.append(rollout.width_of(x[2])) or forward(*x)

    def headed(head):
        return lambda model, hidden: logits.append(len(hidden)) or head(model, hidden)

    swap(monkeypatch, rollout, "forward_model", passed)
    swap(monkeypatch, rollout, "language_head", headed)
    n = first.mask.sum()
    trainer.compute_losses(first, first_adv, n)
    trainer.meter.close()  # no backward pass will end what began here
    longest = int(lengths.sort().values[2])
    assert all(longest - 1 <= width <= longest for width in widths) and len(widths) == 2
    assert longest < r.ids.shape[1]
    assert logits == [n]


def test_losses_and_training_do_not_depend_on_the_width(make, monkeypatch):
    trainer = make()
    r, adv, _ = one_rollout(trainer)
    short = torch.argsort(r.attention.sum(1))[:3]
    first, first_adv = r.rows(short), adv.rows(short)
    n = first.mask.sum()
    loss, stats, _ = trainer.compute_losses(first, first_adv, n)
    cut = make().train().log_history
    monkeypatch.setattr(rollout, "width_of", lambda mask: mask.shape[1])
    same, as_well, _ = trainer.compute_losses(first, first_adv, n)
    trainer.meter.close()  # no backward pass will end what began here
    assert_close(loss, same, atol=1e-6, rtol=1e-6)
    assert_close(stats, as_well, atol=1e-6, rtol=1e-6)
    for a, b in zip(cut, make().train().log_history, strict=True):
        assert a == pytest.approx(b, abs=1e-4)


def test_training_does_not_depend_on_passes_of_like_length(make, monkeypatch):
    """Cut as often as can be, or not at all: the same numbers."""
    cuts = []

    def count(length_buckets):
        def counted(self, mask, rows, least=None):
            if least is None:
                return length_buckets(self, mask, rows)
            buckets = length_buckets(self, mask, rows, least)  # of the update
            cuts.append(len(buckets))
            return buckets

        return counted

    swap(monkeypatch, Executor, "length_buckets", count)
    whole = make().train().log_history
    assert set(cuts) == {1}
    monkeypatch.setattr(lengths, "LEAST_SHARE_SAVED", 0.0)
    monkeypatch.setattr(trainer, "worth_a_pass", lambda _: 0)
    cut = make().train().log_history
    assert max(cuts) > 2
    for a, b in zip(cut, whole, strict=True):
        assert a == pytest.approx(b, abs=1e-4)
