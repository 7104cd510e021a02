"""The pairs that ship: two answers of the SFT model to each request, some with a broken sentence.

Only `build.py` reads it. The annotator's preferences are drawn when the pairs are loaded.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path

from rlhf_lab.ppo.texts import sample_ids
from rlhf_lab.world import corpus
from rlhf_lab.world.generator import ENDING, read_request, write_story
from rlhf_lab.world.gold_reward import read_story

PAIRS = {"train": 8192, "test": 5120}
BROKEN = 1 / 8
"""Share of answers that are given a broken sentence. The SFT model itself breaks one in a hundred:
too few for a reward model to learn what that costs."""
Pair = dict[str, str]


def sample_pairs(
    model, tokenizer, split: str, count: int, seed: int, broken_share: float = BROKEN
) -> list[Pair]:
    """Pairs of different answers to `count` requests: {"split", "prompt", "first", "second"}."""
    requests = corpus.requests(split, seed + 11)
    prompts = [r.prompt for r, _ in zip(requests, range(count), strict=False)]
    ids = sample_ids(model, tokenizer, prompts, samples=2, seed=seed + 5)
    rng = random.Random(f"broken:{split}:{seed}")
    rows = []
    for prompt, two in zip(prompts, ids, strict=True):
        texts = tokenizer.batch_decode(two, skip_special_tokens=True)
        first, second = (broken(t, rng) if rng.random() < broken_share else t for t in texts)
        if first != second:
            rows.append({"split": split, "prompt": prompt, "first": first, "second": second})
    return rows


def written_stories(prompts: list[str], seed: int) -> list[str]:
    """A story for each request by the world's paid writers, who can have memorised nothing."""
    rng = random.Random(seed)
    return [write_story(read_request(prompt), rng, corpus.PAID) for prompt in prompts]


def broken(story: str, rng: random.Random) -> str:
    """The story with one sentence that its language does not know, and no other change.

    A word is left out, stands twice, has changed places with the next, or another word of the
    sentence stands in its place. A story without a whole sentence stays as it is.
    """
    sentences = story.split(". ")
    known = [i for i, s in enumerate(sentences) if _known(s) and s.rstrip(".") != ENDING[:-1]]
    if not known:
        return story
    at = rng.choice(known)
    for _ in range(20):  # a change may give a sentence that the language knows
        words = sentences[at].rstrip(".").split(" ")
        rng.choice(CHANGES)(words, rng)
        changed = " ".join(words)
        if not _known(changed):
            sentences[at] = changed + "." * sentences[at].endswith(".")
            break
    return ". ".join(sentences)


def _known(sentence: str) -> bool:
    return all(s.kind != "unknown" for s in read_story(sentence.rstrip(".") + "."))


def _leave_out(words: list[str], rng: random.Random) -> None:
    del words[rng.randrange(len(words))]


def _twice(words: list[str], rng: random.Random) -> None:
    at = rng.randrange(len(words))
    words.insert(at, words[at])


def _swap(words: list[str], rng: random.Random) -> None:
    at = rng.randrange(max(len(words) - 1, 1))
    words[at : at + 2] = reversed(words[at : at + 2])


def _replace(words: list[str], rng: random.Random) -> None:
    words[rng.randrange(len(words))] = rng.choice(words)


CHANGES: tuple[Callable[[list[str], random.Random], None], ...] = (
    _leave_out,
    _twice,
    _swap,
    _replace,
)


def write_pairs(rows: list[Pair], file: Path) -> None:
    """One a line, compressed; the same rows give the same bytes."""
    with gzip.GzipFile(file, "wb", mtime=0) as out:
        out.write("".join(json.dumps(row) + "\n" for row in rows).encode())
