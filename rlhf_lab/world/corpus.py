"""Requests and demonstrations of the bundled world, in splits that share nothing."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from functools import cache

from .generator import Request, Slips, draw_request, write_story

SPLITS = {"train": range(0, 8), "validation": range(8, 9), "test": range(9, 10)}
"""Tenths of all stories, and of all requests, by checksum: no two splits share either."""


def in_split(text: str, split: str) -> bool:
    """Whether a text belongs to a split."""
    return zlib.crc32(text.encode()) % 10 in SPLITS[split]


def requests(split: str, seed: int) -> Iterator[Request]:
    """Endless requests of a split. What is asked for (wording aside) decides the split."""
    rng = random.Random(f"requests:{split}:{seed}")
    while True:
        request = draw_request(rng)
        if _asked_in(split, request.mood, request.animal, request.object, request.place):
            yield request


@cache  # some thousands, each of them asked for many times
def _asked_in(split: str, mood: str, animal: str, thing: str, place: str) -> bool:
    """Whether what is asked for belongs to a split."""
    return in_split(Request(mood, animal, thing, place).prompt, split)


PAID = Slips()
"""Writers who are paid for demonstrations: they try, and slip at the stated rates."""


def demonstrations(split: str, count: int, seed: int, slips: Slips = PAID) -> list[dict[str, str]]:
    """`count` instructions with a story by a paid but human writer: {"prompt", "completion"}."""
    rng = random.Random(f"demonstrations:{split}:{seed}")
    rows = []
    for request in requests(split, seed):
        story = write_story(request, rng, slips)
        if in_split(story, split):
            rows.append({"prompt": request.prompt, "completion": story})
        if len(rows) == count:
            return rows
    return rows
