"""Rows and columns that must not be learned from without a word: dropped, or read right.

pytest tests/data/test_left_out.py
"""

from __future__ import annotations

import pytest
from row_texts import EARLIER, PLAIN, N, asked, bad, good, pairs_of, turn

from rlhf_lab.data.load import from_rows
from rlhf_lab.data.mapping import Refused


def right(data, pairs: int) -> None:
    assert len(pairs_of(data)) == pairs
    assert not any("[worse]" in str(r["completion"]) for r in data.sft.train + data.sft.test)
    for row in data.answers.train + data.answers.test:
        assert row["label"] == ("[better]" in row["completion"])


def answered(i: int, **flags: object) -> list[dict]:
    return [turn("user", asked(i)), turn("assistant", bad(i) if flags else good(i), **flags)]


@pytest.mark.parametrize("key", ["weight", "train", "training", "loss"])
@pytest.mark.parametrize("off", [False, 0])
def test_an_answer_that_is_marked_as_not_to_be_learned_is_dropped(key, off):
    """Whatever the key; what is said of what is asked is said of the prompt."""
    rows = [{"messages": answered(i, **{key: off} if i % 2 else {})} for i in range(2 * N)]
    for row in rows:
        row["messages"][0][key] = off
    data = from_rows(rows)
    assert data.report.dropped == {"an answer that is marked as not to be learned": N}
    right(data, 0)
    assert len(data.sft.train + data.sft.test) == N


PICTURE = {"bytes": b"x", "path": "a.png"}
PICTURES = {
    "bytes": {"image": PICTURE},
    "paths": {"images": ["a/b.png"]},
    "an address": {"Image_URL": "https://example.com/a"},
    "sound": {"audio": "a.wav"},
    "a film": {"video": {"path": "a.mp4", "bytes": None}},
    "a place in the text": {"prompt": "<image>\nWhat is it?"},
    "its end": {"prompt": "What is it? <audio>"},
    "a numbered place": {"prompt": "Is <image_1> like <image_2>?"},
}
NO_PICTURES = {
    "none": {"image": None, "images": [], "audio": {"bytes": None, "path": None}},
    "a caption": {"image": "a fox in the snow"},
    "a flag": {"video": False},
    "HTML": {"prompt": "Mend this:\n<video>\n<source></video>"},
    "a tag in a line": {"prompt": "What does the <audio> element do?"},
}


@pytest.mark.parametrize("case", [*PICTURES, *NO_PICTURES])
def test_rows_about_pictures_are_dropped_as_parts_of_messages_are(case):
    more = {**PICTURES, **NO_PICTURES}[case]
    rows = [{"prompt": asked(i), "response": good(i)} for i in range(N)]
    rows += [{"prompt": asked(i), "response": bad(i), **more} for i in range(N)]
    data = from_rows(rows)
    if case in NO_PICTURES:
        assert not data.report.dropped
        return
    part = [{"type": "image"}, {"type": "text", "text": "Why?"}]
    parts = [{"messages": [turn("user", part), turn("assistant", bad(i))]} for i in range(N)]
    told = [{"messages": answered(i)} for i in range(N)]
    assert data.report.dropped == from_rows(parts + told).report.dropped
    assert len(data.sft.train + data.sft.test) == N
    if "prompt" not in more:  # who says that pictures mean nothing keeps the texts
        ignored = from_rows(rows, fields={"ignore": [*more]})
        assert not ignored.report.dropped


@pytest.mark.parametrize("waiting", [1, 12, 14, 20, 23])
def test_conversations_that_wait_beside_answered_ones_are_counted(waiting):
    """Rows are prompts or demonstrations, and those of the other kind are dropped for a reason."""
    thanks = [turn("user", "Thanks. And then?")]
    rows = [{"messages": answered(i) + thanks * (i < waiting)} for i in range(24)]
    data = from_rows(rows)
    asks = waiting > 14  # fewer than ten are answered
    assert sum(data.report.dropped.values()) == (24 - waiting if asks else waiting)
    prompts = data.prompts.train + data.prompts.test
    assert len(prompts) == (waiting if asks else 24 - waiting)
    assert all(row["prompt"][-1]["role"] == "user" for row in prompts)
    assert len(data.sft.train + data.sft.test) == (0 if asks else 24 - waiting)


