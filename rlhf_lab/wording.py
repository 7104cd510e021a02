"""The nearest of what would have been right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


def did_you_mean(name: Any, known: Iterable[Any]) -> str:
    """`did you mean 'adamw_torch'? `, or nothing where no name is near."""
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}? " if close else ""
