"""What stands beside the columns that are read and may belong to them: conversations, labels in
objects and messages, scales, and turns, texts or questions before an answer. What nobody has
explained is asked."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from .labels import WORDS, Rows, holds_texts, is_label, words
from .mapping import FieldMap, Fields, Refused, mentions, number
from .messages import READ, ROLE_NAMES, TABLE, Cell, Row, missing, structure, turns_of, unrolled
from .suggest import Path, by_middle, likely_prompt, path_of
from .wrapped import ENOUGH

CONVERSATIONS = TABLE["conversations"]
SPEAKS = {"system", "sys", "persona", "preamble", "developer", "instructions"}
"""Words in the names of columns that hold a system prompt."""
FAULTS = {"error", "errors", "exception", "violation", "violations", "issues", "flags"}
"""Words in the names of columns that tell what is wrong with an answer."""
MENDED = {
    "corrected",
    "correction",
    "edit",
    "edited",
    "revised",
    "revision",
    "improved",
    "rewritten",
}
"""Words in the names of columns that hold a better text of an answer."""
BELONGS = {"input": ("instruction",), "context": ("instruction", "question")}
"""Columns that are added to the prompt, beside columns of these names."""


# ------------------------------------------------------------------------------------ conversations


def place_conversations(
    rows: Rows, found: FieldMap, free: Mapping[str, str], user: FieldMap
) -> None:
    """What a column of whole conversations is: the prompt, where most of them wait for the answers
    beside them; prompt and answer in one, where no other column is the prompt."""
    talks = [free[c] for c in CONVERSATIONS if c in free]
    whole = next(iter(talks), "")
    ends = [last_role(cell) for r in rows if not missing(cell := r.get(whole))]
    answered = ends.count("assistant")
    waits = bool(ends) and answered * 2 < len(ends)
    if found.keys() & {"answers", "chosen"} and "prompt" not in user and waits:
        if whole in [v for k, v in found.items() if k != "completion"]:
            return
        asked = [(r.get(str(found.get("prompt"))), r.get(whole)) for r in rows]
        within = all(isinstance(a, str) and a.strip() in texts_of(talk) for a, talk in asked)
        found["prompt" if "prompt" not in found or within else "history"] = whole
        if found.get("completion") == whole:
            del found["completion"]
    if "prompt" in found:
        return
    if found.get("completion") in talks:
        if waits and answered < ENOUGH:
            found["prompt"] = found.pop("completion")
    elif "completion" in found and ends and answered < len(ends):
        found["prompt"] = whole  # what is asked stands in it, the answer beside it
    elif "completion" in found and ends:
        found["completion"] = whole


def last_role(cell: object) -> str:
    """Our name of who speaks last in a conversation; "" for what is none."""
    turns = turns_of(cell)
    last = turns[-1] if isinstance(turns, list) and turns else None
    last = unrolled([last])[-1] if isinstance(last, Mapping) else None
    role = (last.get("role") or last.get("from")) if isinstance(last, Mapping) else ""
    return ROLE_NAMES.get(str(role).strip().lower(), "")


# ------------------------------------------------------------------------- labels inside of columns


def inner_labels(rows: Rows, of: Fields, columns: Sequence[str]) -> tuple[list[Row], list[str]]:
    """Rows of what stands inside of columns, and the paths of it that seem to say how good an
    answer is: keys of objects (`metadata.quality`), of the only one of a list, and of the answer's
    last message (`messages[-1].feedback`)."""
    found: list[dict[str, Cell]] = [{} for _ in rows]
    for column in [*columns, of.completion]:
        at = -1 if column == of.completion else 0
        for row, inner in zip(rows, found):
            item: Cell = structure(row.get(column)) if column else None
            listed = isinstance(item, (list, tuple)) and (len(item) == 1 or (at and item))
            item = structure(item[at]) if listed else item
            if not isinstance(item, Mapping) or (at and not item.keys() & {"role", "from"}):
                continue
            where = f"{path_of(column)}[{at}]" if listed else path_of(column)
            known = READ if at else ()
            inner |= {f"{where}.{path_of(str(k))}": v for k, v in item.items() if k not in known}
    labels: list[str] = []
    for path in dict.fromkeys(p for inner in found for p in inner):
        # By the name of the key: that of the column may say more than it means.
        key = path.rpartition(".")[2].strip('"')
        if not ignored(path, of) and is_label(key, [{key: i.get(path)} for i in found]):
            labels.append(Path(path))
    return [*found], labels


def check_mended(of: Fields, rows: Rows, columns: Sequence[str], name: str) -> None:
    """Refuse a column that says what is wrong with some of the answers (`error`, where it holds
    anything), and one with a better text of the same answers (`corrected_response`)."""
    for column in columns:
        found, cells = words(column), [r.get(column) for r in rows]
        if found & (WORDS["of_prompt"] | WORDS["about"]):
            continue
        filled = [not missing(cell) for cell in cells]
        some = all(not isinstance(cell, (bool, int, float)) for cell in cells) and any(filled)
        if found & FAULTS and some and not all(filled):
            raise Refused(
                f"{name}: {column!r} says something of some answers, and bad answers are no "
                "demonstrations; say which are good, {fields}, or that it means nothing: {ignore}",
                {"label": f"!{path_of(column)}"},
                ignore=[column],
            )
        beside = [(c, r.get(of.completion)) for c, r in zip(cells, rows) if isinstance(c, str)]
        # Not a note on what was changed: about as long as the answer itself, or longer.
        texts = [text for text, old in beside if 3 * len(text) > sum(map(len, texts_of(old)))]
        if found & MENDED and 2 * len(texts) > sum(filled) and holds_texts(rows, column, len(rows)):
            raise Refused(
                f"{name}: {column!r} may hold better answers than {of.completion!r}; learn which "
                "is better, {fields}, or the better ones, {other}, or say that it means nothing: "
                "{ignore}",
                {"chosen": column, "rejected": of.completion},
                ignore=[column],
                other={"completion": column},
            )


def ignored(path: str, of: Fields) -> bool:
    """Whether a path is read already, or is said to mean nothing."""
    return any(mentions(p, path) or p == path for p in (*of.paths().values(), *of.ignore))


def check_signs(of: Fields, cells: Sequence[object], name: str) -> None:
    """Refuse a signed number that has one sign only: a scale from 1 to 7 has its middle at 4."""
    found = [n for cell in cells if (n := number(cell)) is not None]
    if len(found) >= ENOUGH and len({*found}) > 1 and (min(found) > 0 or max(found) < 0):
        side = "above" if found[0] > 0 else "below"
        raise Refused(
            f"{name}: {of.preference!r} is read as a signed number, and all are {side} 0; of a "
            "scale say where its middle is, {fields}",
            by_middle(of),
        )


# ------------------------------------------------------------------------------- before the answer


def check_before(of: Fields, rows: Rows, filled: Sequence[str], name: str) -> None:
    """Refuse columns that seem to hold what comes before an answer, and that are not read: a system
    prompt, earlier turns, a text that is asked about, another question."""
    used = [*of.paths().values(), of.each, of.group, *of.ignore]
    added = [c for c, beside in BELONGS.items() if of.prompt in beside and c in filled][:1]
    read = [c for c in filled if any(mentions(p, c) for p in used)]
    beside = [c for c in filled if c not in read and c not in added]
    prompts = [c for c in beside if c.lower() in TABLE["names"]["prompt"] and of.prompt]
    before = [c for c in beside if words(c) & WORDS["before"] or c in prompts]
    if not of.prompt and (asked := likely_prompt(rows, filled)) in before:
        before.remove(asked)  # is there none, it is asked
    for column in before:
        cells = [(cell, r) for r in rows if not missing(cell := r.get(column))]
        new = [cell for cell, r in cells if _says(cell, column) and not _within(cell, r, read)]
        if 10 * len(new) <= len(cells):
            continue
        what = (
            "the question, or a part of it" if column in prompts else "what comes before an answer"
        )
        raise Refused(
            f"{name}: {column!r} looks as if it held {what}, and is not read; say how it is, "
            "{fields}, or that it means nothing: {ignore}",
            _reads(column, new, of, filled),
            ignore=[column],
        )


def comes_later(row: Row, filled: frozenset[str], of: Fields) -> str:
    """A column that says what comes before an answer in this row, and that the first rows lack or
    leave empty (`filled`: those they do not); "" for none."""
    for column in row.keys() - filled:
        named = any(column.lower() in TABLE["names"][n] for n in ("system", "history", "tools"))
        if (named or words(column) & WORDS["before"]) and not ignored(column, of):
            if not missing(row[column]) and (named or _says(row[column], column)):
                return str(column)
    return ""


def _says(cell: object, column: str) -> bool:
    """Whether a cell holds turns, or words that somebody could have said, and no name or number."""
    held = structure(cell)
    if isinstance(held, (list, tuple)) and not any(isinstance(turn, str) for turn in held):
        return any(texts_of(held))
    several = 2 if words(column) & SPEAKS else 3
    return any(len(re.findall(r"\S*\w\S*", text)) >= several for text in texts_of(held))


def _within(cell: object, row: Row, read: Iterable[str]) -> bool:
    """Whether the texts of a cell stand in the columns that are read, too."""
    known = "\n".join(text for c in read for text in texts_of(row.get(c)))
    return all(text.strip() in known for text in texts_of(cell))


def texts_of(cell: object) -> Iterator[str]:
    """The texts inside of a cell, but for the names of roles."""
    cell = structure(cell)
    if isinstance(cell, str):
        yield cell
    elif isinstance(cell, Mapping):
        for key, value in cell.items():
            yield from () if key in ("role", "from") else texts_of(value)
    elif isinstance(cell, (list, tuple)):
        for value in cell:
            yield from texts_of(value)


def _reads(column: str, cells: Sequence[object], of: Fields, filled: Sequence[str]) -> FieldMap:
    """A mapping that may read a column before the answers."""
    held = structure(cells[0])
    texts = isinstance(held, str) or (isinstance(held, list) and isinstance(held[0], str))
    if not texts and not of.history:
        return {"history": column}
    if not of.prompt and isinstance(held, str) and not words(column) & SPEAKS and of.answers:
        return {"prompt": column}
    if isinstance(held, str) and not of.system and (words(column) & SPEAKS or not of.prompt):
        return {"system": column}
    if not of.prompt:
        return {"history": "COLUMN"}
    parts = [path_of(column), path_of(of.prompt) if of.prompt in filled else of.prompt]
    if column.lower() in TABLE["names"]["prompt"]:
        parts.reverse()
    joined = ", ".join(parts if isinstance(held, str) else [parts[0], f"[{parts[1]}]"])
    flat = "" if isinstance(held, str) else "[] | "
    return {"prompt": f'join(`"\\n"`, [{joined}]{flat}[?@])'}
