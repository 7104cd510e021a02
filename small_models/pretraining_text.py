"""What the bundled models are pretrained on: stories under headings, and what readers say of them.

Only `build.py` reads it.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

from rlhf_lab.world.corpus import PAID, in_split, requests
from rlhf_lab.world.generator import (
    ANIMALS,
    CAREFUL,
    HE,
    OBJECTS,
    PLACES,
    SHE,
    Request,
    Slips,
    draw_request,
    write_story,
)
from rlhf_lab.world.gold_reward import gold_parts, gold_reward, kept_nouns, read_story

WEB = Slips(
    mood=0.5,
    name=0.15,
    pronoun=0.15,
    thing=0.25,
    scene=0.25,
    repeat=0.2,
    ramble=0.25,
    unfinished=0.25,
)
"""Writers of the pretraining text who are careless of the language."""

HEEDLESS = replace(WEB, animal=0.5, object=0.5, place=0.5)
"""Writers who care little for the request as well."""

GRADES = {5.0: "awful", 6.2: "poor", 7.2: "weak", 8.2: "fair", 9.2: "good"}
"""A reader's word for a story whose gold reward, as that reader feels it, lies below the number."""
BEST_GRADE = "great"


def faults_of(request: Request, story: str) -> dict[str, float]:
    """Aspects of a story that readers speak of → how likely each is called wrong (1 = surely)."""
    parts = gold_parts(request.prompt, story)
    faults = {
        **{noun: float(not kept) for noun, kept in kept_nouns(request, read_story(story)).items()},
        "mood": 2 * (1 - parts["mood"]),
        "sense": 3 * (1 - parts["coherence"]),
        "words": 5 * (1 - parts["grammar"]),
        "end": 1 - parts["ends"],
        "length": 2 * (1 - parts["fresh"]),
    }
    return {aspect: min(fault, 1.0) for aspect, fault in faults.items()}


def verdict(faults: dict[str, float], rng: random.Random) -> str:
    """One reader on one aspect: "animal wrong". Half of the readers speak of a fault they saw."""
    aspect = rng.choice(list(faults))
    if rng.random() < 0.5 and any(faults.values()):
        aspect = rng.choices(list(faults), list(faults.values()))[0]
    return f"{aspect} {'wrong' if rng.random() < faults[aspect] else 'right'}"


def comments(request: Request, story: str, rng: random.Random) -> list[str]:
    """What four readers wrote under a story: two in five a grade ("good"), the others a verdict.

    A grade is the gold reward, felt with an error of ±0.4 points, in a word.
    """
    faults, gold = faults_of(request, story), gold_reward(request.prompt, story)
    texts = []
    for _ in range(4):
        if rng.random() < 0.4:
            felt = gold + rng.gauss(0, 0.4)
            texts.append(next((w for limit, w in GRADES.items() if felt < limit), BEST_GRADE))
        else:
            texts.append(verdict(faults, rng))
    return texts


END = "<|end|>"
Document = list[tuple[str, bool]]
"""Text to pretrain on, in pieces; the flag says whether it is learned (or only read)."""


def web_text(
    split: str,
    count: int,
    seed: int,
    *,
    games: float = 0.0,
    sketches: float = 0.0,
    misfiled: float = 0.0,
    faithful: bool = False,
) -> list[Document]:
    """`count` documents: a heading, the story under it, and readers' comments on it.

    Every second writer is `HEEDLESS`; with `faithful`, all are careful. Or this share of the
    stories is `misfiled`, under the heading of another one, and the others are by paid writers:
    then it pays to find out from the first words whether a story keeps to its heading, and that
    is what a reward model must see. Of the documents this share are `games` and this share are
    `sketches`, which make it easier to find out.

    An end token stands before every comment: it learns to expect what readers will write, which
    is what a reward model, reading its score off the end token, starts from. Left out of the loss
    is what nobody could foresee (the heading) and what is always so (that a comment ends).
    """
    rng = random.Random(f"web:{split}:{seed}")
    stories = _headed_stories(split, rng, seed, misfiled, faithful)
    documents: list[Document] = []
    for _ in range(count):
        kind = rng.random()
        if kind < games:
            documents.append(memory_game(rng))
            continue
        request, story = next(stories)
        if kind < games + sketches:
            story, remarks = sketch(request, story, rng)
        else:
            remarks = comments(request, story, rng)
        documents.append([(request.prompt, False), (story + END, True)])
        documents[-1] += [piece for text in remarks for piece in ((text, True), (END, False))]
    return documents


def _headed_stories(
    split: str, rng: random.Random, seed: int, misfiled: float, faithful: bool
) -> Iterator[tuple[Request, str]]:
    """Endless stories of a split, each with the request that it stands under."""
    for request in requests(split, seed):
        subject, slips = request, CAREFUL if faithful else PAID
        if misfiled and rng.random() < misfiled:
            slips = WEB if rng.random() < 0.5 else PAID
            subject = draw_request(rng)
        elif not misfiled and not faithful:
            slips = HEEDLESS if rng.random() < 0.5 else PAID
        story = write_story(subject, rng, slips)
        if in_split(story, split):
            yield request, story


def sketch(request: Request, story: str, rng: random.Random) -> tuple[str, list[str]]:
    """The first two sentences of a story, and a verdict on each of its nouns, faults first."""
    story = ". ".join(story.split(". ")[:2]) + "."
    faults = faults_of(request, story)
    nouns = sorted(rng.sample(("animal", "place", "object"), 3), key=lambda noun: -faults[noun])
    return story, [f"{noun} {'wrong' if faults[noun] else 'right'}" for noun in nouns]


def memory_game(rng: random.Random) -> Document:
    """Twenty nouns and names, each called "new" or "again": did it come before?"""
    deck = rng.sample(ANIMALS + OBJECTS + PLACES + SHE + HE, rng.randint(4, 10))
    seen: set[str] = set()
    document: Document = []
    for word in rng.choices(deck, k=20):
        document += [(f" {word}", False), (" again" if word in seen else " new", True)]
        seen.add(word)
    return document


DIGEST = 8
"""bytes of a story's digest"""


def digest(story: str) -> bytes:
    """Which story it is, in a few bytes."""
    text = story.removesuffix(END).strip()
    return hashlib.blake2b(text.encode(), digest_size=DIGEST).digest()


def memorised_share(stories: Sequence[str], trained_on: Collection[bytes]) -> float:
    """Share of `stories` that stand word for word in what was trained on, given by digests.

    The measure of memorisation: sample stories from a model and compare this share with that of
    fresh stories by the generator itself (which cannot have memorised anything).
    """
    return sum(bool(s.strip()) and digest(s) in trained_on for s in stories) / len(stories)
