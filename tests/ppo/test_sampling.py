"""Sampling noise belongs to a response: not to a batch, its order, its padding or its company.

pytest tests/ppo/test_sampling.py
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from rlhf_lab.ppo.sampling import (
    generate,
    mix,
    pad_prompts,
    row_keys,
    sample_tokens,
    uniforms,
)

MANY = torch.arange(40_000)


def chi_square_fits(counts: torch.Tensor, expected: torch.Tensor) -> bool:
    """Pearson's statistic within 6 standard deviations of its mean (k degrees: k ± 6√(2k))."""
    k = len(counts) - 1
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    return statistic < k + 6 * (2 * k) ** 0.5


def keys_of(index, seed=0, iteration=0, sample=None):
    index = torch.as_tensor(index)
    return row_keys(seed, iteration, index, torch.zeros_like(index) if sample is None else sample)


# ------------------------------------------------------------------------------------- the numbers


def splitmix64(x: int) -> int:
    """SplitMix64's finaliser in Python's own integers, as its authors print it."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
    return x ^ (x >> 31)


@settings(deadline=None)
@given(st.integers(-(2**63), 2**63 - 1))
def test_mix_is_splitmix64(x):
    assert mix(torch.tensor([x])).item() % 2**64 == splitmix64(x % 2**64)


def test_splitmix64_matches_its_published_stream():
    """The first outputs for seed 0, from the reference implementation (Vigna, splitmix64.c)."""
    gamma = 0x9E3779B97F4A7C15
    assert [splitmix64(gamma * i % 2**64) for i in (1, 2)] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
    ]


def test_uniforms_lie_between_0_and_1():
    u = uniforms(keys_of(MANY), 0)
    assert u.dtype == torch.float64
    assert 0 < u.min() and u.max() < 1


@pytest.mark.parametrize("what", ["prompts", "positions", "samples", "iterations", "seeds"])
def test_uniforms_are_uniform_along_every_coordinate(what):
    """Twenty bins, chi-square: neighbouring prompts, positions, samples, iterations and seeds."""
    n, zero = 1_500, torch.tensor([0])
    u = {
        "prompts": lambda: uniforms(keys_of(MANY[:n]), 3),
        "samples": lambda: uniforms(keys_of(MANY[:n] * 0, sample=MANY[:n]), 3),
        "positions": lambda: torch.cat([uniforms(keys_of(zero), i) for i in range(n)]),
        "iterations": lambda: torch.cat(
            [uniforms(row_keys(0, i, zero, zero), 0) for i in range(n)]
        ),
        "seeds": lambda: torch.cat([uniforms(row_keys(i, 0, zero, zero), 0) for i in range(n)]),
    }[what]()
    assert chi_square_fits(torch.histc(u, 20, 0, 1), torch.full((20,), n / 20, dtype=u.dtype))


def test_consecutive_positions_are_independent():
    """Pairs (position 0, position 1) over a 5 × 5 grid, chi-square."""
    keys = keys_of(MANY)
    cell = (uniforms(keys, 0) * 5).long() * 5 + (uniforms(keys, 1) * 5).long()
    assert chi_square_fits(torch.bincount(cell, minlength=25), torch.full((25,), len(MANY) / 25))


def test_every_coordinate_changes_the_key():
    zero, one = torch.tensor([0]), torch.tensor([1])
    keys = [
        row_keys(*k).item()
        for k in (
            (0, 0, zero, zero),
            (1, 0, zero, zero),
            (0, 1, zero, zero),
            (0, 0, one, zero),
            (0, 0, zero, one),
        )
    ]
    assert len(set(keys)) == 5


@settings(deadline=None, max_examples=30)
@given(st.permutations(range(12)))
def test_keys_do_not_depend_on_batch_order_or_company(order):
    order = torch.tensor(order)
    whole = keys_of(torch.arange(12))
    assert torch.equal(keys_of(order), whole[order])
    assert torch.equal(keys_of(order[:3]), whole[order[:3]])


# -------------------------------------------------------------------------------------- the tokens


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_follow_the_softmax_of_logits_over_temperature(temperature):
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0, 0.5])
    tokens = sample_tokens(logits.expand(len(MANY), 5), uniforms(keys_of(MANY), 0), temperature)
    p = torch.tensor([(x / temperature).exp() for x in logits])
    assert chi_square_fits(torch.bincount(tokens, minlength=5), len(MANY) * p / p.sum())


def test_impossible_tokens_are_never_sampled():
    """Tokens of probability 0 at both ends and in the middle, at the ends of (0, 1) as well."""
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    u = torch.cat([uniforms(keys_of(MANY[:1000]), 0), torch.tensor([2.0**-54, 1 - 2.0**-53])])
    tokens = sample_tokens(logits.expand(len(u), 5), u.double())
    assert set(tokens.tolist()) == {1, 3}


def test_a_low_temperature_takes_the_likeliest_token():
    logits = torch.randn(200, 7, generator=torch.Generator().manual_seed(0))
    tokens = sample_tokens(logits, uniforms(keys_of(MANY[:200]), 0), 1e-4)
    assert torch.equal(tokens, logits.argmax(-1))


# ------------------------------------------------------------------------------- whole responses

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [10, 11], [1, 2, 3]]


@pytest.fixture(scope="module")
def respond(tiny):
    """Responses (without padding) of a double-precision model to some of PROMPTS, by index."""
    model = tiny.lm(0, "gpt2").double()

    def respond(index, extra_padding=0, iteration=0, temperature=1.0):
        ids, mask = pad_prompts([PROMPTS[i] for i in index], tiny.pad)
        if extra_padding:
            blank = torch.zeros(len(index), extra_padding, dtype=torch.long)
            ids = torch.cat([blank + tiny.pad, ids], 1)
            mask = torch.cat([blank.bool(), mask], 1)
        out = generate(
            model,
            ids,
            mask,
            keys_of(index, iteration=iteration),
            max_new_tokens=10,
            stop_token_ids=tiny.eos,
            pad_token_id=tiny.pad,
            temperature=temperature,
        )
        return [[t for t in row if t != tiny.pad] for row in out.tolist()]

    return respond


def test_a_response_does_not_depend_on_batch_order(respond):
    whole = respond([0, 1, 2, 3, 4])
    assert respond([3, 0, 4, 2, 1]) == [whole[i] for i in (3, 0, 4, 2, 1)]


def test_a_response_does_not_depend_on_its_company(respond):
    assert [respond([i])[0] for i in range(5)] == respond([0, 1, 2, 3, 4])


def test_a_response_does_not_depend_on_the_width_of_the_padding(respond):
    assert respond([0, 1, 2], extra_padding=7) == respond([0, 1, 2])


def test_the_same_prompt_twice_gets_two_responses(respond):
    """Prompts 0 and 4 are the same words at different places of the data set."""
    first, *_, last = respond([0, 1, 2, 3, 4])
    assert first != last


def test_another_iteration_gets_other_responses(respond):
    assert respond([0, 1, 2], iteration=0) != respond([0, 1, 2], iteration=1)


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_first_tokens_follow_the_models_distribution(tiny, temperature):
    """A thousand samples of one prompt against softmax(logits / T) of the model itself."""
    n, model = 1_000, tiny.lm(0, initializer_range=0.15)
    ids, mask = pad_prompts([PROMPTS[0]] * n, tiny.pad)
    out = generate(
        model,
        ids,
        mask,
        keys_of([0] * n, sample=MANY[:n]),
        max_new_tokens=1,
        stop_token_ids=tiny.eos,
        pad_token_id=tiny.pad,
        temperature=temperature,
    )
    with torch.no_grad():
        p = (model(ids[:1]).logits[0, -1] / temperature).softmax(0)
    likely = p > 0.01  # chi-square wants at least ten expected in a bin
    counts = torch.bincount(out[:, 0], minlength=tiny.words).float()
    join = lambda x: torch.cat([x[likely], x[~likely].sum()[None] + 1e-9])  # noqa: E731
    assert chi_square_fits(join(counts), join(n * p))
    assert_close(counts.sum().item(), float(n))
