"""Other people's preference files: each shape by its name, in the right direction, nothing lost.

pytest tests/data/test_shapes.py

The marks in the texts are those of `kit/row_texts.py`. The id of a test names the sample that it
stands for (c01 to c20).
"""

from __future__ import annotations

import json

import pandas
import pytest
from row_texts import EARLIER, PLAIN, SYS, N, asked, bad, chat, good, pairs_of, sides, turn
from shape_rows import shape_rows

from rlhf_lab.data.load import from_rows, load_data
from rlhf_lab.data.mapping import Refused
from rlhf_lab.data.messages import Dropped, conversation, messages, tools
from rlhf_lab.data.shapes import named_shapes

EARLIER_IN = (
    "OpenAI",
    "LMArena",
    "HelpSteer3",
    "HelpSteer ratings",
    "LLaMA",
    "axolotl chat",
    "ms-swift",
    "Capybara",
    "UltraInteract",
    "HH-RLHF",
    "summarize",
    "Tulu",
    "Skywork",
    "NeMo",
    "Step-DPO",
)
SYS_IN = ("OpenAI", "LLaMA", "axolotl", "ms-swift", "Orca", "Gemini")
TWO_ROWS = ("HelpSteer ratings", "summarize-from-feedback ratings")


@pytest.mark.parametrize("name", [s.name for s in named_shapes()])
def test_a_shape_is_known_by_name_and_read_in_the_right_direction(name):
    """Samples c01 to c14: the shape is named, no [worse] is chosen, no [tie] is a preference, no
    system or earlier turn is lost, ties and unused answers are counted."""
    rows = [row for i in range(1, 4 * N) for row in shape_rows(name, i)]
    data = from_rows(rows, "mine")
    assert data.notes[0].startswith(f"mine: {len(rows)} rows, read as {name}: ")
    found = pairs_of(data)
    ties = sum("[tie]" in json.dumps(row) for row in rows) // (1 + (name in TWO_ROWS))
    each = {"RewardBench 2": 2, "OASST trees": 2, "OASST messages": 2}.get(name, 1)
    assert len(found) == each * (4 * N - 1) - ties
    assert data.report.dropped.get("a tie", 0) == ties
    for row in found:
        assert "[better]" in row["chosen"] and "[worse]" in row["rejected"], row
        if name.startswith(EARLIER_IN) or "And in winter" in str(row["prompt"]):
            assert "[earlier]" in str(row["prompt"])
        assert ("[sys]" in str(row["prompt"])) == name.startswith(SYS_IN)
    demonstrations = data.sft.train + data.sft.test
    assert demonstrations and all("[better]" in r["completion"] for r in demonstrations)
    assert set(data.report.columns) == set().union(*rows)


def test_every_named_shape_says_where_it_is_described():
    for shape in named_shapes():
        assert shape.described and shape.columns


def test_answers_in_no_pair_are_counted():
    """c04: five answers a row, two of them without a score; one pair is made."""
    rows = [shape_rows("UltraFeedback", i)[0] for i in range(N)]
    data = from_rows(rows, "mine")
    assert data.report.unused == 3 * N and "not used, in no pair: 36 answers" in str(data.notes)
    assert "not used in it: custom_system_prompt" in data.report.columns["completions"]
    every = from_rows(rows, "mine", fields={"pairs": "all"})
    assert len(pairs_of(every)) == 3 * N and every.report.unused == 2 * N


def test_another_column_of_a_named_shape_may_decide():
    """c07: `safer_response_id` in place of `better_response_id`, and the note says so."""
    name = "PKU-SafeRLHF, by helpfulness (safer_response_id is not used)"
    rows = [shape_rows(name, i)[0] for i in range(N)]
    data = from_rows(rows, "mine", fields={"winner": "safer_response_id"})
    assert "'safer_response_id' decides: 0 → A is chosen" in data.notes[0]
    chosen = {r["chosen"] for r in pairs_of(data)}
    assert chosen == {r["response_0"] for r in rows}


# ------------------------------------------------------------------------- shapes by their columns

CALL = {"type": "function", "function": {"name": "look", "arguments": {"room": "x"}}}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]


