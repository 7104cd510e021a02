"""Links inside the repository lead somewhere: pages, notebooks, docstrings' pages.

Run: pytest tests/docs/test_links.py
"""

import json
import re
from pathlib import Path

import pytest
from pages import PAGES, ROOT, anchors, links

MORE = ("CHANGELOG.md", "benchmarks/README.md", "rlhf_lab/ppo/RULES.md")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FILES = [*PAGES, *(ROOT / name for name in MORE), *NOTEBOOKS]


def markdown(file: Path) -> str:
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".ipynb":
        return text
    cells = (c for c in json.loads(text)["cells"] if c["cell_type"] == "markdown")
    return "\n\n".join("".join(cell["source"]) for cell in cells)


@pytest.mark.parametrize("file", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(file):
    wrong = []
    for link in links(markdown(file)):
        target, _, anchor = link.partition("#")
        there = (file.parent / target).resolve() if target else file
        if not there.exists() or not there.is_relative_to(ROOT):
            wrong.append(link)
        elif re.fullmatch(r"L\d+(-L\d+)?", anchor):
            if int(anchor[1:].split("-")[0]) > len(there.read_text("utf-8").splitlines()):
                wrong.append(link)
        elif anchor and there.suffix == ".md" and anchor not in anchors(markdown(there)):
            wrong.append(link)
    assert not wrong


def test_the_check_finds_a_link_that_leads_nowhere():
    text = "[a](docs/install.md), [b](docs/nowhere.md#x), `[c](no)`\n\n```\n[d](no)\n```\n"
    assert links(text + "[e](https://example.org)") == ["docs/install.md", "docs/nowhere.md#x"]
    assert anchors("# From TRL: it's *so*\n```\n# no\n```\n") == {"from-trl-its-so"}


def test_every_page_is_in_the_list_of_the_site():
    listed = (ROOT / "docs" / "index.md").read_text("utf-8").splitlines()
    pages = {p.stem for p in (ROOT / "docs").glob("*.md")} - {"index"}
    assert not pages - set(listed)


def test_what_is_where_names_every_part_of_the_package():
    page = (ROOT / "docs" / "where.md").read_text("utf-8")
    package = ROOT / "rlhf_lab"
    folders = {f"{p.parent.name}/" for p in package.glob("*/*.py")} - {"small_models/"}
    modules = {p.name for p in package.glob("*.py")} - {"__init__.py"}
    named = set(re.findall(r"`([\w/]+(?:\.py)?)`", page))
    assert not (folders | modules) - named
    assert not {name for name in named if name.endswith(".py")} - modules


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_files_that_a_page_names_are_there(page):
    top = r"rlhf_lab|tests|docs|notebooks|benchmarks|small_models|binder|\.ci"
    named = re.findall(rf"`((?:{top})/[\w./]*)`", page.read_text("utf-8"))
    made = {"docs/reference/", "docs/notebooks/"}
    assert not [name for name in named if name not in made and not (ROOT / name).exists()]
