"""Kinds of files that were once read wrong, refused though known, or refused with a wrong remedy.

pytest tests/data/test_other_files.py

The marks in the texts are those of `kit/row_texts.py`.
"""

from __future__ import annotations

import json
import shlex

import pandas
import pytest
from row_texts import EARLIER, PLAIN, SYS, N, asked, bad, chat, good, pairs_of, sides, turn
from shape_rows import shape_rows

from rlhf_lab.data.load import from_rows, load_data
from rlhf_lab.data.mapping import Refused, from_flags, spell


def right(data, pairs: int) -> None:
    found = pairs_of(data)
    assert len(found) == pairs
    for row in found:
        assert "[better]" in row["chosen"] and "[worse]" in row["rejected"], row
    assert not any("[worse]" in str(r["completion"]) for r in data.sft.train + data.sft.test)
    for row in data.answers.train + data.answers.test:
        assert row["label"] == ("[better]" in row["completion"])


def two(tie: bool = False, **more) -> list[dict]:
    """Two answers, and columns that are made of which of them won (0, 1; -1: neither)."""
    rows = []
    for i in range(2 * N):
        a, b, won = sides(i + 1, tie and i % 4 == 3)
        made = {k: make(won) if callable(make) else make[won] for k, make in more.items()}
        rows.append({"prompt": asked(i + 1), "response_a": a, "response_b": b, **made})
    return rows


def single(column: str, of_good: object, of_bad: object) -> list[dict]:
    answers = [(asked(i), t(i), t is good) for i in range(N) for t in (good, bad)]
    return [
        {"prompt": q, "response": t, column: of_good if is_good else of_bad}
        for q, t, is_good in answers
    ]


SUGGESTED = {
    "1 or 2, the second first": two(verdict=[1, 2])[::-1],
    "true: the first": two(a_is_better=[True, False]),
    "true: the one that is named": two(b_is_better=[False, True]),
    "words with commas and colons": two(verdict=["A wins, barely: yes", "B wins, barely: yes"]),
    "a probability of the one that is named": two(p_b_better=["0.01", "0.7"]),
    "a letter beside scores that say nothing": two(
        score_a=[3, 3], score_b=[3, 3], choice=["A", "B"]
    ),
    "A>B": two(True, verdict=["A>>B", "B>A", "A=B"]),
    "ranks": two(rank_a=[1, 2], rank_b=[2, 1]),
    "losses": two(loss_a=[0.5, 1.5], loss_b=[1.5, 0.5]),
    "a list and its scores": [
        {"prompt": asked(i), "responses": [bad(i), "Some.", good(i)], "rewards": [0.1, 0.2, 0.3]}
        for i in range(N)
    ],
    "a list and an index": [
        {"prompt": asked(i), "responses": list(sides(i)[:2]), "chosen": sides(i)[2]}
        for i in range(N)
    ],
    "a list and an index from 1, one of which is never the best": [
        {
            "prompt": asked(i),
            "candidates": [good(i), "No. [worse]", bad(i)][:: 1 if i % 2 else -1],
            "best": 1 if i % 2 else 3,
        }
        for i in range(N)
    ],
    "a list of objects": [
        {
            "prompt": asked(i),
            "answers": [{"text": bad(i), "rank": 2}, {"text": good(i), "rank": 1}],
        }
        for i in range(N)
    ],
    "a list of conversations": [
        {
            "prompt": asked(i),
            "candidates": [
                {"rank": n, "reply": chat(i, t)[-1:]} for n, t in enumerate((good(i), bad(i)))
            ],
        }
        for i in range(N)
    ],
    "scores with a gap": [
        {**r, "score_b": "N/A" if i == 3 else r["score_b"]}
        for i, r in enumerate(two(score_a=[5, 1], score_b=[1, 5]))
    ],
    "won by chosen or by rejected": [
        {
            "prompt": r["prompt"],
            "chosen": r["response_a"],
            "rejected": r["response_b"],
            "winner": r["w"],
        }
        for r in two(True, w=["chosen", "rejected", "tie"])
    ],
    "accepted": single("decision", "accept", "reject"),
    "hallucinated": single("hallucinated", "False", "True"),
    "stars": single("stars", 5, 1),
    "whether it was chosen": single("chosen", True, False),
    "desirable": single("label", "desirable", "undesirable"),
    "helpful": single("feedback", "helpful", "unhelpful"),
    "correct": single("is_correct", 1, 0),
    "safe": single("is_safe", True, False),
    "toxic": single("toxic", 0, 1),
    "rank 1": single("rank", 1, 2),
    "a quality of 0 to 1": [
        {**r, "quality": r["quality"] + i / 1000} for i, r in enumerate(single("quality", 0.8, 0.1))
    ],
    "Argilla, one rating": [
        {
            "id": "x",
            "prompt": r["prompt"],
            "response": r["response"],
            "q.responses": [r["q"]],
            "q.responses.users": ["u"],
        }
        for r in single("q", 5, 2)
    ],
    "Argilla, one rating, nested": [
        {
            "fields": {"prompt": r["prompt"], "response": r["response"]},
            "responses": {"q": [{"value": r["q"], "user_id": "u"}]},
        }
        for r in single("q", 5, 2)
    ],
}


