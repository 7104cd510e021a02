"""Mappings that refusals show: pasted as they are printed they are right, or refused again.

pytest tests/data/test_suggestions.py

The truth is written down beside the values, without a line of the package.
"""

from __future__ import annotations

import shlex

import pytest
from row_texts import N, asked, bad, good, sides

from rlhf_lab.data.load import from_rows
from rlhf_lab.data.mapping import Refused, from_flags, spell

LABELS = """
quality: high|low excellent|poor grounded|hallucinated pass|fail accept|reject approved|declined
  relevant|off-topic safe|unsafe appropriate|inappropriate Correct|Incorrect fluent|not_fluent
  TRUE|FALSE clean|toxic like|dislike acceptable|unacceptable y|n +|- win|loss perfect|flawed
  success|failure satisfied|unsatisfied best|worst keep|discard 5|1 .9|.1
label: 1|0 1|-1 chosen|rejected good|bad yes|no correct|wrong helpful|unhelpful harmless|harmful
feedback: like|dislike up|down positive|negative
rank: 1|2
loss: .5|1.5
thumbs_down: False|True 0|1 no|yes
low_quality: False|True
not_helpful: False|True
is_bad: False|True 0|1
bad: 0|1
is_rejected: False|True
rejected: False|True
failed: no|yes
refusal: 0|1
is_refusal: False|True
spam_flag: 0|1
has_violation: False|True
downvoted: 0|1
reported: False|True
violatesPolicy: False|True
poor: 0|1
unsafe: 0|1
error: 0|1
toxicity: low|high
is_safe: True|False
fulfilment: Yes|No
verified: True|False 1|0
passed: yes|no
user_satisfied: yes|no
status: passed|failed accepted|rejected
review: approved|rejected
reaction: 👍|👎
thumb: up|down
"""
"""Column: values of a good answer and of a bad one, where the table knows which is which."""
NO_TABLE = """
quality: A|F ok|terrible gut|schlecht strong|weak full|partial honest|lie ⭐⭐⭐⭐⭐|⭐ x|y
label: 1|2 2|1 full|none
bad_quality: low|high True|False
no_error: True|False
grade: A|B
annotation: 3|7
"""
"""The same where no table knows it."""


def of_table(table: str) -> list[tuple[str, str, str]]:
    cases = []
    for line in table.strip().replace("\n  ", " ").splitlines():
        column, _, pairs = line.partition(": ")
        cases += [(column, *pair.split("|")) for pair in pairs.split()]
    return cases


def single(column: str, of_good: str, of_bad: str) -> list[dict]:
    def value(word: str) -> object:
        return {"True": True, "False": False}.get(word, word.replace("_", " "))

    return [
        {"prompt": asked(i), "response": make(i), column: value(word)}
        for i in range(N)
        for make, word in ((good, of_good), (bad, of_bad))
    ]


def two(**columns: tuple[object, object]) -> list[dict]:
    """Answers a and b, and columns that say one thing where a is better and another where b is."""
    rows = []
    for i in range(2 * N):
        a, b, won = sides(i)
        said = {c: values[won] for c, values in columns.items()}
        rows.append({"prompt": asked(i), "response_a": a, "response_b": b, **said})
    return rows


def pasted(rows: list[dict]) -> tuple[int, str]:
    """What the first mapping that a refusal shows makes of the rows, in Python and with flags: how
    many it reads, all of them right; or 0 and why it is refused."""
    with pytest.raises(Refused) as error:
        from_rows(rows, "mine")
    example = error.value.example
    try:
        data = from_rows(rows, "mine", fields=example)
    except ValueError as again:
        with pytest.raises(ValueError):
            from_rows(rows, "mine", fields=from_flags(shlex.split(spell(example, "flags"))[1::2]))
        return 0, str(again)
    flags = from_flags(shlex.split(spell(example, "flags"))[1::2])
    assert from_rows(rows, "mine", fields=flags).preferences == data.preferences
    pairs = data.preferences.train + data.preferences.test
    assert all("[better]" in p["chosen"] and "[worse]" in p["rejected"] for p in pairs), example
    labelled = data.answers.train + data.answers.test
    assert all(a["label"] == ("[better]" in a["completion"]) for a in labelled), example
    assert not any("[worse]" in str(r) for r in data.sft.train + data.sft.test), example
    return len(pairs) + len(labelled), ""


