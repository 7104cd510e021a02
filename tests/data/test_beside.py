"""What stands beside the columns that are read, and may belong to them, is asked.

pytest tests/data/test_beside.py

Markers as in `kit/row_texts.py`: no [worse] is a demonstration, no [sys] and no [earlier] is lost.
"""

from __future__ import annotations

import shlex

import pytest
from row_texts import EARLIER, PLAIN, SYS, N, asked, bad, chat, good, pairs_of, sides, turn

from rlhf_lab.data.load import from_rows
from rlhf_lab.data.mapping import Refused, from_flags, spell


def suggested(rows: list[dict]):
    """The data that the first suggested mapping reads, pasted with flags."""
    with pytest.raises(Refused) as error:
        from_rows(rows, "mine")
    assert "\n" not in str(error.value)
    return from_rows(
        rows, fields=from_flags(shlex.split(spell(error.value.example, "flags"))[1::2])
    )


TURNS = [[EARLIER, "Yes. [earlier]"]]
BEFORE = {
    "persona": SYS,
    "instructions": SYS,
    "sys_prompt": SYS,
    "system_instructions": SYS,
    "context": "Rooms have doors, mostly. [earlier]",
    "documents": ["Rooms have doors. [earlier]", "And some windows too."],
    "previous_turns": TURNS,
    "dialog_history": f"User: {EARLIER}\nBot: Yes, of course.",
    "input": "It is about the big rooms. [earlier]",
    "question": "Which of the rooms is meant? [earlier]",
}


@pytest.mark.parametrize("column", BEFORE)
def test_what_comes_before_an_answer_is_asked_and_then_read(column):
    data = suggested([row | {column: BEFORE[column]} for row in PLAIN])
    mark = "[sys]" if BEFORE[column] == SYS else "[earlier]"
    assert len(pairs_of(data)) == N
    assert all(mark in str(p["prompt"]) and "room" in str(p["prompt"]) for p in pairs_of(data))
    data = from_rows([r | {column: BEFORE[column]} for r in PLAIN], fields={"ignore": [column]})
    assert data.report.columns[column] == "ignored"


@pytest.mark.parametrize(
    "column, cell",
    [("context", "kitchen"), ("history_id", "h 1"), ("turns", 2), ("persona", "pirate")],
)
def test_a_name_or_a_number_is_no_turn(column, cell):
    assert len(pairs_of(from_rows([row | {column: cell} for row in PLAIN]))) == N


def test_what_the_prompt_holds_already_is_not_asked():
    rows = [row | {"question": row["prompt"]} for row in PLAIN]
    assert len(pairs_of(from_rows(rows))) == N
    named = [{"system": SYS, "question": asked(i), "chosen": good(i)} for i in range(N)]
    named = [row | {"rejected": bad(i), "background": EARLIER * 2} for i, row in enumerate(named)]
    with pytest.raises(Refused, match="'background' looks as if"):  # of a shape with a name, too
        from_rows(named)


@pytest.mark.parametrize("column", ["system", "persona", "history"])
def test_what_comes_before_an_answer_below_the_first_rows_costs_the_row(column):
    """A file's columns are looked at in its first 1,000 rows."""
    cell = TURNS if column == "history" else SYS
    for empty in ({}, {column: None}):
        rows = [{**PLAIN[i % N], **empty} for i in range(1000)]
        data = from_rows(rows + [{**row, column: cell} for row in PLAIN])
        assert data.report.dropped == {f"{column!r}, which the first rows leave empty": N}
        assert len(pairs_of(data)) == 1000


@pytest.mark.parametrize("earlier", [f"User: {EARLIER}", [EARLIER, "Yes."]])
def test_earlier_turns_that_do_not_say_who_speaks_are_never_left_out(earlier):
    with pytest.raises(ValueError, match=f"dropped {N} rows: earlier turns as text"):
        from_rows([row | {"history": earlier} for row in PLAIN])


