"""A file that a script of this folder writes: to disk, or with --check only compared with it."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def with_blocks(text: str, blocks: Mapping[str, str]) -> str:
    """A page in which what stands between `<!-- name -->` and `<!-- /name -->` is written anew."""
    for name, made in blocks.items():
        block = f"<!-- {name} -->\n{made}\n<!-- /{name} -->"
        pattern = rf"<!-- {name} -->.*?<!-- /{name} -->"
        text, count = re.subn(pattern, lambda _, block=block: block, text, flags=re.S)
        assert count == 1, name
    return text


def write_or_check(files: dict[Path, str]) -> int:
    """Write the files that differ from their text. → exit status: 1 when --check was given and one
    is out of step; nothing is written then."""
    check = "--check" in sys.argv[1:]
    stale = [p for p, text in files.items() if not p.is_file() or p.read_text("utf-8") != text]
    for path in stale:
        name = path.relative_to(ROOT)
        if check:
            print(f"{name} is out of step: python .ci/{Path(sys.argv[0]).name}")
        else:
            path.write_text(files[path], encoding="utf-8")
            print(f"written: {name}")
    return int(check and bool(stale))
