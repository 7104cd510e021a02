"""No pair is ever swapped and no turn ever lost without being counted: 3,200 random files.

pytest tests/data/test_no_silent_errors.py

Each file has random columns, labels, roles, ties, gaps and nesting. What must come out is written
down while the file is made, without a line of the package: every text occurs once, and says which
row it belongs to. A file may be refused (one line); then nothing was trained on.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random

import pytest

from rlhf_lab.data.load import from_rows
from rlhf_lab.data.mapping import Refused

PER_KIND = 400
ROLES = {
    "system": ["system", "System"],
    "user": ["user", "human", "Human", "prompter", "User"],
    "assistant": ["assistant", "gpt", "Assistant", "model", "chatgpt", "bot"],
}
PAIRS = [
    ("response_a", "response_b"),
    ("response_1", "response_2"),
    ("answer_0", "answer_1"),
    ("first_try", "other_try"),
    ("left text", "right text"),
    ("out.x", "out.y"),
]


class Row:
    """What a row says: its turns, two answers, and which is better (0, 1) where it is told."""

    def __init__(self, rng: Random, i: int, talk: bool, tied: float) -> None:
        self.question = f"Question {i}?"
        self.system = f"system {i}" if talk and rng.random() < 0.5 else ""
        self.earlier = []
        for n in range(rng.randrange(3) if talk else 0):
            self.earlier += [("user", f"earlier {i} {n}"), ("assistant", f"reply {i} {n}")]
        self.answers = [f"first answer {i}", f"second answer {i}"]
        self.better = rng.randrange(2)
        self.state = rng.choices(
            ["told", "tie", "gap", "junk"], [1 - tied, tied / 2, tied / 4, tied / 4]
        )[0]

    @property
    def before(self) -> list[tuple[str, str]]:
        system = [("system", self.system)] if self.system else []
        return [*system, *self.earlier, ("user", self.question)]

    def texts(self) -> list[str]:
        return [text for _, text in self.before]


def spoken(rng: Random, turns: list[tuple[str, str]], form: str) -> object:
    """Turns in one of the forms that people keep them in."""
    keys = rng.choice([("role", "content"), ("from", "value")])
    found: list[dict] = []
    for role, content in turns:
        parts = form == "parts" and [
            {"type": "text", "text": content[:3]},
            {"type": "text", "text": content[3:]},
        ]
        found.append({keys[0]: rng.choice(ROLES[role]), keys[1]: parts or content})
    return {"JSON": json.dumps, "Python": repr}.get(form, lambda x: x)(found)


def label_of(
    rng: Random, rows: list[Row], names: tuple[str, str]
) -> tuple[list[object], dict, bool]:
    """A column that decides, the mapping that explains it, and whether it explains itself."""
    kind = rng.choice(["letter", "name", "number", "word", "bool", "signed", "model"])
    tie: object = rng.choice(["tie", "Draw", "both_bad", "equal"])
    mapping: dict = {"winner": "verdict"}
    plain = False
    if kind in ("letter", "model"):
        words = ["A", "B"] if kind == "letter" else ["model_a", "model_b"]
        words = words if names != PAIRS[0][::-1] else words[::-1]  # the letter of the column
        mapping["values"] = {words[0]: "A", words[1]: "B"}
        plain = set(names) == set(PAIRS[0])
        if plain and rng.random() < 0.5:
            del mapping["values"]
    elif kind == "name":
        words, plain = list(names), names[0] not in ("first_try",)
    elif kind == "number":
        words = rng.choice([[0, 1], [1, 0], [1, 2], [2, 1], ["1.0", "0.0"]])
        mapping["values"] = {str(float(w)).removesuffix(".0"): x for w, x in zip(words, "AB")}
    elif kind == "word":
        words = rng.sample(["better", "worse", "yes", "no", "x", "y"], 2)
        mapping["values"] = dict(zip(words, "AB"))
    elif kind == "bool":
        words = rng.sample([True, False], 2)
        mapping["values"] = {str(w): x for w, x in zip(words, "AB")}
    else:
        side = rng.randrange(2)
        words, tie = ([2, -1.5], 0) if side == 0 else (["-3", "1"], "0")
        mapping = {"preference": "verdict", "positive": "AB"[side]}
    told = {
        "told": lambda r: words[r.better],
        "tie": lambda r: tie,
        "gap": lambda r: rng.choice([None, "", "N/A", float("nan")]),
        "junk": lambda r: rng.choice(["unsure", "?", "see note"]),
    }
    return [told[r.state](r) for r in rows], mapping, plain


def columns_of(
    rng: Random, rows: list[Row], names: tuple[str, str], talk: bool
) -> tuple[list[dict], dict]:
    """Rows with a prompt and two answers in columns, and the mapping that says where they are."""
    form = rng.choice(["list", "JSON", "Python", "parts"]) if talk else "text"
    whole = talk and rng.random() < 0.5  # the answers stand at the end of whole conversations
    aside = talk and not whole and rng.random() < 0.5  # system and history in columns of their own
    found = []
    for row in rows:
        turns = [("user", row.question)] if aside else row.before
        prompt = (
            spoken(rng, turns, form)
            if talk and not (aside and rng.random() < 0.5)
            else turns[-1][1]
        )
        record: dict = {} if whole else {"prompt": prompt}
        for name, answer in zip(names, row.answers):
            answered = [("assistant", answer)]
            record[name] = spoken(rng, row.before + answered, form) if whole else answer
        if aside:
            asked = [t for role, t in row.earlier if role == "user"]
            replies = [t for role, t in row.earlier if role == "assistant"]
            record |= {"system": row.system, "history": [list(p) for p in zip(asked, replies)]}
        found.append(record)
    mapping = {} if whole else {"prompt": "prompt"}
    return found, mapping


def check(
    rows: list[Row], records: list[dict], fields: object, seed: int, must: bool = False
) -> bool:
    """Load a file, and compare with what was written down. → whether it was read."""
    try:
        data = from_rows(records, "file", fields=fields)
    except ValueError as error:
        assert "\n" not in str(error) and str(error), seed
        assert not must or "usable rows" in str(error), (seed, error, records[0])
        return False
    by_answer = {text: (row, n) for row in rows for n, text in enumerate(row.answers)}
    seen = set()
    for pair in data.preferences.train + data.preferences.test:
        (row, won), (other, lost) = by_answer[pair["chosen"]], by_answer[pair["rejected"]]
        assert row is other and won == row.better and lost != won, (seed, "swapped", pair)
        assert row.state == "told", (seed, "a tie became a preference", pair)
        prompt = pair["prompt"]
        if isinstance(prompt, str):
            assert row.texts() == [prompt.strip()], (seed, prompt)
        else:
            assert [(m["role"], m["content"]) for m in prompt] == row.before, (seed, "lost", pair)
        seen.add(row.question)
    lost = len(rows) - len(seen)
    counted = sum(data.report.dropped.values()) + data.report.identical
    assert counted == lost, (seed, data.report.dropped, lost)
    assert data.report.dropped.get("a tie", 0) == sum(r.state == "tie" for r in rows), seed
    told = sum(r.state == "told" for r in rows)
    assert len(seen) == told, (seed, "a row with a label was left out", data.report.dropped)
    for row in data.sft.train + data.sft.test:
        owner, n = by_answer[row["completion"]]
        assert n == owner.better and owner.state == "told", (seed, "a bad demonstration", row)
    return True


def made(seed: int, kind: str) -> tuple[Random, list[Row], list[dict], dict, tuple[str, str], bool]:
    rng = Random(f"{kind} {seed}")
    names = rng.choice(PAIRS)
    names = names if rng.random() < 0.5 else names[::-1]
    talk = rng.random() < 0.6
    rows = [Row(rng, i, talk, rng.choice([0.0, 0.2])) for i in range(rng.randrange(14, 20))]
    records, mapping = columns_of(rng, rows, names, talk)
    for record in records:
        record |= {"id": rng.randrange(10**6), "model": "m"}
    return rng, rows, records, mapping, names, talk


def explained(seed: int) -> bool:
    """Two answers and a column that a mapping explains."""
    rng, rows, records, mapping, names, _ = made(seed, "explained")
    labels, decides, _ = label_of(rng, rows, names)
    for record, label in zip(records, labels):
        record["verdict"] = label
    return check(rows, records, {**mapping, "answers": names, **decides}, seed, must=True)


def guessed(seed: int) -> bool:
    """The same without a word from the user: read in the right direction, or refused."""
    rng, rows, records, _, names, _ = made(seed, "guessed")
    labels, decides, plain = label_of(rng, rows, names)
    column = rng.choice(
        ["winner", "preference", "label", "choice", "chosen", "verdict", "humanVote"]
    )
    for record, label in zip(records, labels):
        record[column] = label
    read = check(rows, records, None, seed)
    assert not read or plain or "values" not in decides, (seed, "guessed what was not said")
    return read


def swapped(seed: int) -> bool:
    """Both columns mapped as chosen and rejected beside a label: refused until it is explained."""
    rng, rows, records, mapping, names, _ = made(seed, "swapped")
    labels, decides, _ = label_of(rng, rows, names)
    column = rng.choice(["winner", "preference", "label", "better_id", "vote", "verdict"])
    for record, label in zip(records, labels):
        record[column] = label
    mapping |= {"chosen": names[0], "rejected": names[1]}
    with pytest.raises(Refused, match="say what decides"):
        from_rows(records, "file", fields=mapping)
    return True


def scored(seed: int) -> bool:
    """Scores or ranks, numbers or text, in columns or in a list, with a margin."""
    rng, rows, records, mapping, names, _ = made(seed, "scored")
    ranks, listed, margin = rng.random() < 0.5, rng.random() < 0.5, rng.choice([0, 1])
    for row, record in zip(rows, records):
        high, low = rng.choice([(9, 4), (3, -2)])
        scores: list[object] = [high, low] if (row.better == 0) != ranks else [low, high]
        if row.state == "tie":
            scores = [5, 5.5] if margin else [5, 5]
        elif row.state in ("gap", "junk"):
            scores[rng.randrange(2)] = rng.choice([None, "N/A", "nan", "unsure"])
        scores = [str(s) for s in scores] if rng.random() < 0.3 else scores
        record |= {"s": scores} if listed else {"one": scores[0], "two": scores[1]}
    word = "ranks" if ranks else "scores"
    decides = {word: "s" if listed else ["one", "two"], "margin": margin}
    return check(rows, records, {**mapping, "answers": names, **decides}, seed, must=True)


def nested(seed: int) -> bool:
    """Everything below paths: objects in a list, one for each answer, inside a wrapping object."""
    rng, rows, records, mapping, names, _ = made(seed, "nested")
    aside = {"system", "history"} & records[0].keys()
    for row, record in zip(rows, records):
        high, low = (1.5, -2) if row.better == 0 else (-2, 1.5)
        scores = {"tie": [3, 3], "told": [high, low]}.get(row.state, [high, None])
        items = [{"reply": {"text": record.pop(n)}, "score": s} for n, s in zip(names, scores)]
        if row.state == "gap":
            del items[1]["score"]
        record["meta"] = {"list": items, "prompt": record.pop("prompt", None)}
    mapping = {"prompt": "meta.prompt"} if mapping else {}
    mapping |= {name: f"row.{name}" for name in aside} if rng.random() < 0.5 else {}
    if "system" in str(mapping):
        records = [{"row": r, "meta": r.pop("meta")} for r in records]
    decides = {"each": "meta.list", "answers": "reply.text", "scores": "score"}
    if rng.random() < 0.5:
        records = [{"rows": {"all": records}}]
        decides["rows"] = "rows.all"
    return check(rows, records, {**mapping, **decides}, seed, must=True)


def groups(seed: int) -> bool:
    """A row for each answer, rows of one prompt one after the other."""
    rng, rows, records, _, names, talk = made(seed, "groups")
    if "prompt" not in records[0]:
        return False
    split = []
    for row, record in zip(rows, records):
        scores = {"tie": [2, 2], "told": [4, 1] if row.better == 0 else [1, 4]}.get(
            row.state, [4, None]
        )
        answers = [record.pop(n) for n in names]
        split += [
            {**record, "answer": a, "stars": s, "q": row.question} for a, s in zip(answers, scores)
        ]
    fields = {"prompt": "prompt", "group": "q", "answers": "answer", "scores": "stars"}
    return check(rows, split, fields, seed, must=True)


def named(seed: int) -> bool:
    """`chosen` and `rejected` by name, in any form of cell."""
    rng = Random(f"named {seed}")
    talk = rng.random() < 0.7
    rows = [Row(rng, i, talk, 0.0) for i in range(14)]
    records, _ = columns_of(rng, rows, ("one", "two"), talk)
    for row, record in zip(rows, records):
        both = record.pop("one"), record.pop("two")
        record |= {"chosen": both[row.better], "rejected": both[1 - row.better], "score_chosen": 8}
    return check(rows, records, None, seed, must=True)


def labelled(seed: int) -> bool:
    """One answer a row with a word for whether it is good: never a demonstration."""
    rng = Random(f"labelled {seed}")
    words = rng.choice(
        [[True, False], ["True", "False"], [1, 0], ["good", "bad"], ["x", "y"], [5, 1]]
    )
    column = rng.choice(["label", "kto_tag", "rating", "score", "feedback", "is_good"])
    good = [rng.random() < 0.5 for _ in range(20)]
    rows = [
        {"prompt": f"Question {i}?", rng.choice(["response"]): f"answer {i}", column: words[1 - g]}
        for i, g in enumerate(good)
    ]
    fields = rng.choice(
        [None, {"label": column, "values": {str(w): x for w, x in zip(words, ("good", "bad"))}}]
    )
    try:
        data = from_rows(rows, "file", fields=fields)
    except Refused:
        assert fields is None, seed
        return True
    assert not data.sft.train and not data.preferences.train, (seed, "a demonstration")
    found = {r["completion"]: r["label"] for r in data.answers.train + data.answers.test}
    assert found == {f"answer {i}": g for i, g in enumerate(good)}, seed
    return True


KINDS: list[Callable[[int], bool]] = [
    explained,
    guessed,
    swapped,
    scored,
    nested,
    groups,
    named,
    labelled,
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_no_pair_is_swapped_and_no_turn_is_lost(kind):
    """What is read is right; and most of what can be read is (guesses are refused more often)."""
    read = sum(kind(seed) for seed in range(PER_KIND))
    least = {"guessed": 0.05, "groups": 0.4}.get(kind.__name__, 0.95)
    assert read >= least * PER_KIND, f"only {read} of {PER_KIND} were read"
