"""`rlhf-lab notebooks DIR`: the course, whole, and nothing of the reader's is lost.
`rlhf-lab test-notebooks DIR`: a line for each notebook, and a status that says whether all passed.
"""

from pathlib import Path

import nbformat

from rlhf_lab.cli import notebooks as command
from rlhf_lab.cli.main import main

SOURCE = Path(__file__).parents[2] / "notebooks"


def test_the_course_is_copied_and_what_is_there_stays(tmp_path, capsys):
    folder = tmp_path / "course"
    assert main(["notebooks", str(folder)]) == 0
    names = {p.name for p in SOURCE.glob("*.ipynb")}
    assert {p.name for p in folder.glob("*.ipynb")} == names
    assert f"{len(names)} notebooks in {folder}" in capsys.readouterr().out
    shown = {p for n in folder.glob("*.ipynb") for p in n.read_text("utf-8").split("(images/")[1:]}
    assert all((folder / "images" / p.split(")")[0]).is_file() for p in shown)
    mine = folder / sorted(names)[0]
    mine.write_text("my answers")
    assert main(["notebooks", str(folder)]) == 2
    assert "another folder, or --overwrite" in capsys.readouterr().err
    assert mine.read_text() == "my answers"
    assert main(["notebooks", str(folder), "--overwrite"]) == 0
    assert mine.read_text("utf-8") == (SOURCE / mine.name).read_text("utf-8")


# ---------------------------------------------------------------------------------- test-notebooks


def notebook(path: Path, **stored: str | None) -> None:
    """Marked cells, and the output that is stored of each: None where the cell has not run."""
    made = nbformat.v4.new_notebook()
    for source, output in stored.items():
        cell = nbformat.v4.new_code_cell(CODE[source], metadata={"tags": ["nbval-check-output"]})
        if output is not None:
            cell.execution_count = 1
            cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=output)]
        made.cells.append(cell)
    path.parent.mkdir(exist_ok=True)
    nbformat.write(made, path)


CODE = {
    "now": "import datetime\nprint(datetime.datetime.now(), 2 + 2)",
    "two": "print(2)",
    "file": "open('beside.txt').read()",
}


def test_a_folders_notebooks_have_to_give_what_is_stored(tmp_path, capsys):
    """Times aside; a project around the folder, and Jupyter's copies, have no say."""
    notebook(tmp_path / "1_same.ipynb", now="2020-01-01 10:00:00.123 4\n", two=None)
    notebook(tmp_path / "more" / "2_other.ipynb", file=None, two="1\n")
    notebook(tmp_path / ".ipynb_checkpoints" / "broken.ipynb", file=None)
    (tmp_path / "conftest.py").write_text("raise RuntimeError('not for these')")
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --no-such-option")
    assert main(["test-notebooks", str(tmp_path), "--workers", "2"]) == 1
    said = capsys.readouterr().out
    same, other, total = (line for line in said.splitlines() if line[:1].strip())
    assert same.startswith("passed  1_same.ipynb: 2 passed in ")
    assert same.endswith("; outputs of 1 of 2 marked cells compared")
    assert other.startswith("FAILED  more/2_other.ipynb: 2 failed in ")
    assert "beside.txt" in said and "mismatch 'stdout'" in said  # of both cells, what is wrong
    assert total == "1 of 2 notebooks passed"


def test_what_cannot_be_tested_is_one_line(tmp_path, capsys, monkeypatch):
    def refused(folder):
        assert main(["test-notebooks", str(folder)]) == 2
        return capsys.readouterr().err

    assert refused(tmp_path).startswith(f"rlhf-lab: no notebooks in {tmp_path}: ")
    assert refused(tmp_path / "nowhere").count("\n") == 1
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert refused(tmp_path) == (
        "rlhf-lab: test-notebooks needs nbval: pip install 'rlhf-lab[teach]'\n"
    )
