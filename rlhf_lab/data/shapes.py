"""Preference files that are known by name (shapes.yaml), and the few that need code to be read.

A reader takes a row (or the rows of one group) and makes rows with `prompt` and `answers`, a list
of {"text", "rank"} of which the lowest rank is the best; it yields Dropped for what it leaves out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

from .mapping import number, plain, tag_of
from .messages import Dropped, Example, missing, structure

Read: TypeAlias = "Callable[[Any], Iterable[Example | Dropped]]"


@dataclass(frozen=True)
class Named:
    """A shape with a name: the columns that it is known by, and its mapping."""

    name: str
    described: str
    columns: Sequence[str]
    fields: Mapping[str, Any]
    without: Sequence[str] = ()
    reader: str = ""

    def matches(self, columns: Iterable[str]) -> bool:
        have = set(columns)
        there = (
            any(fnmatchcase(h, c) for h in have) if "*" in c else c in have for c in self.columns
        )
        return all(there) and not have.intersection(self.without)


@cache
def table() -> dict[str, Any]:
    """shapes.yaml: `names` of columns, `words` in them, and `shapes`."""
    import yaml

    text = Path(__file__).with_name("shapes.yaml").read_text(encoding="utf-8")
    found: dict[str, Any] = yaml.safe_load(text)
    return found


@cache
def named_shapes() -> list[Named]:
    """The shapes of the table."""
    entries: list[dict[str, Any]] = table()["shapes"]
    return [Named(**entry) for entry in entries]


def _answers(texts: Iterable[object], ranks: Iterable[float | None]) -> list[Example]:
    return [{"text": text, "rank": rank} for text, rank in zip(texts, ranks)]


def _asked(fields: Mapping[str, Any]) -> object:
    """The prompt among the fields of an annotation tool, with the system prompt beside it."""
    name = next((p for p in table()["names"]["prompt"] if not missing(fields.get(p))), None)
    if name is None:
        raise Dropped("no prompt among the fields (prompt, instruction, question, …)")
    prompt, system = fields[name], fields.get("system")
    if missing(system) or not isinstance(prompt, str):
        return prompt
    return [{"role": "system", "content": system}, {"role": "user", "content": prompt}]


# ------------------------------------------------------------------------------------- OASST


def oasst_tree(row: Mapping[str, Any]) -> Iterator[Example | Dropped]:
    """Every question of a tree of messages whose answers were ranked."""
    waiting: list[tuple[Any, list[Example]]] = [(structure(row.get("prompt")), [])]
    while waiting:
        asked, before = waiting.pop()
        if not isinstance(asked, Mapping):
            yield Dropped("wrong type")
            continue
        turns = [*before, _turn(asked)]
        replies = [r for r in asked.get("replies") or [] if isinstance(r, Mapping)]
        if asked.get("deleted"):
            yield Dropped("a deleted question")
            continue
        ranks = [None if r.get("deleted") else number(r.get("rank")) for r in replies]
        if sum(rank is not None for rank in ranks) > 1:
            yield {"prompt": turns, "answers": _answers((r.get("text") for r in replies), ranks)}
        elif replies:
            yield Dropped("a question with fewer than two ranked answers")
        for reply in replies:
            further = [(n, [*turns, _turn(reply)]) for n in reply.get("replies") or []]
            if further and reply.get("deleted"):
                yield Dropped("a question below a deleted answer")
            else:
                waiting += further


def _turn(node: Mapping[str, Any]) -> Example:
    return {"role": node.get("role"), "content": node.get("text")}


def oasst_messages(rows: list[Mapping[str, Any]]) -> Iterator[Example | Dropped]:
    """The same of a tree whose messages stand in rows of their own."""
    nodes = {r.get("message_id"): {**r, "replies": []} for r in rows}
    for node in nodes.values():
        if (parent := nodes.get(node.get("parent_id"))) is not None:
            parent["replies"].append(node)
        elif node.get("parent_id"):
            yield Dropped("a message whose parent is not beside it")
    for node in nodes.values():
        if not node.get("parent_id"):
            yield from oasst_tree({"prompt": node})


# --------------------------------------------------------------------------- annotation tools


def label_studio(row: Mapping[str, Any]) -> Iterator[Example | Dropped]:
    """A task with its annotations: pairwise (left, right) or a ranker, the mean of several."""
    data, votes = structure(row.get("data")), []
    texts: list[object] = []
    if not isinstance(data, Mapping):
        raise Dropped("wrong type")
    for annotation in structure(row.get("annotations")) or []:  # type: ignore[attr-defined]
        for result in [] if annotation.get("was_cancelled") else annotation.get("result") or []:
            value = result.get("value") or {}
            if "ranker" in value:
                texts, ranks = _ranker(value["ranker"], data)
                votes.append(ranks)
            elif plain(value) in ("left", "right"):
                names = [n for n in str(result.get("to_name")).split(",") if n in data]
                texts = [data[n] for n in (names if len(names) == 2 else _two_of(data))]
                votes.append([float(plain(value) != side) for side in ("left", "right")])
    yield {"prompt": _asked(data), "answers": _answers(texts, _mean(votes))}


def label_studio_min(row: Mapping[str, Any]) -> Iterator[Example | Dropped]:
    """The short export: a column holds what was selected or ranked."""
    for value in map(structure, row.values()):
        inner = value[0] if isinstance(value, list) and len(value) == 1 else value
        if plain(inner) in ("left", "right") or (isinstance(inner, dict) and "ranker" in inner):
            value = inner if isinstance(inner, dict) else {"selected": inner}
            yield from label_studio({"data": row, "annotations": [{"result": [{"value": value}]}]})
            return
    yield Dropped("no label")


def _two_of(data: Mapping[str, Any]) -> list[str]:
    """The two columns of a task that differ by a mark only: answer1, answer2."""
    stems: dict[str, list[str]] = {}
    for name in data:
        stem, mark = tag_of(name)
        stems.setdefault(stem, []).extend([name] * bool(mark))
    found = [sorted(names) for names in stems.values() if len(names) == 2]
    if len(found) != 1:
        raise Dropped("answers of other names than the labelling tags")
    return found[0]


def _ranker(value: object, data: Mapping[str, Any]) -> tuple[list[object], list[float | None]]:
    """The items of a ranker and their places; "_" holds those that were not ranked."""
    buckets = value if isinstance(value, Mapping) else {"": value}
    ranked = [ids for name, ids in buckets.items() if name != "_"]
    lists = (structure(v) for v in data.values())
    items = next((v for v in lists if isinstance(v, list) and v and isinstance(v[0], dict)), None)
    if len(ranked) != 1 or not isinstance(ranked[0], list) or items is None:
        raise Dropped("a ranker whose buckets do not say which is better")
    order = list(map(str, ranked[0]))
    ids = [str(item.get("id")) for item in items]
    texts = [next((i[k] for k in ("body", "text", "html", "title") if i.get(k)), "") for i in items]
    return list(texts), [float(order.index(i)) if i in order else None for i in ids]


def _mean(votes: list[list[float | None]]) -> list[float | None]:
    """The mean place of each answer over the people who placed it."""
    if not votes:
        raise Dropped("no label")
    places = [[v for v in of_answer if v is not None] for of_answer in zip(*votes)]
    return [sum(p) / len(p) if p else None for p in places]


def argilla(row: Mapping[str, Any]) -> Iterator[Example | Dropped]:
    """A record with responses that rank its fields, or name one of them; the mean of several."""
    nested = isinstance(row.get("responses"), Mapping) and isinstance(row.get("fields"), Mapping)
    fields = row["fields"] if nested else row
    responses: dict[str, list[object]] = {}
    if nested:
        for name, given in row["responses"].items():
            sent = [r for r in given or [] if r.get("status", "submitted") == "submitted"]
            responses[name] = [r.get("value") for r in sent]
    for column in () if nested else [c for c in row if c.endswith(".responses")]:
        given = structure(row[column]) or []
        states = structure(row.get(f"{column}.status")) or ["submitted"] * len(given)  # type: ignore[arg-type]
        name = column.removesuffix(".responses")
        responses[name] = [v for v, s in zip(given, states) if s == "submitted"]  # type: ignore[call-overload]
    rankings = {name: [_places(v) for v in values] for name, values in responses.items()}
    found = {n: [p for p in places if p] for n, places in rankings.items() if any(places)}
    if not any(responses.values()):
        raise Dropped("no label")
    if len(found) != 1:
        name = next(iter(responses))
        rated = f"""label='"{name}.responses"[0] >= `4`' says which are good"""
        several = "several questions rank the answers"
        raise Dropped(several if found else f"no ranking; of a rating, {rated}")
    (votes,) = found.values()
    names = list(dict.fromkeys(n for vote in votes for n in vote))
    others = [n for n in fields if n not in names and tag_of(n)[0] in map(_stem, names)]
    if not all(n in fields for n in names):
        raise Dropped("a ranking of names that are no fields")
    if len(names) == 1:  # one was named: it is better than its like
        names, votes = (
            [*names, *others],
            [{names[0]: 0.0} | dict.fromkeys(others, 1.0)] * len(votes),
        )
    answers = _answers(
        (fields[n] for n in names), _mean([[v.get(n) for n in names] for v in votes])
    )
    yield {"prompt": _asked(fields), "answers": answers}


def _stem(name: str) -> str:
    return tag_of(name)[0]


def _places(value: object) -> dict[str, float]:
    """A ranking as places by name: ["b", "a"], or [{"value": "a", "rank": 2}, …]; {} for none."""
    value = structure(value)
    if isinstance(value, str):
        return {value: 0.0} if not number(value) else {}
    if not isinstance(value, list):
        return {}
    if all(isinstance(v, Mapping) and "rank" in v for v in value):
        return {str(v.get("value")): float(number(v["rank"]) or 0) for v in value}
    return (
        {v: float(i) for i, v in enumerate(value)} if all(isinstance(v, str) for v in value) else {}
    )


READERS: dict[str, Read] = {
    "oasst_tree": oasst_tree,
    "oasst_messages": oasst_messages,
    "label_studio": label_studio,
    "label_studio_min": label_studio_min,
    "argilla": argilla,
}
