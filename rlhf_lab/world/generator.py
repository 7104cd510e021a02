"""The bundled world: short stories, instructions that ask for them.

Everything here is plain Python and deterministic: the same seed gives the same text on every
machine. A *request* names a mood, an animal, an object and a place. A *story* is six or seven
sentences drawn from templates (`stories.yaml`). Because the templates are known, a story can be
read back sentence by sentence: `gold_reward.py` does, and computes the reward that no learned model
can see.

The world's people make mistakes at stated rates (`Slips`): that is what leaves reinforcement
learning something to mend.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from ..stages import read_table

_TEXTS = read_table(__file__, "stories.yaml")
WORDS: dict[str, list[str]] = {slot: words.split() for slot, words in _TEXTS["words"].items()}
"""What may stand in a slot; of names those of a she and of a he."""
ANIMALS, SHE, HE, PLACES, OBJECTS, ADJECTIVES, TIMES = WORDS.values()
Bank: TypeAlias = dict[str, tuple[str, ...]]
"""mood → the sentences that have it"""
EVENTS, SCENES, CLOSES = (
    Bank({mood: tuple(sentences) for mood, sentences in _TEXTS[kind].items()})
    for kind in ("event", "scene", "close")
)
OPENINGS, FINDS, ASKS = (tuple[str, ...](_TEXTS[kind]) for kind in ("opening", "find", "ask"))
MOODS = tuple(EVENTS)
ENDING = "The end."

KNOWN_WORDS = set(re.findall("[a-z]+", str(_TEXTS).lower()))
"""Every word of this world, of its requests too."""

PRONOUNS = {"she": ("she", "her"), "he": ("he", "his")}


def gender(name: str) -> str:
    """'she' or 'he': the pronoun that goes with a name of this world."""
    return "she" if name in SHE else "he"


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


# --------------------------------------------------------------------------- requests and stories


@dataclass(frozen=True)
class Request:
    """What an instruction asks for."""

    mood: str
    animal: str
    object: str
    place: str
    wording: int = 0

    @property
    def prompt(self) -> str:
        """The instruction as text; it ends with a newline, the response starts after it."""
        ask = ASKS[self.wording % len(ASKS)]
        return ask.format(a=article(self.animal), an=article(self.object), **vars(self)) + "\n"


def _request_pattern(ask: str) -> re.Pattern[str]:
    """The regular expression that reads a request back from its wording."""
    words = {w: f"(?P<{w}>[a-z]+)" for w in ("mood", "animal", "object", "place")}
    return re.compile(ask.replace(".", r"\.").format(**words, a="an?", an="an?"))


_REQUESTS = [_request_pattern(ask) for ask in ASKS]


def read_request(prompt: str) -> Request | None:
    """The request behind a prompt of this world, or None for any other text."""
    for wording, pattern in enumerate(_REQUESTS):
        found = pattern.fullmatch(prompt.strip())
        if found and found["mood"] in MOODS:
            return Request(**found.groupdict(), wording=wording)
    return None


@dataclass(frozen=True)
class Slips:
    """How often a writer of this world makes each mistake (probabilities).

    `animal`, `object`, `place`: the story is about another one than was asked for. `mood`: a
    sentence has another mood. `name`, `pronoun`, `thing`, `scene`: a later mention of the hero's
    name, pronoun, object or place is wrong. `repeat`: a sentence stands there twice. `ramble`: the
    story goes on after its close. `unfinished`: "The end." is missing.
    """

    animal: float = 0.15
    object: float = 0.15
    place: float = 0.15
    mood: float = 0.25
    name: float = 0.08
    pronoun: float = 0.10
    thing: float = 0.12
    scene: float = 0.15
    repeat: float = 0.12
    ramble: float = 0.10
    unfinished: float = 0.10


CAREFUL = Slips(**dict.fromkeys(Slips.__dataclass_fields__, 0.0))


def draw_request(rng: random.Random) -> Request:
    return Request(
        rng.choice(MOODS),
        rng.choice(ANIMALS),
        rng.choice(OBJECTS),
        rng.choice(PLACES),
        rng.randrange(len(ASKS)),
    )


def write_story(request: Request, rng: random.Random, slips: Slips = CAREFUL) -> str:
    """One story for a request by a writer with these slips. The empty `CAREFUL` makes none."""

    def slip(rate: float, options: Sequence[str], right: str) -> str:
        return rng.choice([o for o in options if o != right]) if rng.random() < rate else right

    animal = slip(slips.animal, ANIMALS, request.animal)
    thing = slip(slips.object, OBJECTS, request.object)
    place = slip(slips.place, PLACES, request.place)
    name = rng.choice(SHE + HE)
    adj, time = rng.choice(ADJECTIVES), rng.choice(TIMES)

    def tell(templates: Sequence[str], first: bool = False) -> str:
        """Fill one template; only mentions after the first can be slips."""
        rate = 0.0 if first else 1.0
        written_name = slip(rate * slips.name, SHE + HE, name)
        pron, poss = PRONOUNS[slip(rate * slips.pronoun, ("she", "he"), gender(name))]
        template = rng.choice(templates)
        words = {
            "animal": animal,
            "name": written_name,
            "pron": pron,
            "poss": poss,
            "adj": adj,
            "time": time,
            "object": slip(rate * slips.thing, OBJECTS, thing),
            "place": slip(rate * slips.scene, PLACES, place),
            "a": article(adj if "{adj}" in template else animal),
        }
        sentence = template.format(**words)
        return sentence[0].upper() + sentence[1:]

    def in_mood(bank: Bank) -> str:
        return tell(bank[slip(slips.mood, MOODS, request.mood)])

    body = [in_mood(EVENTS), in_mood(SCENES)]
    if rng.random() < 0.5:
        body.reverse()
    story = [tell(OPENINGS, first=True), tell(FINDS, first=True), *body, in_mood(CLOSES)]
    if rng.random() < slips.repeat:
        at = rng.randrange(len(story))
        story.insert(at + 1, story[at])
    if rng.random() < slips.ramble:
        story += [in_mood(rng.choice((EVENTS, SCENES))) for _ in range(rng.randint(1, 3))]
    if rng.random() >= slips.unfinished:
        story.append(ENDING)
    return " ".join(story)