@pytest.mark.parametrize("case", SUGGESTED)
def test_what_a_refusal_suggests_is_right_as_it_stands(case):
    """The mapping that the line shows, typed as it is, reads the file in the right direction: the
    same in Python and with flags."""
    rows = SUGGESTED[case]
    with pytest.raises(Refused) as error:
        from_rows(rows, "mine")
    example = error.value.example
    data = from_rows(rows, "mine", fields=example)
    right(data, len(pairs_of(data)))
    assert len(data.answers.train + data.answers.test) == 2 * N or len(pairs_of(data)) >= N
    flags = from_flags(shlex.split(spell(example, "flags"))[1::2])
    assert from_rows(rows, "mine", fields=flags).preferences == data.preferences


ANSWERS = [("good", "fair", "poor"), ("poor", "good", "fair"), ("fair", "poor", "good")]
BEST_FIRST = ("good", "fair", "poor")


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("column", ["ranking", "scores"])
def test_an_order_of_answers_is_not_taken_for_ranks_without_a_word(column, first):
    """Of a list such as [1, 2, 0], both readings as they are shown read what they say."""
    rows = [{"prompt": asked(i), "answers": [f"{a} {i}" for a in ANSWERS[i % 3]]} for i in range(N)]
    for i, row in enumerate(rows):  # numbers of answers, the best first
        row[column] = [first + ANSWERS[i % 3].index(a) for a in BEST_FIRST]
    with pytest.raises(Refused, match="where it is the order of the answers, the best first") as no:
        from_rows(rows)
    for pair in pairs_of(from_rows(rows, fields=no.value.other)):
        assert pair["chosen"].startswith("good")
    flags = from_flags(shlex.split(spell(no.value.other, "flags"))[1::2])
    assert from_rows(rows, fields=flags).preferences.train
    sign = 1 if column == "ranking" else -1  # ranks, or scores
    for i, row in enumerate(rows):  # a number of each answer
        merits = [first + sign * BEST_FIRST.index(a) for a in ANSWERS[i % 3]]
        row[column] = [m + 2 * (sign < 0) for m in merits]
    with pytest.raises(Refused, match="each number is an answer's (rank|score)") as no:
        from_rows(rows)
    for pair in pairs_of(from_rows(rows, fields=no.value.example)):
        assert pair["chosen"].startswith("good") and pair["rejected"].startswith("poor")


def test_lists_that_say_the_same_in_both_readings_are_suggested_in_one():
    rows = [{"prompt": asked(i), "answers": ["a", "b", "c"], "rank": [1, 0, 2]} for i in range(N)]
    for lists in ([[1, 0, 2]], [[0, 2, 1], [2, 1, 0]], [[1, 1, 2], [2, 3, 1]]):
        for i, row in enumerate(rows):
            row["rank"] = lists[i % len(lists)]
        with pytest.raises(Refused) as no:
            from_rows(rows)
        assert "order" not in str(no.value) and no.value.example["ranks"] == ["rank"]


MODELS = [["small", "large"], ["large", "small"]]
TURNED = [i % 2 for i in range(2 * N)]


