"""Preference files that are known by name (shapes.yaml), and the few that need code to be read.

A reader takes a row (or the rows of one group) and makes rows with `prompt`, `answers`, a list of
{"text", "rank"} of which the lowest rank is the best, and `read`, the columns that it read; it
yields Dropped for what it leaves out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import TypeAlias

from .labels import WORDS, words
from .mapping import names_of, number, plain, tag_of
from .messages import TABLE, TIES, Cell, Dropped, Example, Row, history, missing, structure

Made: TypeAlias = "Iterator[Example | Dropped]"
Read: TypeAlias = "Callable[[Cell], Made]"


@dataclass(frozen=True)
class Named:
    """A shape with a name: the columns that it is known by, and its mapping; `decides` says what
    decides where no column does."""

    name: str
    described: str
    columns: Sequence[str]
    fields: Mapping[str, object]
    without: Sequence[str] = ()
    reader: str = ""
    decides: str = ""

    def matches(self, columns: Iterable[str]) -> bool:
        have = set(columns)
        there = (
            any(fnmatchcase(h, c) for h in have) if "*" in c else c in have for c in self.columns
        )
        return all(there) and not have.intersection(self.without)


@cache
def named_shapes() -> list[Named]:
    """The shapes of the table."""
    return [Named(**entry) for entry in TABLE["shapes"]]


def _row(
    prompt: object, texts: Iterable[object], ranks: Iterable[float | None], read: Iterable[str]
) -> Example:
    """What a reader makes: answers of which the lowest rank is the best, and the columns read."""
    answers = [{"text": text, "rank": rank} for text, rank in zip(texts, ranks)]
    return {"prompt": prompt, "answers": answers, "read": list(read)}


def _prompt_of(data: Row) -> str:
    names = TABLE["names"]["prompt"]
    found = next((n for n in data if n.lower() in names and not missing(data[n])), None)
    if found is None:
        raise Dropped("no prompt among the fields (prompt, instruction, question, …)")
    return found


def _asked(data: Row) -> object:
    """The prompt among the fields of an annotation tool, with the system prompt and the earlier
    turns beside it."""
    names, prompt = TABLE["names"], data[asks := _prompt_of(data)]
    held = {k: v for k, v in data.items() if k != asks and not missing(v)}
    system = next((v for k, v in held.items() if k.lower() in names["system"]), None)
    earlier = next((v for k, v in held.items() if k.lower() in names["history"]), None)
    read = [*names["system"], *names["history"]]
    for name, value in held.items():
        before = words(name) & WORDS["before"]
        if before and name.lower() not in read and isinstance(value, str) and " " in value:
            raise Dropped(
                f"a field {name!r} before the answers: make rows in Python, fields=FUNCTION"
            )
    if (system is None and earlier is None) or not isinstance(prompt, str):
        return prompt
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, *history(earlier), {"role": "user", "content": prompt}]


# ------------------------------------------------------------------------------------- OASST


def oasst_tree(row: Row, read: Sequence[str] = ("prompt",)) -> Made:
    """Every question of a tree of messages whose answers were ranked."""
    waiting: list[tuple[Cell, list[Example]]] = [(structure(row.get("prompt")), [])]
    while waiting:
        asked, before = waiting.pop()
        if not isinstance(asked, Mapping):
            yield Dropped("wrong type")
            continue
        if _deleted(asked):
            yield Dropped("a deleted question")
            continue
        turns = [*before, _turn(asked)]
        replies = [r for r in asked.get("replies") or [] if isinstance(r, Mapping)]
        ranks = [None if _deleted(r) else number(r.get("rank")) for r in replies]
        if sum(rank is not None for rank in ranks) > 1:
            yield _row(turns, (r.get("text") for r in replies), ranks, read)
        elif replies:
            yield Dropped("a question with fewer than two ranked answers")
        for reply in replies:
            further = [(n, [*turns, _turn(reply)]) for n in reply.get("replies") or []]
            if further and _deleted(reply):
                yield Dropped("a question below a deleted answer")
            else:
                waiting += further


def _deleted(node: Row) -> bool:
    return plain(node.get("deleted")) in ("true", "1")  # a table says "False"


def _turn(node: Row) -> Example:
    return {"role": node.get("role"), "content": node.get("text")}


def oasst_messages(rows: list[Row]) -> Made:
    """The same of a tree whose messages stand in rows of their own."""
    nodes = {r.get("message_id"): {**r, "replies": []} for r in rows}
    for node in nodes.values():
        if (parent := nodes.get(node.get("parent_id"))) is not None:
            parent["replies"].append(node)
        elif not missing(node.get("parent_id")):
            yield Dropped("a message whose parent does not stand beside it (rows of one tree must)")
    read = ("message_id", "parent_id", "message_tree_id", "text", "role", "rank", "deleted")
    for node in nodes.values():
        if missing(node.get("parent_id")):
            yield from oasst_tree({"prompt": node}, read)


# --------------------------------------------------------------------------- annotation tools


def alike(data: Row) -> list[str]:
    """The fields that hold answers: those that differ by a mark only (answer1, answer2); [] where
    it is not plain which they are."""
    stems: dict[str, list[str]] = {}
    for name in data:
        stem, mark = tag_of(name)
        if mark and isinstance(data[name], str):
            stems.setdefault(stem, []).append(name)
    found = {stem: sorted(names) for stem, names in stems.items() if len(names) > 1}
    answers = [names for stem, names in found.items() if stem in TABLE["words"]["answer"].split()]
    answers = answers or list(found.values())
    return answers[0] if len(answers) == 1 else []


def _voted(
    data: Row, texts: Row, votes: Sequence[Mapping[str, float]], read: Iterable[str]
) -> Example:
    """A row of the answers that were placed, with their mean place over the people who did."""
    names = dict.fromkeys(name for vote in votes for name in vote)
    if not names:
        raise Dropped("no label")
    places = [[vote[name] for vote in votes if name in vote] for name in names]
    ranks = [sum(p) / len(p) for p in places]
    return _row(_asked(data), (texts[name] for name in names), ranks, read)


def _choice(value: object, names: Sequence[str]) -> dict[str, float]:
    """Places of the answers by a word that names the best of them, or says that it is a tie; {} for
    any other."""
    won = {**names_of(names), "left": 0, "right": 1}.get(label := plain(value))
    if not names or (won is None and label not in TIES):
        return {}
    return {name: float(won is not None and i != won) for i, name in enumerate(names)}


def label_studio(row: Row) -> Made:
    """A task with its annotations: pairwise (left, right) or a ranker, the mean of several."""
    data, annotations = structure(row.get("data")), structure(row.get("annotations"))
    if not isinstance(data, Mapping) or not isinstance(annotations, list):
        raise Dropped("wrong type")
    kept = [a for a in annotations if not a.get("was_cancelled")]
    results = [result for a in kept for result in a.get("result") or []]
    votes = [_vote(r.get("value"), data, str(r.get("to_name")).split(",")) for r in results]
    if not any(votes):
        votes = [_rated(a.get("result") or [], data) for a in kept]
    yield _voted(data, {**data, **_items(data)}, votes, ["data", "annotations"])


def _rated(results: Sequence[Row], data: Row) -> dict[str, float]:
    """The places of a task's answers that one person rated, the highest first."""
    by_mark = {tag_of(n)[1]: n for n in alike(data)}
    places: dict[str, float] = {}
    for result in results:
        value, tag = result.get("value"), str(result.get("to_name"))
        rating = number(value.get("rating")) if isinstance(value, Mapping) else None
        of = tag if tag in by_mark.values() else by_mark.get(tag_of(tag)[1])
        if rating is not None and of in places:
            raise Dropped("several ratings of one answer")
        if rating is not None and of:
            places[of] = -rating
    return places if len(places) > 1 else {}


