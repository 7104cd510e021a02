"""What messages say of being learned: OpenAI's and Mistral's `weight`, axolotl's `train`, others'.

pytest tests/data/test_learned.py
"""

import pytest

from rlhf_lab.data.messages import Dropped, messages

ASKED = {"role": "user", "content": "How warm is Oslo?"}
CALLS = [{"id": "c", "type": "function", "function": {"name": "weather", "arguments": {}}}]
RESULT = {"role": "tool", "tool_call_id": "c", "content": "4"}


def answer(text="It is 4 degrees.", **more):
    return {"role": "assistant", "content": text, **more}


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"loss": "false"}])
def test_an_answer_is_learned_whole_or_not_at_all(mark):
    called = answer("", tool_calls=CALLS, **mark)
    with pytest.raises(Dropped, match="^an answer that is marked as not to be learned$"):
        messages([ASKED, answer(**mark)])
    with pytest.raises(Dropped, match="^an answer of which a part is marked as not to be learned$"):
        messages([ASKED, called, RESULT, answer(weight=1)])
    # Before the last question all is prompt, of which nothing is learned; nor of what tools return.
    assert messages([ASKED, answer(**mark), ASKED, answer()])[-1] == answer()
    assert messages([ASKED, answer("", tool_calls=CALLS), {**RESULT, **mark}, answer()])


def test_shares_are_refused_and_plain_marks_are_not():
    with pytest.raises(Dropped, match=r"^an answer whose weight is 0\.5, and"):
        messages([ASKED, answer(weight=0.5)])
    for mark in ({"weight": 1}, {"weight": 1.0}, {"train": True}, {"loss": None}):
        assert messages([ASKED, answer(**mark)]) == [ASKED, answer()]
