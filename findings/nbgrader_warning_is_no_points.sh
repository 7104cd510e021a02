#!/usr/bin/env bash
# A warning costs all points of an autograded cell, although its assertion holds.
#
# Version: nbgrader 0.9.6 with nbconvert 7; Python 3.11.
# Expected: a test cell fails where it raises. One whose assertions hold gets its points, whatever a
#   library writes to stderr on the way (a deprecation, a progress bar, a logger).
# Behaviour: any output of the cell on stderr counts as an error: 0 points, and no word about why. So a
#   class's grades depend on the versions of the libraries that the tests import.
# Remedy: silence warnings, loggers and progress bars in the test cells, or let a cell end in a number,
#   which nbgrader reads as partial credit, and keep stderr empty all the same.
# Seen: "quiet 2 of 2, with a warning 0 of 2".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
export PATH="$folder/env/bin:$PATH" HOME="$folder" JUPYTER_PLATFORM_DIRS=0
pip install --quiet nbgrader==0.9.6 ipykernel
cat > "$folder/try.py" <<'P'
import shutil
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_notebook
from nbgrader.apps import NbGraderAPI
from traitlets.config import Config

HOLDS = "assert 1 + 1 == 2"


def test_cell(name, source):
    grading = {"grade_id": name, "grade": True, "solution": False, "locked": True, "task": False,
               "points": 2, "schema_version": 3}
    return new_code_cell(source, metadata={"nbgrader": grading})


course = Path("course").absolute()
(course / "source" / "week").mkdir(parents=True)
cells = [test_cell("quiet", HOLDS), test_cell("warns", f"import warnings\nwarnings.warn('old')\n{HOLDS}")]
kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
nbformat.write(new_notebook(cells=cells, metadata=kernel), course / "source" / "week" / "sums.ipynb")
config = Config()
config.CourseDirectory.root = str(course)
api = NbGraderAPI(config=config)
assert api.generate_assignment("week")["success"]
shutil.copytree(course / "release" / "week", course / "submitted" / "one" / "week")
assert api.autograde("week", "one")["success"]
with api.gradebook as book:
    (sheet,) = book.find_submission("week", "one").notebooks
    points = {grade.name: f"{grade.score:g} of {grade.max_score:g}" for grade in sheet.grades}
print(f"quiet {points['quiet']}, with a warning {points['warns']}")
P
seen=$(cd "$folder" && python try.py 2>/dev/null | tail -1)
echo "$seen"
[ "$seen" = "quiet 2 of 2, with a warning 0 of 2" ]