def test_a_conversation_that_waits_is_the_prompt_of_the_answers_beside_it():
    for i, beside in ((0, {"prompt": asked(0)}), (1, {})):
        a, b, won = sides(i)
        waiting = {"messages": [turn("system", SYS), *chat(i, "")[:-1]], **beside}
        one = waiting | {"chosen": good(i), "rejected": bad(i)}
        two = waiting | {"response_a": a, "response_b": b, "winner": "AB"[won]}
        for rows in ([one] * N, [two] * N):
            for pair in pairs_of(from_rows(rows)):
                assert "[sys]" in str(pair["prompt"]) and "[earlier]" in str(pair["prompt"])
                assert "[better]" in pair["chosen"] and "[worse]" in pair["rejected"]


def judged(make) -> list[dict]:
    """Answers, every second of which is bad, with what `make` says of each."""
    texts = [(asked(i), (good if i % 2 else bad)(i)) for i in range(2 * N)]
    return [make(q, a, ("bad", "good")[i % 2]) for i, (q, a) in enumerate(texts)]


INSIDE = {
    "an object": lambda q, a, says: {"prompt": q, "output": a, "meta": {"quality": says}},
    "a list of one": lambda q, a, says: {"prompt": q, "output": a, "notes": [{"label": says}]},
    "a rating": lambda q, a, says: {
        "prompt": q,
        "output": a,
        "feedback": {"rating": 1 if says == "good" else -1},
    },
    "a message": lambda q, a, says: {
        "messages": [turn("user", q), turn("assistant", a, feedback=says)]
    },
}


@pytest.mark.parametrize("where", INSIDE)
def test_a_label_inside_of_a_column_is_asked(where):
    rows = judged(INSIDE[where])
    data = suggested(rows)
    answers = data.answers.train + data.answers.test
    assert len(answers) == 2 * N and not data.sft.train
    assert all(row["label"] == ("[better]" in row["completion"]) for row in answers)
    with pytest.raises(Refused) as error:
        from_rows(rows)
    ignoring = from_rows(rows, fields={"ignore": error.value.ignore})
    assert len(ignoring.sft.train + ignoring.sft.test) == 2 * N


@pytest.mark.parametrize("column, cell", [("error", "Timeout at step 3."), ("flags", ["toxic"])])
def test_what_is_wrong_with_some_answers_is_asked(column, cell):
    rows = judged(
        lambda q, a, says: {"prompt": q, "output": a, column: cell if says == "bad" else None}
    )
    answers = suggested(rows).answers
    found = answers.train + answers.test
    assert len(found) == 2 * N
    assert all(row["label"] == ("[better]" in row["completion"]) for row in found)


@pytest.mark.parametrize("column", ["corrected_response", "human_edit"])
def test_a_better_text_of_an_answer_is_asked(column):
    rows = [{"prompt": asked(i), "response": bad(i), column: good(i)} for i in range(N)]
    for pair in pairs_of(suggested(rows)):
        assert "[better]" in pair["chosen"] and "[worse]" in pair["rejected"]
    with pytest.raises(Refused) as error:
        from_rows(rows)
    data = from_rows(rows, fields=error.value.other)
    assert all("[better]" in row["completion"] for row in data.sft.train)


@pytest.mark.parametrize(
    ("column", "says"),
    [
        ("edited_at", lambda i: f"2024-01-{i + 1:02} 10:00:00"),
        ("edited_by", lambda i: f"Ann Smith {i}"),
        ("edit_summary", lambda i: f"typo {i}"),
        ("revised_prompt", asked),
        ("issue_url", lambda i: f"https://example.org/{i}" if i % 2 else None),
        ("country_flags", lambda i: "DE" if i % 3 else None),
    ],
)
def test_when_who_and_why_of_a_change_are_no_better_text(column, says):
    rows = [{"prompt": asked(i), "response": good(i) * 2, column: says(i)} for i in range(N)]
    assert all("[better]" in row["completion"] for row in from_rows(rows).sft.train)


def test_flags_named_accepted_and_rejected_are_no_pair():
    rows = judged(
        lambda q, a, says: {
            "prompt": q,
            "response": a,
            "accepted": says == "good",
            "rejected": says == "bad",
        }
    )
    answers = suggested(rows).answers
    assert all(r["label"] == ("[better]" in r["completion"]) for r in answers.train + answers.test)


