"""How much memory does a large file take? `python benchmarks/large_file.py [--gigabytes 1]`

Writes a JSONL file of random preferences, then subsamples and describes it in a process of its own
(`rlhf-lab data FILE`), and prints the peak of that process' resident set, as the kernel counted it.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMIT = 1.5 * 2**30


def write(path: Path, size: int) -> None:
    """About `size` bytes of pairs, of 200 to 4,000 characters each."""
    rng, words = random.Random(0), [f"word{i}" for i in range(5000)]
    with path.open("w") as file:
        while file.tell() < size:
            texts = (" ".join(rng.choices(words, k=rng.randint(10, 170))) for _ in range(3))
            row = dict(zip(("prompt", "chosen", "rejected"), texts))
            file.write(json.dumps(row) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "large.jsonl"
        write(path, int(args.gigabytes * 1e9))
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "rlhf_lab.cli", "data", str(path)], check=True)
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024  # Linux counts in KiB
    print(
        f"{args.gigabytes:g} GB of JSONL: peak {peak / 2**30:.2f} GiB (limit 1.5), "
        f"{seconds:.0f} s on this machine"
    )
    return int(peak > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
