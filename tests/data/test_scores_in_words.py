"""Scores that are written as text: of so many, in percent, in stars.

pytest tests/data/test_scores_in_words.py
"""

import pytest

import rlhf_lab as lab
from rlhf_lab.data.mapping import score_in_words, scores_of
from rlhf_lab.data.messages import Dropped


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("9/10", ("of 10", 9.0)),
        (" 4.5 out of 5", ("of 5", 4.5)),
        ("10 of 10", ("of 10", 10.0)),
        ("80%", ("%", 80.0)),
        ("★★★★", ("stars", 4.0)),
        ("★★★☆☆", ("of 5 stars", 3.0)),
        ("\N{WHITE MEDIUM STAR}" * 2, ("stars", 2.0)),
        ("12/10", None),  # more than all: a date, or a ratio
        ("9/10/2024", None),
        ("9,5", None),
        ("very good", None),
        ("", None),
        (9, None),
    ],
)
def test_what_is_certain_is_read(text, score):
    assert score_in_words(text) == score


def test_scores_of_one_answer_each_are_compared_in_one_form_alone():
    assert scores_of(["9/10", None, "2/10"]) == [9.0, None, 2.0]
    for unlike in (["9/10", "4/5"], ["9/10", 8], ["★★★★", "★★★☆☆"], ["80%", "4/5"]):
        with pytest.raises(Dropped, match="scores of several forms"):
            scores_of(unlike)


@pytest.mark.parametrize("better, worse", [("9.5/10", "2/10"), ("★★★★☆", "★☆☆☆☆"), ("80%", "9%")])
def test_a_file_of_them_is_read_as_it_is_mapped_and_the_rest_counted(better, worse):
    """80 % is more than 9 %, where text would say the opposite."""
    rows = [
        {
            "prompt": f"What is {i}?",
            "answers": ["good", "bad"] if i % 2 else ["bad", "good"],
            "ratings": [better, worse] if i % 2 else [worse, better],
        }
        for i in range(40)
    ]
    rows[5]["ratings"] = [better, 3]
    data = lab.load_data(rows, fields={"answers": "answers", "scores": "ratings"})
    pairs = [*data.preferences.train, *data.preferences.test]
    assert len(pairs) == 39 and all(p["chosen"] == "good" for p in pairs)
    assert any("scores of several forms" in note for note in data.notes)
