"""Rows about pictures, sound or films: models here read text, and what a row lacks without them is
never known, so that such rows are left out and counted."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from .messages import TABLE, Cell, Message, missing, structure

NAMES = frozenset(TABLE["images"])
PATH = re.compile(r"(?:\w+:)?\S*\S\.\w{2,5}(?:\?\S*)?|(?:https?|data|s3|gs|file):\S+|\S{200,}")
MARK = re.compile(
    r"<\|?(?:image|audio|video)(?:[ _]?\d+|_pad|_soft_token|_token)\|?>|<\|(?:image|audio|video)\|>"
    r"|^\s*<(?:image|audio|video)>|<(?:image|audio|video)>\s*$",
    re.MULTILINE,
)
"""What stands for a picture in a text. HTML has such tags too: closed ones, or within a line."""


def image_columns(columns: Sequence[str], used: Sequence[str]) -> tuple[str, ...]:
    """Columns that hold pictures, sound or films by their names, and that no mapping uses."""
    return tuple(c for c in columns if c.lower() in NAMES and c not in used)


def holds_image(cell: Cell) -> bool:
    """Whether a cell holds a picture: bytes, an object of a library, a path or an address."""
    cell = structure(cell)
    if isinstance(cell, Mapping):
        return any(not missing(v) for v in cell.values())
    if isinstance(cell, (list, tuple)):
        return any(map(holds_image, cell))
    if isinstance(cell, str):
        return bool(PATH.fullmatch(cell.strip()))
    return not missing(cell) and not isinstance(cell, (bool, int, float))


def marks_image(prompt: str | list[Message]) -> bool:
    """Whether a prompt says where a picture stood."""
    texts = [prompt] if isinstance(prompt, str) else [turn.get("content") for turn in prompt]
    return any(
        "<" in t and bool(MARK.search(t)) and not re.search("</(?:image|audio|video)>", t)
        for t in texts
        if isinstance(t, str)
    )
