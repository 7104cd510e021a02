#!/usr/bin/env bash
# datasets: a function that lies in a module of yours was changed, and `map` still gives the rows of the old one.
#
# Version: datasets 5.2.0 with dill 0.4.1; Python 3.11 (huggingface/datasets#3297, open).
# Expected: `map` keeps its result under a hash of the function's code, as the cache is documented:
#   change the function, and the rows are made anew. So it is for one that stands in the script.
# Behaviour: a function that is imported is hashed by its name, also where a lambda or a function of the script
#   calls it. After helper.py is changed, the next run trains on the rows that the old code made: a
#   template that was mended, another limit of length, a filter that was sharpened change nothing, without a
#   word. What stands in a notebook's cell or in the script is hashed by its code.
# Met with data sets that have a cache: load_dataset, load_from_disk.
# Remedy: load_from_cache_file=False, or new_fingerprint with the helper's version in it.
# Seen: "helper.py said 1, then 2: rows by the helper 1, then 1; by a lambda that calls it 1, then 1; by the same
#   code in the script 1, then 2"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet datasets==5.2.0 dill==0.4.1
cd "$folder"
echo '{"x": 0}' > rows.jsonl
seen=""
for answer in 1 2; do
  printf 'def clean(row):\n    return {"y": %s}\n' "$answer" > helper.py
  cat helper.py > run.py
  cat >> run.py <<'P'
import helper
from datasets import load_dataset

rows = load_dataset("json", data_files="rows.jsonl", cache_dir="cache", split="train")
for function in (helper.clean, lambda row: helper.clean(row), clean):
    print(rows.map(function)[0]["y"], end=" ")
P
  seen+="$(PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1 env/bin/python run.py 2>/dev/null)"
done
set -- $seen
echo "helper.py said 1, then 2: rows by the helper $1, then $4; by a lambda that calls it $2, then $5; by the same"
echo "code in the script $3, then $6"
[ "$*" = "1 1 1 1 1 2" ]
