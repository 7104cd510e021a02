"""Turns of a conversation, in whatever form people keep them, as chat templates know them.

A message of ours has `role` (system, user, assistant, tool), `content` (text), and where it has
them `tool_calls`, `tool_call_id`, `name` and `reasoning_content`. Roles go by many names; contents
come as text or in parts; whole conversations come as JSON or Python text in one cell.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any, TypeAlias

from ..stages import read_table

Cell: TypeAlias = Any
"""What stands in a row under a column, or in an object inside it."""
Row: TypeAlias = Mapping[str, Cell]
"""A row, or an object in it, as other people keep it."""
Example: TypeAlias = dict[str, Cell]
"""A row with our fields, or with their token ids."""
Message: TypeAlias = dict[str, Cell]
"""A turn of a conversation: {"role", "content"}, and what else it has."""
Prompt: TypeAlias = str | list[Message] | list[int]
"""Text, a conversation, or token ids."""
Answer: TypeAlias = str | list[Message]
"""Text, or several messages (assistant with a tool call, tool, assistant)."""

TABLE: dict[str, Any] = read_table(__file__, "shapes.yaml")
"""Names of roles and columns, words in them, what values mean, and shapes that have a name."""
ROLE_NAMES: dict[str, str] = {
    theirs: ours for ours, names in TABLE["roles"].items() for theirs in names
}
NOTHING, TIES, GOOD, BAD, MORE, LESS = map(set, TABLE["values"].values())
"""What stands for nothing, for a tie, for a good answer and for a bad one, and for more or less of
what a column is about, in lower case."""
STANDS_FOR_NOTHING = "a text that stands for nothing (nan, N/A, [deleted], …)"

NO_TEXT = "a message with parts that are no text (pictures, files, …)"
NO_CONTENT = "a message whose content is neither text nor parts of text"
A_DATE = "a date, which datasets and pandas make of such texts: give the file itself"

HUMAN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
EXTRA_ID = re.compile(r"<extra_id_1>(User|Assistant)\n")
AS_TEXT = re.compile(r"""\s*\[?\s*\{\s*['"](role|from|content|value|text|parts)['"]\s*:""")
LEARNED = ("weight", "train", "training", "loss", "loss_weight", "loss_scale")
"""Keys with which OpenAI, axolotl, ms-swift and others say whether a turn is learned."""
NOT_LEARNED = {"0", "0.0", "false"}
ROUNDS = (("input", "output"), ("human", "assistant"), ("user", "assistant"))
"""Keys of an object that holds a question and its answer, as in Capybara."""
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message, and types of its parts, that hold what was thought."""
CONTENT = ("content", "value", "text", "parts")
READ = {
    "role",
    "from",
    *CONTENT,
    "tool_calls",
    "function_call",
    "tool_call_id",
    "name",
    *THOUGHTS,
    *LEARNED,
}
"""Keys of a message that are read."""


class Dropped(ValueError):
    """A row that cannot be used; its message is the reason it is counted under.

    `example` is a mapping that would read it, where there is one.
    """

    example: dict[str, object] = {}


def _other_type(value: object) -> str:
    """Why a value that is neither text nor messages cannot be used."""
    if isinstance(value, date):
        return A_DATE
    if isinstance(value, Mapping):
        return f"wrong type: an object ({', '.join(map(str, [*value][:4]))}) that is no message"
    if isinstance(value, (list, tuple)):
        kinds = {"str": "text", "dict": "object"}
        inside = sorted({kinds.get(type(v).__name__, type(v).__name__) for v in value})
        return f"wrong type: a list of {', '.join(f'{kind}s' for kind in inside)}, no messages"
    return f"wrong type: {type(value).__name__}"


def listed(value: object) -> object:
    """The rows of a table that is an object of lists of like length, as `datasets` keeps lists of
    objects; any other value as it is."""
    value = structure(value)
    columns = [*value.values()] if isinstance(value, Mapping) else []
    if not columns or not all(isinstance(c, (list, tuple)) for c in columns):
        return value
    if len({len(c) for c in columns}) > 1:
        return value
    assert isinstance(value, Mapping)
    return [dict(zip(value, cells)) for cells in zip(*columns)]


def text(value: object) -> str:
    """A cell as text. Raises Dropped for what is empty, no text, or stands for nothing."""
    if not isinstance(value, str):
        missing = value is None or (isinstance(value, float) and math.isnan(value))
        raise Dropped("empty" if missing else _other_type(value))
    if len(value) < 30:
        bare = value.strip()
        if bare.lower() in NOTHING:
            raise Dropped(STANDS_FOR_NOTHING)
        if not bare:
            raise Dropped("empty")
    elif value.isspace():
        raise Dropped("empty")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:  # half of a surrogate pair: no tokenizer takes it
            raise Dropped("broken characters") from None
    return value


def plainly_text(value: object) -> bool:
    """Whether a cell is text at first sight, which `conversation` and `text` would only confirm."""
    return (
        isinstance(value, str)
        and len(value) >= 30
        and value[0].isalnum()
        and value[0] not in "HA"  # Human:, Assistant:
        and value.isascii()
        and "<extra_id_1>" not in value
    )


def missing(value: object) -> bool:
    """Whether a cell holds nothing at all: None, NaN, "", white space, []."""
    if isinstance(value, str):
        return not value or value.isspace()
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, (list, tuple, dict)) and not value)


def structure(value: object) -> object:
    """A cell as the list or dict that it holds, as JSON or Python text or as an array; else as it
    is."""
    if not isinstance(value, str):
        to_list = None if value is None else getattr(value, "tolist", None)
        return to_list() if to_list else value
    if value[:1] not in ("[", "{") and value.lstrip()[:1] not in ("[", "{"):
        return value
    for read in (json.loads, ast.literal_eval):
        try:
            found: object = read(value.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        return found if isinstance(found, (list, dict)) else value
    return value


def conversation(value: object) -> list[Message]:
    """The messages of a cell that holds a conversation; [] for one that holds plain text."""
    if not isinstance(value, str):
        return messages(value)
    if found := dialogue(value):
        return found
    if value[:1].isalnum() or not AS_TEXT.match(value):
        return []
    inside = structure(value)
    if inside is value:
        raise Dropped("messages as text that cannot be parsed")
    turns = inside if isinstance(inside, list) else [inside]
    are_messages = all(
        isinstance(m, dict) and {"role", "from"} & m.keys() and m.keys() & {*CONTENT} for m in turns
    )
    return messages(turns, True) if are_messages else []


def messages(value: object, as_text: bool = False) -> list[Message]:
    """A list of messages (or one) with the roles and keys that chat templates know. `as_text`: they
    were JSON text, whose nulls somebody wrote."""
    value, as_text = turns_of(value), as_text or isinstance(value, str)
    if missing(value):
        raise Dropped("empty")
    turns = [value] if isinstance(value, Mapping) else value
    if not isinstance(turns, (list, tuple)) or not all(isinstance(m, Mapping) for m in turns):
        raise Dropped(_other_type(turns))
    turns = of_anthropic(unrolled(turns))
    found = [turn for m in turns if (turn := _message(m, as_text))]
    if not found:
        raise Dropped("empty")
    if found[-1]["role"] == "assistant":
        _check_learned(turns)
    return found


def _check_learned(turns: Sequence[Row]) -> None:
    """Raises Dropped where an answer, or a call of it, is not to be learned, or by a share."""
    for place, turn in enumerate(reversed(turns)):
        role = str(turn.get("role") or turn.get("from")).strip().lower()
        if ROLE_NAMES.get(role) == "user":
            return
        marks = {str(turn[k]).lower() for k in LEARNED if not missing(turn.get(k))}
        if marks & NOT_LEARNED and ROLE_NAMES.get(role) != "tool":
            part = "of which a part " * (place > 0)
            raise Dropped(f"an answer {part or 'that '}is marked as not to be learned")
        if odd := marks - NOT_LEARNED - {"1", "1.0", "true"}:
            raise Dropped(f"an answer whose weight is {min(odd)}, and answers are learned or not")


def turns_of(value: object) -> object:
    """The turns of a cell, also of `{"messages": […]}` and of an object of lists."""
    value = structure(value)
    if isinstance(value, Mapping) and len(value) == 1:
        value = structure(next((value[k] for k in TABLE["conversations"] if k in value), value))
    if isinstance(value, Mapping) and any(isinstance(value.get(k), list) for k in ("role", "from")):
        return listed(value)
    return value


def unrolled(turns: Sequence[Row]) -> Sequence[Row]:
    """Turns out of objects that hold what was asked and what was answered; others as they are."""
    found: list[Row] = []
    for turn in turns:
        pair = next((p for p in ROUNDS if turn.keys() >= {*p}), None)
        if pair is None or turn.keys() & {"role", "from"}:
            found.append(turn)
            continue
        found += [{"role": r, "content": turn[k]} for r, k in zip(("user", "assistant"), pair)]
    return found


CALL, RESULT = "tool_use", "tool_result"


def of_anthropic(turns: Sequence[Row]) -> Sequence[Row]:
    """Turns with calls and results as parts of their content, as Anthropic's API has them, in the
    form of the others: a call belongs to its message, a result is a message of the role tool, with
    the name of the call that it answers. Raises Dropped where that order would not be kept."""
    found: list[Row] = []
    names: dict[object, object] = {}
    for turn in turns:
        content = turn.get("content")
        parts: Cell = content if isinstance(content, str) else structure(content)
        listed = isinstance(parts, (list, tuple)) and all(isinstance(p, Mapping) for p in parts)
        kinds = [part.get("type") for part in parts] if listed else []
        if not {CALL, RESULT} & {*kinds}:
            found.append(turn)
            continue
        calls, results = ([p for p in parts if p.get("type") == k] for k in (CALL, RESULT))
        rest = [p for p in parts if p.get("type") not in (CALL, RESULT)]
        if turn.get("role") != ("user" if results else "assistant") or turn.get("tool_calls"):
            _no_calls()
        if [*parts] != [*results, *rest, *calls] or (calls and results):
            raise Dropped("text behind a tool call, or before a tool's result, in one message")
        for result in results:
            if result.get("is_error") or result.get("tool_use_id") not in names:
                raise Dropped("a tool's result that is an error, or answers no call before it")
            answer = {"tool_call_id": (n := result["tool_use_id"]), "name": names[n]}
            found.append({"role": "tool", "content": result.get("content"), **answer})
        for call in calls:
            if not call.get("id") or not isinstance(call.get("input"), Mapping):
                _no_calls()
            names[call["id"]] = call.get("name")
        asked = [{"id": c["id"], "name": c.get("name"), "arguments": c["input"]} for c in calls]
        if rest or calls:
            found.append({**turn, "content": rest, **({"tool_calls": asked} if asked else {})})
    return found


def _message(given: Row, as_text: bool) -> Message | None:
    """One message; None for a system turn that says nothing."""
    theirs = given.get("role") or given.get("from")
    if not isinstance(theirs, str):
        raise Dropped(_other_type(given))
    role = ROLE_NAMES.get(theirs) or ROLE_NAMES.get(theirs.strip().lower())
    if role is None:
        raise Dropped(f"unknown role {theirs[:30]!r}")
    content = next((given[k] for k in CONTENT if given.get(k) is not None), None)
    body, thoughts = (returned(content), None) if role == "tool" else _parted(content)
    calls = tool_calls(given.get("tool_calls") or given.get("function_call"), as_text)
    if role == "function_call":
        role, body, calls = "assistant", None, tool_calls(body, as_text) or _no_calls()
    if missing(body) and (calls or role in ("tool", "system")):
        if role == "system":
            return None
        body = ""
    elif role != "tool" or not isinstance(body, str):  # what a tool answers may well be "null"
        body = text(body)
    turn: Message = {"role": role, "content": body}
    turn |= {"tool_calls": calls} if calls else {}
    turn |= {k: given[k] for k in ("tool_call_id", "name") if given.get(k)}
    beside = next((given[k] for k in THOUGHTS if not missing(given.get(k))), None)
    if thoughts and beside not in (None, thoughts):
        raise Dropped("a message that is given two kinds of reasoning")
    thoughts = thoughts if beside is None else text(beside)
    return turn | ({"reasoning_content": thoughts} if thoughts else {})


def joined(content: object) -> object:
    """The text of a message that comes in parts, as multimodal data have it; no pictures, and no
    thoughts."""
    return _parted(content)[0]


def _parted(content: object) -> tuple[object, str | None]:
    """What a message that may come in parts says, and what it thinks: AI SDK's parts have the type
    reasoning, Anthropic's and Mistral's thinking."""
    content = content if isinstance(content, str) else structure(content)
    parts = content.get("parts", [content]) if isinstance(content, Mapping) else content
    if not isinstance(parts, (list, tuple)):
        return parts, None
    spoken: list[str] = []
    thought: list[str] = []
    for part in parts:
        found, kind = part, ""
        if isinstance(part, Mapping):
            kind = str(part.get("type") or "")
            keys = ("text", "value", *(THOUGHTS if kind in THOUGHTS else ()))
            found = next((part[k] for k in keys if part.get(k) is not None), None)
        if kind in THOUGHTS and not isinstance(found, str):
            found = joined(found)  # Mistral's thoughts are parts themselves
        if not isinstance(found, str):
            if kind.startswith(("tool", "function")):
                _no_calls()
            typed = all(isinstance(p, Mapping) and "type" in p for p in parts)
            raise Dropped(NO_TEXT if typed else NO_CONTENT)
        (thought if kind in THOUGHTS else spoken).append(found)
    return "".join(spoken) if spoken or not thought else None, "\n\n".join(thought) or None


def returned(content: object) -> object:
    """What a tool returned, as text: an object, a list or a number as JSON, as templates write it
    where they take more than texts. Parts of a text are joined."""
    value = content if isinstance(content, str) else structure(content)
    if isinstance(value, Mapping):
        in_parts = value.get("type") == "text" or "parts" in value
    else:
        parts = value if isinstance(value, (list, tuple)) else []
        in_parts = any(isinstance(part, Mapping) and "type" in part for part in parts)
    if in_parts or isinstance(value, str) or missing(value):
        return joined(value)
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):  # dates, bytes
        raise Dropped(NO_CONTENT) from None


def tool_calls(value: object, as_text: bool = False) -> list[Message]:
    """Calls in the form that chat templates take: {"type", "function": {"name", "arguments"}}. Only
    those that were no text (`as_text`) have gaps in their arguments."""
    value, as_text = structure(value), as_text or isinstance(value, str)
    calls = []
    for call in [value] if isinstance(value, Mapping) else _sequence(value):
        function = call.get("function") if isinstance(call, Mapping) else None
        function = call if function is None else function
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            _no_calls()
        given = function.get("arguments", function.get("parameters"))
        arguments = structure(given) or {}
        if not (as_text or isinstance(given, str)):
            arguments = _without_none(arguments)
        named = {"name": function["name"], "arguments": arguments}
        number = {"id": call["id"]} if call.get("id") else {}
        calls.append({"type": "function", **number, "function": named})
    return calls


def _no_calls() -> list[Message]:
    raise Dropped("tool calls in a form that is not known")


def tools(value: object) -> list[Example]:
    """The JSON schemas of the tools that a row offers; [] for none."""
    as_text, value = isinstance(value, str), structure(value)
    found = []
    for given in [value] if isinstance(value, Mapping) else _sequence(value):
        schema: Cell = structure(given)
        named = schema.get("function") or schema if isinstance(schema, Mapping) else None
        if not isinstance(named, Mapping) or not isinstance(named.get("name"), str):
            raise Dropped("tools in a form that is not known")
        if not (as_text or isinstance(given, str)):
            schema = _without_none(schema)
        bare = "parameters" in schema
        found.append({"type": "function", "function": schema} if bare else schema)
    return found


def history(value: object) -> list[Message]:
    """Earlier turns: messages, or pairs of what was asked and answered; [] for none."""
    value = structure(value)
    if missing(value):
        return []
    if isinstance(value, str) and (found := conversation(value)):
        return found
    if isinstance(value, str) or all(isinstance(turn, str) for turn in _sequence(value)):
        raise Dropped("earlier turns as text, which does not say who speaks")
    rounds = _sequence(value)
    if all(isinstance(r, (list, tuple)) and len(r) == 2 for r in rounds):
        return [m for r in rounds for m in (_turn("user", r[0]), _turn("assistant", r[1]))]
    return conversation(value)


def rounds(asked: object, answered: object) -> list[Message]:
    """A conversation out of the list of what was asked and the list of what was answered."""
    if not isinstance(answered, list) or not isinstance(asked, list) or len(asked) != len(answered):
        raise Dropped("prompts and answers differ in number")
    return [m for q, a in zip(asked, answered) for m in (_turn("user", q), _turn("assistant", a))]


def _turn(role: str, content: object) -> Message:
    return {"role": role, "content": text(content)}


def _sequence(value: object) -> Sequence[Cell]:
    if missing(value):
        return []
    if not isinstance(value, (list, tuple)):
        raise Dropped("wrong type")
    return value


def _without_none(value: Cell) -> Cell:
    """Without the gaps that Parquet writes for keys which other rows have."""
    if isinstance(value, Mapping):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, list) else value


def dialogue(text: str) -> list[Message]:
    """Messages of a `\\n\\nHuman: … \\n\\nAssistant: …` string, or one whose turns are parted by
    `<extra_id_1>User` as in HelpSteer2; [] for any other text."""
    if text.startswith(("\n\nHuman:", "\n\nAssistant:", "Human:", "Assistant:")):
        if text[0] != "\n" and "\n\nAssistant:" not in text:
            return []
        _, *pieces = HUMAN.split(text)
    elif "<extra_id_1>" in text:
        first, *pieces = EXTRA_ID.split(text)
        pieces = ["User", first, *pieces] if pieces else []
    else:
        return []
    return [
        {"role": ROLE_NAMES[who.lower()], "content": content.strip()}
        for who, content in zip(pieces[::2], pieces[1::2])
    ]
