"""What a run's samples repeat."""

from __future__ import annotations

import math
from collections.abc import Iterable

NGRAM = 3


def repeated_ngrams(texts: Iterable[str]) -> float:
    """Share of the runs of three words that stood in the same text before; NaN without any."""
    seen = total = 0
    for text in texts:
        words = text.split()
        grams = [tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)]
        total, seen = total + len(grams), seen + len(grams) - len(set(grams))
    return seen / total if total else math.nan
