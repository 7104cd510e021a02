#!/usr/bin/env bash
# datasets.map(num_proc=4) with numpy's or torch's random numbers: four parts of the data draw the same ones.
#
# Version: datasets 5.2.0 with numpy 2.4.6, torch 2.13.0 (CPU), Linux; Python 3.11.
# Expected: workers draw numbers of their own, as PyTorch's DataLoader gives each worker seeds of its own, and as
#   Python's `random` does here.
# Behaviour: workers are forks, with the state that numpy's and torch's generators had. Row i of each part gets the
#   number of row i of the first part: with four workers a quarter of the numbers is drawn. A Generator that the
#   function holds is copied just so. `random` is seeded anew by each fork, which also means that random.seed(0) does
#   nothing for num_proc. Nothing is said, and with num_proc=None all is well.
# Met where rejected answers, temperatures, few-shot examples or masks are drawn by row.
# Remedy: with_indices=True and np.random.default_rng((seed, index)) for each row.
# Seen: "1,000 rows, 4 workers: numpy 250 numbers, torch 250, a Generator 250, random 1000, by index 1000; one
#   process: 1000; random.seed(0) twice with 4 workers: the same rows: False"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet datasets==5.2.0 numpy==2.4.6 torch==2.13.0
cat > "$folder/try.py" <<'P'
import random

import numpy as np
import torch
from datasets import Dataset, disable_caching, disable_progress_bars

disable_progress_bars()
disable_caching()
rows = Dataset.from_dict({"row": list(range(1000))})
own = np.random.default_rng(0)
DRAW = {
    "numpy": lambda row: np.random.rand(),
    "torch": lambda row: torch.rand(()).item(),
    "a Generator": lambda row: own.random(),
    "random": lambda row: random.random(),
    "by index": lambda row: np.random.default_rng((0, row["row"])).random(),
}


def drawn(name, workers):
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return rows.map(lambda row: {"x": DRAW[name](row)}, num_proc=workers)["x"][:]


four = {name: drawn(name, 4) for name in DRAW}
counts = {name: len(set(numbers)) for name, numbers in four.items()}
one = {len(set(drawn(name, None))) for name in DRAW}
again = drawn("random", 4) == four["random"]
print("1,000 rows, 4 workers: " + ", ".join(f"{name} {count}" for name, count in counts.items())
      + f"; one process: {one}; random.seed(0) twice with 4 workers: the same rows: {again}")
assert one == {1000} and counts["random"] == counts["by index"] == 1000 and not again
for name in ("numpy", "torch", "a Generator"):
    assert counts[name] == 250 and four[name][:250] == four[name][250:500]
P
cd "$folder" && OMP_NUM_THREADS=1 HF_HOME="$folder" env/bin/python try.py 2>/dev/null
