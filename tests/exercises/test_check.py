"""`lab.check` accepts what is right, names the mistakes that it knows, and breaks over nothing.

pytest tests/exercises/test_check.py
"""

from __future__ import annotations

import collections
import functools

import pytest
import torch

import rlhf_lab as lab
from rlhf_lab.display import Display
from rlhf_lab.exercises import _TRIES
from rlhf_lab.exercises.book import EXERCISES

MISTAKES = [(name, says) for name, x in EXERCISES.items() for says in x.mistakes]


@pytest.fixture(autouse=True)
def first_try():
    _TRIES.clear()


def message(name, function):
    """The first line of what a failed check says, without the name."""
    found = lab.check(name, function)
    assert not found.passed and not found
    return repr(found).splitlines()[0].removeprefix(f"✗ {name}: ")


def test_there_are_enough_exercises_and_mistakes():
    assert len(EXERCISES) >= 24 and len(MISTAKES) >= 72
    assert {x.notebook for x in EXERCISES.values()} == {*range(11), 12}
    twice = [says for says, n in collections.Counter(s for _, s in MISTAKES).items() if n > 1]
    assert not twice


@pytest.mark.parametrize("name", EXERCISES)
def test_the_solution_passes_its_own_check(name):
    exercise = EXERCISES[name]
    assert lab.check(name, exercise.variant())
    if not exercise.fixed:
        assert lab.check(name, exercise.function)


@pytest.mark.parametrize("name", EXERCISES)
def test_each_planted_mistake_is_called_by_its_own_name(name):
    exercise = EXERCISES[name]
    found = {says: message(name, exercise.variant(says)) for says in exercise.mistakes}
    assert found == {says: says for says in exercise.mistakes}


# ------------------------------------------------ written by hand, in other ways than the library's


def right_gae(r, v, mask, gamma, lam):
    """A_t as the sum over later δ, in two loops."""
    out = torch.zeros_like(v)
    for row, n in enumerate(mask.sum(1).tolist()):
        values = [*v[row, :n].tolist(), 0.0]
        delta = [float(r[row, t]) + gamma * values[t + 1] - values[t] for t in range(n)]
        for t in range(n):
            out[row, t] = sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n))
    return out, out + v * mask


def right_ppo_loss(new, old, advantages, mask, clip):
    ratio = (new - old).exp()
    inside = ratio.clamp(1 - clip, 1 + clip)
    loss = -torch.min(ratio * advantages, inside * advantages)
    outside = torch.where(advantages > 0, ratio > 1 + clip, ratio < 1 - clip)
    return loss.masked_fill(~mask, 0.0), (outside & mask).double()


def right_whiten(values, mask, shift_mean):
    real = values[mask]
    if real.numel() < 2:
        return values * mask
    mean, std = real.mean(), real.std()
    return torch.where(mask, (values - mean) / std + (0.0 if shift_mean else mean), 0.0)


def right_sft_loss(logits, tokens, mask):
    labels = tokens.masked_fill(~mask, -100)[:, 1:].flatten()
    if (labels == -100).all():
        return logits.sum() * 0
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels)


def right_kto_loss(logps, ref, kl_logps, ref_kl, good, beta):
    kl = torch.clamp((kl_logps - ref_kl).mean(), min=0).detach()
    losses = [
        1 - torch.sigmoid(beta * (a - b - kl) if ok else beta * (kl - a + b))
        for a, b, ok in zip(logps, ref, good)
    ]
    return torch.stack(losses).mean()


