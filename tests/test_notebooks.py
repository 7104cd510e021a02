"""What nbval does not see: a checked cell without stored output would pass in silence.

pytest tests/test_notebooks.py          # the notebooks themselves are run by `make test`
"""

import json
import random
import re
import runpy
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from urllib.parse import urlsplit

import pytest

from rlhf_lab.runs.run import Run

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def code_cells(path: Path) -> list[dict]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [c for c in cells if c["cell_type"] == "code"]


def test_the_notebooks_are_there():
    names = {p.stem for p in NOTEBOOKS}
    assert names >= {"01_sft", "02_reward_model", "03_ppo", "04_dpo", "05_rloo_grpo"}
    assert names >= {"06_four_models", "07_what_scales", "08_cheaper_training"}
    assert names >= {"09_serve_and_distil", "10_what_goes_wrong"}
    assert names >= {"11_plan_your_project", "12_many_gpus"}


def test_stored_runs_are_small_and_say_how_they_were_made():
    """`make course_runs` makes them; a notebook asks for no other."""
    made = {p.parent.name for p in NOTEBOOKS[0].parent.glob("course_runs/*/run.json")}
    assert made == set(
        runpy.run_path(str(NOTEBOOKS[0].parents[1] / ".ci" / "course_runs.py"))["RUNS"]
    )
    for name in made:
        run = Run.stored(name)
        assert run.status == "finished" and run.config["seed"] == 0 and run.config["versions"]
        assert run.peak > 0 and run.summary.keys() & {"gold_reward", "noise_free_accuracy"}
        assert max(p.stat().st_size for p in run.folder.iterdir()) <= 50_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_checked_cell_has_the_output_to_check_against(path):
    checked = [c for c in code_cells(path) if "nbval-check-output" in c["metadata"].get("tags", [])]
    assert checked, "a notebook without a checked cell tests only that nothing crashes"
    for cell in checked:
        assert cell["outputs"] and cell["execution_count"], "".join(cell["source"])


