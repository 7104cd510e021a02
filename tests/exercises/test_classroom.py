"""The course for a class: what students get, what teachers get, and nothing is lost on the way.

pytest tests/exercises/test_classroom.py         # a class that is graded: test_graded_class.py
"""

import importlib
import inspect
import json
import re
from pathlib import Path

import pytest

import rlhf_lab as lab
from rlhf_lab.cli import notebooks as command
from rlhf_lab.cli.main import main
from rlhf_lab.exercises.book import EXERCISES
from rlhf_lab.exercises.cases import TABLE
from rlhf_lab.exercises.classroom import EXERCISE, solved

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def source(cell: dict) -> str:
    return "".join(cell["source"])


@pytest.mark.parametrize("name", EXERCISES)
def test_the_solution_that_teachers_get_passes(name):
    space = {}
    exec(f"def mine({', '.join(EXERCISES[name].arguments)}):\n{solved(name)}", space)
    assert lab.check(name, space["mine"])
    assert inspect.getsource(EXERCISES[name].function).splitlines()[0] in solved(name)


def test_every_exercise_of_a_notebook_is_found_and_takes_the_arguments_of_its_solution():
    found = 0
    for path in NOTEBOOKS:
        for cell in (
            c for c in cells(path) if "def my_" in source(c) and "lab.check(" in source(c)
        ):
            head, _, _, name = EXERCISE.fullmatch(source(cell)).groups()
            arguments = re.search(r"\((.*)\)", head)[1].split(", ")
            assert arguments == list(EXERCISES[name].arguments)
            assert EXERCISES[name].notebook == int(path.name[:2])
            found += 1
    assert found == sum(p.read_text("utf-8").count("def my_") for p in NOTEBOOKS) >= 20


def test_points_are_of_exercises():
    assert set(TABLE["points"]) <= set(EXERCISES)
    assert {x.points for x in EXERCISES.values()} == {1, 2, 3}


def test_students_see_no_answer_before_they_are_asked(tmp_path):
    assert main(["notebooks", str(tmp_path), "--for", "students"]) == 0
    for path in NOTEBOOKS:
        ours, theirs = cells(path), cells(tmp_path / path.name)
        assert [source(c) for c in theirs] == [source(c) for c in ours]
        code = [c for c in theirs if c["cell_type"] == "code"]
        assert not any(c["outputs"] or c["execution_count"] for c in code)
        assert all(keeps_the_rest(*pair) for pair in zip(ours, theirs))


def keeps_the_rest(ours: dict, theirs: dict) -> bool:
    ran = {"outputs", "execution_count"}
    return {k: v for k, v in ours.items() if k not in ran} == {
        k: v for k, v in theirs.items() if k not in ran
    }


def test_a_course_folder_for_nbgrader(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "_needs", lambda *_: None)  # nbgrader itself is not needed yet
    assert main(["notebooks", str(tmp_path), "--for", "nbgrader"]) == 0
    assert len(list(tmp_path.glob("source/*/*.ipynb"))) == len(NOTEBOOKS)
    for path in NOTEBOOKS:
        copy = tmp_path / "source" / path.stem / path.name
        exercises = [m for c in cells(path) if (m := EXERCISE.fullmatch(source(c)))]
        marked = [c for c in cells(copy) if "nbgrader" in c["metadata"]]
        assert [c["metadata"]["nbgrader"]["solution"] for c in marked] == [1, 0] * len(exercises)
        ids = [c["id"] for c in cells(copy)]
        assert len(set(ids)) == len(ids)
        for mark, test in zip(exercises, marked[1::2]):
            assert test["metadata"]["nbgrader"]["points"] == EXERCISES[mark[4]].points
        text = "\n".join(source(c) for c in cells(copy) if c["cell_type"] == "markdown")
        for link in re.findall(r"\]\(((?:\.\.|images)/[^)#]+)\)", text):
            assert (copy.parent / link).exists(), link
        assert "](0" not in text  # the others lie in folders of their own


def test_without_nbgrader_it_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert main(["notebooks", str(tmp_path / "course"), "--for", "nbgrader"]) == 2
    said = "rlhf-lab: --for nbgrader needs nbgrader: pip install 'rlhf-lab[teach]'\n"
    assert capsys.readouterr().err == said and not (tmp_path / "course").exists()


# ---------------------------------------------------------------------------------- the syllabus


@pytest.fixture(scope="module")
def syllabus():
    """`.ci/syllabus.py`, which writes the tables of the page for teachers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(NOTEBOOKS[0].parents[1] / ".ci"))
        yield importlib.import_module("syllabus")


def test_the_page_for_teachers_says_what_the_notebooks_say(syllabus):
    """`python .ci/syllabus.py` mends what this finds."""
    text = syllabus.PAGE.read_text("utf-8")
    assert text == syllabus.page(text) == syllabus.page(text.replace("| 40 |", "| 41 |"))


def test_every_exercise_is_in_the_syllabus_and_every_notebook_in_a_plan(syllabus):
    text = syllabus.PAGE.read_text("utf-8")
    assert all(f"`{name}` {x.points}" in text for name, x in EXERCISES.items())
    on_a_page = {name: number for number, c in syllabus.chapters().items() for name in c.graded}
    belongs = {name: f"{x.notebook:02}" for name, x in EXERCISES.items() if name != "sft_loss"}
    assert on_a_page == belongs
    longest = sum(syllabus.PLANS["half a term"].values(), [])
    assert longest == [p.name[:2] for p in NOTEBOOKS]


def test_a_plan_asks_for_nothing_that_comes_later(syllabus):
    found = syllabus.chapters()
    for sessions in syllabus.PLANS.values():
        order = sum(sessions.values(), [])
        for number in order:
            assert set(found[number].needs) <= set(order[: order.index(number)]), number
