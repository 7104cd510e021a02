"""Gold reward against dollars per million tokens, by hand, on a clock that ticks once a look.

pytest tests/test_frontiers.py
"""

import itertools
from dataclasses import replace

import pytest

import rlhf_lab as lab
from rlhf_lab import frontiers
from rlhf_lab.data.tokenize import prompt_of
from rlhf_lab.ppo.texts import sample_ids, score_texts


@pytest.fixture(scope="module")
def found():
    model, clock = lab.load("mini"), itertools.count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frontiers.time, "perf_counter", lambda: next(clock))
        return lab.frontier_serving(
            {"SFT": [model, model], "best of 2": (model, 2)},
            ("fp32", "bf16"),
            price=3.6,
            seeds=(0, 1),
            prompts=4,
            response_length=12,
        )


def test_points_are_those_written_out_by_hand(found):
    model, data = lab.load("mini"), lab.load_data("stories")
    rows, tokenizer = data.prompts.test[:4], model.tokenizer
    assert [(p.name, p.to) for p in found.points] == [
        *(("SFT", "fp32"), ("SFT", "bf16")),
        *(("best of 2", "fp32"), ("best of 2", "bf16")),
    ]
    golds, tokens = {1: [], 2: []}, {1: [], 2: []}
    for seed in (0, 1):
        drawn = sample_ids(model.sft, tokenizer, rows, samples=2, max_new_tokens=12, seed=seed)
        for n in (1, 2):
            kept = []
            for row, answers in zip(rows, drawn, strict=True):
                ids = tokenizer(row["prompt"])["input_ids"]
                scores = score_texts(model.reward, tokenizer, [ids] * n, answers[:n])
                kept.append(answers[int(scores.argmax())])
            texts = tokenizer.batch_decode(kept, skip_special_tokens=True)
            of_rows = [data.gold_reward(prompt_of(r), t) for r, t in zip(rows, texts, strict=True)]
            golds[n].append(sum(of_rows) / 4)
            tokens[n].append(sum(map(len, kept)))
    for point, n in ((found.points[0], 1), (found.points[2], 2)):
        assert point.gold_reward == pytest.approx(golds[n])
        assert point.tokens_per_second == pytest.approx(tokens[n])  # in the one second there is
        # 3.60 USD an hour is .001 a second.
        assert point.usd_per_million == pytest.approx([1000 / t for t in tokens[n]])


def test_the_larger_model_is_that_of_the_plan(found):
    by = {(to, n): (usd, seconds) for to, n, usd, seconds in found.predicted}
    how = {"concurrency": 16, "prompt_length": 512, "response_length": 256}
    e = lab.plan("inference", "Qwen2.5-7B", hardware="h100", **how).estimate
    assert by["bf16", 16] == pytest.approx((e.serving.usd_per_million, e.serving.per_token))
    assert by["fp32", 1][1] > 1.5 * by["bf16", 1][1]  # twice the bytes to read for a token
    assert {to for to, _ in by} == {"fp32", "bf16"}


def test_the_figure_says_all_in_words(found):
    figure, words = found.figure(), found.figure().words
    assert [t.name for t in figure.data] == ["SFT", "best of 2", "fp32", "bf16"]
    assert len(figure.data[0].x) == 2 and figure.data[2].xaxis == "x2"
    assert "best of 2 in bf16: gold reward" in words and "predicted: $" in words
    assert "USD/M tokens at $3.6/h" in repr(found) and " ± " in repr(found)


def test_one_seed_has_no_spread(found):
    one = replace(found, points=[p._replace(gold_reward=[9.0]) for p in found.points])
    assert one.rows[0]["gold reward"] == "9.00" and "±" in one.rows[0]["tokens/s"]


def test_what_has_no_price_or_no_truth_is_refused():
    with pytest.raises(ValueError, match="rtx4070 has no price: choose another"):
        lab.frontier_serving({"SFT": "mini"}, price=1, hardware="rtx4070")
    rows = [{"prompt": "a", "completion": f"b {i}"} for i in range(12)]
    with pytest.raises(ValueError, match="has no gold reward, so nothing is known of quality"):
        lab.frontier_serving({"SFT": "mini"}, price=1, data=lab.load_data(rows))


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"models": {}}, "models by name"),
        ({"models": "mini"}, "models must be Mapping, not 'mini'"),
        ({"formats": ("int9",)}, "format='int9': did you mean 'int8'. choose from fp32"),
        ({"price": -1.0}, "price is above 0"),
        ({"models": {"best of none": ("mini", 0)}}, "at least 1"),
    ],
)
def test_what_is_no_question_is_refused(given, line):
    with pytest.raises(ValueError, match=line):
        lab.frontier_serving(**{"models": {"SFT": "mini"}, "price": 1.0, **given})


def test_a_reward_model_writes_nothing(tmp_path):
    """Each door says so, before anything is trained or timed."""
    folder = lab.load("mini").paths["reward"]
    says = "is a reward model: it scores, and writes nothing"
    for stage in ("sft", "ppo", "dpo", "rloo", "inference"):
        with pytest.raises(ValueError, match=says):
            lab.plan(stage, folder)
    with pytest.raises(ValueError, match=says):
        lab.plan("distill", "mini", teacher_model=folder)
    with pytest.raises(ValueError, match=says):
        lab.plan("inference", "small", draft_model=folder, accepted=0.5)
    with pytest.raises(ValueError, match=says):
        lab.best_of_n(folder, n=2, prompts=2)
    with pytest.raises(ValueError, match=says):
        lab.frontier_serving({"a": folder}, ("fp32",), price=1.0, seeds=(0,), prompts=2)
    assert lab.plan("reward", folder).stage == "reward"


def test_guesses_without_a_draft_are_refused():
    with pytest.raises(ValueError, match="give draft_model"):
        lab.plan("inference", "small", accepted=0.8)
