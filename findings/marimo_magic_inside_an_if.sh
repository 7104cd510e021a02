#!/usr/bin/env bash
# One indented magic, and marimo's conversion of a notebook is a file that cannot start.
#
# Version: marimo 0.25.2; Python 3.11.
# Expected: `marimo convert` knows IPython's magics: it takes a `%pip` at the left edge out with a
#   remark, and makes a call of `!command`, also of an indented one. So the usual first cell of a
#   notebook for Colab, `if "google.colab" in sys.modules:` and an indented `%pip install`, which
#   IPython runs, is converted as well, or refused.
# Behaviour: an indented `%pip` stays as it is, in a cell that marimo marks as unparsable. The command
#   says "Converted notebook saved" and ends with 0; the file raises UnparsableError when it starts,
#   so no other cell of it runs either.
# Remedy: install with subprocess in cells that are conditional.
# Seen: "left edge: converts 0, runs 0", "! in an if: converts 0, runs 0",
#   "%pip in an if: converts 0, runs 1 UnparsableError".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet marimo==0.25.2
venv/bin/python - <<'PYTHON'
import json, subprocess, sys

CELLS = {
    "left edge": "%pip install --quiet pip\nx = 1",
    "! in an if": "import sys\nif 'google.colab' in sys.modules:\n    !echo there\nx = 1",
    "%pip in an if": "import sys\nif 'google.colab' in sys.modules:\n    %pip install --quiet pip\nx = 1",
}
seen = {}
for name, source in CELLS.items():
    cell = {"cell_type": "code", "execution_count": None, "id": "a", "metadata": {}, "outputs": []}
    book = {"cells": [{**cell, "source": source}], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    with open("book.ipynb", "w") as file:
        json.dump(book, file)
    def run(*command):
        return subprocess.run([sys.executable, *command], capture_output=True, text=True)
    made = run("-m", "marimo", "-y", "convert", "book.ipynb", "-o", "book.py")
    ran = run("book.py")
    error = " UnparsableError" if "UnparsableError" in ran.stderr else ""
    seen[name] = f"converts {made.returncode}, runs {ran.returncode}{error}"
    print(f"{name}: {seen[name]}")
sys.exit(
    seen
    != {
        "left edge": "converts 0, runs 0",
        "! in an if": "converts 0, runs 0",
        "%pip in an if": "converts 0, runs 1 UnparsableError",
    }
)
PYTHON
