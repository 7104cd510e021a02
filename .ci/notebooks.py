"""Run notebooks and store them as the repository keeps them: `python .ci/notebooks.py [NAME …]`

Names are beginnings (`03`); without any, all are run, one after the other, with the threads that
OMP_NUM_THREADS says. What is not kept: progress on stderr, what the Colab cell and cells about one
machine (tagged `this-machine`) print, times, and widgets, which show an error where no kernel runs:
each has a picture beside it that stays.
`--check` runs nothing, and exits with 1 where a stored notebook holds what is not kept.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import nbformat

FOLDER = Path(__file__).parents[1] / "notebooks"
WIDGET = "application/vnd.jupyter.widget-view+json"
LARGEST = 300_000  # bytes: what a reader without a clone waits for


def kept(output: nbformat.NotebookNode) -> bool:
    data = output.get("data", {})
    return WIDGET not in data and output.get("name") != "stderr" and (data or "data" not in output)


def cleaned(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook without what is not kept, in place."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        cell.metadata.pop("execution", None)
        cell.outputs = [output for output in cell.outputs if kept(output)]
        if {"colab", "this-machine"} & set(cell.metadata.get("tags", [])):
            cell.execution_count, cell.outputs = None, []
    return notebook


def run(path: Path) -> None:
    from nbclient import NotebookClient

    notebook, start = nbformat.read(path, 4), time.monotonic()
    metadata = dict(notebook.metadata)
    place = {"metadata": {"path": str(FOLDER)}}
    how = {"timeout": 400, "record_timing": False, "store_widget_state": False}
    # A busy machine sends one print in several messages.
    NotebookClient(notebook, **how, coalesce_streams=True, resources=place).execute()
    notebook.metadata = nbformat.from_dict(metadata)
    nbformat.write(cleaned(notebook), path)
    print(
        f"{path.name}  {time.monotonic() - start:.0f} s  {path.stat().st_size:,} bytes", flush=True
    )


def main() -> int:
    os.environ["HF_HUB_OFFLINE"] = "1"
    check, names = "--check" in sys.argv, [a for a in sys.argv[1:] if a != "--check"]
    paths = [
        p for p in sorted(FOLDER.glob("*.ipynb")) if not names or p.name.startswith(tuple(names))
    ]
    bad = 0
    for path in paths:
        if not check:
            run(path)
        text = path.read_text("utf-8")
        whole = nbformat.writes(cleaned(nbformat.reads(text, 4)))
        if whole.strip() != text.strip() or path.stat().st_size > LARGEST:
            bad += 1
            print(f"{path.name} is not as it is kept: python .ci/notebooks.py {path.stem}")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