def test_c15_labelled_answers_are_no_demonstrations(tmp_path):
    rows = [
        {"prompt": asked(i), "completion": t, "label": t == good(i)}
        for i in range(N)
        for t in (good(i), bad(i))
    ]
    pandas.DataFrame(rows).to_csv(tmp_path / "a.csv", index=False)  # True and False become text
    for data in (from_rows(rows), load_data(tmp_path / "a.csv")):
        assert len(data.answers.train + data.answers.test) == 2 * N and not data.sft.train
        assert all(r["label"] == ("[better]" in r["completion"]) for r in data.answers.train)


def test_c16_an_answer_of_several_messages_is_kept_whole_with_its_tools():
    calls = [turn("assistant", None, tool_calls=[CALL]), turn("tool", "null", name="look")]
    last = [turn("assistant", good(0))]
    rows = [
        {
            "prompt": [turn("user", asked(i))],
            "chosen": [*calls, *last],
            "tools": json.dumps(TOOLS),
            "rejected": [turn("assistant", bad(i))],
        }
        for i in range(N)
    ]
    data = from_rows(rows)
    row = data.preferences.train[0]
    assert [m["role"] for m in row["chosen"]] == ["assistant", "tool", "assistant"]
    assert row["chosen"][0]["tool_calls"] == [CALL] and row["chosen"][1]["content"] == "null"
    assert row["rejected"].endswith("[worse]") and row["tools"] == TOOLS
    assert row["prompt"][0]["content"].startswith("What")
    whole = from_rows([{"messages": r["prompt"] + r["chosen"], "tools": TOOLS} for r in rows])
    assert (
        whole.sft.train[0]["completion"] == row["chosen"] and whole.sft.train[0]["tools"] == TOOLS
    )
    assert data.labelled.train[0]["tools"] == TOOLS


def test_c17_a_system_column_becomes_a_system_turn():
    rows = [
        {"system": SYS, "question": asked(i), "chosen": good(i), "rejected": bad(i)}
        for i in range(N)
    ]
    for row in pairs_of(from_rows(rows)):
        assert [m["role"] for m in row["prompt"]] == ["system", "user"]


@pytest.mark.parametrize("write", [json.dumps, repr], ids=["JSON", "Python"])
def test_c18_conversations_as_text_in_a_cell(write):
    rows = [
        {
            "prompt": asked(i),
            **{k: write(chat(i, t)) for k, t in (("chosen", good(i)), ("rejected", bad(i)))},
        }
        for i in range(N)
    ]
    for row in pairs_of(from_rows(rows)):
        assert row["chosen"].startswith("Shelves") and len(row["prompt"]) == 3


def test_text_that_looks_like_messages_and_cannot_be_parsed_is_no_answer():
    rows = [dict(r) for r in PLAIN]
    rows[3]["chosen"] = "[{'role': 'user', 'content': 'cut o"
    assert from_rows(rows[:1] * 3 + rows).report.dropped == {
        "messages as text that cannot be parsed": 1
    }
    assert conversation('{"name": "an answer that is JSON"}') == []


@pytest.mark.parametrize(
    "names", [("A", "B"), ("a", "b"), ("response_a", "response_b"), ("model_a", "model_b")]
)
def test_c18_a_letter_in_chosen_names_the_answer(names):
    rows = []
    for i in range(N):
        a, b, won = sides(i)
        rows.append({"prompt": asked(i), "response_a": a, "response_b": b, "chosen": names[won]})
    data = from_rows(rows, "mine")
    assert all("[better]" in r["chosen"] for r in pairs_of(data)) and len(pairs_of(data)) == N
    assert "'chosen' decides" in data.notes[0]


def test_c18_a_prompt_repeated_in_the_answers_is_found():
    rows = [
        {
            **r,
            "chosen": f"{r['prompt']} {r['chosen']}",
            "rejected": f"{r['prompt']} {r['rejected']}",
        }
        for r in PLAIN
    ]
    data = from_rows(rows, "mine")
    assert "which the answers repeat" in data.notes[0]
    for row, given in zip(sorted(pairs_of(data), key=repr), sorted(rows, key=repr)):
        assert row["prompt"] + row["chosen"] == given["chosen"]


def tails() -> list[dict]:
    rows = []
    for i in range(2 * N):
        one, other = ("Long.", "Other.") if i % 2 else ("Same.", "Same.")
        rows.append(
            {
                key: [
                    turn("user", asked(i)),
                    turn("assistant", first),
                    turn("user", "More?"),
                    turn("assistant", last),
                ]
                for key, first, last in (("chosen", one, good(i)), ("rejected", other, bad(i)))
            }
        )
    return rows


