"""What two commands cost: `python benchmarks/commands.py [--gigabytes 1] [--against CHECKOUT]`

    data    `rlhf-lab data FILE` on a large JSONL file of random preferences
    typo    `rlhf-lab train ppo` with a misspelt setting, until it is refused

With `--against`, a checkout of an earlier build, both builds run in turn, and ratios are of the
medians. Seconds are the processors' (user and system), which a busy machine changes least; the peak
is that of the process' resident set, as the kernel counted it. Writes results/commands.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median

HERE = Path(__file__).parent
LIMITS = {"peak GiB": 0.5, "data": 1.05, "typo": 0.1}
"""Of `data`: its peak, and its seconds over the other build's; of `typo`: the same."""
MISSPELT = ["train", "ppo", "--set", "lerning_rate=1e-5"]
TIMES = {"data": 2, "typo": 5}
"""How often a command runs in each build."""


def write(path: Path, size: int) -> None:
    """About `size` bytes of pairs, of 200 to 4,000 characters each."""
    rng, words = random.Random(0), [f"word{i}" for i in range(5000)]
    with path.open("w") as file:
        while file.tell() < size:
            texts = (" ".join(rng.choices(words, k=rng.randint(10, 170))) for _ in range(3))
            row = dict(zip(("prompt", "chosen", "rejected"), texts))
            file.write(json.dumps(row) + "\n")


def run(build: Path, arguments: list[str]) -> tuple[float, float, int]:
    """A command of a build in a process of its own: → CPU seconds, peak in GiB, exit status."""
    command = [sys.executable, "-P", "-m", "rlhf_lab.cli", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(build), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        env=environment,
        cwd=tempfile.gettempdir(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 2**20, process.returncode  # from KiB


def in_turn(builds: list[Path], arguments: list[str], times: int) -> Iterator[dict[str, float]]:
    """The medians of a command in each build."""
    runs = [[run(build, arguments) for build in builds] for _ in range(times)]
    for of_build in zip(*runs, strict=True):
        seconds, peaks, statuses = zip(*of_build, strict=True)
        yield {"seconds": median(seconds), "peak GiB": max(peaks), "status": max(statuses)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--against", type=Path, help="a checkout of an earlier build")
    args = parser.parse_args()
    builds = [HERE.parent, *([args.against.resolve()] if args.against else [])]
    results: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "large.jsonl"
        write(path, int(args.gigabytes * 1e9))
        for name, arguments in {"data": ["data", str(path)], "typo": MISSPELT}.items():
            ours, *theirs = in_turn(builds, arguments, TIMES[name])
            results[name] = ours
            if theirs:
                results[name]["ratio"] = ours["seconds"] / theirs[0]["seconds"]
                results[name]["earlier build"] = theirs[0]
    report = {"gigabytes": args.gigabytes, **results}
    (HERE / "results" / "commands.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    held = results["data"]["peak GiB"] <= LIMITS["peak GiB"] and all(
        results[name].get("ratio", 0.0) <= LIMITS[name] for name in TIMES
    )
    print("within the limits" if held else f"beyond the limits: {LIMITS}")
    return int(not held)


if __name__ == "__main__":
    sys.exit(main())
