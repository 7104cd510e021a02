"""The site of rlhf_lab: `make docs` builds it into build/docs, and needs no network.

Pages are Markdown (MyST); notebooks are chapters, shown as they are stored (nothing is run); the
reference is written by `generate.py` from the source, which is read and never imported.
"""

import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
MADE = {"make web": ("web", "planner"), "make lite": ("lite", "lite")}
"""Folders of build/, and where the site has them."""
BUILT = {made for made, (folder, _) in MADE.items() if (ROOT / "build" / folder).is_dir()}
sys.path[:0] = [str(HERE), str(ROOT)]

import generate  # noqa: E402

import rlhf_lab as lab  # noqa: E402

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
# plotly's figures are drawn by JupyterLab alone: their words stand on the page.
suppress_warnings = ["mystnb.unknown_mime_type"]
nb_ipywidgets_js = {}  # ... and no page asks another host for the widgets' scripts.


def read_page(app, page: str, source: list[str]) -> None:
    """Links of a hand-written page as links of the site; the first page begins with the README."""
    file = HERE / f"{page}.md"
    if page.startswith(("notebooks/", "reference/")):
        return
    source[0] = generate.for_the_site(source[0], file, page)
    if page == "web":
        source[0] += generate.web_pages(BUILT)
    if page == "index":
        readme = generate.ROOT / "README.md"
        source[0] = generate.for_the_site(readme.read_text("utf-8"), readme, page) + source[0]


def add_pages(app, failed) -> None:
    """Beside the site's own pages: the planner and the notebooks in a browser, as `make web` and
    `make lite` have left them, and a stored run."""
    if failed or app.builder.name != "html":
        return
    for made in BUILT:
        folder, at = MADE[made]
        shutil.rmtree(Path(app.outdir) / at, ignore_errors=True)
        shutil.copytree(ROOT / "build" / folder, Path(app.outdir) / at)
    lab.report(ROOT / "notebooks" / "course_runs" / "ppo", Path(app.outdir) / "replay" / "ppo.html")


def setup(app):
    generate.write_all(HERE)
    app.connect("source-read", read_page)
    app.connect("build-finished", add_pages)
