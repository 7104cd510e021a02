"""What a user says of a file's columns, alike in Python, with flags and in YAML; refusals mend.

pytest tests/data/test_mappings.py
"""

from __future__ import annotations

import json
import shlex

import pytest
from row_texts import PLAIN, N, asked, bad, good, pairs_of, sides
from shape_rows import shape_rows

from rlhf_lab.cli.main import main
from rlhf_lab.data.load import from_rows, load_data
from rlhf_lab.data.mapping import Refused, from_flags, names_of, spell
from rlhf_lab.data.schema import ANSWERS


def two(i: int) -> dict:
    a, b, won = sides(i, i % 4 == 3)
    return {
        "q": {"text": asked(i)},
        "left text": a,
        "right text": b,
        "verdict": ("1", "2", "0")[won],
        "s": [(5, 1, 3)[won], (1, 5, 3)[won]],
        "strength": (1.5, -1.5, 0.2)[won],
    }


TWO = [two(i) for i in range(4 * N)]
ASKED = {"prompt": "q.text", "answers": ["left text", "right text"]}
WAYS = {
    "winner": {"winner": "verdict", "values": {"1": "A", "2": "B", "0": "tie"}, "ignore": ["s"]},
    "scores": {"scores": ["s[0]", "s[1]"]},
    "a list of scores": {"scores": ["s"]},
    "ranks": {"ranks": ["s[1]", "s[0]"]},
    "margin": {"scores": ["s"], "margin": "1.5"},
    "preference": {"preference": "strength", "positive": "A", "margin": "0.5"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("surface", ["python", "flags", "yaml"])
def test_a_mapping_says_what_decides_alike_on_three_surfaces(way, surface, tmp_path):
    given = {**ASKED, **WAYS[way]}
    fields: object = given
    if surface == "flags":
        fields = from_flags(shlex.split(spell(given, "flags"))[1::2])
    elif surface == "yaml":
        fields = tmp_path / "map.yaml"
        fields.write_text(spell(given, "yaml").replace("; ", "\n"))
    data = load_data(TWO, fields=fields)
    assert data.report.dropped == {"a tie": N} and len(pairs_of(data)) == 3 * N
    assert all("[better]" in r["chosen"] and "[worse]" in r["rejected"] for r in pairs_of(data))


def test_ties_can_be_kept_as_demonstrations():
    data = from_rows(TWO, fields={**ASKED, **WAYS["scores"], "ties": "demonstrations"})
    texts = [r["completion"] for r in data.sft.train + data.sft.test]
    assert (
        sum("[tie]" in t for t in texts) == 2 * N and sum("[better]" in t for t in texts) == 3 * N
    )
    assert not any("[tie]" in r["chosen"] for r in pairs_of(data)) and data.report.tied == N


def test_a_function_makes_rows_of_ours():
    def mine(row):
        won = {"1": ("left text", "right text"), "2": ("right text", "left text")}.get(
            row["verdict"]
        )
        return won and {"prompt": row["q"]["text"], "chosen": row[won[0]], "rejected": row[won[1]]}

    data = load_data(TWO, fields=mine)
    assert data.report.dropped == {"left out by your function": N} and len(pairs_of(data)) == 3 * N
    with pytest.raises(ValueError, match="your function failed on row 1: KeyError"):
        load_data(TWO, fields=lambda row: row["nothing"])


def test_rows_of_one_prompt_that_stand_apart_are_counted():
    rows = [r for i in range(1, N) for r in shape_rows("HelpSteer ratings", 2 * i)]
    assert len(pairs_of(from_rows(rows))) == N - 1
    with pytest.raises(ValueError, match="fewer than two answers"):
        from_rows(rows[::2] + rows[1::2])


REFUSED = {
    "swapped pairs (c07)": (
        {"chosen": "response_0", "rejected": "response_1"},
        {
            "prompt": asked,
            "response_0": lambda i: sides(i)[0],
            "response_1": lambda i: sides(i)[1],
            "better_response_id": lambda i: sides(i)[2],
        },
        "'better_response_id' may say which is better",
    ),
    "a bare 0/1": (
        {"answers": ["x", "y"], "winner": "won"},
        {
            "prompt": asked,
            "x": lambda i: sides(i)[0],
            "y": lambda i: sides(i)[1],
            "won": lambda i: sides(i)[2],
        },
        "'won' holds '1', '0': say what each value means",
    ),
    "two answers and a label": (
        {},
        {
            "prompt": asked,
            "answer_1": lambda i: sides(i)[0],
            "answer_2": lambda i: sides(i)[1],
            "label": lambda i: sides(i)[2],
        },
        "look like answers to one prompt, and 'label' may say which is better",
    ),
    "two labels": (
        {},
        {
            "prompt": asked,
            "answer_a": lambda i: sides(i)[0],
            "answer_b": lambda i: sides(i)[1],
            "winner": lambda i: "ab"[sides(i)[2]],
            "human_choice": lambda i: "AB"[sides(i)[2]],
        },
        "'winner', 'human_choice' may say which is better",
    ),
    "a rating beside an answer": (
        {},
        {"prompt": asked, "response": good, "rating": lambda i: i % 5},
        "'rating' looks as if it said how good each answer is",
    ),
    "0 and 1 beside an answer": (
        {},
        {"prompt": asked, "completion": good, "label": lambda i: i % 2},
        "'label' looks as if it said how good each answer is",
    ),
    "prompts although there are answers": (
        {},
        {"prompt": asked, "model_output": good},
        "only prompts could be read, and 'model_output' may hold answers",
    ),
    "short answers and a number": (
        {},
        {
            "question": asked,
            "first": lambda i: ["Yes. [better]", "No. [worse]"][i % 2],
            "second": lambda i: ["Yes. [better]", "No. [worse]"][1 - i % 2],
            "verdict": lambda i: 1 - i % 2,
        },
        "'first' and 'second' look like answers to one prompt, and 'verdict' may say",
    ),
    "texts of another name": (
        {},
        {"prompt": asked, "fox": lambda i: "a b" if i else "c d", "owl": lambda i: f"x y {i}"},
        "only prompts could be read, and 'owl' may hold answers",
    ),
    "no prompt": ({}, {"ask": asked, "chosen": good, "rejected": bad}, "hold no conversation"),
    "nothing decides": (
        {"answers": ["x", "y"]},
        {"prompt": asked, "x": good, "y": bad},
        "nothing decides",
    ),
    "a sign without a side": (
        {"answers": ["x", "y"], "preference": "z"},
        {"prompt": asked, "x": good, "y": bad, "z": lambda i: i},
        "say which answer is better above 0",
    ),
    "a path that skips": (
        {"answers": "c[].text", "scores": "c[].score"},
        {"prompt": asked, "c": lambda i: [{"text": good(i), "score": 1}]},
        "skips what is missing",
    ),
    "no chosen": ({}, {"prompt": asked, "rejected": bad}, "rejected is there, chosen is not"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_two_readings_are_refused_with_a_mapping_on_each_surface(case, tmp_path, capsys):
    """The mapping that the message shows is understood on the surface where it is shown: its names
    are known, and it is refused no more for the same reason."""
    fields, columns, says = REFUSED[case]
    rows = [{k: make(i) for k, make in columns.items()} for i in range(N)]
    with pytest.raises(Refused) as error:
        from_rows(rows, "mine", fields=fields)
    assert says in str(error.value) and "\n" not in str(error.value)
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(rows))
    assert main(["data", str(path), *shlex.split(spell(fields, "flags"))]) == 2
    printed = capsys.readouterr().err
    assert says in printed and "fields={" not in printed and printed.count("\n") == 1
    if error.value.example:
        assert "--field" in printed


MENDED = (
    "swapped pairs (c07)",
    "a bare 0/1",
    "two answers and a label",
    "two labels",
    "0 and 1 beside an answer",
    "prompts although there are answers",
)


@pytest.mark.parametrize("case", MENDED)
def test_the_mapping_that_a_message_shows_works(case):
    """Its columns are right; what its values mean is for the user to say: here it is turned round
    where it is wrong."""
    fields, columns, _ = REFUSED[case]
    rows = [{k: make(i) for k, make in columns.items()} for i in range(N)]
    with pytest.raises(Refused) as error:
        from_rows(rows, "mine", fields=fields)
    given = {
        k: v
        for k, v in {**fields, **error.value.example}.items()
        if k not in ("chosen", "rejected")
    }
    if "values" in given and "winner" in given:
        given["values"] = {"0": "A", "1": "B"} if "0" in given["values"] else {"a": "A", "b": "B"}
        given["ignore"] = ["human_choice"] if "human_choice" in columns else ["prompt_id"]
    data = from_rows(rows, "mine", fields=given)
    assert all("[better]" in r["chosen"] for r in pairs_of(data))
    assert any(
        r.keys() & set(ANSWERS) for r in data.sft.train + data.answers.train + pairs_of(data)
    )


def test_a_mapping_with_a_wrong_word_is_one_line(tmp_path):
    for fields, says in (
        ({"winer": "x"}, "no field 'winer' to map; did you mean 'winner'"),
        ({"margin": "wide"}, "margin is a number"),
        ({"ties": "keep"}, "ties is drop or demonstrations"),
        ({"answers": [1]}, "answers is a list of columns"),
        ({"prompt": "a b.c"}, "neither a column nor a JMESPath"),
        (
            {"answers": ["chosen", "rejected"], "winner": "prompt", "values": {"x": "C"}},
            "values says 'C'",
        ),
        ({"values": {"x": "best"}}, "values says what each value means"),
    ):
        with pytest.raises(ValueError, match=says) as error:
            from_rows(PLAIN, "mine", fields=fields)
        assert "\n" not in str(error.value)
    path = tmp_path / "map.yaml"
    for written, says in (
        ("a: [", "is not YAML"),
        ("- a", "holds no names"),
        ("", "it is empty"),
        ("prompt: a\nprompt: b", "lines 1 and 2 both say prompt"),
        ("prompt: 3", "prompt is a column"),
    ):
        path.write_text(written)
        with pytest.raises(ValueError, match=says):
            from_rows(PLAIN, "mine", fields=path)


def test_bare_numbers_name_no_answer():
    assert {"0", "1", "2"}.isdisjoint(names_of(["answer_1", "answer_2"]))
    assert names_of(["b", "a"]).get("first") is None
    assert names_of(["response_b", "response_a"])["response_a"] == 1


def test_data_lists_every_column(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({**r, "note": "x"}) for r in PLAIN))
    assert main(["data", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "columns not used: note" in printed and "what became of it" in printed
