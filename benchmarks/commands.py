"""What starting costs: `python benchmarks/commands.py [--gigabytes 1] [--against CHECKOUT]`

    data     `rlhf-lab data FILE` on a large JSONL file of random preferences
    small    the same on a file of 100 kB
    stories  `rlhf-lab data stories`
    typo     `rlhf-lab train ppo` with a misspelt setting, until it is refused
    plan     `rlhf-lab plan ppo`
    ppo      `lab.train("ppo")`, until the first iteration is logged
    kernel   a notebook's kernel that has imported the lab: its resident set is what counts

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
LIMITS = {"data": 1.05, "small": 0.1, "stories": 0.1, "typo": 0.1, "plan": 0.1, "ppo": 0.7}
"""Seconds over the other build's."""
PEAK, KERNEL = 0.5, 0.8
"""The most that `data` may hold in GiB, and that `kernel` may hold over the other build's."""
CLI = ["-m", "rlhf_lab.cli"]
PPO = (
    "import os, sys, rlhf_lab as lab\nfrom rlhf_lab.runs.run import Run\n"
    "Run.log = lambda *_, **__: os._exit(0)\n"
    "lab.train(lab.plan('ppo', max_steps=1), out=sys.argv[1], overwrite=True, quiet=True)"
)
KERNEL_CODE = "import ipykernel.kernelapp, rlhf_lab as lab; lab.plan, lab.train, lab.planner"
COMMANDS = {
    "data": [*CLI, "data", "large.jsonl"],
    "small": [*CLI, "data", "small.jsonl"],
    "stories": [*CLI, "data", "stories"],
    "typo": [*CLI, "train", "ppo", "--set", "lerning_rate=1e-5"],
    "plan": [*CLI, "plan", "ppo"],
    "ppo": ["-c", PPO, "run"],
    "kernel": [
        "-c",
        "import ipykernel.kernelapp, rlhf_lab as lab; lab.plan, lab.train, lab.planner",
    ],
}


def write(path: Path, size: float) -> None:
    """About `size` bytes of pairs, of 200 to 4,000 characters each."""
    rng, words = random.Random(0), [f"word{i}" for i in range(5000)]
    with path.open("w") as file:
        while file.tell() < size:
            texts = (" ".join(rng.choices(words, k=rng.randint(10, 170))) for _ in range(3))
            row = dict(zip(("prompt", "chosen", "rejected"), texts))
            file.write(json.dumps(row) + "\n")


def run(build: Path, arguments: list[str], folder: Path) -> tuple[float, float, int]:
    """A command of a build in a process of its own: → CPU seconds, peak in GiB, exit status."""
    command = [sys.executable, "-P", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(build), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        env=environment,
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 2**20, process.returncode  # from KiB


def in_turn(
    builds: list[Path], arguments: list[str], times: int, folder: Path
) -> Iterator[dict[str, float]]:
    """The medians of a command in each build."""
    runs = [[run(build, arguments, folder) for build in builds] for _ in range(times)]
    for of_build in zip(*runs, strict=True):
        seconds, peaks, statuses = zip(*of_build, strict=True)
        yield {"seconds": median(seconds), "peak GiB": median(peaks), "status": max(statuses)}


def missed(results: dict[str, dict]) -> list[str]:
    """What is beyond its limit."""
    over = [f"data holds {results['data']['peak GiB']:.2f} GiB"] if "data" in results else []
    over = over if over and results["data"]["peak GiB"] > PEAK else []
    for name, found in results.items():
        what, limit = ("peak ratio", KERNEL) if name == "kernel" else ("ratio", LIMITS[name])
        if found.get(what, 0.0) > limit:
            over.append(f"{name}: {found[what]:.3f} of the other build's, at most {limit}")
    return over


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--against", type=Path, help="a checkout of an earlier build")
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--times", type=int, default=11, help="runs of each build [11; data: 2]")
    args = parser.parse_args()
    builds = [HERE.parent, *([args.against.resolve()] if args.against else [])]
    file = HERE / "results" / "commands.json"
    results: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write(folder / "small.jsonl", 1e5)
        if "data" in args.only:
            write(folder / "large.jsonl", args.gigabytes * 1e9)
        for name in args.only:
            times = min(2, args.times) if name == "data" else args.times
            ours, *theirs = in_turn(builds, COMMANDS[name], times, folder)
            results[name] = {**ours, "runs": times}
            if theirs:
                results[name]["ratio"] = ours["seconds"] / theirs[0]["seconds"]
                results[name]["peak ratio"] = ours["peak GiB"] / theirs[0]["peak GiB"]
                results[name]["earlier build"] = theirs[0]
            print(name, json.dumps(results[name]), flush=True)
    earlier = json.loads(file.read_text()) if file.is_file() else {}
    if "data" in args.only:
        earlier["gigabytes"] = args.gigabytes
    file.write_text(json.dumps({**earlier, **results}, indent=1) + "\n")
    over = missed(results)
    print("\n".join(over) or "within the limits")
    return int(bool(over))


if __name__ == "__main__":
    sys.exit(main())