def test_c18_conversations_that_part_early_are_counted_or_paired_there():
    data = from_rows(tails(), "mine")
    reason = "conversations that part before the last answer (parted=pair pairs them there)"
    assert data.report.dropped == {reason: N} and len(pairs_of(data)) == N
    there = from_rows(tails(), "mine", fields={"parted": "pair"})
    assert there.report.parted == N and "without the turns that follow" in str(there.notes)
    firsts = [r for r in pairs_of(there) if len(r["prompt"]) == 1]
    assert {(r["chosen"], r["rejected"]) for r in firsts} == {("Long.", "Other.")}


def test_c19_roles_by_their_many_names_and_unknown_ones_by_name():
    names = [
        ("prompter", "assistant"),
        ("User", "Assistant"),
        ("human", "gpt"),
        ("user", "model"),
        ("Human", "chatgpt"),
        ("HUMAN", "Bot"),
    ]
    rows = [{"messages": [turn(u, asked(i)), turn(a, good(i))]} for i in range(N) for u, a in names]
    data = from_rows([*rows, {"messages": [turn("narrator", "x"), turn("assistant", "y")]}])
    assert data.report.dropped == {"unknown role 'narrator'": 1} and data.report.kept == len(rows)
    roles = {m["role"] for r in data.sft.train for m in r["prompt"]}
    assert roles == {"user"}


def test_c19_one_system_row_among_others_keeps_its_system_turn():
    rows = [{"chosen": chat(i, good(i)), "rejected": chat(i, bad(i))} for i in range(N)]
    for key in ("chosen", "rejected"):
        rows[5][key] = [turn("system", SYS), *rows[5][key]]
    prompts = [r["prompt"] for r in pairs_of(from_rows(rows))]
    assert sum(p[0]["role"] == "system" for p in prompts) == 1


def test_c20_rows_in_a_wrapping_object(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"version": 1, "data": PLAIN}))
    assert pairs_of(load_data(path)) == pairs_of(from_rows(PLAIN))
    path.write_text(json.dumps({"train": PLAIN, "test": PLAIN[:2]}))
    with pytest.raises(Refused, match="several lists of rows .*'rows': 'train'"):
        load_data(path)
    assert load_data(path, fields={"rows": "train"}).report.rows == N
    lines = tmp_path / "a.jsonl"
    lines.write_text("\n".join(json.dumps({"item": r}) for r in PLAIN))
    assert pairs_of(load_data(lines, fields={"rows": "item"})) == pairs_of(from_rows(PLAIN))


@pytest.mark.parametrize(
    "nothing", ["nan", "NaN", "N/A", "n/a", "[deleted]", "[removed]", "null", "None"]
)
def test_texts_that_stand_for_nothing_have_a_reason_of_their_own(nothing):
    rows = [dict(r) for r in [*PLAIN, PLAIN[0]]]
    rows[4]["rejected"] = nothing
    dropped = from_rows(rows).report.dropped
    assert list(dropped) == ["a text that stands for nothing (nan, N/A, [deleted], …)"]


def test_system_history_and_prompt_beside_a_conversation():
    """A system prompt beside conversations is put before them; two that differ are told."""
    rows = [
        {
            "prompt": [turn("system", SYS), turn("user", EARLIER)],
            "chosen": chat(i, good(i)),
            "rejected": chat(i, bad(i)),
        }
        for i in range(N)
    ]
    assert all(r["prompt"][0]["content"] == SYS for r in pairs_of(from_rows(rows)))
    other = [*rows, {**rows[0], "prompt": "What is this? [earlier]"}]
    assert from_rows(other).report.dropped == {"a prompt that is not in the conversation": 1}
    alpaca = [
        {
            "instruction": asked(i),
            "input": "In short.",
            "output": good(i),
            "system": SYS,
            "history": [[EARLIER, "Yes."]],
        }
        for i in range(N)
    ]
    row = from_rows(alpaca).sft.train[0]
    assert [m["role"] for m in row["prompt"]] == ["system", "user", "assistant", "user"]
    assert row["prompt"][-1]["content"].endswith("\nIn short.")


def test_messages_keep_reasoning_and_calls_and_say_what_they_do_not_read():
    given = [
        turn("user", "Why?", mood="curious"),
        turn("assistant", "So.", thinking="Hm.", weight=1),
    ]
    assert messages(given)[1] == turn("assistant", "So.", reasoning_content="Hm.")
    with pytest.raises(Dropped, match="pictures"):
        messages([turn("user", [{"type": "image", "image": "x.png"}])])
    data = from_rows([{"messages": given}] * 12, "mine")
    assert "(not used in it: mood)" in data.report.columns["messages"]
    assert data.sft.train[0]["completion"] == [messages(given)[1]]