def test_the_course_is_checked():
    tags = [c["metadata"].get("tags", []) for path in NOTEBOOKS for c in code_cells(path)]
    assert sum("nbval-check-output" in of_cell for of_cell in tags) >= 80


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_each_notebook_starts_alone(path):
    installs, first = ("".join(cell["source"]) for cell in code_cells(path)[:2])
    assert "import rlhf_lab as lab" in first and '"google.colab" in sys.modules' in installs


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_question_is_answered_on_its_page(path):
    """`name = lab.guess(…)` needs a `name.reveal(…)` further down."""
    sources = ["".join(c["source"]) for c in code_cells(path)]
    asked = [
        (name, i)
        for i, source in enumerate(sources)
        for name in re.findall(r"^(\w+) = lab\.guess\(", source, re.M)
    ]
    assert asked, "a notebook asks before it runs"
    for name, i in asked:
        assert any(f"{name}.reveal(" in source for source in sources[i + 1 :]), name


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_each_opens_with_a_picture_and_ends_with_what_comes_next(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    first, last = ("".join(cells[i]["source"]) for i in (0, -1))
    assert re.search(r"!\[[^\]]+\]\(images/(?!binder|colab|kaggle|molab)", first), (
        "no picture with words"
    )
    for told in ("You will be able to", "Minutes:", "You need:"):
        assert told in first
    assert "Next:" in last or path is NOTEBOOKS[-1]


@pytest.mark.parametrize("there", [True, False], ids=["there", "missing"])
@pytest.mark.parametrize("host", ["google.colab", "KAGGLE_KERNEL_RUN_TYPE", "marimo", None])
def test_the_first_cell_installs_on_a_host_where_the_lab_is_missing(host, there, monkeypatch):
    installed, enabled = [], []
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    for name in ("google", "google.colab", "marimo"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    if host == "KAGGLE_KERNEL_RUN_TYPE":
        monkeypatch.setenv(host, "Interactive")
    elif host:
        module = ModuleType(host)
        module.output = SimpleNamespace(enable_custom_widget_manager=lambda: enabled.append(True))
        monkeypatch.setitem(sys.modules, host.split(".")[0], ModuleType(host.split(".")[0]))
        monkeypatch.setitem(sys.modules, host, module)
    missing = {*([] if there else ["rlhf_lab"]), *(["pip"] if host == "marimo" else [])}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in missing else name)
    monkeypatch.setattr(subprocess, "run", lambda command, check: installed.append(command))
    exec("".join(code_cells(NOTEBOOKS[0])[0]["source"]), {})
    assert len(installed) == (host is not None and not there)
    for command in installed:
        assert command[0] == ("uv" if host == "marimo" else sys.executable)
        assert command[-1].startswith("rlhf-lab @ git+https://github.com/")
    assert enabled == ([True] if host == "google.colab" else [])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_magics_stand_at_the_left_edge(path):
    """molab shows a notebook with marimo, which cannot read one inside an `if`."""
    for cell in code_cells(path):
        lines = [line for line in cell["source"] if not line.startswith(("!", "%"))]
        compile("".join(lines), f"{path.name} {cell['id']}", "exec")


def test_badges_lead_to_four_places_of_the_one_setting():
    project = tomllib.loads((NOTEBOOKS[0].parents[1] / "pyproject.toml").read_text("utf-8"))
    name = project["project"]["urls"]["Repository"].removeprefix("https://github.com/")
    text = "".join(json.loads(NOTEBOOKS[0].read_text(encoding="utf-8"))["cells"][0]["source"])
    found = re.findall(r"\[!\[Open in (\w+)\]\(images/\w+\.svg\)\]\((\S+)\)", text)
    hosts = {place: urlsplit(at).hostname for place, at in found}
    assert hosts == {
        "Binder": "mybinder.org",
        "Colab": "colab.research.google.com",
        "Kaggle": "kaggle.com",
        "molab": "molab.marimo.io",
    }
    assert all(name in at and at.endswith(NOTEBOOKS[0].name) for _, at in found)


def test_the_table_of_rules_follows_the_code():
    """`python .ci/rules.py` mends what this finds."""
    script = Path(__file__).parents[1] / ".ci" / "rules.py"
    checked = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_badges_and_colab_cells_follow_the_one_setting():
    """`python .ci/badges.py` mends what this finds."""
    script = Path(__file__).parents[1] / ".ci" / "badges.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_diagrams_follow_their_table():
    """`python .ci/pictures.py` mends what this finds."""
    script = Path(__file__).parents[1] / ".ci" / "pictures.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_no_error_is_stored(path):
    kinds = {o["output_type"] for c in code_cells(path) for o in c["outputs"]}
    assert "error" not in kinds


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_outputs_show_before_anything_is_trusted_and_without_a_kernel(path):
    """A fresh clone is not trusted, and GitHub trusts nobody: SVG is taken out of HTML there. A
    widget shows an error where no kernel runs. A picture is an image with words."""
    for output in (o for c in code_cells(path) for o in c["outputs"]):
        data = {kind: "".join(text) for kind, text in output.get("data", {}).items()}
        assert not {"image/svg+xml", "application/vnd.jupyter.widget-view+json"} & set(data)
        assert "<svg" not in data.get("text/html", "")
        assert "<img" not in data.get("text/html", "") or 'alt="' in data["text/html"]


def test_notebooks_are_stored_as_they_are_kept():
    """`python .ci/notebooks.py NAME` mends what this finds."""
    script = Path(__file__).parents[1] / ".ci" / "notebooks.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_kernel_loses_no_request():
    """ipykernel 7.0 to 7.3 lose one that arrives while they answer another: Run All stands still.

    Requests at random distances, as a browser sends them, and then every answer is waited for.
    """
    from jupyter_client.manager import start_new_kernel

    rng = random.Random(0)
    manager, client = start_new_kernel(kernel_name="python3")
    try:
        waiting = set()
        for i in range(400):
            waiting.add(client.kernel_info() if i % 2 else client.execute("1", silent=True))
            time.sleep(rng.random() * 0.004)
        while waiting:  # raises queue.Empty when an answer does not come
            waiting.discard(client.get_shell_msg(timeout=20)["parent_header"].get("msg_id"))
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
