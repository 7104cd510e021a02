#!/usr/bin/env bash
# A stored widget takes the place of the picture that was stored beside it for readers without a kernel.
#
# Version: myst-nb 1.4.0 with Sphinx 9.0.4; Python 3.11.
# Expected: an output that holds a widget's view and an image/png is shown as the image on a page that
#   runs nothing (nb_execution_mode "off"; no widget state in the notebook), as notebook viewers do,
#   which take the richest kind that they can show.
# Behaviour: the widget's view comes first in myst-nb's order, whether its state is stored or not. The
#   page gets a script with the view's id and nothing else: no image, no text, no warning.
# Remedy: nb_mime_priority_overrides = [("*", "application/vnd.jupyter.widget-view+json", None)].
# Seen: "picture alone: 1 image", "picture and widget: 0 images", "with the remedy: 1 image".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet myst-nb==1.4.0 sphinx==9.0.4
venv/bin/python - <<'PYTHON'
import json, subprocess, sys
from pathlib import Path

VIEW = "application/vnd.jupyter.widget-view+json"
PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def images(name, widget, settings=""):
    data = {"image/png": PNG, "text/plain": "a picture"}
    if widget:
        data[VIEW] = {"model_id": "0" * 32, "version_major": 2, "version_minor": 0}
    shown = {"output_type": "display_data", "data": data, "metadata": {}}
    cell = {"cell_type": "code", "execution_count": 1, "id": "a", "metadata": {}, "source": "picture"}
    title = {"cell_type": "markdown", "id": "t", "metadata": {}, "source": "# Title"}
    language = {"language_info": {"name": "python", "pygments_lexer": "python"}}
    book = {"cells": [title, {**cell, "outputs": [shown]}], "metadata": language}
    site = Path(name)
    site.mkdir()
    (site / "index.ipynb").write_text(json.dumps({**book, "nbformat": 4, "nbformat_minor": 5}))
    (site / "conf.py").write_text(f"extensions = ['myst_nb']\nnb_execution_mode = 'off'\n{settings}")
    build = [sys.executable, "-m", "sphinx", "-q", "-W", str(site), f"{name}-html"]
    subprocess.run(build, check=True)  # -W: a warning would fail
    return Path(f"{name}-html", "index.html").read_text().count("<img ")


remedy = f"nb_mime_priority_overrides = [('*', '{VIEW}', None)]\n"
found = images("alone", False), images("both", True), images("mended", True, remedy)
for name, n in zip(("picture alone", "picture and widget", "with the remedy"), found):
    print(f"{name}: {n} image{'s' * (n != 1)}")
sys.exit(found != (1, 0, 1))
PYTHON
