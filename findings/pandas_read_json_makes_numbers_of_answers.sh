#!/usr/bin/env bash
# pandas.read_json reads answers that are texts as numbers: "3.10" is 3.1, "007" is 7, long ids lose digits.
#
# Version: pandas 3.1.1; Python 3.11.
# Expected: JSON tells "007" from 7; a string stays that string, as json.loads, polars and datasets read it (and as
#   pandas 3 keeps strings everywhere else).
# Behaviour: `dtype=True` is the default, and tries each column of strings as numbers. Where all of them look like
#   one, the column is numbers: leading and trailing zeros, signs and exponents go, "12345678901234567890" becomes
#   1.2345678901234567e+19, so that rows of two ids have one. One answer that is no number, and all stay strings: a
#   part of the data (a test split, one task) is read otherwise than the whole. Frames that pandas itself wrote with
#   to_json do not come back. Nothing is said.
# Met with answers of arithmetic: str(answer) in a prompt or a reward that compares texts is of another text.
# Remedy: dtype=False; or Dataset.from_list and json.loads.
# Seen: "'3.10' is read as 3.1, '007' as 7, '1e3' as 1000.0; 2 ids of 20 digits are 1 after reading; with a row
#   'none': '3.10'; dtype=False: '3.10'; rewarded by equal text: 1 of 4 answers that are all right"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet pandas==3.1.1
cat > "$folder/try.py" <<'P'
import json
from pathlib import Path

import pandas


def read(values, **how):
    """A column of texts, written as JSON Lines and read by pandas."""
    Path("rows.jsonl").write_text("\n".join(json.dumps({"answer": value}) for value in values))
    return pandas.read_json("rows.jsonl", lines=True, **how)["answer"].tolist()


answers = ["3.10", "2.50", "0.75", "4.00"]
taken = read(answers)
ids = read(["12345678901234567890", "12345678901234567891"])
mixed, told = read([*answers, "none"]), read(answers, dtype=False)
rewarded = sum(str(got) == answer for got, answer in zip(taken, answers))
frame = pandas.DataFrame({"answer": answers})
frame.to_json("frame.json")
back = pandas.read_json("frame.json")["answer"].tolist()
zeros, power = read(["007", "010"])[0], read(["1e3", "2.5"])[0]
print(f"'3.10' is read as {taken[0]!r}, '007' as {zeros!r}, '1e3' as {power!r}; 2 ids of 20 digits are {len(set(ids))} "
      f"after reading; with a row 'none': {mixed[0]!r}; dtype=False: {told[0]!r}; rewarded by equal text: {rewarded} of "
      f"{len(answers)} answers that are all right")
assert taken[0] == 3.1 and zeros == 7 and len(set(ids)) == 1 and back == taken
assert mixed[:4] == told == answers and rewarded == 1
P
cd "$folder" && env/bin/python try.py 2>/dev/null
