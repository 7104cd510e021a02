"""Badges and the cell that installs, from the one repository setting: `python .ci/badges.py
[--check]`.

The address is `project.urls.Repository` in pyproject.toml. Written are the badge block of the
README, the one under each notebook's title, their pictures (our own: a notebook asks no other host
for one), and each notebook's first code cell, which installs the lab on Colab, on Kaggle and on
molab, and does nothing elsewhere. It is plain Python, without `%pip`: marimo, which is molab's
notebook, cannot read a magic inside an `if`. JupyterLab shows it folded: a first screen is for what
the notebook is about. With --check nothing is written: exit status 1 says
that something is out of step.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from written_file import ROOT, write_or_check

START, END = "<!-- badges -->", "<!-- /badges -->"
TAG = "colab"
CELL = """\
# On Colab, on Kaggle and in marimo (molab) this installs the lab where it is missing.
import os
import subprocess
import sys
from importlib.util import find_spec

hosted = "google.colab" in sys.modules or "KAGGLE_KERNEL_RUN_TYPE" in os.environ
if (hosted or "marimo" in sys.modules) and find_spec("rlhf_lab") is None:
    install = [sys.executable, "-m", "pip", "install"]
    if find_spec("pip") is None:  # molab's environments are uv's
        install = ["uv", "pip", "install", "--python", sys.executable]
    subprocess.run([*install, "--quiet", "rlhf-lab @ git+{address}"], check=True)
if "google.colab" in sys.modules:
    from google.colab import output

    output.enable_custom_widget_manager()"""


def address() -> str:
    """The repository's address: the one setting."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return re.search(r'^Repository = "(https://github\.com/[^"]+?)/?"$', text, re.M)[1]


def places(notebook: str) -> dict[str, str]:
    """Where a notebook opens; in JupyterLab on Binder, in marimo on molab."""
    name = address().removeprefix("https://github.com/")
    file = f"{name}/blob/main/notebooks/{notebook}"
    return {
        "Binder": f"https://mybinder.org/v2/gh/{name}/HEAD?urlpath=lab/tree/notebooks/{notebook}",
        "Colab": f"https://colab.research.google.com/github/{file}",
        "Kaggle": f"https://kaggle.com/kernels/welcome?src=https://github.com/{file}",
        "molab": f"https://molab.marimo.io/github/{file}",
    }


def pages() -> dict[str, str]:
    """What a reader of any notebook may want beside it."""
    docs = f"{address()}/blob/main/docs"
    return {"Words": f"{docs}/glossary.md", "When something fails": f"{docs}/troubleshooting.md"}


IMAGES = Path("notebooks/images")
COLOURS = {"Binder": "#b34a00", "Colab": "#1a5fb4", "Kaggle": "#0f6674", "molab": "#1d6b34"}
"""White on each is read easily."""
BADGE = """\
<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="22" role="img" aria-label="{label}">
<rect width="{width}" height="22" rx="4" fill="{colour}"/>
<text x="{middle}" y="15.5" text-anchor="middle" textLength="{length}" fill="#fff" \
font-family="Helvetica,Arial,sans-serif" font-size="12">{label}</text>
</svg>
"""


def picture(place: str) -> str:
    """A badge as SVG."""
    label = f"Open in {place}"
    length = round(6.3 * len(label))
    return BADGE.format(
        label=label, colour=COLOURS[place], length=length, width=length + 20, middle=length / 2 + 10
    )


def badges(notebook: str, images: str) -> str:
    """The badges of a notebook, in Markdown; `images` is the folder as seen from the page."""
    shown = (
        f"[![Open in {place}]({images}/{place.lower()}.svg)]({at})"
        for place, at in places(notebook).items()
    )
    return " ".join(shown)


def readme(text: str) -> str:
    """The README with its badge block up to date."""
    first = min(p.name for p in (ROOT / "notebooks").glob("*.ipynb"))
    block = f"{START}\n{badges(first, IMAGES.as_posix())}\n{END}"
    return re.sub(f"{START}.*?{END}", lambda _: block, text, flags=re.S)


def notebook(text: str, name: str) -> str:
    """A notebook with badges and links under its title, the cell that installs before its first
    code."""
    whole = json.loads(text)
    title, *rest = whole["cells"][0]["source"]
    rest = [line for line in rest if not line.startswith("[![Open in ")]
    while rest and not rest[0].strip():
        rest.pop(0)
    beside = (f"[{words}]({at})" for words, at in pages().items())
    links = " · ".join([badges(name, IMAGES.name), *beside])
    whole["cells"][0]["source"] = [title.rstrip("\n") + "\n", "\n", links + "\n", "\n", *rest]
    cells = [c for c in whole["cells"] if TAG not in c["metadata"].get("tags", [])]
    first = next(i for i, c in enumerate(cells) if c["cell_type"] == "code")
    cells.insert(
        first,
        {
            "cell_type": "code",
            "execution_count": None,
            "id": "colab",
            "metadata": {"jupyter": {"source_hidden": True}, "tags": [TAG]},
            "outputs": [],
            "source": CELL.format(address=address()).splitlines(keepends=True),
        },
    )
    whole["cells"] = cells
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def files() -> dict[Path, str]:
    """What each file has to read."""
    page = ROOT / "README.md"
    found = {page: readme(page.read_text("utf-8"))}
    for place in COLOURS:
        found[ROOT / IMAGES / f"{place.lower()}.svg"] = picture(place)
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        found[path] = notebook(path.read_text("utf-8"), path.name)
    return found


if __name__ == "__main__":
    sys.exit(write_or_check(files()))
