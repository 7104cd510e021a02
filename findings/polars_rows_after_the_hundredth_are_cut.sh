#!/usr/bin/env bash
# polars.DataFrame(rows): after 100 rows with rewards 0 and 1, a reward of .9 is 0.
#
# Version: polars 2.1.0; Python 3.11.
# Expected: a list of dicts, as a reward function returns it or json.loads reads it, is held as it is; a value that
#   does not fit is an error, as a text in a column of numbers is, and as `read_ndjson` says of the same rows.
# Behaviour: types and columns come from the first 100 rows (infer_schema_length). Later floats in a column of whole
#   numbers are cut to whole numbers, without rounding, and keys that come later, also inside of messages, are
#   dropped. Nothing is said; `strict=True` is the default. from_dicts does the same.
# Remedy: infer_schema_length=None.
# Seen: "a mean reward of 0.700 as written, 0.250 in the frame, 0.700 with infer_schema_length=None; columns
#   ['reward'] of ['reward', 'note']; a later text: ComputeError; read_ndjson of the same rows: ComputeError"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet polars==2.1.0
cat > "$folder/try.py" <<'P'
import json
from pathlib import Path

import polars

rows = [{"reward": i % 2} for i in range(200)] + [{"reward": 0.9}] * 200


def outcome(act):
    try:
        act()
    except polars.exceptions.PolarsError as error:
        return type(error).__name__
    return "read"


written = sum(row["reward"] for row in rows) / len(rows)
frames = [polars.DataFrame(rows), polars.from_dicts(rows), polars.DataFrame(rows, infer_schema_length=None)]
means = [frame["reward"].mean() for frame in frames]
columns = polars.DataFrame([*rows, {"reward": 1, "note": "by hand"}]).columns
text = outcome(lambda: polars.DataFrame([*rows, {"reward": "none"}]))
Path("log.jsonl").write_text("\n".join(map(json.dumps, rows)))
lines = outcome(lambda: polars.read_ndjson("log.jsonl"))
print(f"a mean reward of {written:.3f} as written, {means[0]:.3f} in the frame, {means[2]:.3f} with "
      f"infer_schema_length=None; columns {columns} of ['reward', 'note']; a later text: {text}; read_ndjson of the "
      f"same rows: {lines}")
assert abs(means[2] - written) < 1e-9 and means[0] == means[1] == 0.25 and written > 0.6
assert columns == ["reward"] and text == lines == "ComputeError"
P
cd "$folder" && env/bin/python try.py 2>/dev/null