def test_a_conversation_beside_its_answer():
    """What is asked stands in messages, or in a context, and the answer beside it."""
    for column in ("messages", "context"):
        rows = [{column: answered(i)[:1], "answer": good(i), "style": "x"} for i in range(N)]
        data = from_rows(rows)
        assert data.sft.train[0]["prompt"][0]["content"].startswith("What belongs")
        assert "[better]" in data.sft.train[0]["completion"]
    rows = [{"messages": answered(i)[: 1 + (i == 3)], "answer": good(i)} for i in range(N)]
    assert sum(from_rows(rows).report.dropped.values()) == 1  # its prompt holds an answer already
    whole = [{"problem": asked(i), "answer": str(i), "messages": answered(i)} for i in range(N)]
    data = from_rows(whole)
    assert "[better]" in data.sft.train[0]["completion"]
    assert data.report.columns["answer"] == "not used"
    rounds = [{"input": "Hello.", "output": EARLIER}, {"input": "Why?", "output": good(1)}]
    data = from_rows([{"conversation": rounds}] * N)
    assert [m["content"] for m in data.sft.train[0]["prompt"]] == ["Hello.", EARLIER, "Why?"]
    judged = [
        {
            "context": answered(i)[:1],
            "response": bad(i) if i % 2 else good(i),
            "principle": "p",
            "fulfilment": ["Yes", "No"][i % 2],
        }
        for i in range(N)
    ]
    with pytest.raises(Refused) as error:
        from_rows(judged)
    right(from_rows(judged, fields=error.value.example), 0)


@pytest.mark.parametrize(
    "columns, says",
    [
        ({"chosen_score": [5, 1], "rejected_score": [1, 5]}, "'chosen_score' is lower than"),
        ({"rank-chosen": [1, "2"], "rank-rejected": [2, "1"]}, "'rank-chosen' is higher than"),
        ({"flipped": [False, True]}, "'flipped' says yes"),
        ({"label": [1, 0]}, "'label' says no"),
        ({"annotators_agree": ["yes", "no"]}, "'annotators_agree' says no"),
        ({"chosen_length": [5, 1], "rejected_length": [1, 5]}, ""),
        ({"margin": [2, -1]}, "'margin' is below 0"),
        ({"length_difference": [2, -1]}, ""),
        ({"label": [1, 1]}, ""),
    ],
)
def test_pairs_beside_columns_that_contradict_them_are_counted(columns, says):
    """Names are believed, and the second line says in how many rows something else is said."""
    rows = [{"prompt": asked(i), "chosen": good(i), "rejected": bad(i)} for i in range(3 * N)]
    for i, row in enumerate(rows):
        row |= {column: values[i % 3 == 0] for column, values in columns.items()}
    data = from_rows(rows)
    right(data, 3 * N)
    said = [line for line in data.notes if "are taken as they are named" in line]
    assert [says in line and f"in {N} rows" in line for line in said] == [True] * bool(says)
    assert not says or data.notes[1] == said[0]


@pytest.mark.parametrize(
    "columns, says",
    [
        ({"chosen_score": [5, 4], "rejected_score": [1, 4]}, "'chosen_score' and 'rejected_score'"),
        ({"is_tie": [False, True]}, "'is_tie' says yes"),
        ({"preference": ["A", "tie"]}, "'preference' says so"),
        ({"strength": ["better", "about the same"]}, "'strength' says so"),
        ({"preference_strength": [2, 0]}, "'preference_strength' is 0"),
    ],
)
def test_a_pair_that_a_column_calls_a_tie_is_no_preference(columns, says):
    rows = [
        {
            "prompt": asked(i),
            "chosen": "This. [tie]" if i % 3 == 0 else good(i),
            "rejected": "That. [tie]" if i % 3 == 0 else bad(i),
            **{column: values[i % 3 == 0] for column, values in columns.items()},
        }
        for i in range(3 * N)
    ]
    data = from_rows(rows)
    right(data, 2 * N)
    (reason,) = data.report.dropped
    assert reason.startswith(f"a tie: {says}") and data.report.dropped[reason] == N
    both = from_rows(rows, fields={"ties": "demonstrations"})
    assert both.report.tied == N and len(both.sft.train + both.sft.test) == 4 * N
    assert not any("[tie]" in str(p) for p in both.preferences.train + both.preferences.test)


def test_ties_below_the_first_rows_are_no_preferences():
    """A file's columns are looked at in its first 1,000 rows."""
    rows = [{**PLAIN[0], "preference": "A", "is_tie": False} for _ in range(1000)]
    rows += [{**row, "preference": "A", "is_tie": True} for row in PLAIN]
    rows += [{**row, "preference": "tie", "is_tie": False} for row in PLAIN]
    data = from_rows(rows)
    assert data.report.dropped == {"a tie: 'is_tie' says yes": N, "a tie: 'preference' says so": N}


def test_answers_that_a_column_calls_swapped_are_counted():
    """Which of the two the winner then names, nobody has said: the second line does."""
    rows = [
        {"prompt": asked(i), "response_a": good(i), "response_b": bad(i), "winner": "A"}
        for i in range(N)
    ]
    data = from_rows([row | {"swapped": i % 2} for i, row in enumerate(rows)])
    assert data.notes[1].endswith("are taken as they are named by 'winner'")
    assert f"in {N // 2} rows 'swapped' says yes" in data.notes[1]
