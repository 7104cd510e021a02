"""Tools of a row, calls and results: the template writes them, or the row is left out and counted.

pytest tests/data/test_chat_tools.py

Templates come from TRL's package and from `kit/templates.py`; what each writes stands there by
hand.
"""

from __future__ import annotations

import pytest
from templates import OURS, case, chat_tokenizer, of_trl

from rlhf_lab.data import tokenize
from rlhf_lab.data.chat import LEFT_OUT, remedy
from rlhf_lab.data.tokenize import encode_prompt, encode_response

WHO = [{"role": "user", "content": "Who?"}]
TOOL = {"type": "function", "function": {"name": "clock", "description": "", "parameters": {}}}


@pytest.mark.parametrize("arguments", [{"zone": "UTC"}, '{"zone": "UTC"}'], ids=["object", "text"])
@pytest.mark.parametrize("name", ["qwen3", "glm4moe", "gptoss", "lfm2_v2"])
def test_an_answer_of_several_messages_with_a_tool(name, arguments):
    """The call, its result and the answer are written by the template; a template that knows no
    tools costs the row. Arguments may be an object or JSON text: templates want either."""
    found = case(name)
    tokenizer = chat_tokenizer(found.template, found.eos)
    call = {"id": "call1", "type": "function"}
    call["function"] = {"name": "clock", "arguments": arguments}
    answer = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "clock", "tool_call_id": "call1", "content": "12:00"},
        {"role": "assistant", "content": "Noon."},
    ]
    prompt = encode_prompt(tokenizer, WHO, [TOOL])
    text = tokenizer.decode(encode_response(tokenizer, answer, WHO, [TOOL]))
    assert "clock" in tokenizer.decode(prompt)
    assert text.index("UTC") < text.index("12:00") < text.index("Noon.")
    assert text.endswith(found.end)
    phi = chat_tokenizer(case("phi3").template, "<|endoftext|>")
    row = {"prompt": WHO, "completion": answer, "tools": [TOOL]}
    assert tokenize.sft_rows(phi, [row], 10_000) == (
        [],
        {"truncated": 0, "too long": 0, "the chat template leaves out tools": 1},
    )


CLOCK = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}
CHAIN = [
    {"role": "assistant", "content": "", "tool_calls": [CLOCK]},
    {"role": "tool", "name": "clock", "content": "12:00"},
    {"role": "assistant", "content": "Noon."},
]
TIME = [{"role": "user", "content": "What does the clock say? 12:00?"}]


@pytest.mark.parametrize(
    ("what", "row"),
    [
        ("tools", {"prompt": TIME, "tools": [TOOL]}),
        ("tool calls", {"prompt": [*TIME, *CHAIN, *TIME]}),
        ("tool calls", {"prompt": TIME, "completion": CHAIN}),
    ],
    ids=["tools", "a call in the prompt", "a call in the answer"],
)
def test_tools_and_calls_are_missed_though_their_names_are_in_the_question(what, row):
    row = {"completion": "Nobody.", **row}
    knows_none = chat_tokenizer(OURS["eos closes the whole"][0])
    rows, counts = tokenize.sft_rows(knows_none, [row], 10_000)
    assert not rows and counts[f"{LEFT_OUT} {what}"] == 1 and remedy(f"{LEFT_OUT} {what}")
    found = case("qwen3")
    qwen = chat_tokenizer(found.template, found.eos)
    assert len(tokenize.sft_rows(qwen, [row], 10_000)[0]) == 1


def test_a_result_that_a_template_leaves_out_is_missed_though_it_is_in_the_question():
    calls = "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}"
    template = OURS["eos closes the whole"][0].replace("{{ m.content }}", calls + "{{ m.content }}")
    no_results = template.replace("in messages %}", "in messages if m.role != 'tool' %}")
    row = {"prompt": TIME, "completion": CHAIN}
    assert tokenize.sft_rows(chat_tokenizer(template), [row], 10_000)[0]
    rows, counts = tokenize.sft_rows(chat_tokenizer(no_results), [row], 10_000)
    assert not rows and counts[f"{LEFT_OUT} a turn of tool"] == 1


