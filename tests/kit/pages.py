"""The pages people read: their blocks of code, the marks before these, and their links."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "AGENTS.md", "SECURITY.md")),
        *(p for p in (ROOT / "docs").glob("*.md")),
    ]
)
MARK = re.compile(r"<!-- (not run|file): (.+) -->")
LINK = re.compile(r"\]\(([^)\s]+)\)")


class Block(NamedTuple):
    """A fenced block. `not_run`: why it is not run; `file`: the name of the file that it shows."""

    page: Path
    line: int
    language: str
    code: str
    not_run: str = ""
    file: str = ""

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, without directives of the site (```{toctree})."""
    mark, fence, language, start, code = {}, "", "", 0, []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        opened = re.match(r"(`{3,})(\S*)$", line)
        if fence and line == fence:
            if not language.startswith("{"):
                yield Block(page, start, language, "\n".join(code) + "\n", **mark)
            mark, fence = {}, ""
        elif fence:
            code.append(line)
        elif opened:
            fence, language, start, code = opened[1], opened[2], number, []
        elif found := MARK.fullmatch(line):
            mark = {found[1].replace(" ", "_"): found[2]}
        elif line.strip():
            mark = {}
    assert not fence, f"{page.name}: a block that does not end"


def prose(text: str) -> str:
    """A page's text without its blocks of code and code in lines."""
    text = re.sub(r"^(`{3,}).*?^\1$", "", text, flags=re.M | re.S)
    return re.sub(r"`[^`\n]*`", "", text)


def links(text: str) -> list[str]:
    """Where the links and pictures of a page go, other hosts left out."""
    found = LINK.findall(prose(text))
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^(`{3,}).*?^\1$", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