def test_a_winner_that_is_a_copy_of_what_stands_beside_it():
    """The winner is the name of a model that stands now on one side, now on the other, or the text
    of the better answer."""
    rows = two(winner=lambda won: won)
    for row, turned in zip(rows, TURNED):
        row |= dict(zip(("model_a", "model_b"), MODELS[turned]))
        row["winner"] = MODELS[turned][row["winner"]]
    right(from_rows(rows), 2 * N)
    answers = {"answers": ["response_a", "response_b"], "winner": "winner"}
    with pytest.raises(Refused) as error:
        from_rows(rows, fields=answers)
    right(from_rows(rows, fields={**answers, **error.value.example}), 2 * N)
    texts = [{**r, "preferred": max(r["response_a"], r["response_b"])} for r in two()]
    right(from_rows(texts), 2 * N)
    neither = [{**r, "baseline": "small", "model_a": "small", "model_b": "large"} for r in two()]
    with pytest.raises(Refused, match="say what decides"):
        from_rows(neither)


@pytest.mark.parametrize("names", [("A", "B"), ("response_a", "response_b")])
def test_names_of_answers_in_chosen_and_rejected_are_no_answers(names):
    rows = two(chosen=names, rejected=names[::-1])
    right(from_rows(rows), 2 * N)


def test_columns_by_their_names_whatever_their_case():
    for good_name, bad_name in (
        ("Chosen", "Rejected"),
        ("better", "worse"),
        ("accepted", "rejected"),
        ("Chosen Response", "Rejected Response"),
    ):
        rows = [
            {"Prompt": r["prompt"], good_name: r["chosen"], bad_name: r["rejected"]} for r in PLAIN
        ]
        right(from_rows(rows), N)
    rows = two(Preferred=["Response A", "Response B"])
    renamed = [
        {
            "Prompt": r["prompt"],
            "Response A": r["response_a"],
            "Response B": r["response_b"],
            "Preferred": r["Preferred"],
        }
        for r in rows
    ]
    right(from_rows(renamed), 2 * N)


@pytest.mark.parametrize(
    "name",
    [
        "OpenAI preference fine-tuning",
        "OASST messages",
        "WebGPT comparisons",
        "summarize-from-feedback comparisons",
        "LMArena human preferences",
    ],
)
def test_objects_as_text_in_the_cells_of_a_table(name, tmp_path):
    rows = [row for i in range(1, 2 * N) for row in shape_rows(name, i)]
    cells = [
        {k: json.dumps(v) if isinstance(v, (dict, list)) else v for k, v in r.items()} for r in rows
    ]
    pandas.DataFrame(cells).to_csv(tmp_path / "a.csv", index=False)
    data = load_data(tmp_path / "a.csv")
    right(data, len(pairs_of(from_rows(rows))))
    assert f"read as {name}: " in data.notes[0]


def test_an_answer_that_is_null_in_a_list_is_none():
    rows = [shape_rows("LMArena human preferences, 55k", 4 * i + 1)[0] for i in range(N)]
    rows[0]["response_b"] = json.dumps(["Yes.", None])
    data = from_rows(rows)
    right(data, N - 1)
    assert data.report.dropped == {"empty": 1}


def argilla(i: int, value: object, **others: object) -> dict:
    a, b, _ = sides(i)
    questions = {"preference": value, **others}
    fields = {"prompt": asked(i), "response_a": a, "response_b": b}
    return {"fields": fields, "responses": {q: [{"value": v}] for q, v in questions.items()}}


def test_argilla_questions_of_every_kind():
    """A word that names an answer, a tie, remarks beside a ranking, and a rating of each answer."""
    rows = [argilla(i, "AB"[sides(i)[2]], remark="fine") for i in range(2 * N)]
    rows[0] = argilla(0, "tie")
    data = from_rows(rows)
    right(data, 2 * N - 1)
    assert data.report.dropped == {"a tie": 1}
    rated = [
        argilla(i, None, rating_a=[5, 1][sides(i)[2]], rating_b=[1, 5][sides(i)[2]])
        for i in range(N)
    ]
    right(from_rows(rated), N)


