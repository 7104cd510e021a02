"""The site of rlhf_lab: `make docs` builds it into build/docs, and needs no network.

Pages are Markdown (MyST); notebooks are chapters, shown as they are stored (nothing is run); the
reference is written by `generate.py` from the source, which is read and never imported.
"""

import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]

import generate  # noqa: E402

project = "rlhf_lab"
author = "The rlhf_lab authors"
version = release = generate.version()
extensions = ["myst_nb"]
html_theme = "furo"
html_title = "rlhf_lab"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_copyright = False
exclude_patterns = ["**/.ipynb_checkpoints"]
myst_heading_anchors = 3
myst_enable_extensions = ["deflist"]
add_module_names = False
toc_object_entries = False

nb_execution_mode = "off"
# A stored widget has no kernel here: the picture in the same output stands in for it ...
nb_mime_priority_overrides = [("*", "application/vnd.jupyter.widget-view+json", None)]
nb_ipywidgets_js = {}  # ... and no page asks another host for the widgets' scripts.

LINK = re.compile(r"(\]\(|\bhref=\")\.\./([^)\"\s]+)")


def links_for_the_site(text: str, page: str) -> str:
    """Links out of docs/, which work in the repository, as links of the site: a notebook or
    another page that is part of it, or else the file in the repository."""
    up = "../" * page.count("/")

    def link(found: re.Match) -> str:
        target = found[2]
        if target.startswith("notebooks/"):
            return f"{found[1]}{up}{target}"
        return f"{found[1]}{generate.address()}/blob/main/{target}"

    return LINK.sub(link, text)


def read_page(app, page: str, source: list[str]) -> None:
    if not page.startswith(("notebooks/", "reference/")):
        source[0] = links_for_the_site(source[0], page)


def setup(app):
    generate.write_all(HERE)
    app.connect("source-read", read_page)
