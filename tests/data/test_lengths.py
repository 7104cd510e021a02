"""Which rows pass together, and what a plan makes of rows' lengths.

pytest tests/data/test_lengths.py
"""

import random
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.trainer_pt_utils import LengthGroupedSampler

import rlhf_lab as lab
from rlhf_lab.data.lengths import (
    LEAST_SHARE_SAVED,
    by_length,
    expected_longest,
    of_rows,
    planned_lengths,
    story_lengths,
)
from rlhf_lab.models.load import load
from rlhf_lab.stages import STAGES

ROWS = st.lists(st.integers(1, 90), min_size=1, max_size=40)


def padded(lengths, places):
    return len(places) * max(lengths[i] for i in places)


@given(ROWS, st.integers(1, 20), st.integers(0, 400))
def test_every_row_passes_once(lengths, rows, least):
    """And the longest first: what they take is not held beside another pass' gradients."""
    passes = by_length(lengths, rows, least)
    assert sorted(i for places in passes for i in places) == list(range(len(lengths)))
    assert max(map(len, passes)) <= rows
    passed = [lengths[i] for places in passes for i in places]
    assert passed == sorted(lengths, reverse=True)


@given(ROWS, st.integers(0, 400))
def test_a_pass_more_pays(lengths, least):
    """Cuts save over `least` tokens each, and a fifth; no cut that is left would."""
    passes = by_length(lengths, len(lengths), least)
    whole = padded(lengths, range(len(lengths)))
    cut = [padded(lengths, p) for p in passes]
    assert whole - sum(cut) >= (len(passes) - 1) * (least + 1)
    assert len(passes) == 1 or sum(cut) < 0.8 * whole
    for places, cost in zip(passes, cut, strict=True):
        for k in range(1, len(places)):
            saved = cost - sum(padded(lengths, half) for half in (places[:k], places[k:]))
            assert saved <= max(least, LEAST_SHARE_SAVED * cost)


def test_a_cut_by_hand():
    """Two rows of 105 tokens and six of 15: 8·105 tokens as one pass, 2·105 + 6·15 = 300 as two."""
    lengths = [15, 105, 15, 15, 15, 105, 15, 15]
    assert by_length(lengths, 8, 539) == [[1, 5], [0, 2, 3, 4, 6, 7]]
    assert by_length(lengths, 8, 540) == [[1, 5, 0, 2, 3, 4, 6, 7]]
    assert by_length(lengths, 4, 10**6) == [[1, 5, 0, 2], [3, 4, 6, 7]]
    assert by_length([15, 17] * 4, 8, 0) == [[1, 3, 5, 7, 0, 2, 4, 6]]  # alike: one pass


def test_the_longest_of_some_rows_on_average():
    """Against draws."""
    draw = random.Random(0)
    lengths = [draw.randint(1, 50) for _ in range(500)]
    drawn = [max(draw.choices(lengths, k=8)) for _ in range(20_000)]
    assert expected_longest(lengths, 8) == pytest.approx(sum(drawn) / len(drawn), rel=0.01)


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
@pytest.mark.parametrize("batch", [4, 32])
def test_rows_of_like_length_are_padded_as_planned(stage, batch):
    """Against the batches of transformers' own sampler, drawn from the bundled rows."""
    how = {"per_device_train_batch_size": batch, "max_length": 512}
    grouped = {**how, "train_sampling_strategy": "group_by_length"}
    model, rows = load("tiny"), story_lengths(STAGES[stage].rows)
    both = zip(rows.prompts, rows.answers, strict=True)
    lengths = [prompt + max(answers) for prompt, answers in both]
    order = [*LengthGroupedSampler(batch, lengths=lengths)]
    longest = [lengths[i] for i in order[::batch]]
    found, random_ = (of_rows(stage, model, rows, x) for x in (grouped, how))
    padded = found["padded_prompt"] + found["padded_response"]
    assert padded == pytest.approx(sum(longest) / len(longest), rel=0.02)
    assert padded < 0.95 * (random_["padded_prompt"] + random_["padded_response"])
    assert padded >= found["mean_tokens"]


@pytest.mark.parametrize("stage", ["dpo", "kto", "ppo"])
def test_rows_that_are_dropped_count_for_nothing(stage, monkeypatch):
    """As if they were not there, though the first that are looked at are all too long."""
    monkeypatch.setattr("rlhf_lab.data.lengths.LOOKED_AT", 4)
    both = {"chosen": "a", "rejected": "b b", "completion": "a a", "label": True}
    kept = [{**both, "prompt": "a " * n} for n in (2, 3, 5, 8)]
    found = []
    for rows in (kept, [{**both, "prompt": "a " * 3000}] * 4 + kept):
        part = SimpleNamespace(train=rows)
        names = {"preferences": part, "labelled": part, "prompts": part, "sft": part}
        data = SimpleNamespace(name="mine", **names)
        if stage == "ppo":  # which takes the demonstrations for its responses
            data.sft = SimpleNamespace(train=kept)
        found.append(planned_lengths(stage, load("tiny"), data, {"max_length": 512}))
    assert found[0] == found[1] and found[0]["rows"] == 4


def test_a_plan_counts_the_passes_of_the_trainer():
    """One response in eight is long: rows are planned at less than half its width, those of the
    update and those that are scored."""
    rows = [{"prompt": "a a", "completion": "a " * (60 if i % 8 == 0 else 3)} for i in range(200)]
    data = lab.load_data(rows)
    settings = {"per_device_train_batch_size": 32, "num_mini_batches": 1, "response_length": 64}
    plan = lab.plan("ppo", "tiny", data=data, **settings)
    found = plan.settings
    for passes in ("padded_update", "padded_scoring"):
        assert found[passes] < 0.5 * (found["padded_prompt"] + found["padded_response"])
        assert found[passes] > found["mean_tokens"]
    alike = {k: v for k, v in found.items() if k not in ("padded_update", "padded_scoring")}
    of_update, of_rollout = (
        {p.name: p.work.flops * p.times for p in x.estimate.average}
        for x in (plan, lab.plan("ppo", "tiny", **alike))
    )
    assert of_update["forward"] < 0.5 * of_rollout["forward"]
    assert of_update["reference"] < 0.5 * of_rollout["reference"]
    assert of_update["rollout"] == of_rollout["rollout"]


def test_a_plan_says_how_long_sampled_responses_are_taken_to_be():
    """PPO samples its own: as long as the answers of the file, if it has any, else at the limit."""
    answers = [2 * (i % 5) + 1 for i in range(50)]
    rows = [{"prompt": f"a {i}", "completion": " b" * n} for i, n in enumerate(answers)]
    for data, source in (
        (rows, "taken as long as the answers of your data"),
        ([{"prompt": row["prompt"]} for row in rows], "taken as long as their limit"),
    ):
        plan = lab.plan("ppo", "tiny", response_length=40, data=data)
        (said,) = [a for a in plan.assumptions if a.what == "responses"]
        mean = plan.settings["mean_response"]
        assert said.source == source and said.value == f"of {mean:.0f} tokens on average"
        assert (mean == 40) == ("completion" not in data[0])
        assert plan.estimate.setup.response == 40, "memory is that of the longest"
