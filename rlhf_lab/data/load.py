"""Data for the four stages: the bundled world, or a user's own file, through one door.

`load_data("stories")` is the world; `load_data("mine.json")` reads rows and guesses their fields,
aloud. Either way the result has these sets, each split into train and test:

    sft          {"prompt", "completion"}
    preferences  {"prompt", "chosen", "rejected"}
    prompts      {"prompt"}

and labelled answers, {"prompt", "completion", "label"}: those of a file that holds such rows, else
both answers of every preference.
"""

from __future__ import annotations

import gzip
import json
import random
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from itertools import chain, islice
from pathlib import Path
from typing import Any

from ..models.load import small_models_folder
from ..world import corpus
from ..world.gold_reward import Annotator, accuracy_ceiling, gold_parts, gold_reward
from .files import open_rows
from .schema import Dropped, Report, convert, recognise

SIZES = {"sft": 2560, "preferences": 3072, "prompts": 8192, "test": 512, "test_pairs": 1024}
"""Rows of the bundled world's training sets, of each test set, and of held-out pairs."""


LIMIT, MEMORY = 100_000, 50_000_000
"""Rows, and bytes of them, that are kept in memory: of a larger source, a random sample."""


@dataclass(frozen=True)
class Split:
    """Rows to train on and rows held out."""

    train: list[dict] = field(default_factory=list)
    test: list[dict] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"Split(train={len(self.train)}, test={len(self.test)})"


@dataclass(frozen=True)
class Data:
    """What the stages train on. `annotator` and `gold_reward` exist for the bundled world only."""

    name: str
    sft: Split
    preferences: Split
    prompts: Split
    annotator: Annotator | None = None
    notes: tuple[str, ...] = ()
    report: Report | None = None
    answers: Split = Split()
    """answers that somebody labelled one by one; good ones have label True"""

    @property
    def labelled(self) -> Split:
        """Labelled answers to learn from: `answers`, else both answers of every preference."""
        if self.answers.train or self.answers.test:
            return self.answers
        return Split(unpaired(self.preferences.train), unpaired(self.preferences.test))

    @property
    def has_gold(self) -> bool:
        """Whether the true reward is known."""
        return self.annotator is not None

    def gold_reward(self, prompt: str, response: str) -> float:
        """The gold reward of a response, 0 to 10 (bundled world only)."""
        self._need_gold()
        return gold_reward(prompt, response)

    def gold_parts(self, prompt: str, response: str) -> dict[str, float]:
        """Its parts, each 0 to 1 (bundled world only)."""
        self._need_gold()
        return gold_parts(prompt, response)

    def accuracy_ceiling(self, pairs: list[dict] | None = None) -> float | None:
        """Best accuracy a reward model can expect on the held-out pairs; None if unknowable."""
        if self.annotator is None:
            return None
        return accuracy_ceiling(pairs or self.preferences.test, self.annotator)

    def with_pairs(self, train: list[dict], test: list[dict]) -> Data:
        """The same data with other pairs ({"prompt", "first", "second"}), judged anew."""
        self._need_gold()
        split = Split(annotate(train, self.annotator), annotate(test, self.annotator))
        return replace(self, preferences=split)

    def with_preferences(self, rows: list[dict]) -> Data:
        """The same data with preferences of your own to train on; the held-out pairs stay, so that
        accuracy and its ceiling compare. Raises ValueError for none."""
        if not rows:
            raise ValueError("no preferences yet: label some pairs first")
        return replace(
            self,
            name=f"{self.name}, your preferences",
            preferences=Split(list(rows), self.preferences.test),
        )

    def _need_gold(self) -> None:
        if self.annotator is None:
            raise ValueError(f"{self.name} has no gold reward: only the bundled world knows it")


def unpaired(pairs: list[dict]) -> list[dict]:
    """Preferences as labelled answers: the chosen one is good, the rejected one is not."""
    labels = (("chosen", True), ("rejected", False))
    return [
        {"prompt": pair["prompt"], "completion": pair[name], "label": label}
        for pair in pairs
        for name, label in labels
    ]


def annotate(pairs: list[dict], annotator: Annotator) -> list[dict]:
    """Label pairs of responses as the simulated annotator does."""
    rows = (annotator.label(i, p["prompt"], p["first"], p["second"]) for i, p in enumerate(pairs))
    return list(rows)


def load_data(
    source: Any = "stories",
    *,
    seed: int = 0,
    fields: Mapping[str, str] | None = None,
    split: str = "train",
    subset: str | None = None,
    limit: int | None = None,
    temperature: float = 0.6,
    length_bias: float = 0.0,
) -> Data:
    """The bundled world ("stories"), or your own data in any of the shapes of `shapes.py`.

    `source`: a JSON, JSONL, CSV, TSV or Parquet file (also .gz), a folder that `datasets` saved, a
    hub id, a `datasets.Dataset`, or a list of dicts. `fields` maps our names to your columns:
    {"prompt": "question", "chosen": "better", "rejected": "worse"}; what it leaves out is guessed,
    and `notes` say how. `split` and `subset` choose part of a hub data set. Of more than `limit`
    rows a random sample is kept; unless you say, of more than 100,000 rows or 50 MB of them.
    `temperature` and `length_bias` belong to the world's simulated annotator. Raises ValueError
    with one line (what, where, what to do) for what cannot be read.
    """
    if isinstance(source, Data):
        return source
    if isinstance(source, str) and source == "stories":
        return _stories(Annotator(temperature, length_bias, seed), seed)
    name = Path(source).name if isinstance(source, (str, Path)) else "your data"
    rows = open_rows(source, split, subset)
    return from_rows(rows, name, seed, fields=fields, limit=limit)


