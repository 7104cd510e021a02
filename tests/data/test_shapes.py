"""Other people's preference files: each shape by its name, in the right direction, nothing lost.

pytest tests/data/test_shapes.py

Texts carry markers, as the samples of issue 25 do: [better] and [worse] say which answer won, [tie]
that neither did, [sys] marks a system turn and [earlier] an earlier one. The id of a test names the
sample that it stands for (c01 to c20).
"""

from __future__ import annotations

import json
import shlex

import pandas
import pytest

from rlhf_lab.cli.main import main
from rlhf_lab.data.load import from_rows, load_data
from rlhf_lab.data.mapping import Refused, from_flags, names_of, spell
from rlhf_lab.data.messages import Dropped, conversation, messages
from rlhf_lab.data.schema import ANSWERS
from rlhf_lab.data.shapes import named_shapes

N = 12
SYS, EARLIER = "Be tidy. [sys]", "Hello. [earlier]"
TURNS = "{}<extra_id_1>Assistant\n{}<extra_id_1>User\n{}"


def turn(role: str, content: object, **more: object) -> dict:
    return {"role": role, "content": content, **more}


def asked(i: int) -> str:
    return f"What belongs in room {i}?"


def good(i: int) -> str:
    return f"Shelves for room {i}. [better]"


def bad(i: int) -> str:
    return f"Anything in room {i}. [worse]"


def chat(i: int, answer: str) -> list[dict]:
    before = [turn("user", EARLIER), turn("assistant", "Yes. [earlier]")]
    return [*before, turn("user", asked(i)), turn("assistant", answer)]


def sides(i: int, tie: bool = False) -> tuple[str, str, int]:
    """Answers as they stand, A and B, and which of them won (0, 1)."""
    if tie:
        return f"One for {i}. [tie]", f"Two for {i}. [tie]", -1
    return (good(i), bad(i), 0) if i % 2 else (bad(i), good(i), 1)


def parts(messages: list[dict]) -> list[dict]:
    return [
        turn(m["role"], [{"type": "text", "text": m["content"], "image": None}]) for m in messages
    ]


def node(role: str, content: str, rank: int | None = None, *replies: dict, **more: object) -> dict:
    return {"message_id": content, "role": role, "text": content, "rank": rank} | {
        "deleted": False,
        "replies": list(replies),
        **more,
    }


def tree(i: int) -> dict:
    further = node(
        "prompter",
        "And in winter? [earlier]",
        None,
        node("assistant", "Warm. [better]", 0),
        node("assistant", "Cold. [worse]", 1),
    )
    gone = node("assistant", "gone [deleted]", None, deleted=True)
    answers = [node("assistant", bad(i), 2), node("assistant", good(i), 0, further)]
    return node("prompter", asked(i), None, *answers, node("assistant", "Some.", 1), gone)


def flat(found: dict, number: int, parent: str | None = None) -> list[dict]:
    own = {k: v for k, v in found.items() if k != "replies"}
    own |= {"message_tree_id": f"t{number}", "parent_id": parent and f"{number}{parent}"}
    own["message_id"] = f"{number}{found['message_id']}"
    return [own] + [r for c in found["replies"] for r in flat(c, number, found["message_id"])]


def annotated(i: int, result: dict, data: dict) -> dict:
    done = {"result": [{"type": "x", "value": result, "to_name": "answer1,answer2"}]}
    undone = {"was_cancelled": True, "result": [{"value": {"selected": "left"}}]}
    return {"id": i, "annotations": [done, undone], "data": data, "project": 1}


