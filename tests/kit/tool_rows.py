"""Rows as annotation tools export them, and of sets whose prompts stand in several columns; beside
those of `shape_rows.py`, with the same markers."""

from __future__ import annotations

from row_texts import EARLIER, asked, bad, good, sides


def tool_rows(name: str, i: int) -> list[dict]:
    """Row `i` of a shape; every fourth is a tie where it can have one."""
    a, b, won = sides(i, i % 4 == 3)
    names = ["response-1", "response-2"]
    votes = [names[won]] if won >= 0 else names
    rows: dict[str, list[dict]] = {
        "Argilla 1 records": [
            {
                "prompt": asked(i),
                **dict(zip(names, (a, b))),
                "best": [
                    *({"user_id": "u", "value": v, "status": "submitted"} for v in votes),
                    {"user_id": "v", "value": names[won == 0], "status": "discarded"},
                ],
                "best-suggestion": None,
                "best-suggestion-metadata": {"type": None, "score": None, "agent": None},
                "external_id": None,
                "metadata": "{}",
            }
        ],
        "Prodigy choices": [
            {
                "text": asked(i),
                "options": [{"id": 7, "text": a}, {"id": "x", "text": b}],
                "accept": [7, "x"] if won < 0 else [7 if won == 0 else "x"],
                "answer": "accept",
            }
        ],
        "Step-DPO pairs": [
            {
                "prompt": asked(i),
                "initial_reason_steps": f"Step 1: {EARLIER} Step 2:",
                "chosen": good(i),
                "rejected": bad(i),
                "full_chosen": "Step 2 and all that follows.",
                "answer": str(i),
            }
        ],
        "Preference Collection": [
            {
                "instruction": f"Compare {good(i)} with {bad(i)}",
                "output": "Feedback: the first. [RESULT] A",
                "orig_instruction": asked(i),
                "orig_response_A": sides(i)[0],
                "orig_response_B": sides(i)[1],
                "orig_preference": "AB"[sides(i)[2]],
                "orig_score_A": "4",
            }
        ],
    }
    return rows[name]
