"""Badges and the Colab cell, from the one repository setting: `python .ci/badges.py [--check]`.

The address is `project.urls.Repository` in pyproject.toml. Written are the badge block of the
README, the links under each notebook's title (plain ones: a notebook asks no other host for a
picture), and each notebook's first code cell, which installs the lab on Colab and does nothing
elsewhere. With --check nothing is written: exit status 1 says that something is out of step.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- badges -->", "<!-- /badges -->"
TAG = "colab"
CELL = """\
# On Colab this installs the lab. Anywhere else it does nothing.
import sys

if "google.colab" in sys.modules:
    %pip install --quiet "rlhf-lab @ git+{address}"
    from google.colab import output

    output.enable_custom_widget_manager()"""


def address() -> str:
    """The repository's address: the one setting."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return re.search(r'^Repository = "(https://github\.com/[^"]+?)/?"$', text, re.M)[1]


def places(notebook: str) -> dict[str, str]:
    """Where a notebook opens: Binder (in JupyterLab) and Colab."""
    name = address().removeprefix("https://github.com/")
    return {
        "Binder": f"https://mybinder.org/v2/gh/{name}/HEAD?urlpath=lab/tree/notebooks/{notebook}",
        "Colab": f"https://colab.research.google.com/github/{name}/blob/main/notebooks/{notebook}",
    }


PICTURES = {
    "Binder": "https://mybinder.org/badge_logo.svg",
    "Colab": "https://colab.research.google.com/assets/colab-badge.svg",
}
LINK = "[Open in "


def readme(text: str) -> str:
    """The README with its badge block up to date."""
    first = min(p.name for p in (ROOT / "notebooks").glob("*.ipynb"))
    shown = (f"[![Open in {n}]({PICTURES[n]})]({at})" for n, at in places(first).items())
    block = f"{START}\n{' '.join(shown)}\n{END}"
    return re.sub(f"{START}.*?{END}", lambda _: block, text, flags=re.S)


def notebook(text: str, name: str) -> str:
    """A notebook with links under its title and the Colab cell before its first code."""
    whole = json.loads(text)
    title, *rest = whole["cells"][0]["source"]
    rest = [line for line in rest if not line.startswith(LINK)]
    while rest and not rest[0].strip():
        rest.pop(0)
    links = " · ".join(f"{LINK}{n}]({at})" for n, at in places(name).items())
    whole["cells"][0]["source"] = [title.rstrip("\n") + "\n", "\n", links + "\n", "\n", *rest]
    cells = [c for c in whole["cells"] if TAG not in c["metadata"].get("tags", [])]
    first = next(i for i, c in enumerate(cells) if c["cell_type"] == "code")
    cells.insert(first, {
        "cell_type": "code", "execution_count": None, "id": "colab",
        "metadata": {"tags": [TAG]}, "outputs": [],
        "source": CELL.format(address=address()).splitlines(keepends=True),
    })  # fmt: skip
    whole["cells"] = cells
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def main() -> int:
    check, stale = "--check" in sys.argv[1:], []
    files = {ROOT / "README.md": readme}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        files[path] = lambda text, name=path.name: notebook(text, name)
    for path, make in files.items():
        old = path.read_text(encoding="utf-8")
        if (new := make(old)) != old:
            stale.append(path)
            if not check:
                path.write_text(new, encoding="utf-8")
    for path in stale:
        print(f"{'out of step' if check else 'written'}: {path.relative_to(ROOT)}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
