"""The shapes in which people keep instructions and preferences, and how a row becomes ours.

Ours: `prompt` (text, or a list of messages), `completion`, `chosen`, `rejected` (texts). Read are
TRL's shapes (prompt and completion; prompt, chosen and rejected, the prompt explicit or the common
beginning of both; the same as lists of messages; a conversation under `messages`), the
`\\n\\nHuman: … \\n\\nAssistant: …` dialogues of HH-RLHF, and instruction files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

Example: TypeAlias = dict[str, Any]
"""A row with our fields, or with their token ids."""
Message: TypeAlias = dict[str, str]
"""A turn of a conversation: {"role", "content"}."""
Prompt: TypeAlias = str | list[Message] | list[int]
"""Text, a conversation, or token ids."""

FIELDS = {
    "prompt": ("prompt", "instruction", "question", "query"),
    "completion": ("completion", "output", "response", "answer", "messages", "conversations"),
    "chosen": ("chosen", "preferred"),
    "rejected": ("rejected", "dispreferred"),
    "label": ("label",),
}
"""Names under which people store each field. An `input` beside `instruction` belongs to the prompt;
`messages` holds prompt and completion in one."""

TURN = re.compile(r"\n\n(Human|Assistant):")
ROLE_NAMES = dict.fromkeys(("gpt", "bot", "Assistant"), "assistant")
ROLE_NAMES |= dict.fromkeys(("human", "Human"), "user")
"""Other people's names of the roles that chat templates know."""


class Dropped(Exception):
    """A row that cannot be used; its message is the reason it is counted under."""


@dataclass(frozen=True)
class Shape:
    """Where each of our fields stands in a row, and whether a newline must part prompt and answer.

    `fields` maps ours to theirs; `extra` is a column that is added to the prompt.
    """

    fields: Mapping[str, str]
    extra: str | None = None
    separator: str = ""

    def __str__(self) -> str:
        parts = [f"{ours} = {theirs!r}" for ours, theirs in self.fields.items()]
        if "prompt" not in self.fields:
            parts.insert(0, "prompt = what comes before the last answer")
        if self.extra:
            parts.append(f"{self.extra!r} added to the prompt")
        if self.separator:
            parts.append("a line break between prompt and answer")
        return ", ".join(parts)


def recognise(rows: Sequence[object], fields: Mapping[str, str] | None, name: str) -> Shape:
    """The shape of some rows; `fields` (ours → theirs) names what must not be guessed.

    Raises ValueError with one line when there is no prompt or nothing to train on.
    """
    mappings = [r for r in rows if isinstance(r, Mapping)]
    have = list(dict.fromkeys(k for r in mappings for k in r))
    filled = {k for k in have if any(r.get(k) for r in mappings)}
    fields = dict(fields or {})
    for ours, theirs in fields.items():
        if ours not in FIELDS:
            raise ValueError(f"{name}: no field {ours!r} to map; choose from {', '.join(FIELDS)}")
        if theirs not in have:
            raise ValueError(f"{name}: no column {theirs!r} for {ours}; there are {_list(have)}")
    guessed = {
        ours: fields.get(ours) or next((k for k in known if k in filled), "")
        for ours, known in FIELDS.items()
    }
    found = {ours: theirs for ours, theirs in guessed.items() if theirs}
    if "label" in found and "label" not in fields and not _are_labels(mappings, found):
        del found["label"]
    if not have:
        raise ValueError(f"{name} must hold a list of objects, one per row: it has none")
    if ("chosen" in found) != ("rejected" in found):
        there, lacking = ("chosen", "rejected") if "chosen" in found else ("rejected", "chosen")
        raise ValueError(
            f"{name}: {there} is there, {lacking} is not, among {_list(have)}; map it with "
            f"fields={{{lacking!r}: COLUMN}}"
        )
    if "prompt" not in found and not ({"chosen", "completion"} & found.keys()):
        raise ValueError(
            f"{name}: no prompt field among {_list(have)}; name it one of "
            f"{', '.join(FIELDS['prompt'])}, or map it with fields={{'prompt': COLUMN}}"
        )
    extra = "input" if found.get("prompt") == "instruction" and "input" in filled else None
    shape = Shape(found, extra)
    converted = _converted(rows, shape)
    if not converted and "prompt" not in found:
        raise ValueError(
            f"{name}: no prompt: {', '.join(map(repr, found.values()))} hold no "
            "conversation to take it from; map it with fields={'prompt': COLUMN}"
        )
    return replace(shape, separator=_separator(converted, shape))


def _are_labels(rows: Sequence[Mapping[str, object]], found: Mapping[str, str]) -> bool:
    """Whether a column holds for each answer whether it is a good one (true) or not (false)."""
    known = [v for r in rows if (v := r.get(found["label"])) is not None]
    return "completion" in found and bool(known) and all(isinstance(v, bool) for v in known)


def _converted(rows: Sequence[object], shape: Shape) -> list[Example]:
    """The rows that can be used, with our fields."""
    converted = []
    for row in rows:
        try:
            converted.append(convert(row, shape))
        except Dropped:
            continue
    return converted


def _separator(rows: Sequence[Example], shape: Shape) -> str:
    """A line break where text prompts and answers mostly touch without white space, else ""."""
    touching = parted = 0
    answers = [f for f in ("completion", "chosen") if f in shape.fields]
    for row in rows:
        if isinstance(row["prompt"], str):
            for answer in (row[f] for f in answers if f in row):
                apart = row["prompt"][-1:].isspace() or answer[:1].isspace()
                parted, touching = parted + apart, touching + (not apart)
            touching += not answers and not row["prompt"][-1:].isspace()
    return "\n" if touching > parted else ""