@pytest.mark.parametrize("column, of_good, of_bad", of_table(LABELS))
def test_a_word_of_the_table_is_suggested_as_what_it_says(column, of_good, of_bad):
    assert pasted(single(column, of_good, of_bad)) == (2 * N, "")


@pytest.mark.parametrize("column, of_good, of_bad", of_table(NO_TABLE))
def test_another_word_is_left_to_the_user(column, of_good, of_bad):
    read, why = pasted(single(column, of_good, of_bad))
    assert not read and "GOOD_OR_BAD" in why


SURE = {
    "a fraction": two(score_a=("9/10", "2/10"), score_b=("2/10", "9/10")),
    "a percentage": two(score_a=("90%", "20 %"), score_b=("20%", "90%")),
    "votes up and down": two(
        upvotes_a=(9, 2), upvotes_b=(2, 9), downvotes_a=(1, 8), downvotes_b=(8, 1)
    ),
    "harm": two(harmfulness_a=(0, 1), harmfulness_b=(1, 0)),
    "Elo": two(elo_a=(1300, 1200), elo_b=(1200, 1300)),
    "yes and no of a": two(a_better=("yes", "no")),
    "yes and no of b": two(is_b_better=("no", "yes")),
    "b is worse": two(b_is_worse=(True, False)),
    "the first": two(chosen_first=(True, False)),
    "the worse": two(worse=("b", "a")),
    "the loser": two(loser=("response_b", "response_a")),
    "the least helpful": two(least_helpful=("B", "A")),
    "the flagged one": two(flagged=("response_b", "response_a")),
    "the more toxic one": two(more_toxic=("B", "A")),
    "the one not preferred": two(not_preferred=("b", "a")),
    "one and two": two(preferred=("one", "two")),
    "Response 1": two(choice=("Response 1", "Response 2")),
    "1 and 2": two(preference=(1, 2)),
    "A>B": two(verdict=("A>B", "A<B")),
    "[[A]]": two(verdict=("[[A]]", "[[B]]")),
    "words": two(verdict=("Response A is better than B", "Response B is slightly better")),
    "a probability of b": two(p_b_better=(0.2, 0.7)),
    "an index of two": [
        {"prompt": asked(i), "response_0": a, "response_1": b, "safer_response_id": won}
        for i in range(N)
        for a, b, won in [sides(i)]
    ],
    "labels in a list": [
        {
            "prompt": asked(i),
            "responses": [good(i), bad(i)],
            "labels": ["good", "bad"],
        }
        for i in range(N)
    ],
    "objects with words": [
        {
            "prompt": asked(i),
            "responses": [
                {"text": bad(i), "quality": "low"},
                {"text": good(i), "quality": "high"},
            ],
        }
        for i in range(N)
    ],
    "votes by name": two(votes=({"A": 3, "B": 1}, {"A": 0, "B": 2})),
    "votes in a list": two(votes=(["A", "B", "A"], ["B", "B"])),
    "a prompt of another name": [
        {k.replace("prompt", "user_prompt"): v for k, v in row.items()}
        for row in two(winner=("A", "B"))
    ],
    "the name of a column": [
        {
            "prompt": asked(i),
            "ours": bad(i),
            "theirs": good(i),
            "preferred": ("theirs", "ours")[i < 0],
        }
        for i in range(N)
    ],
    "right and wrong answers": [
        {"question": asked(i), "correct_answers": [good(i)], "incorrect_answers": [bad(i)] * 2}
        for i in range(N)
    ],
    "best and worst": [{"prompt": asked(i), "worst": bad(i), "best": good(i)} for i in range(N)],
    "positive and negative": [
        {"prompt": asked(i), "positive": good(i), "negative": bad(i)} for i in range(N)
    ],
}


