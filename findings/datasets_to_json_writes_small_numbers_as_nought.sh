#!/usr/bin/env bash
# Dataset.to_json writes ten decimals: probabilities below 5e-11 come back as 0, their logarithms as -inf.
#
# Version: datasets 5.2.0 with pandas 3.1.1, pyarrow 26.0.1; Python 3.11.
# Expected: numbers that are written as JSON and read again are the numbers, as json.dumps and to_csv write them.
# Behaviour: rows go through pandas' to_json, whose double_precision is 10 by default. That counts digits behind the
#   point, not digits of the number: 3.2e-11 is written as 0.0, a learning rate of 1.23456789e-9 as 0.0000000012.
#   Lists are rounded as well. Nothing is said.
# Met with a teacher's probabilities of rare tokens, p-values, rates at the end of a cosine schedule.
# Remedy: to_parquet; or logarithms; to_json(double_precision=15) moves the limit to 5e-16.
# Seen: "3.2e-11 comes back as 0.0 from to_json, 3.2e-11 from to_csv, 3.2e-11 from Parquet; 3.2e-11 with
#   double_precision=15; a rate of 1.23456789e-09 as 1.2e-09; KL(teacher || student) of four tokens: 0.0163 nats as
#   computed, inf from the file"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet datasets==5.2.0 pandas==3.1.1 pyarrow==26.0.1
cat > "$folder/try.py" <<'P'
import csv
import json
import math
from pathlib import Path

from datasets import Dataset, load_dataset

teacher = [0.5, 0.25, 0.25 - 1e-3, 1e-3]
student = [0.5, 0.25, 0.25 - 3.2e-11, 3.2e-11]
data = Dataset.from_list([{"rare": student[-1], "all": student, "rate": 1.23456789e-9}])
data.to_json("rows.jsonl")
data.to_json("longer.jsonl", double_precision=15)
data.remove_columns("all").to_csv("rows.csv")
data.to_parquet("rows.parquet")
read = json.loads(Path("rows.jsonl").read_text())
longer = json.loads(Path("longer.jsonl").read_text())
table = float(next(csv.DictReader(Path("rows.csv").open()))["rare"])
parquet = load_dataset("parquet", data_files="rows.parquet", split="train")[0]["rare"]


def divergence(of):
    return sum(p * (math.log(p / q) if q else math.inf) for p, q in zip(teacher, of))


print(f"{student[-1]} comes back as {read['rare']} from to_json, {table} from to_csv, {parquet} from Parquet; "
      f"{longer['rare']} with double_precision=15; a rate of 1.23456789e-09 as {read['rate']}; KL(teacher || student) "
      f"of four tokens: {divergence(student):.4f} nats as computed, {divergence(read['all']):.4f} from the file")
assert read["rare"] == 0.0 and read["all"][-1] == 0.0 and table == parquet == student[-1]
assert read["rate"] == 1.2e-9 and math.isinf(divergence(read["all"])) and math.isfinite(divergence(student))
assert abs(longer["rare"] / student[-1] - 1) < 1e-3
P
cd "$folder" && HF_HOME="$folder" HF_HUB_OFFLINE=1 env/bin/python try.py 2>/dev/null