def shape_rows(name: str, i: int) -> list[dict]:
    """Row `i` of a shape as its description has it; every fourth is a tie where it can have one."""
    tie = i % 4 == 3
    a, b, won = sides(i, tie)
    plain_a, plain_b, sure = sides(i)
    letter = "AB"[sure]
    pair = {"prompt": asked(i), "response1": plain_a, "response2": plain_b}
    fields = {"prompt": asked(i), "answer1": plain_a, "answer2": plain_b}
    order = [f"response{sure + 1}", f"response{2 - sure}"]
    items = [{"id": "x", "body": plain_a}, {"id": "y", "body": plain_b}]
    ranked = ["x", "y"] if sure == 0 else ["y", "x"]
    swift = [turn("system", SYS), *chat(i, good(i))]
    v1 = [
        {
            "role": m["role"],
            "loss_weight": 1.0,
            "content": [{"type": "text", "value": m["content"]}],
        }
        for m in swift
    ]
    rows: dict[str, list[dict]] = {
        "OpenAI preference fine-tuning": [
            {
                "input": {"messages": swift[:-1], "tools": [], "parallel_tool_calls": True},
                "preferred_output": [turn("assistant", good(i))],
                "non_preferred_output": [turn("assistant", bad(i))],
            }
        ],
        "LMArena human preferences": [
            {
                "winner": ("model_a", "model_b", ("tie", "both_bad", "tie (bothbad)")[i % 3])[won],
                "conversation_a": parts(chat(i, a)),
                "conversation_b": json.dumps(chat(i, b)),
                "model_a": "x",
                "model_b": "y",
            }
        ],
        "LMArena human preferences, 55k": [
            {
                "prompt": json.dumps([EARLIER, asked(i)]),
                "response_a": json.dumps(["Yes. [earlier]", a]),
                "response_b": json.dumps(["Yes. [earlier]", b]),
                **{
                    f"winner_{w}": int(won == n)
                    for n, w in ((0, "model_a"), (1, "model_b"), (-1, "tie"))
                },
            }
        ],
        "HelpSteer3 preferences": [
            {
                "context": chat(i, "")[:-1],
                "response1": a,
                "response2": b,
                "overall_preference": (-2, 1, 0)[won],
            }
        ],
        "HelpSteer2 preferences": [
            {
                "prompt": asked(i),
                "response_1": a,
                "response_2": b,
                "preference_strength": (-2, 1, 0)[won],
            }
        ],
        "HelpSteer ratings": [
            dict.fromkeys(("correctness", "coherence", "complexity", "verbosity"), 2)
            | {"prompt": TURNS.format(EARLIER, "Yes. [earlier]", asked(i)), "response": answer}
            | {"helpfulness": 2 + 2 * (won == n)}
            for n, answer in enumerate((a, b))
        ],
        "UltraFeedback": [
            {
                "instruction": asked(i),
                "models": ["m", "n", "o", "p"],
                "correct_answers": ["None"],
                "incorrect_answers": ["None"],
                "completions": [
                    {"response": r, "fine-grained_score": s, "custom_system_prompt": "x"}
                    for r, s in (
                        (bad(i), "1.0"),
                        ("Some.", float("nan")),
                        (good(i), "4.5"),
                        ("Some. two", "N/A"),
                        ("Some. three", 3.0),
                    )
                ],
            }
        ],
        "UltraFeedback, binarized": [
            {
                "prompt": EARLIER,
                "chosen": chat(i, good(i)),
                "rejected": chat(i, bad(i)),
                "messages": chat(i, good(i)),
                "score_chosen": 8.0,
                "score_rejected": 2.0,
            }
        ],
        "UltraFeedback, binarized by Argilla": [
            {
                "instruction": asked(i),
                "chosen_response": good(i),
                "rejected_response": bad(i),
                "chosen_avg_rating": 4.5,
            }
        ],
        "OASST trees": [
            {"message_tree_id": f"t{i}", "tree_state": "ready_for_export", "prompt": tree(i)}
        ],
        "OASST messages": flat(tree(i), i),
        "SHP": [
            {
                "history": asked(i),
                "human_ref_A": plain_a,
                "human_ref_B": plain_b,
                "labels": 1 - sure,
            }
        ],
        "PKU-SafeRLHF, by helpfulness (safer_response_id is not used)": [
            {
                "prompt": asked(i),
                "response_0": plain_a,
                "response_1": plain_b,
                "better_response_id": sure,
                "safer_response_id": 0,
            }
        ],
        "summarize-from-feedback comparisons": [
            {
                "info": {"title": "Rooms [earlier]", "post": asked(i), "article": None},
                "summaries": [{"text": plain_a, "policy": "x"}, {"text": plain_b, "policy": "y"}],
                "choice": sure,
            }
        ],
        "WebGPT comparisons": [
            {
                "question": {"dataset": "x", "full_text": asked(i)},
                "answer_0": a,
                "answer_1": b,
                "score_0": (0.5, -0.5, 0.0)[won],
                "score_1": (-0.5, 0.5, 0.0)[won],
            }
        ],
        "Nectar": [
            {
                "prompt": f"\n\nHuman: {asked(i)}\n\nAssistant: ",
                "num_responses": 3,
                "answers": [
                    {"answer": t, "rank": r, "model": "x"}
                    for t, r in ((bad(i), 3.0), (good(i), 1.0), ("Some.", 2.0))
                ],
            }
        ],
        "Label Studio export": [
            annotated(i, {"selected": ("left", "right")[sure]}, fields)
            if i % 2
            else annotated(i, {"ranker": {"rank": ranked}}, {"prompt": asked(i), "items": items})
        ],
        "Label Studio export, JSON_MIN": [
            {
                **fields,
                "id": i,
                "comparison": [{"selected": ("left", "right")[sure]}],
                "annotator": 1,
                "annotation_id": 1,
                "lead_time": 2.5,
            }
        ],
        "Argilla 2 records, flattened": [
            {
                **pair,
                "preference.responses": [order, order[::-1]],
                "preference.responses.users": ["u", "v"],
                "preference.responses.status": ["submitted", "draft"],
            }
        ],
        "Argilla 2 records": [
            {
                "fields": pair,
                "suggestions": {},
                "responses": {
                    "preference": [{"value": order if i % 2 else order[0], "user_id": "u"}]
                },
            }
        ],
        "LLaMA-Factory v1 pairs": [
            {"chosen_messages": v1, "rejected_messages": [*v1[:-1], {**v1[-1], "content": bad(i)}]}
        ],
        "LLaMA-Factory sharegpt pairs": [
            {
                "conversations": [
                    {
                        "from": {"user": "human", "assistant": "gpt"}[m["role"]],
                        "value": m["content"],
                    }
                    for m in chat(i, "")[:-1]
                ],
                "chosen": {"from": "gpt", "value": good(i)},
                "rejected": {"from": "gpt", "value": bad(i)},
                "system": SYS,
            }
        ],
        "axolotl chat pairs": [
            {
                "messages": swift[:-1],
                "chosen": turn("assistant", good(i)),
                "rejected": turn("assistant", bad(i)),
            }
        ],
        "ms-swift pairs of conversations": [
            {"messages": swift, "rejected_messages": [*swift[:-1], turn("assistant", bad(i))]}
        ],
        "ms-swift pairs": [{"messages": swift, "rejected_response": bad(i)}],
        "ms-swift query pairs": [
            {
                "query": asked(i),
                "response": good(i),
                "rejected_response": bad(i),
                "history": [[EARLIER, "Yes. [earlier]"]],
                "system": SYS,
            }
        ],
        "axolotl icr pairs": [
            {"system": SYS, "input": asked(i), "chosen": good(i), "rejected": bad(i)}
        ],
        "RewardBench": [
            {
                "prompt": asked(i),
                "chosen": good(i),
                "chosen_model": "x",
                "rejected": bad(i),
                "rejected_model": "y",
            }
        ],
        "RewardBench 2": [
            {
                "prompt": asked(i),
                "chosen": [good(i)],
                "rejected": [bad(i), bad(i) + " two"],
                "num_correct": 1,
                "num_incorrect": 2,
            }
        ],
    }
    assert letter in "AB"
    return rows[name]


