"""What other libraries do that one would not guess, looked at again: `make findings`, or
`python .ci/findings.py [NAME …]` (parts of names).

Runs findings/*.sh one by one, each with its own install of what it needs (minutes, and a package
index), stops at none, and prints a table. A script that fails says that the behaviour has changed,
or that its install did not work: its last lines stand under the table. Exit status 1 for either.
Outside `make test`, since other people's packages decide.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "findings"
MINUTES = 30
"""What a script may take: installs of torch are large."""


def run(script: Path) -> tuple[str, float, str]:
    """→ (as written, changed or too slow; seconds; what it printed)."""
    start = time.monotonic()
    try:
        done = subprocess.run(
            ["bash", str(script)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=60 * MINUTES,
        )
    except subprocess.TimeoutExpired:
        return f"no answer in {MINUTES} min", time.monotonic() - start, ""
    outcome = "as written" if done.returncode == 0 else f"changed (exit {done.returncode})"
    return outcome, time.monotonic() - start, done.stdout


def main(folder: Path, names: list[str]) -> int:
    scripts = sorted(folder.glob("*.sh"))
    chosen = [s for s in scripts if not names or any(name in s.stem for name in names)]
    if not chosen:
        print(f"no script in {folder} is named like {' or '.join(names) or '*.sh'}")
        return 1
    width, failed = max(len(s.stem) for s in chosen), []
    print(f"{'finding':{width}}  {'outcome':18}  {'s':>5}  last line")
    for script in chosen:
        outcome, seconds, text = run(script)
        last = (text.strip().splitlines() or [""])[-1]
        print(f"{script.stem:{width}}  {outcome:18}  {seconds:5.0f}  {last:.90}", flush=True)
        if outcome != "as written":
            failed.append((script, text))
    for script, text in failed:
        print(f"\n== {script.name}, its last lines", *text.strip().splitlines()[-15:], sep="\n")
    print(f"\n{len(chosen) - len(failed)} of {len(chosen)} as written")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(FOLDER, sys.argv[1:]))
