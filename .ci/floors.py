"""The oldest versions that pyproject.toml allows: `python .ci/floors.py` prints them as pins.

`make test-floors` installs them together and trains with them. `--installed` prints what is
installed of what the package asks for, as lines of a Markdown table.
"""

from __future__ import annotations

import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def requirements() -> list[Requirement]:
    """What the package asks for, without extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [Requirement(line) for line in project["dependencies"]]


def floor(need: Requirement) -> str:
    """The oldest version that a requirement allows. Raises ValueError where it names none."""
    for part in need.specifier:
        if part.operator == ">=":
            return part.version
    raise ValueError(f"{need.name} has no floor in pyproject.toml: write {need.name}>=…")


if __name__ == "__main__":
    for need in requirements():
        if "--installed" in sys.argv:
            print(f"| {need.name} | {floor(need)} | {version(need.name)} |")
        else:
            print(f"{need.name}=={floor(need)}")
