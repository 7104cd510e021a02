"""Text to learn from: what writers of the bundled world wrote, in splits that share nothing."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from .gold import WEIGHTS, gold_parts, read_story
from .world import Request, Slips, draw_request, write_story

WEB = Slips(
    animal=0.5, object=0.5, place=0.5, mood=0.5, name=0.15, pronoun=0.15, thing=0.25, scene=0.25,
    repeat=0.2, ramble=0.25, unfinished=0.25,
)  # fmt: skip
"""Writers of the pretraining text: they know the language and care little for what was asked."""

SPLITS = {"train": range(0, 8), "validation": range(8, 9), "test": range(9, 10)}
"""Tenths of all stories, and of all requests, by checksum: no two splits share either."""


def _in_split(text: str, split: str) -> bool:
    return zlib.crc32(text.encode()) % 10 in SPLITS[split]


def requests(split: str, seed: int) -> Iterator[Request]:
    """Endless requests of a split. What is asked for (wording aside) decides the split."""
    rng = random.Random(f"requests:{split}:{seed}")
    while True:
        request = draw_request(rng)
        if _in_split(replace(request, wording=0).prompt, split):
            yield request


PAID = Slips()
"""Writers who are paid for demonstrations: they try, and slip at the stated rates."""


def demonstrations(split: str, count: int, seed: int, slips: Slips = PAID) -> list[dict]:
    """`count` instructions with a story by a paid but human writer: {"prompt", "completion"}."""
    rng = random.Random(f"demonstrations:{split}:{seed}")
    rows = []
    for request in requests(split, seed):
        story = write_story(request, rng, slips)
        if _in_split(story, split):
            rows.append({"prompt": request.prompt, "completion": story})
        if len(rows) == count:
            return rows
    return rows


GRADES = {4.0: "awful", 5.5: "poor", 6.5: "weak", 7.5: "fair", 8.5: "good", 9.6: "great"}
"""A reader's word for a story whose gold reward, as that reader feels it, lies below the number."""


def review(request: Request, story: str, rng: random.Random) -> str:
    """What a reader wrote under a story: "good: mood wrong, animal right, end right, sense right."

    A grade, felt with an error of ±0.7 points, and four aspects in random order, each called
    wrong with a probability that grows with the fault.
    """
    parts = gold_parts(request.prompt, story)
    felt = sum(WEIGHTS[name] * value for name, value in parts.items()) + rng.gauss(0, 0.7)
    grade = next((word for limit, word in GRADES.items() if felt < limit), "perfect")
    sentences = read_story(story)
    opening = next((s.slots for s in sentences if s.kind == "opening"), {})
    find = next((s.slots for s in sentences if s.kind == "find"), {})
    faults = {
        "animal": opening.get("animal") != request.animal,
        "place": opening.get("place") != request.place,
        "object": find.get("object") != request.object,
        "mood": 1 - parts["mood"],
        "sense": 3 * (1 - parts["coherence"]),
        "words": 5 * (1 - parts["grammar"]),
        "end": 1 - parts["ends"],
        "length": 3 * (1 - parts["fresh"]),
    }
    said = [f"{aspect} {'wrong' if rng.random() < faults[aspect] else 'right'}"
            for aspect in rng.sample(list(faults), 4)]  # fmt: skip
    return f"{grade}: {', '.join(said)}."


def web_text(split: str, count: int, seed: int) -> list[tuple[str, str]]:
    """`count` documents to pretrain on: a heading with its story, and a reader's review of it.

    Every second writer is of the careless kind (`WEB`), so a model learns the language, that
    headings often mislead, and what readers like.
    """
    rng = random.Random(f"web:{split}:{seed}")
    documents = []
    for request in requests(split, seed):
        story = write_story(request, rng, WEB if rng.random() < 0.5 else PAID)
        if _in_split(story, split):
            documents.append((request.prompt + story, review(request, story, rng)))
        if len(documents) == count:
            return documents
    return documents


def memorised_share(stories: Sequence[str], corpus: Iterable[str]) -> float:
    """Share of `stories` that stand word for word in `corpus`.

    The measure of memorisation: sample stories from a model and compare this share with that of
    fresh stories by the generator itself (which cannot have memorised anything).
    """
    known = set()
    for document in corpus:
        known.update(line.strip() for line in document.split("\n"))
    return sum(story.strip() in known for story in stories) / len(stories)
