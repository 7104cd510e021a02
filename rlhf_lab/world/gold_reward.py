"""The gold reward of the bundled world, and the simulated annotator who prefers by it.

A story is read back sentence by sentence against the templates of `generator.py`; the gold reward
is a documented sum of named parts of what was read. The annotator compares two responses through
it with a stated noise, so the best accuracy any reward model can reach is computed, not guessed.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from . import generator as world
from .generator import Request, gender, read_request

_SLOT = {
    word: "name" if slot in world.PRONOUNS else slot
    for slot, words in world.WORDS.items()
    for word in words
}
_SLOT |= dict.fromkeys(world.PRONOUNS, "pron")
_SLOT |= {"her": "poss", "his": "poss", "a": "a", "an": "a"}


@dataclass(frozen=True)
class Sentence:
    """A sentence as read: its kind, its mood ('' where it has none) and the words in its slots."""

    kind: str
    mood: str
    slots: dict[str, str]


def _skeleton(sentence: str) -> tuple[str, dict[str, str]]:
    """Replace every slot word by its slot: the key under which a template is known."""
    slots: dict[str, str] = {}
    words = []
    for word in sentence[:-1].split(" "):
        lower = word if word in _SLOT else word.lower()
        slot = _SLOT.get(lower)
        if slot and slot != "a":
            slots.setdefault(slot, lower)
        words.append("{" + slot + "}" if slot else lower)
    return " ".join(words), slots


def _known_sentences() -> dict[str, tuple[str, str]]:
    slots = "animal name pron poss adj time object place a".split()
    example = dict(zip(slots, "fox Tom he his red day kite cave a".split(), strict=True))
    known = {_skeleton(world.ENDING)[0]: ("end", "")}
    banks: dict[str, Mapping[str, tuple[str, ...]]] = {
        **{"opening": {"": world.OPENINGS}, "find": {"": world.FINDS}},
        **{"event": world.EVENTS, "scene": world.SCENES, "close": world.CLOSES},
    }
    for kind, bank in banks.items():
        for mood, templates in bank.items():
            for template in templates:
                known[_skeleton(template.format(**example))[0]] = (kind, mood)
    return known


_KNOWN = _known_sentences()


def read_story(text: str) -> list[Sentence]:
    """Read a story back, sentence by sentence. A sentence of no template has kind 'unknown'."""
    sentences = []
    for piece in re.findall(r"[^.]+\.?", text.strip()):
        piece = piece.strip()
        if not piece:
            continue
        if not piece.endswith("."):
            sentences.append(Sentence("unknown", "", {}))
            continue
        sentences.append(_read_sentence(piece))
    return sentences


@lru_cache(maxsize=16384)  # stories are made of the same sentences
def _read_sentence(text: str) -> Sentence:
    skeleton, slots = _skeleton(text)
    return Sentence(*_KNOWN.get(skeleton, ("unknown", "")), slots)


# -------------------------------------------------------------------------------- the gold reward

WEIGHTS = {"follows": 3.0, "mood": 2.0, "coherence": 2.0, "grammar": 1.0, "ends": 1.0, "fresh": 1.0}
"""Weight of each part of the gold reward; each part lies in [0, 1], so the best story scores 10."""


def kept_nouns(request: Request, story: list[Sentence]) -> dict[str, bool]:
    """Is the hero the animal, the place the place and the thing found the object asked for?"""
    opening = next((s.slots for s in story if s.kind == "opening"), {})
    find = next((s.slots for s in story if s.kind == "find"), {})
    return {
        "animal": opening.get("animal") == request.animal,
        "place": opening.get("place") == request.place,
        "object": find.get("object") == request.object,
    }


def part_follows(request: Request, story: list[Sentence]) -> float:
    """A third each: the hero is the animal, the thing found the object, the place as asked for."""
    return sum(kept_nouns(request, story).values()) / 3


def part_mood(request: Request, story: list[Sentence]) -> float:
    """(sentences in the mood asked for − sentences in another) / 3, within [0, 1]."""
    moods = [s.mood for s in story if s.mood]
    right = sum(m == request.mood for m in moods)
    return min(max((2 * right - len(moods)) / 3, 0.0), 1.0)


def part_coherence(request: Request, story: list[Sentence]) -> float:
    """Share of mentions that agree with what the story has introduced.

    A mention is a name, pronoun, animal, object or place after its introduction; a mention of
    something not introduced yet is wrong. A story needs an opening and a find: each one missing
    counts as three wrong mentions.
    """
    hero: dict[str, str] = {}
    right = total = 0
    for s in story:
        now = dict(s.slots)
        if s.kind == "opening" and "name" not in hero:
            hero |= {k: now[k] for k in ("animal", "name", "place")}
            continue
        if s.kind == "find" and "object" not in hero:
            hero["object"] = now.pop("object")
        for slot, word in now.items():
            if slot in ("name", "animal", "object", "place"):
                right, total = right + (hero.get(slot) == word), total + 1
            elif slot in ("pron", "poss") and "name" in hero:
                agrees = word in world.PRONOUNS[gender(hero["name"])]
                right, total = right + agrees, total + 1
            elif slot in ("pron", "poss"):
                total += 1
    total += 3 * ("name" not in hero) + 3 * ("object" not in hero)
    return right / total if total else 0.0


def part_grammar(request: Request, story: list[Sentence]) -> float:
    """Share of sentences that the language of this world knows."""
    return sum(s.kind != "unknown" for s in story) / len(story) if story else 0.0


def part_ends(request: Request, story: list[Sentence]) -> float:
    """1 when "The end." stands once, at the end, right after a closing sentence; half for less."""
    ends = [i for i, s in enumerate(story) if s.kind == "end"]
    if len(ends) != 1 or ends[0] != len(story) - 1:
        return 0.0
    return 1.0 if len(story) > 1 and story[-2].kind == "close" else 0.5


def part_fresh(request: Request, story: list[Sentence]) -> float:
    """1 less a quarter for each sentence that is repeated or beyond the six that a story needs."""
    seen = [(s.kind, s.mood, tuple(sorted(s.slots.items()))) for s in story if s.kind != "unknown"]
    excess = len(seen) - len(set(seen)) + max(len(story) - 6, 0)
    return max(1.0 - excess / 4, 0.0) if story else 0.0


GOLD_PARTS = {
    "follows": part_follows,
    "mood": part_mood,
    "coherence": part_coherence,
    "grammar": part_grammar,
    "ends": part_ends,
    "fresh": part_fresh,
}


def gold_parts(prompt: str, response: str) -> dict[str, float]:
    """Every part of the gold reward, each in [0, 1]."""
    return dict(zip(GOLD_PARTS, _part_values(prompt, response), strict=True))


@lru_cache(maxsize=4096)  # the reward and each part are asked for one by one: read a story once
def _part_values(prompt: str, response: str) -> tuple[float, ...]:
    request = read_request(prompt)
    if request is None:
        raise ValueError(f"no gold reward for this prompt: {prompt[:60]!r} is not of this world")
    story = read_story(response)
    return tuple(part(request, story) for part in GOLD_PARTS.values())


def gold_reward(prompt: str, response: str) -> float:
    """The gold reward of a response: the weighted sum of its parts, between 0 and 10."""
    parts = gold_parts(prompt, response)
    return sum(WEIGHTS[name] * value for name, value in parts.items())


# ------------------------------------------------------------------------- the simulated annotator


@dataclass(frozen=True)
class Annotator:
    """Compares two responses as a person with known taste would.

    P(first preferred) = sigmoid((gold₁ − gold₂ + length_bias · (words₁ − words₂)) / temperature):
    the Bradley–Terry model on the gold reward (Bradley & Terry 1952; Christiano et al. 2017,
    section 2.2.3). `length_bias` is in points of gold reward per word.
    """

    temperature: float = 0.6
    length_bias: float = 0.0
    seed: int = 0

    def prefers_first(self, prompt: str, first: str, second: str) -> float:
        """Probability that the first response is preferred."""
        gap = gold_reward(prompt, first) - gold_reward(prompt, second)
        gap += self.length_bias * (len(first.split()) - len(second.split()))
        return 1 / (1 + math.exp(-max(min(gap / self.temperature, 60.0), -60.0)))

    def label(self, index: int, prompt: str, first: str, second: str) -> dict[str, str]:
        """One preference row; the draw is keyed by (seed, index, prompt), not by call order."""
        p = self.prefers_first(prompt, first, second)
        draw = random.Random(f"annotator:{self.seed}:{index}:{prompt}").random()
        chosen, rejected = (first, second) if draw < p else (second, first)
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def accuracy_ceiling(pairs: Sequence[Mapping[str, str]], annotator: Annotator) -> float:
    """Best accuracy any reward model can expect on this annotator's labels of these pairs.

    A model that knew every probability p would still be wrong with probability min(p, 1 − p).
    """
    ps = [annotator.prefers_first(r["prompt"], r["chosen"], r["rejected"]) for r in pairs]
    return sum(max(p, 1 - p) for p in ps) / len(ps)
