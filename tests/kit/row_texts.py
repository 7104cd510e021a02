"""Texts of rows in other people's shapes (`shape_rows.py`), and what rows are put together from.

Texts carry markers: [better] and [worse] say which answer won, [tie] that neither did, [sys] marks
a system turn and [earlier] an earlier one.
"""

from __future__ import annotations

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


def sharegpt(messages: list[dict]) -> list[dict]:
    names = {"user": "human", "assistant": "gpt"}
    return [{"from": names[m["role"]], "value": m["content"]} for m in messages]


def rated(i: int) -> list[dict]:
    """Completions with ratings as text, among them one that has none."""
    ratings = ((bad(i), ("1", "3")), (good(i), ("5", "N/A")), ("Some.", ("N/A", "N/A")))
    return [
        {"response": r, "annotations": {"help": {"Rating": x}, "truth": {"Rating": y}}}
        for r, (x, y) in ratings
    ]


def annotated(i: int, result: dict, data: dict) -> dict:
    done = {"result": [{"type": "x", "value": result, "to_name": "answer1,answer2"}]}
    undone = {"was_cancelled": True, "result": [{"value": {"selected": "left"}}]}
    return {"id": i, "annotations": [done, undone], "data": data, "project": 1}


def pairs_of(data) -> list[dict]:
    return data.preferences.train + data.preferences.test


PLAIN = [{"prompt": asked(i), "chosen": good(i), "rejected": bad(i)} for i in range(N)]
