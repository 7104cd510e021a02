"""Prompts become tokens once, and rows carry their ids to the trainers.

pytest tests/data/test_tokenize.py
"""

import rlhf_lab as lab
from rlhf_lab.data.tokenize import encode_prompt, prompt_rows, prompt_text, row_prompt_ids
from rlhf_lab.ppo.rewards import call_reward

TALK = [{"role": "user", "content": "Hi"}]


def test_rows_carry_the_ids_of_their_prompt():
    tokenizer = lab.load("tiny").tokenizer
    rows = [{"prompt": "A fox.", "place": "cave"}, {"prompt": TALK}, {"prompt": "long " * 99}]
    encoded, dropped = prompt_rows(tokenizer, rows, 30)
    assert dropped == {"too long": 1} and [r["prompt"] for r in encoded] == ["A fox.", TALK]
    for row in encoded:
        ids = encode_prompt(tokenizer, row["prompt"])
        assert row_prompt_ids(None, row) == ids  # no tokenizer is asked again
        assert row_prompt_ids(tokenizer, {"prompt": row["prompt"]}) == ids
        assert row_prompt_ids(tokenizer, {"input_ids": ids}) == ids
    assert "prompt_ids" not in rows[0]  # the data stay as they are


def test_a_reward_function_is_given_the_columns_of_the_data_only():
    """Functions without **columns go on working: ids of prompts are no column of the data."""

    def reward(prompts, completions, completion_ids, place):
        assert (prompts, completions, completion_ids, place) == (
            ["A fox."],
            ["yes"],
            [[3]],
            ["cave"],
        )
        return [1.0]

    rows = [{"prompt": "A fox.", "place": "cave", "prompt_ids": [1, 2]}]
    assert call_reward(reward, rows, ["yes"], [[3]]).tolist() == [1.0]


def test_a_column_that_some_rows_lack_is_none_there():
    rows = [{"prompt": "A fox."}, {"prompt": "A hen.", "tools": [{}]}]
    seen = []

    def reward(tools, **_):
        seen.append(tools)
        return [1.0, 1.0]

    call_reward(reward, rows, ["yes", "no"], [[3], [4]])
    assert seen == [[None, [{}]]]


def test_prompts_are_read_by_people_as_lines():
    assert prompt_text("A fox.") == "A fox." and prompt_text([1, 2]) == "1 2"
    assert prompt_text(TALK) == "user: Hi"