def test_objects_of_lists_are_lists_of_objects():
    """`datasets` keeps a sequence of objects so; {"messages": […]} is its messages."""
    turns = [turn("system", SYS), *chat(1, good(1))]
    table = {"role": [t["role"] for t in turns], "content": [t["content"] for t in turns]}
    for cell in (table, {"messages": turns}):
        for row in from_rows([{"messages": cell}] * N).sft.train:
            assert "[better]" in row["completion"] and "[sys]" in str(row["prompt"])
            assert "[earlier]" in str(row["prompt"])
    rated = {"text": [bad(1), good(1)], "score": [1, 5]}
    for pair in pairs_of(suggested([{"prompt": asked(1), "completions": rated}] * N)):
        assert "[better]" in pair["chosen"] and "[worse]" in pair["rejected"]


def on_a_scale(first: int, last: int, **names: str) -> list[dict]:
    rows = []
    for i in range(2 * N):
        a, b, won = sides(i)
        cells = {"context": [turn("user", asked(i))], "response1": a, "response2": b}
        rows.append({**cells, "overall_preference": (first, last)[won]})
    return rows


def test_a_scale_without_signs_is_no_signed_number():
    """HelpSteer3's numbers go from -3 to 3; a file of its columns may go from 1 to 7."""
    assert len(pairs_of(from_rows(on_a_scale(-3, 3)))) == 2 * N
    with pytest.raises(Refused, match="all are above 0; of a scale say where its middle is") as e:
        from_rows(on_a_scale(1, 7))
    with pytest.raises(ValueError):  # NUMBER is the user's to decide
        from_rows(on_a_scale(1, 7), fields=e.value.example)
    mapping = {
        k: v.replace("NUMBER", "4") if k == "winner" else v for k, v in e.value.example.items()
    }
    for pair in pairs_of(from_rows(on_a_scale(1, 7), fields=mapping)):
        assert "[better]" in pair["chosen"] and "[worse]" in pair["rejected"]


def test_a_named_shape_with_other_numbers_is_asked():
    """AlpacaFarm's preference is 1 or 2: in a file with 0 and 1 its 1 would be the other answer."""
    rows = [
        {"instruction": asked(i), "output_1": a, "output_2": b, "preference": won}
        for i in range(2 * N)
        for a, b, won in [sides(i)]
    ]
    with pytest.raises(Refused, match="'preference' may say which is better"):
        from_rows(rows)


def studio(data: dict, *results: dict) -> list[dict]:
    return [{"id": i, "annotations": [{"result": [*results]}], "data": data} for i in range(N)]


def test_label_studio_ratings_and_what_stands_before_its_prompt():
    texts = {"prompt": asked(1), "answer1": bad(1), "answer2": good(1)}
    rated = [{"value": {"rating": n}, "to_name": f"answer{n}"} for n in (1, 2)]
    before = {"history": TURNS, "system_message": SYS}
    for pair in pairs_of(from_rows(studio(texts | before, *rated))):
        assert "[better]" in pair["chosen"] and "[worse]" in pair["rejected"]
        assert "[sys]" in str(pair["prompt"]) and "[earlier]" in str(pair["prompt"])
    with pytest.raises(ValueError, match="several ratings of one answer"):
        from_rows(studio(texts, *rated, rated[0]))
    with pytest.raises(ValueError, match="a field 'context' before the answers"):
        from_rows(studio(texts | {"context": EARLIER}, *rated))


def test_prodigy_tasks_that_were_not_accepted_say_nothing():
    options = [{"id": 1, "text": bad(1)}, {"id": 2, "text": good(1)}]
    task = {"prompt": asked(1), "options": options, "accept": [2], "answer": "accept"}
    data = from_rows([task] * N + [task | {"accept": [1], "answer": "reject"}] * 3)
    assert data.report.dropped == {"a task that was not accepted": 3}
    assert all("[better]" in pair["chosen"] for pair in pairs_of(data))