# ------------------------------------------------------------------------------- the bundled world


def _stories(annotator: Annotator, seed: int) -> Data:
    test = SIZES["test"]
    sft = Split(
        corpus.demonstrations("train", SIZES["sft"], seed),
        corpus.demonstrations("test", test, seed),
    )
    prompts = Split(
        *(
            [{"prompt": r.prompt} for r, _ in zip(corpus.requests(split, seed), range(count))]
            for split, count in (("train", SIZES["prompts"]), ("test", test))
        )
    )
    pairs = bundled_pairs()
    train = annotate(pairs["train"][: SIZES["preferences"]], annotator)
    split = Split(train, annotate(pairs["test"][: SIZES["test_pairs"]], annotator))
    return Data("stories", sft, split, prompts, annotator)


def bundled_pairs() -> dict[str, list[dict]]:
    """Pairs of responses that the bundled SFT model wrote, not judged yet, by split."""
    path = small_models_folder() / "pairs.jsonl.gz"
    if not path.is_file():  # while the checkpoints are being rebuilt there are none yet
        return {"train": [], "test": []}
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return {s: [r for r in rows if r["split"] == s] for s in ("train", "test")}


# ------------------------------------------------------------------------- a user's own rows

HEAD = 1000
"""Rows that are looked at to tell a source's shape."""


def from_rows(
    rows: Iterable,
    name: str = "rows",
    seed: int = 0,
    held_out: float = 0.1,
    fields: Mapping[str, str] | None = None,
    limit: int | None = None,
) -> Data:
    """Turn rows into the three sets: fields guessed aloud, drops counted, a tenth held out.

    A prompt stands on one side only, however many rows it has. Rows come in a random order.
    """
    rows = iter(rows)
    head = list(islice(rows, HEAD))
    if not head:
        raise ValueError(f"{name} has no rows")
    report = Report(name, recognise(head, fields, name))
    sample = Sample(seed, LIMIT if limit is None else limit, MEMORY if limit is None else None)
    for row in chain(head, rows):
        report.rows += 1
        try:
            made = convert(row, report.shape)
        except Dropped as reason:
            report.drop(str(reason))
            continue
        report.look(made)
        if "chosen" in made and made["chosen"] == made["rejected"]:
            report.identical += 1  # nothing to compare; still an answer to learn from
            made = {"completion": made["chosen"], **made}
            del made["chosen"], made["rejected"]
        sample.add(made)
    kept = sample.rows()
    report.kept, report.sampled = len(kept), sample.seen > len(kept)
    if len(kept) < 10:
        why = "; ".join(report.notes()[1:])
        raise ValueError(
            f"{name}: {len(kept)} usable rows; at least 10 are needed" + f" ({why})" * bool(why)
        )
    train, test = hold_out(kept, held_out)
    return Data(
        name,
        *(Split(select(train, *keys), select(test, *keys)) for keys in SETS),
        None,
        tuple(report.notes()),
        report,
        Split(select(train, *LABELLED), select(test, *LABELLED)),
    )


SETS = (("prompt", "completion"), ("prompt", "chosen", "rejected"), ("prompt",))
"""The fields of the rows of `Data.sft`, `Data.preferences` and `Data.prompts`."""
LABELLED = ("prompt", "completion", "label")
"""Those of `Data.answers`. An answer with a label is no demonstration: it may be a bad one."""


def select(rows: list[dict], *keys: str) -> list[dict]:
    """Rows that have these fields, and these only; a prompt alone is kept once.

    Where nobody wrote answers, the preferred ones are demonstrations.
    """
    if "completion" in keys and not any("completion" in r for r in rows):
        rows = [{**r, "completion": r["chosen"]} for r in rows if "chosen" in r]
    if "completion" in keys and "label" not in keys:
        rows = [r for r in rows if "label" not in r]
    found = [{k: r[k] for k in keys} for r in rows if all(k in r for k in keys)]
    return list({repr(r): r for r in found}.values()) if len(keys) == 1 else found


def hold_out(rows: list[dict], share: float) -> tuple[list[dict], list[dict]]:
    """Rows to train on and rows held out, no prompt in both. → train, test."""
    prompts = list(dict.fromkeys(repr(r["prompt"]) for r in rows))
    if len(prompts) == 1:  # all ask the same thing: the rows are what differs
        count = max(1, round(len(rows) * share))
        return rows[count:], rows[:count]
    chosen = set(prompts[: max(1, round(len(prompts) * share))])
    return (
        [r for r in rows if repr(r["prompt"]) not in chosen],
        [r for r in rows if repr(r["prompt"]) in chosen],
    )


class Sample:
    """A uniform random sample of a stream, within a number of rows and of bytes in memory.

    Every row draws a number; those with the smallest are kept. Their order is a random one.
    """

    def __init__(self, seed: int, limit: int, memory: int | None):
        self.random, self.limit, self.memory = random.Random(seed), limit, memory or float("inf")
        self.heap: list[tuple[float, int, dict, int]] = []
        self.seen = self.held = 0

    def add(self, row: dict) -> None:
        size = footprint(row)
        # The counter parts ties, and keeps the heap from comparing rows.
        heappush(self.heap, (-self.random.random(), self.seen, row, size))
        self.seen, self.held = self.seen + 1, self.held + size
        while len(self.heap) > self.limit or (self.held > self.memory and len(self.heap) > 1):
            self.held -= heappop(self.heap)[3]

    def rows(self) -> list[dict]:
        return [row for _, _, row, _ in sorted(self.heap, key=lambda e: (-e[0], e[1]))]


def footprint(value: Any) -> int:
    """Bytes that a row takes in memory: text, lists and dicts."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sys.getsizeof(value) + sum(map(footprint, inside))