def test_label_studio_sides_are_those_of_the_tags():
    """Left is the first tag, whatever its name and mark; a choice may name an answer."""
    for tags, value in (
        ("txt-2,txt-1", lambda won: {"selected": ["right", "left"][won]}),
        ("answer2,answer1", lambda won: {"selected": ["right", "left"][won]}),
        ("prompt", lambda won: {"choices": [["Answer 1", "answer 2"][won]]}),
    ):
        rows = []
        for i in range(N):
            a, b, won = sides(i)
            result = [{"value": value(won), "to_name": tags}, {"value": {"text": ["so"]}}]
            data = {"prompt": asked(i), "answer1": a, "answer2": b}
            rows.append({"annotations": [{"result": result}], "data": data})
        right(from_rows(rows), N)


def test_what_a_reader_read_is_not_called_unused():
    for name, read in (
        ("Label Studio export, JSON_MIN", {"prompt", "answer1", "answer2", "comparison"}),
        ("Argilla 2 records, flattened", {"preference.responses", "preference.responses.status"}),
        ("OASST messages", {"deleted", "rank", "text"}),
    ):
        data = from_rows([row for i in range(N) for row in shape_rows(name, i)])
        assert {c for c, became in data.report.columns.items() if became == "read"} >= read


def test_a_context_beside_an_instruction_belongs_to_the_prompt():
    rows = [
        {"instruction": "Sum it up.", "context": asked(i), "response": good(i)} for i in range(N)
    ]
    data = from_rows(rows)
    assert "'context' added to the prompt" in data.notes[0] and len(data.prompts.train) == N - 1
    assert all("\nWhat belongs" in r["prompt"] for r in data.sft.train)


def test_earlier_turns_in_a_context_and_answers_in_objects():
    rows = [
        {
            "context": chat(i, "")[:2],
            "prompt": asked(i),
            "chosen": {"text": good(i), "model": "x"},
            "rejected": {"text": bad(i), "model": "y"},
        }
        for i in range(N)
    ]
    data = from_rows(rows)
    right(data, N)
    assert all(len(r["prompt"]) == 3 for r in pairs_of(data))


def test_rows_as_a_service_of_the_hub_wraps_them(tmp_path):
    rows = [{"row_idx": i, "row": row} for i, row in enumerate(PLAIN)]
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"features": [{"name": "prompt"}], "rows": rows}))
    with pytest.raises(Refused) as error:
        load_data(path)
    right(load_data(path, fields=error.value.example), N)


def test_messages_of_other_services():
    """Older calls of functions; parts without a type; a system prompt in parts."""
    call = {
        "role": "assistant",
        "content": None,
        "function_call": {"name": "look", "arguments": "{}"},
    }
    old = [turn("user", "Why?"), call, {"role": "function", "name": "look", "content": "1"}]
    functions = [{"name": "look", "parameters": {"type": "object"}}]
    rows = [
        {"messages": [*old, turn("assistant", good(i))], "functions": functions} for i in range(N)
    ]
    row = from_rows(rows).sft.train[0]
    assert [m["role"] for m in row["completion"]] == ["assistant", "tool", "assistant"]
    assert row["completion"][0]["tool_calls"][0]["function"]["name"] == "look" and row["tools"]
    parts = [
        {"role": "user", "parts": [{"text": "Why?"}]},
        {"role": "model", "parts": [{"text": "So."}]},
    ]
    for system in ({"parts": [{"text": SYS}]}, [{"text": SYS}], SYS):
        row = from_rows([{"systemInstruction": system, "contents": parts}] * N).sft.train[0]
        assert row["prompt"] == [turn("system", SYS), turn("user", "Why?")]
    shared = {"chosen": {"role": "bot", "text": "a"}, "rejected": {"role": "bot", "text": "b"}}
    talk = {"context": [{"role": "human", "text": EARLIER}], **shared}
    assert pairs_of(from_rows([talk] * N))[0]["prompt"] == [turn("user", EARLIER)]


def test_several_rejected_answers_beside_one_that_is_chosen():
    rows = [
        {"messages": chat(i, good(i)), "rejected_response": [bad(i), bad(i) + " two"]}
        for i in range(N)
    ]
    right(from_rows(rows), 2 * N)