def label_studio_min(row: Row) -> Made:
    """The short export: a column holds what was selected or ranked."""
    data = {name: structure(cell) for name, cell in row.items()}
    votes = {name: vote for name, cell in data.items() if (vote := _vote(cell, data))}
    read = [_prompt_of(data), *votes, *alike(data)]
    read += [name for name, cell in data.items() if isinstance(cell, list)]
    yield _voted(data, {**data, **_items(data)}, list(votes.values()), read)


def _vote(value: object, data: Row, tags: Sequence[str] = ()) -> dict[str, float]:
    """The places that somebody gave a task's answers, by name; {} for what says nothing of them."""
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    if isinstance(value, Mapping) and "ranker" in value:
        return _ranker(value["ranker"], data)
    names = alike(data)
    by_mark = {tag_of(n)[1]: n for n in names}
    shown = [n if n in data else by_mark.get(tag_of(n)[1]) for n in tags]
    return _choice(value, [n for n in shown if n] if len(tags) == 2 and all(shown) else names)


def _items(data: Row) -> dict[str, object]:
    """The texts that a ranker shows, by their id."""
    lists = (structure(v) for v in data.values())
    items = next((v for v in lists if isinstance(v, list) and v and isinstance(v[0], dict)), [])
    keys = ("body", "text", "html")
    return {str(i.get("id")): next((i[k] for k in keys if i.get(k)), "") for i in items}


def _ranker(value: object, data: Row) -> dict[str, float]:
    """The places of a ranker's items; "_" holds those that were not ranked."""
    buckets = value if isinstance(value, Mapping) else {"": value}
    ranked = [ids for name, ids in buckets.items() if name != "_"]
    if len(ranked) != 1 or not isinstance(ranked[0], list):
        raise Dropped("a ranker whose buckets do not say which is better")
    texts = _items(data)
    return {i: float(place) for place, i in enumerate(map(str, ranked[0])) if i in texts}


