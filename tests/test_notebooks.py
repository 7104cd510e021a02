"""What nbval does not see: a checked cell without stored output would pass in silence.

pytest tests/test_notebooks.py          # the notebooks themselves are run by `make test`
"""

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def code_cells(path: Path) -> list[dict]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [c for c in cells if c["cell_type"] == "code"]


def test_the_four_notebooks_are_there():
    names = {p.stem for p in NOTEBOOKS}
    assert names >= {"01_sft", "02_reward_model", "03_ppo", "04_dpo"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_checked_cell_has_the_output_to_check_against(path):
    checked = [c for c in code_cells(path) if "nbval-check-output" in c["metadata"].get("tags", [])]
    assert checked, "a notebook without a checked cell tests only that nothing crashes"
    for cell in checked:
        assert cell["outputs"] and cell["execution_count"], "".join(cell["source"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_each_notebook_starts_alone(path):
    colab, first = ("".join(cell["source"]) for cell in code_cells(path)[:2])
    assert "import rlhf_lab as lab" in first and '"google.colab" in sys.modules' in colab


@pytest.mark.parametrize("on_colab", [True, False])
def test_the_colab_cell_installs_there_and_does_nothing_elsewhere(on_colab, monkeypatch):
    from IPython.core.inputtransformer2 import TransformerManager

    installed, enabled = [], []
    output = SimpleNamespace(enable_custom_widget_manager=lambda: enabled.append(True))
    shell = SimpleNamespace(run_line_magic=lambda magic, line: installed.append((magic, line)))
    if on_colab:
        monkeypatch.setitem(sys.modules, "google", ModuleType("google"))
        colab = ModuleType("google.colab")
        colab.output = output
        monkeypatch.setitem(sys.modules, "google.colab", colab)
    source = "".join(code_cells(NOTEBOOKS[0])[0]["source"])
    exec(TransformerManager().transform_cell(source), {"get_ipython": lambda: shell})
    if on_colab:
        ((magic, line),) = installed
        assert magic == "pip" and '"rlhf-lab @ git+https://github.com/' in line and enabled
    else:
        assert not installed and not enabled


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


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_no_error_is_stored(path):
    kinds = {o["output_type"] for c in code_cells(path) for o in c["outputs"]}
    assert "error" not in kinds


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_outputs_are_legible_before_anything_is_trusted(path):
    """A fresh clone is not trusted, and GitHub trusts nobody: SVG is taken out of HTML there, and
    a picture's words stand in its place."""
    for output in (o for c in code_cells(path) for o in c["outputs"]):
        data = {kind: "".join(text) for kind, text in output.get("data", {}).items()}
        assert "<svg" not in data.get("text/html", "")
        assert "<svg" not in data.get("text/plain", "")
        assert "image/svg+xml" not in data or data["text/plain"]


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
