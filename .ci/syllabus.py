"""The tables of docs/teaching.md, from the notebooks: `python .ci/syllabus.py [--check]`.

Minutes, what is needed and what a notebook gives stand in its first cell; its exercises are its
cells that check one; points are those of `rlhf_lab/exercises/exercises.yaml`. With --check nothing
is written: exit status 1 says that the page is out of step.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

from written_file import ROOT, with_blocks, write_or_check

sys.path.insert(0, str(ROOT))

from rlhf_lab.exercises.book import EXERCISES  # noqa: E402
from rlhf_lab.exercises.classroom import EXERCISE  # noqa: E402

PAGE = ROOT / "docs" / "teaching.md"
PLANS = {
    "one afternoon": {"Train a model": ["00", "01"], "Learn from preferences": ["02", "03"]},
    "four sessions": {
        "From a base model to a reward model": ["00", "01", "02"],
        "PPO, number by number, and how it fails": ["03", "10"],
        "With less: no sampling, no critic": ["04", "05"],
        "What it costs": ["06", "08", "11"],
    },
    "half a term": {
        "A first run, and SFT": ["00", "01"],
        "Preferences and the reward model": ["02"],
        "PPO": ["03"],
        "DPO, RLOO and GRPO": ["04", "05"],
        "Memory, and what scales": ["06", "07"],
        "Cheaper training, cheaper answers": ["08", "09"],
        "What goes wrong": ["10"],
        "A plan of your own, and many GPUs": ["11", "12"],
    },
}
"""Sessions, and the notebooks of each."""


class Chapter(NamedTuple):
    """What a notebook says of itself. `needs`: other notebooks; `graded`: exercises on its page."""

    file: str
    title: str
    gives: str
    minutes: int
    needed: str
    needs: list[str]
    graded: list[str]

    @property
    def points(self) -> int:
        return sum(EXERCISES[name].points for name in self.graded)


def chapter(path: Path) -> Chapter:
    cells = json.loads(path.read_text("utf-8"))["cells"]
    first, *sources = ("".join(cell["source"]) for cell in cells)
    told = r"\*\*You will be able to\*\* (.+?) \*\*Minutes:\*\* (\d+)\. \*\*You need:\*\* (.+)"
    gives, minutes, needed = re.search(told, first).groups()
    title = re.match(r"# \d+ · (.+)", first)[1]
    needs = re.findall(r"\]\((\d\d)_", needed)
    graded = [found[4] for source in sources if (found := EXERCISE.fullmatch(source))]
    return Chapter(path.name, title, gives, int(minutes), needed, needs, graded)


def chapters() -> dict[str, Chapter]:
    """Number → notebook."""
    return {p.name[:2]: chapter(p) for p in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))}


def table(*rows: tuple[object, ...]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([lines[0], "| --- " * len(rows[0]) + "|", *lines[1:]])


def names(found: list[str]) -> str:
    """Exercises with their points: `gae` 3."""
    return ", ".join(f"`{name}` {EXERCISES[name].points}" for name in found)


def course(found: dict[str, Chapter]) -> str:
    rows = [("notebook", "minutes", "you need", "afterwards you can")]
    for number, c in found.items():
        needed = c.needed.replace("](", "](../notebooks/")
        link = f"[{number} · {c.title}](../notebooks/{c.file})"
        rows.append((link, c.minutes, needed, c.gives))
    total = sum(c.minutes for c in found.values())
    return table(*rows, ("all", total, "", ""))


def exercises(found: dict[str, Chapter]) -> str:
    rows = [(number, names(c.graded), c.points) for number, c in found.items() if c.graded]
    total = ("all", "", sum(c.points for c in found.values()))
    return table(("notebook", "exercises, with points", "points"), *rows, total)


def plans(found: dict[str, Chapter]) -> str:
    rows = [("plan", "session", "notebooks", "minutes", "points")]
    for plan, sessions in PLANS.items():
        for i, (title, numbers) in enumerate(sessions.items(), 1):
            of = [found[number] for number in numbers]
            sums = sum(c.minutes for c in of), sum(c.points for c in of)
            rows.append((plan if i == 1 else "", f"{i}. {title}", ", ".join(numbers), *sums))
    return table(*rows)


def page(text: str) -> str:
    """The page with its tables up to date."""
    found = chapters()
    return with_blocks(text, {made.__name__: made(found) for made in (course, exercises, plans)})


if __name__ == "__main__":
    sys.exit(write_or_check({PAGE: page(PAGE.read_text("utf-8"))}))