ARGUMENTS = {"room": None, "at": [1, None], "by": {"who": None}}
GAPS_LEFT_OUT = {"at": [1, None], "by": {}}


def test_nulls_that_stand_in_json_text_are_kept_and_gaps_of_a_table_are_not():
    """Arrow fills keys that other rows have with nulls, and cannot reach into a text."""

    def called(arguments):
        return [{"type": "function", "function": {"name": "look", "arguments": arguments}}]

    def call_of(given):
        return messages(given)[0]["tool_calls"]

    said = json.dumps({"name": "look", "arguments": ARGUMENTS})
    assert call_of([{"from": "function_call", "value": said}]) == called(ARGUMENTS)
    as_text = turn("assistant", "", tool_calls=called(json.dumps(ARGUMENTS)))
    as_object = turn("assistant", "", tool_calls=called(ARGUMENTS))
    assert call_of([as_text]) == called(ARGUMENTS)
    assert call_of(json.dumps([as_object])) == called(ARGUMENTS)
    assert conversation(json.dumps([as_object]))[0]["tool_calls"] == called(ARGUMENTS)
    assert call_of([as_object]) == called(GAPS_LEFT_OUT)
    schema = {"name": "look", "parameters": {"properties": {"at": {"default": None}}}}
    gaps = {"name": "look", "parameters": {"properties": {"at": {}}}}
    for given in (json.dumps([schema]), [json.dumps(schema)]):
        assert tools(given) == [{"type": "function", "function": schema}]
    assert tools([schema]) == [{"type": "function", "function": gaps}]
    with pytest.raises(Dropped, match="tools in a form"):
        tools([{"type": "function", "function": {"description": "no name"}}])


@pytest.mark.parametrize(
    "thought",
    [
        {"type": "reasoning", "text": "Hm."},  # AI SDK
        {"type": "thinking", "thinking": "Hm.", "signature": "x"},  # Anthropic
        {"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]},  # Mistral
    ],
    ids=["AI SDK", "Anthropic", "Mistral"],
)
def test_parts_that_are_thoughts_are_the_reasoning_of_their_turn(thought):
    said = {"type": "text", "text": "So."}
    expected = turn("assistant", "So.", reasoning_content="Hm.")
    assert messages([turn("assistant", [thought, said])]) == [expected]
    assert messages([turn("assistant", [thought, said], reasoning="Hm.")]) == [expected]
    with pytest.raises(Dropped, match="two kinds of reasoning"):
        messages([turn("assistant", [thought, said], reasoning="Well.")])
    with pytest.raises(Dropped, match="empty"):
        messages([turn("assistant", [thought])])
    with pytest.raises(Dropped, match="tool calls in a form"):
        messages([turn("assistant", [thought, {"type": "tool_use", "name": "look", "input": {}}])])


@pytest.mark.parametrize(
    ("returned", "text"),
    [
        ({"degrees": 20, "wind": None}, '{"degrees": 20, "wind": null}'),
        ([{"town": "Ulm"}, {"town": "Bonn"}], '[{"town": "Ulm"}, {"town": "Bonn"}]'),
        (["Ulm", "Bonn"], '["Ulm", "Bonn"]'),
        (20.5, "20.5"),
        ([{"type": "text", "text": "20 "}, {"type": "text", "text": "degrees"}], "20 degrees"),
        ({"type": "text", "text": "20 degrees"}, "20 degrees"),
        (None, ""),
        ('{"degrees": 20}', '{"degrees": 20}'),
    ],
)
def test_what_a_tool_returned_may_be_an_object(returned, text):
    assert messages([turn("tool", returned)]) == [turn("tool", text)]
    with pytest.raises(Dropped, match="pictures"):
        messages([turn("tool", [{"type": "image", "image": "x.png"}])])


def test_an_object_that_is_no_content_says_so():
    """And not that there is no conversation."""
    rows = [{"messages": [turn("user", {"a": i}), turn("assistant", "So.")]} for i in range(12)]
    with pytest.raises(ValueError, match="12 rows: a message whose content is neither text nor"):
        from_rows(rows, "mine")
