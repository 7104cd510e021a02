"""Messages in the form of Anthropic's API: thoughts, calls and results as parts of a content.

pytest tests/data/test_anthropic.py
"""

import pytest

import rlhf_lab as lab
from rlhf_lab.data.messages import Dropped, messages

THOUGHT = {"type": "thinking", "thinking": "I look it up.", "signature": "EqoB"}
TEXT = {"type": "text", "text": "One moment."}
CALL = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Oslo"}}
RESULT = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "4 degrees"}
ASKED = {"role": "user", "content": "How warm is Oslo?"}
ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "It is 4 degrees."}]}


def turn(role, *parts):
    return {"role": role, "content": [*parts]}


def test_calls_and_results_are_those_of_chat_templates():
    """What OpenAI's form of the same conversation says, message by message."""
    function = {"name": "weather", "arguments": {"city": "Oslo"}}
    theirs = [ASKED, turn("assistant", THOUGHT, TEXT, CALL), turn("user", RESULT), ANSWER]
    ours = [
        ASKED,
        {
            "role": "assistant",
            "content": "One moment.",
            "reasoning_content": "I look it up.",
            "tool_calls": [{"type": "function", "id": "toolu_1", "function": function}],
        },
        {"role": "tool", "content": "4 degrees", "tool_call_id": "toolu_1", "name": "weather"},
        {"role": "assistant", "content": "It is 4 degrees."},
    ]
    assert messages(theirs) == messages(ours)


def test_text_behind_results_is_what_the_user_says_next():
    second = {**CALL, "id": "toolu_2", "input": {"city": "Rome"}}
    parts = [{"type": "text", "text": "20 degrees"}]
    results = RESULT, {"type": "tool_result", "tool_use_id": "toolu_2", "content": parts}
    more = {"type": "text", "text": "In short, please."}
    found = messages([ASKED, turn("assistant", CALL, second), turn("user", *results, more), ANSWER])
    assert [m["role"] for m in found] == "user assistant tool tool user assistant".split()
    assert [m["content"] for m in found[1:5]] == ["", "4 degrees", "20 degrees", more["text"]]
    assert [c["id"] for c in found[1]["tool_calls"]] == ["toolu_1", "toolu_2"]


CALLED = turn("assistant", CALL)


@pytest.mark.parametrize(
    ("turns", "line"),
    [
        ([ASKED, turn("assistant", CALL, TEXT)], "text behind a tool call"),
        ([ASKED, CALLED, turn("user", TEXT, RESULT), ANSWER], "before a tool's result"),
        ([ASKED, turn("user", RESULT), ANSWER], "answers no call before it"),
        ([ASKED, CALLED, turn("user", {**RESULT, "is_error": True}), ANSWER], "is an error"),
        ([ASKED, turn("assistant", {**CALL, "input": "Oslo"})], "a form that is not known"),
        ([ASKED, turn("user", CALL)], "a form that is not known"),
    ],
)
def test_what_is_not_certain_is_refused(turns, line):
    with pytest.raises(Dropped, match=line):
        messages(turns)


def test_a_file_of_them_and_what_is_left_out_is_counted():
    rows = [
        {"messages": [ASKED, CALLED, turn("user", RESULT), {**ANSWER, "content": f"{i} degrees."}]}
        for i in range(20)
    ]
    rows[3]["messages"][2] = turn("user", {**RESULT, "tool_use_id": "toolu_9"})
    data = lab.load_data(rows)
    split = data.sft
    assert len(split.train) + len(split.test) == 19
    assert any("answers no call before it" in note for note in data.notes)
