"""01 to 04 on somebody else's model and data: a Qwen-like folder and a file of preferences.

Run outside a kernel, as a script would run their cells, with plans of two steps.
"""

import json
from pathlib import Path

import pytest
from families import make_folder, rows

import rlhf_lab as lab

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = ("01_sft", "02_reward_model", "03_ppo", "04_dpo")


def cells(name: str) -> list[str]:
    found = json.loads((FOLDER / f"{name}.ipynb").read_text("utf-8"))["cells"]
    code = [c for c in found if c["cell_type"] == "code"]
    return ["".join(c["source"]) for c in code if "colab" not in c["metadata"].get("tags", [])]


def few_steps(stage, model, **settings):
    """The notebook's plan, of two steps of four rows; its other settings stay."""
    if not isinstance(model, str):  # plans of 7B by name stay what they are
        settings["max_steps"] = min(2, settings.get("max_steps", 2))
        if stage != "ppo":
            settings["per_device_train_batch_size"] = min(
                4, settings.get("per_device_train_batch_size", 4)
            )
    return plan(stage, model, **settings)


plan = lab.plan


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    folder = tmp_path_factory.mktemp("elsewhere")
    file = folder / "mine.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows(64)))
    return make_folder(folder / "model", "qwen2"), file


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_takes_my_model_and_my_file(name, elsewhere, monkeypatch):
    """In one folder, in their order: 03 takes the reward model that 02 has trained."""
    from IPython.display import display

    model, file = elsewhere
    monkeypatch.chdir(file.parent)
    monkeypatch.setattr(lab, "plan", few_steps, raising=False)
    space = {"display": display}
    for i, source in enumerate(cells(name)):
        if i == 0:
            source = source.replace('MODEL = "tiny"', f"MODEL = {str(model)!r}")
            source = source.replace('DATA = "stories"', f"DATA = {str(file)!r}")
            assert str(model) in source and str(file) in source
        exec(compile(source, f"{name}, cell {i}", "exec"), space)
    assert space["run"].status == "finished"
    assert space["data"].name == "mine.jsonl" and not space["data"].has_gold