def _list(names: Sequence[str]) -> str:
    shown = [str(n) for n in names[:12]] + ["…"] * (len(names) > 12)
    return f"[{', '.join(shown)}]"


# ------------------------------------------------------------------------------------ one row


def convert(row: object, shape: Shape) -> Example:
    """One row with our fields, those it has. Raises Dropped with the reason."""
    if not isinstance(row, Mapping):
        raise Dropped("wrong type")
    prompt: str | list[Message] | None = None
    if "prompt" in shape.fields:
        prompt = _prompt(row.get(shape.fields["prompt"]))
        if shape.extra and isinstance(row.get(shape.extra), str) and row[shape.extra].strip():
            prompt = f"{_text(prompt)}\n{row[shape.extra].strip()}"
    answers: Example = {}
    before: list[list[Message]] = []  # conversations that answers stand at the end of
    for ours in ("completion", "chosen", "rejected"):
        value = row.get(shape.fields.get(ours))
        if value is None or value == [] or (isinstance(value, str) and not value.strip()):
            continue  # a row may serve one stage and not another
        answers[ours], earlier = _answer(value)
        if earlier:
            before.append(earlier)
    if any(earlier != before[0] for earlier in before):
        raise Dropped("prompts differ")
    if before:  # a whole conversation holds more than a prompt beside it
        prompt = before[0]
    if prompt is None:
        raise Dropped("no prompt" if answers else "empty")
    if isinstance(prompt, str) and not prompt.endswith(shape.separator):
        prompt += shape.separator
    pair = {"chosen", "rejected"} & answers.keys()
    if len(pair) == 1:
        del answers[pair.pop()]
    if not answers and len(shape.fields) > ("prompt" in shape.fields):
        raise Dropped("empty")
    if "label" in shape.fields:
        label = row.get(shape.fields["label"])
        if label not in (False, True):  # 0 and 1 too
            raise Dropped("no label")
        answers["label"] = bool(label)
    return {"prompt": prompt, **answers}


def _prompt(value: object) -> str | list[Message]:
    if not isinstance(value, str):
        return messages(value)
    turns = dialogue(value)
    if not turns:
        return _text(value)
    # An HH dialogue that ends in "\n\nAssistant:" asks for the next turn.
    asked = [turn for turn in turns if turn["content"]]
    if not asked:
        raise Dropped("empty")
    return asked


def _answer(value: object) -> tuple[str, list[Message]]:
    """An answer's text, and the conversation before it where the two stand together."""
    turns = dialogue(value) if isinstance(value, str) else messages(value)
    if not turns:
        return _text(value), []
    if turns[-1]["role"] != "assistant":
        raise Dropped("no answer at the end")
    return _text(turns[-1]["content"]), turns[:-1]


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise Dropped("empty" if value is None else "wrong type")
    if not value.strip():
        raise Dropped("empty")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:  # half of a surrogate pair: no tokenizer takes it
            raise Dropped("broken characters") from None
    return value


def messages(value: object) -> list[Message]:
    """A list of messages with the roles and keys that chat templates know."""
    if value is None or value == []:
        raise Dropped("empty")
    if not isinstance(value, (list, tuple)) or not all(isinstance(m, Mapping) for m in value):
        raise Dropped("wrong type")
    turns = []
    for message in value:
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if not isinstance(role, str):
            raise Dropped("wrong type")
        turns.append({"role": ROLE_NAMES.get(role, role), "content": _text(_joined(content))})
    return turns


def _joined(content: object) -> object:
    """The text of a message that comes in parts, as multimodal data have it; no pictures."""
    if not isinstance(content, (list, tuple)):
        return content
    if not all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in content):
        raise Dropped("wrong type")
    return "".join(p["text"] for p in content)


def dialogue(text: str) -> list[Message]:
    """Messages of a `\\n\\nHuman: … \\n\\nAssistant: …` string; [] for any other text."""
    if not text.startswith(("\n\nHuman:", "\n\nAssistant:")):
        return []
    _, *pieces = TURN.split(text)
    return [
        {"role": ROLE_NAMES[who], "content": content.strip()}
        for who, content in zip(pieces[::2], pieces[1::2])
    ]


# -------------------------------------------------------------------------------------- a report


@dataclass
class Report:
    """What was found in a source: rows read, kept, and dropped by reason.

    `missing`: rows that were kept without a field that others have, by field.
    """

    name: str
    shape: Shape
    rows: int = 0
    kept: int = 0
    sampled: bool = False
    identical: int = 0
    missing: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)

    def drop(self, reason: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def count_missing(self, row: Example) -> None:
        """Count the fields that a converted row lacks."""
        for ours in self.shape.fields.keys() - row.keys() - {"prompt"}:
            self.missing[ours] = self.missing.get(ours, 0) + 1

    def notes(self) -> list[str]:
        """The report in lines for people."""
        lines = [f"{self.name}: {self.rows:,} rows, read as {self.shape}"]
        lines += [f"{self.name}: dropped {n:,} rows: {why}" for why, n in self.dropped.items()]
        lines += [f"{self.name}: {n:,} rows have no {f}" for f, n in sorted(self.missing.items())]
        if self.identical:
            lines.append(
                f"{self.name}: dropped {self.identical:,} pairs whose chosen and rejected "
                "are identical"
            )
        if self.sampled:
            lines.append(f"{self.name}: a random sample of {self.kept:,} rows is used")
        return lines
