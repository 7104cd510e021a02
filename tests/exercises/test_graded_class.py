"""A class of three, good, half and wrong, graded by nbgrader from end to end.

pytest tests/exercises/test_graded_class.py      # needs the extra `teach`
"""

import csv
import json
import os
import re
import sys
from pathlib import Path

import pytest

from rlhf_lab.cli import notebooks as command
from rlhf_lab.cli.main import main
from rlhf_lab.exercises.book import EXERCISES
from rlhf_lab.exercises.classroom import EXERCISE

pytest.importorskip("nbgrader", reason="needs nbgrader: pip install 'rlhf-lab[teach]'")
# nbgrader's own, of its data base.
pytestmark = pytest.mark.filterwarnings("ignore:Object of type <Submitted")

NAME = "05_rloo_grpo"
NOTEBOOK = Path(__file__).parents[2] / "notebooks" / f"{NAME}.ipynb"
ANSWERS = {
    "good": {
        "rloo_advantages": "k = s.shape[1]; return (s - s.mean(1, keepdim=True)) * k / (k - 1)",
        "grpo_advantages": "s = s - s.mean(1, keepdim=True); return s / (s.std(1)[:, None] + 1e-4)",
        "k3": "return (b - a).exp() - 1 - (b - a)",
    },
    "half": {
        "rloo_advantages": "n = s.shape[1] - 1; return s - (s.sum(1, keepdim=True) - s) / n",
        "k3": "return (b - a).exp() - 1 - (b - a)",
    },
    "wrong": {
        "rloo_advantages": "return s - s.mean(1, keepdim=True)",
        "grpo_advantages": "return s.centred()",
        "k3": "return (a - b).exp() - 1 - (a - b)",
    },
}
HEADS = {"rloo_advantages": "(s)", "grpo_advantages": "(s)", "k3": "(a, b)"}


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def source(cell: dict) -> str:
    return "".join(cell["source"])


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """A course of one notebook, cut down to its parameters and exercises; three students' answers
    in the version that nbgrader made for students; graded, with feedback and grades.csv."""
    from nbgrader.api import Gradebook
    from nbgrader.apps import NbGraderAPI
    from nbgrader.plugins import CsvExportPlugin
    from traitlets.config import PyFileConfigLoader

    short, course = tmp_path_factory.mktemp("short"), tmp_path_factory.mktemp("course")
    whole = json.loads(NOTEBOOK.read_text("utf-8"))
    tagged = [c for c in whole["cells"] if "parameters" in c["metadata"].get("tags", [])]
    found = [(EXERCISE.fullmatch(source(c)), c) for c in whole["cells"]]
    whole["cells"] = tagged + [c for match, c in found if match and match[4] in HEADS]
    (short / NOTEBOOK.name).write_text(json.dumps(whole), encoding="utf-8")
    (short / "images").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "notebooks_folder", lambda: short)
        assert main(["notebooks", str(course), "--for", "nbgrader"]) == 0
        # nbgrader starts alembic by its name.
        patch.setenv("PATH", os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]]))
        config = PyFileConfigLoader("nbgrader_config.py", path=str(course)).load_config()
        config.CourseDirectory.root = str(course)
        api = NbGraderAPI(config=config)
        assert api.generate_assignment(NAME)["success"]
        for student, answers in ANSWERS.items():
            hand_in(course, student, answers)
            assert api.autograde(NAME, student)["success"]
            assert api.generate_feedback(NAME, student)["success"]
    with Gradebook(api.coursedir.db_url) as gradebook:
        CsvExportPlugin(to=str(course / "grades.csv")).export(gradebook)
    return course


def hand_in(course: Path, student: str, answers: dict[str, str]) -> None:
    whole = json.loads((course / "release" / NAME / f"{NAME}.ipynb").read_text("utf-8"))
    for cell in whole["cells"]:
        name = cell["metadata"].get("nbgrader", {}).get("grade_id")
        if name in answers:
            cell["source"] = f"def my_{name}{HEADS[name]}:\n    {answers[name]}"
    folder = course / "submitted" / student / NAME
    folder.mkdir(parents=True)
    (folder / f"{NAME}.ipynb").write_text(json.dumps(whole), encoding="utf-8")


def test_the_students_version_has_no_solution(graded):
    release = cells(graded / "release" / NAME / f"{NAME}.ipynb")
    mine = [source(c) for c in release if source(c).startswith("def my_")]
    assert len(mine) == len(HEADS) and all("raise NotImplementedError" in text for text in mine)
    assert not any("return" in text for text in mine)
    assert "formulas import" in (graded / "source" / NAME / f"{NAME}.ipynb").read_text("utf-8")


def test_grades_are_the_points_of_what_is_right(graded):
    with open(graded / "grades.csv", newline="") as file:
        rows = {row["student_id"]: row for row in csv.DictReader(file)}
    points = {name: EXERCISES[name].points for name in HEADS}
    assert {float(row["max_score"]) for row in rows.values()} == {sum(points.values())}
    right = {"good": list(HEADS), "half": ["rloo_advantages", "k3"], "wrong": []}
    expected = {student: sum(points[n] for n in names) for student, names in right.items()}
    assert {student: float(row["score"]) for student, row in rows.items()} == expected


def test_the_feedback_names_the_mistake(graded):
    def feedback(student):
        page = (graded / "feedback" / student / NAME / f"{NAME}.html").read_text("utf-8")
        return re.sub(r"<[^>]+>", "", page)

    wrong = feedback("wrong")
    assert "the baseline is the mean of all, leave the score itself out" in wrong
    assert "line 2 of my_grpo_advantages: `return s.centred()`" in wrong
    assert "the ratio is upside down" in wrong
    assert "grpo_advantages: not solved yet" in feedback("half")
    assert "✗" not in feedback("good")


def test_an_unsolved_exercise_does_not_stop_run_all(graded):
    ran = cells(graded / "autograded" / "half" / NAME / f"{NAME}.ipynb")
    code = [c for c in ran if c["cell_type"] == "code"]
    assert all(c["execution_count"] for c in code)
    assert not [o for c in code for o in c["outputs"] if o["output_type"] == "error"]