AROUND_RESULTS = {
    "qwen3": "\n<|im_start|>user\n<tool_response>\n12:00\n</tool_response><|im_end|>\n"
    "<|im_start|>assistant\n",
    "lfm2_v2": "\n<|im_start|>tool\n<|tool_response_start|>12:00<|tool_response_end|><|im_end|>\n"
    "<|im_start|>assistant\n",
    "gptoss": '12:00"<|end|><|start|>assistant',  # where no token ends the call, the result alone
    "llama3_2": '<|start_header_id|>ipython<|end_header_id|>\n\n"12:00"<|eot_id|>'
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
}


@pytest.mark.parametrize("name", AROUND_RESULTS)
def test_sft_learns_no_tool_result(name):
    """By hand: the assistant's turns are learned with their ends, and what lies between is not."""
    found = case(name)
    tokenizer = chat_tokenizer(found.template, found.eos)
    row = {"prompt": TIME, "completion": CHAIN, "tools": [TOOL]}
    ((made,), _) = tokenize.sft_rows(tokenizer, [row], 10_000)
    ids, mask = made["input_ids"], made["completion_mask"]
    first, last = mask.index(1), len(mask) - mask[::-1].index(1)
    assert last == len(ids) and ids[:first] == encode_prompt(tokenizer, row)
    between = [i for i, learned in zip(ids[first:], mask[first:]) if not learned]
    assert tokenizer.decode(between) == AROUND_RESULTS[name]
    two = [*CHAIN[:2], *CHAIN[:1], {**CHAIN[1], "content": "13:00"}, *CHAIN[2:]]
    ((made,), _) = tokenize.sft_rows(tokenizer, [{**row, "completion": two}], 10_000)
    learned = [i for i, one in zip(made["input_ids"], made["completion_mask"]) if one]
    assert ":00" not in tokenizer.decode(learned) and "Noon." in tokenizer.decode(learned)
    assert tokenizer.decode(learned).count("UTC") == 2


@pytest.mark.parametrize("name", ["qwen3_training", "lfm2_v2_training", "qwen2_5_training"])
def test_what_is_learned_of_a_chain_is_what_trl_would_learn_of_the_assistant(name):
    """TRL's templates for training mark it, for `assistant_only_loss`; they learn the line break
    after a turn's end as well."""
    tokenizer = chat_tokenizer(of_trl(name), "<|im_end|>")
    row = {"prompt": TIME, "completion": CHAIN, "tools": [TOOL]}
    ((made,), _) = tokenize.sft_rows(tokenizer, [row], 10_000)
    whole = tokenizer.apply_chat_template(
        [*TIME, *CHAIN], tools=[TOOL], return_dict=True, return_assistant_tokens_mask=True
    )
    length = len(made["input_ids"])
    assert whole["input_ids"][:length] == made["input_ids"]
    rows = zip(made["input_ids"], made["completion_mask"], whole["assistant_masks"])
    differ = [tokenizer.decode([i]) for i, ours, theirs in rows if ours != theirs]
    assert set(differ) <= {"\n"} and len(differ) <= 3


def test_a_judge_reads_the_tools_of_a_row_as_in_training():
    from rlhf_lab.ppo.texts import encode_pair

    found = case("qwen3")
    tokenizer = chat_tokenizer(found.template, found.eos)
    row = {"prompt": WHO, "tools": [TOOL], "chosen": "Nobody.", "rejected": "Me."}
    ((pair,), _) = tokenize.whole_pair_rows(tokenizer, [row], 10_000)
    assert encode_pair(tokenizer, row, "Nobody.") == pair["chosen_ids"]
    assert "clock" in tokenizer.decode(pair["chosen_ids"])
