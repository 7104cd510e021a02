"""Rows in the shapes in which other people keep preferences, for `test_shapes.py` and
`test_mappings.py`; their texts and markers are those of `row_texts.py`.
"""

from __future__ import annotations

import json

from row_texts import (
    EARLIER,
    SYS,
    TURNS,
    annotated,
    asked,
    bad,
    chat,
    flat,
    good,
    parts,
    rated,
    sharegpt,
    sides,
    tree,
    turn,
)
from tool_rows import tool_rows


def shape_rows(name: str, i: int) -> list[dict]:
    """Row `i` of a shape as its description has it; every fourth is a tie where it can have one."""
    tie = i % 4 == 3
    a, b, won = sides(i, tie)
    plain_a, plain_b, sure = sides(i)
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
        "HelpSteer3 edits": [
            {
                "context": chat(i, "")[:-1],
                "good_edited_response": good(i),
                "bad_edited_response": bad(i),
            }
        ],
        "UltraFeedback, by the mean of its ratings": [
            {"instruction": asked(i), "completions": rated(i)}
        ],
        "UltraFeedback, by its overall score": [
            {
                "instruction": asked(i),
                "models": ["m", "n"],
                "completions": [
                    {"response": bad(i), "overall_score": 4.0},
                    {"response": good(i), "overall_score": "7.5"},
                ],
            }
        ],
        "UltraFeedback, cleaned by Argilla": [
            {
                "prompt": asked(i),
                "chosen": chat(i, good(i))[2:],
                "chosen-rating": 5.0,
                "rejected": chat(i, bad(i))[2:],
                "rejected-rating": 2.0,
            }
        ],
        "axolotl pairs of Argilla": [
            {
                "system": SYS,
                "instruction": asked(i),
                "chosen_response": good(i),
                "rejected_response": bad(i),
            }
        ],
        "distilabel ratings": [
            {
                "instruction": asked(i),
                "generations": [a, b],
                "ratings": ([5, 1], [1, 5], [3, 3])[won],
            }
        ],
        "Orca pairs, rated by distilabel": [
            {
                "system": SYS,
                "input": asked(i),
                "chosen": a,
                "rejected": b,
                "generations": [a, b],
                "rating": ([9.0, 2.0], [2.0, 9.0], [5.0, 5.0])[won],
                "status": "tie" if tie else "unchanged",
            }
        ],
        "Orca pairs": [
            {"system": SYS, "question": asked(i), "chosen": good(i), "rejected": bad(i)}
        ],
        "Capybara pairs": [
            {
                "conversation": [{"input": EARLIER, "output": "Yes."}],
                "prompt": asked(i),
                "chosen": chat(i, good(i)),
                "rejected": chat(i, bad(i)),
                "rating_chosen": 5,
                "rating_rejected": 2,
                "chosen_model": "x",
                "rejected_model": "y",
                "source": "z",
            }
        ],
        "UltraInteract pairs": [
            {"trajectory": sharegpt(chat(i, "")[:-1]), "chosen": good(i), "rejected": bad(i)}
        ],
        "HH-RLHF, processed": [
            {
                "context": [
                    {"role": {"user": "human"}.get(m["role"], "bot"), "text": m["content"]}
                    for m in chat(i, "")[:-1]
                ],
                "chosen": {"role": "bot", "text": good(i)},
                "rejected": {"role": "bot", "text": bad(i)},
            }
        ],
        "PKU-SafeRLHF, single dimension": [
            {
                "prompt": asked(i),
                "response_0": plain_a,
                "response_1": plain_b,
                "better_response_id": sure,
            }
        ],
        "summarize-from-feedback ratings": [
            {
                "info": {"id": f"x{i}", "title": "Rooms [earlier]", "post": asked(i)},
                "summary": {"text": answer, "axes": {"overall": 2 + 3 * (won == n), "accuracy": 4}},
            }
            for n, answer in enumerate((a, b))
        ],
        "AlpacaFarm preferences": [
            {
                "instruction": asked(i),
                "input": "",
                "output_1": plain_a,
                "output_2": plain_b,
                "preference": 1 + sure,
            }
        ],
        "Stack Exchange pairs": [
            {"qid": i, "question": asked(i), "response_j": good(i), "response_k": bad(i)}
        ],
        "Stack Exchange scores": [
            {
                "qid": i,
                "question": asked(i),
                "answers": [{"text": bad(i), "pm_score": 1}, {"text": good(i), "pm_score": 5}],
            }
        ],
        "Unified-Feedback": [
            {
                "conv_A": chat(i, a)[2:],
                "conv_B": chat(i, b)[2:],
                "conv_A_rating": float(won == 0),
                "conv_B_rating": float(won == 1),
            }
        ],
        "Gemini preference tuning": [
            {
                "systemInstruction": {"role": "system", "parts": [{"text": SYS}]},
                "contents": [{"role": "user", "parts": [{"text": asked(i)}]}],
                "completions": [
                    {"completion": {"role": "model", "parts": [{"text": t}]}, "score": won == n}
                    for n, t in enumerate((a, b))
                ],
            }
        ],
        "NeMo RL preferences": [
            {
                "context": chat(i, "")[:-1],
                "completions": [
                    {"rank": n, "completion": [{"role": "assistant", "content": t}]}
                    for n, t in enumerate((good(i), bad(i)))
                ],
            }
        ],
        "LLaMA-Factory alpaca pairs": [
            {
                "instruction": asked(i),
                "input": "In short.",
                "chosen": good(i),
                "rejected": bad(i),
                "system": SYS,
                "history": [[EARLIER, "Yes."]],
            }
        ],
        "Tulu 3 preferences": [
            {
                "prompt": asked(i),
                "chosen": chat(i, good(i)),
                "chosen_model": "x",
                "rejected": chat(i, bad(i)),
                "rejected_model": "y",
                "source": "z",
            }
        ],
        "Skywork preferences": [
            {"chosen": chat(i, good(i)), "rejected": chat(i, bad(i)), "source": "z"}
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
                "conversations": sharegpt(chat(i, "")[:-1]),
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
                "subset": "z",
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
    return rows[name] if name in rows else tool_rows(name, i)