def argilla(row: Row) -> Made:
    """A record whose responses rank its fields, name the best or rate them; the mean of several."""
    nested = isinstance(row.get("responses"), Mapping) and isinstance(row.get("fields"), Mapping)
    fields = row["fields"] if nested else row
    replies: dict[str, list[object]] = {}
    if nested:
        read = ["fields", "responses"]
        for question, given in row["responses"].items():
            sent = [r for r in given or [] if r.get("status", "submitted") == "submitted"]
            replies[question] = [r.get("value") for r in sent]
    else:
        columns = [c for c in row if c.endswith(".responses")]
        read = [*columns, *(f"{c}.status" for c in columns)]
        for column in (c for c in row if f"{c}-suggestion" in row):  # of Argilla 1
            read.append(column)
            given = [r for r in _list(row[column]) if isinstance(r, Mapping)]
            sent = [r for r in given if r.get("status", "submitted") == "submitted"]
            replies[column] = [r.get("value") for r in sent]
        for column in columns:
            given = _list(row[column])
            states = _list(row.get(f"{column}.status")) or ["submitted"] * len(given)
            sent = [v for v, s in zip(given, states) if s == "submitted"]
            replies[column.removesuffix(".responses")] = sent
    if not any(replies.values()):
        raise Dropped("no label")
    names = alike(fields)
    rankings = {
        q: [p for v in values if (p := _places(v, fields, names))] for q, values in replies.items()
    }
    rankings = {q: votes for q, votes in rankings.items() if votes}
    if len(rankings) > 1:
        raise Dropped("several questions rank the answers")
    votes = next(iter(rankings.values()), []) or _ratings(replies, names)
    if not any(votes):
        raise _unranked(fields, next(iter(replies)), nested)
    read += [] if nested else [_prompt_of(fields), *{n: 0 for vote in votes for n in vote}]
    yield _voted(fields, fields, votes, read)


def _list(cell: object) -> list[Cell]:
    found = structure(cell)
    return found if isinstance(found, list) else []


def _places(value: object, fields: Row, names: Sequence[str]) -> dict[str, float]:
    """A ranking as places by name: ["b", "a"], [{"value": "a", "rank": 2}, …], or a word that names
    the best; {} for what ranks no fields."""
    value = structure(value)
    if not isinstance(value, list):
        return _choice(value, names)
    ranked = [v if isinstance(v, Mapping) else {"value": v, "rank": i} for i, v in enumerate(value)]
    places = {str(v.get("value")): number(v.get("rank")) for v in ranked}
    known = {name: place for name, place in places.items() if place is not None}
    return known if fields.keys() >= known.keys() else {}


def _ratings(replies: Mapping[str, list[object]], names: Sequence[str]) -> list[dict[str, float]]:
    """Ratings by questions with the answers' names or marks, as places: the highest comes first."""
    votes = []
    for question, values in replies.items():
        mark = tag_of(question)[1]
        of = next((n for n in names if n in question or (mark and tag_of(n)[1] == mark)), None)
        votes += [{of: -n} for v in values if of and (n := number(v)) is not None]
    return votes


def _unranked(fields: Row, question: str, nested: bool) -> Dropped:
    """Why a record makes no pair, with a mapping that reads one rating of one answer."""
    prompt = _prompt_of(fields)
    texts = [n for n in fields if n != prompt and isinstance(fields[n], str)]
    answer = max(texts, key=lambda n: len(fields[n]), default="COLUMN")
    reason = Dropped("no ranking of answers; of a rating of one answer, say which are good")
    path = f'responses."{question}"[0].value' if nested else f'"{question}.responses"[0]'
    reason.example = {
        "prompt": f"fields.{prompt}" if nested else prompt,
        "completion": f"fields.{answer}" if nested else answer,
        "label": f"{path} >= `4`",
    }
    return reason


def prodigy(row: Row) -> Made:
    """A task of Prodigy's choice interface: the options that were accepted before the others."""
    if plain(row.get("answer")) != "accept":
        raise Dropped("a task that was not accepted")
    options, accepted = _list(row.get("options")), {str(i) for i in _list(row.get("accept"))}
    if not all(isinstance(o, Mapping) for o in options) or not accepted:
        raise Dropped("no label")
    names = [n for n in row if n.lower() in TABLE["names"]["prompt"]] or ["text"]
    asked = {**row, "prompt": row.get(names[0])}
    ranks = [float(str(o.get("id")) not in accepted) for o in options]
    read = [names[0], "options", "accept", "answer"]
    yield _row(_asked(asked), (o.get("text") for o in options), ranks, read)


READERS: dict[str, Read] = {
    "prodigy": prodigy,
    "oasst_tree": oasst_tree,
    "oasst_messages": oasst_messages,
    "label_studio": label_studio,
    "label_studio_min": label_studio_min,
    "argilla": argilla,
}