RIGHT = {
    "gae": right_gae,
    "ppo_loss": right_ppo_loss,
    "whiten": right_whiten,
    "sft_loss": right_sft_loss,
    "kto_loss": right_kto_loss,
    "masked_mean": lambda x, m: x[m].mean() if m.any() else x.new_zeros(()),
    "k1": torch.sub,
    "k3": lambda a, b: (b - a).exp() - 1 - (b - a),
    "pair_accuracy": lambda a, b: sum(x > y for x, y in zip(a.tolist(), b.tolist())) / len(a),
    "rloo_advantages": lambda s: (s - s.mean(1, keepdim=True)) * s.shape[1] / (s.shape[1] - 1),
    "best_of_n_kl": lambda n: (
        sum(1 / k for k in range(1, n + 1)) * 0
        + torch.log(torch.tensor(float(n), dtype=torch.float64))
        - 1
        + 1 / n
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_answer_may_be_written_in_another_way(name):
    assert lab.check(name, RIGHT[name]), repr(lab.check(name, RIGHT[name]))


def forgets_gamma(r, v, mask, gamma, lam):
    return right_gae(r, v, mask, 1.0, lam)


def masks_nothing(new, old, advantages, mask, clip):
    ratio = (new - old).exp()
    loss = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    return loss, right_ppo_loss(new, old, advantages, mask, clip)[1]


WRONG = [
    ("k1", lambda a, b: b - a, "the direction is wrong"),
    ("k3", lambda a, b: (a - b).exp() - 1 - (a - b), "upside down"),
    ("gae", lambda r, v, m, g, c: right_gae(r, v, torch.ones_like(m), g, c), "the mask"),
    ("gae", lambda r, v, m, g, c: right_gae(r, v, m, g, 1.0), "λ is not used"),
    ("gae", forgets_gamma, "γ is missing before the next V; and γ is missing before the next A"),
    ("whiten", lambda x, m, s: right_whiten(x, m, True), "shift_mean=False"),
    ("masked_mean", lambda x, m: (x * m).mean(), "divides by all positions"),
    ("masked_mean", lambda x, m: x[m].mean(), "an empty mask gives 0/0"),
    ("pair_accuracy", lambda a, b: (a >= b).double().mean(), "a tie counts as won"),
    ("token_entropy", lambda z, m: -(z.softmax(-1) * z.log_softmax(-1)).sum(-1).mean(), "padding"),
    ("rloo_advantages", lambda s: s - s.mean(1, keepdim=True), "leave the score itself out"),
    ("best_of_n_kl", lambda n: torch.log(torch.tensor(n).double()), "is not subtracted"),
    ("training_flops", lambda p, t, n, h, w, s: 6 * p * t, "attention is missing"),
]


@pytest.mark.parametrize(("name", "function", "says"), WRONG)
def test_a_mistake_is_named_however_it_is_written(name, function, says):
    assert says in message(name, function)


def test_two_mistakes_at_once_are_both_named():
    x = EXERCISES["token_rewards"]
    one, other = "β is not used", "the score lands one position early"
    assert message("token_rewards", x.variant(one, other)) == f"{one}; and {other}"


LOCATED = [
    ("k1", lambda a, b: 3 * (a - b), "every number is 3 times what it should be"),
    ("k1", lambda a, b: a - b + 0.5, "every number is +0.5 off"),
    ("k2", lambda a, b: -0.5 * (a - b) ** 2, "the sign is wrong"),
    ("k1", lambda a, b: (a - b).sum(1), "k1 has the shape (2,) and not (2, 3)"),
    ("k1", lambda a, b: (a - b) / 0 * 0, "NaN, from 0/0"),
    ("gae", lambda r, v, m, g, c: (right_gae(r, v, m, g, c)[0],) * 2, "returns lack V"),
    (
        "gae",
        lambda r, v, m, g, c: right_gae(r, v, m, 0.9, c),
        "it is right where gamma is 0.9",
    ),
    (
        "token_rewards",
        lambda kl, s, m, b: RIGHT_REWARDS(kl, s, m, b) * m + 2.0 * ~m,
        "it is right at every real position: only masked ones differ",
    ),
    ("gae", lambda r, v, m, g, c: right_gae(r, -v, m, g, c), "advantages differs first at row 0"),
    ("dpo_loss", lambda a, b, c, d, e: (-((a - c - b + d) * e).sigmoid().log().mean(),) * 2, "()"),
]
RIGHT_REWARDS, RIGHT_GAE = EXERCISES["token_rewards"].function, EXERCISES["gae"].function


@pytest.mark.parametrize(("name", "function", "says"), LOCATED)
def test_an_unknown_mistake_is_located(name, function, says):
    assert says in message(name, function)


def test_what_is_right_only_without_padding_is_said_to_be():
    def leaks(kl, scores, mask, beta):
        return RIGHT_REWARDS(kl, scores, mask, beta) + 0.1 * (~mask).any(1, keepdim=True)

    assert "it is right in rows without padding" in message("token_rewards", leaks)


def test_the_place_is_the_first_that_differs():
    def wrong(a, b):
        k1 = a - b
        k1[-1, -1] += 1
        return k1

    assert "k1 differs first at row 1, position 2 (counted from 0)" in message("k1", wrong)


# --------------------------------------------------------------------------- answers that are none


def helper(x):
    return x.nothing_of_this_name


def raises(logprobs, ref_logprobs):
    difference = logprobs - ref_logprobs
    return difference @ difference


def raises_below(logprobs, ref_logprobs):
    return helper(logprobs)


def test_an_exception_is_one_line_that_points_into_the_students_function():
    text = message("k1", raises)
    assert text.startswith("RuntimeError: ")
    assert "line 3 of raises: `return difference @ difference`" in text
    assert text.endswith("arguments: logprobs (2, 3), ref_logprobs (2, 3)")
    assert "line 3 of raises" in message("k1", functools.partial(raises))
    text = message("k1", raises_below)
    assert "AttributeError" in text and "in helper: `return x.nothing_of_this_name`" in text


def test_an_exception_in_an_edge_case_says_its_shapes():
    def divides(values, mask):
        if not mask.any():
            raise ZeroDivisionError("nothing is real")
        return values[mask].mean()

    text = message("masked_mean", divides)
    assert text.startswith("ZeroDivisionError: nothing is real; line 3 of divides")
    assert "values (2, 1), mask (2, 1)" in text


def unsolved(*arguments):
    raise NotImplementedError


@pytest.mark.parametrize("function", [unsolved, lambda *x: None, lambda *x: ...])
@pytest.mark.parametrize("name", ["gae", "kv_cache_bytes"])
def test_an_unsolved_cell_says_so_and_does_not_fail(name, function):
    assert message(name, function) == f'not solved yet: lab.exercises("{name}") says what is asked'


def changes_its_argument(logprobs, ref_logprobs):
    logprobs -= ref_logprobs
    return logprobs


ODD = [
    (changes_its_argument, "it changes its argument logprobs in place"),
    (lambda a, b: "k1", "it returns str"),
    (lambda a, b: [0.0], "it returns list"),
    (lambda a: a, "k1(logprobs, ref_logprobs) -> k1, and yours does not fit"),
    (torch.ones(2), "give the function itself"),
    (lambda a, b: float("inf"), "k1 has the shape () and not (2, 3)"),
    (lambda a, b: torch.full_like(a, float("nan")), "nan and not"),
]


@pytest.mark.parametrize(("function", "says"), ODD)
def test_odd_answers_are_told_in_one_line(function, says):
    assert says in message("k1", function)


def test_one_value_where_two_are_asked_for():
    assert "a number for each of advantages, returns" in message("gae", lambda r, *x: r)


def test_a_loss_without_a_gradient_is_not_right():
    def detached(chosen, rejected, margin):
        return EXERCISES["bradley_terry_loss"].function(chosen.detach(), rejected.detach(), margin)

    assert "no gradient flows" in message("bradley_terry_loss", detached)

    def half(chosen, rejected, margin):
        return EXERCISES["bradley_terry_loss"].function(chosen, rejected.detach(), margin)

    text = message("bradley_terry_loss", half)
    assert text.startswith("the gradient of bradley_terry_loss by rejected differs")


def test_a_function_is_tried_on_copies():
    before = [x.clone() for x in EXERCISES["k1"].cases[0].values()]
    lab.check("k1", changes_its_argument)
    assert all(map(torch.equal, before, EXERCISES["k1"].cases[0].values()))


# ------------------------------------------------------------------------------ what one sees of it


def test_hints_come_one_by_one_and_begin_anew_after_a_right_answer():
    def hint():
        return repr(lab.check("k1", lambda a, b: b - a)).splitlines()[1].strip()

    first = f"hint 1 of 3: {EXERCISES['k1'].hint}"
    assert hint() == first
    assert "should give k1=[[-0.412]]" in hint()
    assert [hint(), hint()] == ['hint 3 of 3: lab.solution("k1") shows how the library does it'] * 2
    assert lab.check("k1", torch.sub)
    assert hint() == first


def test_a_grader_can_assert_it():
    assert lab.check("k1", torch.sub)
    assert lab.check("k1", torch.sub).passed is True
    with pytest.raises(AssertionError):
        assert lab.check("k1", torch.add)


def test_it_reads_in_a_terminal_and_in_a_notebook():
    found = lab.check("k1", torch.sub)
    assert isinstance(found, Display) and repr(found) == "✓ k1: right in all 12 cases"
    assert "<pre" in found._repr_html_() and "✓ k1" in found._repr_html_()
    bad = lab.check("k1", lambda a, b: "<b>")
    assert "<b>" not in bad._repr_html_()


def test_the_list_the_statement_and_the_solution():
    everything = repr(lab.exercises())
    assert all(name in everything for name in EXERCISES)
    assert "<table" in lab.exercises()._repr_html_()
    asked = repr(lab.exercises("gae"))
    assert asked.startswith("gae(rewards, values, mask, gamma, lam) -> advantages, returns")
    assert "(b, t)" in asked and "rewards (2, 3)" in asked and "running" not in asked
    assert "running = (delta" in repr(lab.solution("gae"))
    assert "kind='k3'" in repr(lab.solution("k3"))


@pytest.mark.parametrize("call", [lab.exercises, lab.solution, lambda n: lab.check(n, abs)])
def test_a_name_that_there_is_not_is_refused_with_a_near_one(call):
    with pytest.raises(ValueError, match="no exercise 'gea': did you mean 'gae'"):
        call("gea")