@pytest.mark.parametrize("case", SURE)
def test_what_names_an_answer_is_suggested_as_what_it_says(case):
    read, why = pasted(SURE[case])
    assert read >= N, why


UNSURE = {
    "a signed number": two(score_diff=(3, -3)),
    "a signed number turned": two(preference=(-2, 2)),
    "a rank that names one": two(rank=("A", "B")),
    "a list of two texts": [
        {"instruction": asked(i), "output": [good(i), bad(i)]} for i in range(N)
    ],
    "an order of names": two(ranking=(["A", "B"], ["B", "A"])),
    "a choice of another name": two(overall_response=(1, 2)),
    "a vote against": two(votes_against=("B", "A")),
    "0 and 1": two(preference=(1.0, 0.0)),
    "0 and 1 of a label": two(label=(0, 1)),
    "0 and 1 of a winner": two(winner=(0, 1)),
    "true and false of nobody": two(better=(True, False)),
    "top and bottom": two(preferred=("top", "bottom")),
    "a scale": two(preference=(2, 4)),
    "a longer scale": two(preference=(7, 1)),
    "a probability of one of them": two(preference_prob=(0.8, 0.3)),
    "other words": two(verdict=("x", "y")),
    "an answer that is a letter": two(verdict=("A", "C")),
    "bits": two(verdict=("a bit of this", "b and a are fine")),
    "text with a comma": two(score_a=("9,5", "2,5"), score_b=("2,5", "9,5")),
    "fractions of several": two(score_a=("9/10", "2/10"), score_b=("1/5", "4/5")),
    "a fraction and a number": two(score_a=("9/10", "2/10"), score_b=(2, 9)),
    "letters": two(grade_a=("A", "F"), grade_b=("F", "A")),
    "grades": two(grade_a=(1, 5), grade_b=(5, 1)),
    "one score of two": two(score_a=(9, 2)),
    "numbers of another name": two(fox_a=(9, 2), fox_b=(2, 9)),
    "a place in a list, from 0 or from 1": [
        {"prompt": asked(i), "responses": [bad(i), good(i), "Some."], "best": 1} for i in range(N)
    ],
    "objects with other words": [
        {
            "prompt": asked(i),
            "responses": [{"text": bad(i), "label": "x"}, {"text": good(i), "label": "y"}],
        }
        for i in range(N)
    ],
}


@pytest.mark.parametrize("case", UNSURE)
def test_what_may_go_either_way_cannot_be_pasted(case):
    read, why = pasted(UNSURE[case])
    assert not read and why


def test_a_label_that_says_the_opposite_asks_what_its_values_mean():
    rows = single("is_bad", "False", "True")
    with pytest.raises(Refused, match="seems to say the opposite") as error:
        from_rows(rows, fields={"label": "is_bad"})
    data = from_rows(rows, fields=error.value.example)
    assert all(a["label"] == ("[better]" in a["completion"]) for a in data.answers.train)


ORDINARY = {
    "badge": (True, False),
    "is_edited": (True, False),
    "reported_by": ("Ann", "Bo"),
    "failed_attempts": (0, 3),
    "prompt_toxic_words": (0, 0),
    "is_prompt_bad": (True, False),
    "refusals_in_history": ("none", "some"),
    "error": (None, None),
    "spam": (False, False),
    "turns": (1, 0),
    "poor_mans_id": ("x1", "x2"),
    "is_english": (True, False),
    "category": ("open questions", "chat"),
    "split": ("train", "test"),
}


@pytest.mark.parametrize("column", ORDINARY)
def test_an_ordinary_column_is_no_label(column):
    rows = [
        {"prompt": asked(i), "response": good(i), column: ORDINARY[column][i % 2]}
        for i in range(2 * N)
    ]
    assert len(from_rows(rows).sft.train) > N
