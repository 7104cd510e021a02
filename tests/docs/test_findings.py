"""`make findings`: one script after the other, none of which ends the others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pages import ROOT

SCRIPT = ROOT / ".ci" / "findings.py"
RUNS = """
import sys
sys.path.insert(0, sys.argv[1])
import findings
from pathlib import Path
findings.MINUTES = 1 / 60
sys.exit(findings.main(Path(sys.argv[2]), sys.argv[3:]))
"""


def run(folder: Path, *names: str) -> tuple[int, str]:
    command = [sys.executable, "-c", RUNS, str(SCRIPT.parent), str(folder), *names]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.stderr
    return done.returncode, done.stdout


def test_a_table_of_all_of_them(tmp_path):
    (tmp_path / "a_changed.sh").write_text("echo it was 2, not 1; exit 3")
    (tmp_path / "b_slow.sh").write_text("sleep 30")
    (tmp_path / "c_same.sh").write_text("echo unread; echo still so")
    status, text = run(tmp_path)
    lines = text.splitlines()
    assert status == 1 and lines[-1] == "1 of 3 as written"
    assert [line.split("  ")[0] for line in lines[1:4]] == ["a_changed", "b_slow", "c_same"]
    assert "changed (exit 3)" in lines[1] and "it was 2" in lines[1]
    assert "no answer" in lines[2] and lines[3].endswith("still so")
    assert run(tmp_path, "same") == (0, run(tmp_path, "c_")[1])
    assert run(tmp_path, "nothing")[0] == 1


def test_each_says_what_it_saw_and_installs_what_it_names():
    scripts = sorted((ROOT / "findings").glob("*.sh"))
    assert len(scripts) >= 5
    for script in scripts:
        text = script.read_text("utf-8")
        for part in ("# Version:", "# Expected:", "# Behaviour:", "# Seen", "mktemp -d"):
            assert part in text, f"{script.name}: {part}"
        assert "rlhf_lab" not in text  # theirs alone
        assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