EARLIER_IN = (
    "OpenAI",
    "LMArena",
    "HelpSteer3",
    "HelpSteer ratings",
    "LLaMA",
    "axolotl chat",
    "ms-swift",
)
SYS_IN = ("OpenAI", "LLaMA", "axolotl", "ms-swift")


def pairs_of(data) -> list[dict]:
    return data.preferences.train + data.preferences.test


@pytest.mark.parametrize("name", [s.name for s in named_shapes()])
def test_a_shape_is_known_by_name_and_read_in_the_right_direction(name):
    """Samples c01 to c14: the shape is named, no [worse] is chosen, no [tie] is a preference, no
    system or earlier turn is lost, ties and unused answers are counted."""
    rows = [row for i in range(1, 4 * N) for row in shape_rows(name, i)]
    data = from_rows(rows, "mine")
    assert data.notes[0].startswith(f"mine: {len(rows)} rows, read as {name}: ")
    found = pairs_of(data)
    ties = sum("[tie]" in json.dumps(row) for row in rows) // (1 + (name == "HelpSteer ratings"))
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
    assert data.report.unused == 3 * N and "36 answers are in no pair" in str(data.notes)
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

PLAIN = [{"prompt": asked(i), "chosen": good(i), "rejected": bad(i)} for i in range(N)]
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
    given = [turn("user", "Why?", weight=1), turn("assistant", "So.", thinking="Hm.")]
    assert messages(given)[1] == turn("assistant", "So.", reasoning_content="Hm.")
    call = {
        "from": "function_call",
        "value": '{"name": "look", "arguments": {"room": null, "at": 1}}',
    }
    assert messages([call]) == [
        turn(
            "assistant",
            "",
            tool_calls=[{"type": "function", "function": {"name": "look", "arguments": {"at": 1}}}],
        )
    ]
    with pytest.raises(Dropped, match="pictures"):
        messages([turn("user", [{"type": "image", "image": "x.png"}])])
    data = from_rows([{"messages": given}] * 12, "mine")
    assert "not used in it: weight" in data.report.columns["messages"]
    assert data.sft.train[0]["completion"] == [messages(given)[1]]


# ------------------------------------------------------------------------------- a user's mapping


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
    said = capsys.readouterr().err
    assert says in said and "fields={" not in said and said.count("\n") == 1
    if error.value.example:
        assert "--field" in said


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
        ("- a", "is a list"),
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
    said = capsys.readouterr().out
    assert "columns not used: note" in said and "what became of it" in said
