#!/usr/bin/env bash
# load_dataset("json"): strings that look like dates are read as dates, and written otherwise into prompts.
#
# Version: datasets 5.2.0 with pyarrow 26.0.1, jinja2; Python 3.11.
# Expected: JSON has strings and no dates; an answer "2024-05-01" is that text, as json.loads gives it.
# Behaviour: where every value of a column is an ISO 8601 date or time, Arrow's reader makes a timestamp of it, also
#   in a conversation's `content`. A template or an f-string writes it as "2024-05-01 00:00:00": that is what
#   is learned. Offsets are taken off ("2024-01-01T00:30:00+02:00" becomes the day before). A reward function gets a
#   datetime for a reference answer, which equals no text. features=Features({…: Value("string")}) comes too late: the
#   dates are cast to strings, with their midnights. One row that is no date, and all are strings as they stand:
#   a part of the data (a test split of ten rows, a filter by task) is read otherwise than the whole.
# Met with tasks whose answers are dates (extraction, normalisation, calendars).
# Remedy: Dataset.from_list or from_generator, of rows that the json module has read.
# Seen: "an answer 2024-05-01 is learned as 2024-05-01 00:00:00; 2024-01-01T00:30:00+02:00 as 2023-12-31 22:30:00; with
#   a row that is no date as 2024-05-01; with features as 2024-05-01 00:00:00; from_list 2024-05-01"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet datasets==5.2.0 pyarrow==26.0.1 jinja2
cat > "$folder/try.py" <<'P'
import json
from pathlib import Path

from datasets import Dataset, Features, List, Value, load_dataset
from jinja2 import Template

TEMPLATE = Template("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
TEXTS = Features({"messages": List({"role": Value("string"), "content": Value("string")})})


def learned(name, answers, **how):
    """What a template writes for the first row of a file."""
    rows = [{"messages": [{"role": "assistant", "content": answer}]} for answer in answers]
    Path(name).write_text("\n".join(map(json.dumps, rows)))
    read = load_dataset("json", data_files=name, cache_dir="cache", split="train", **how)
    return TEMPLATE.render(read[0]).removeprefix("<assistant>")


dates = ["2024-05-01", "1999-12-31"]
date = learned("dates.jsonl", dates)
offset = learned("times.jsonl", ["2024-01-01T00:30:00+02:00"])
mixed = learned("mixed.jsonl", [*dates, "unknown"])
told = learned("told.jsonl", dates, features=TEXTS)
listed = Dataset.from_list([json.loads(line) for line in Path("dates.jsonl").read_text().splitlines()])
listed = TEMPLATE.render(listed[0]).removeprefix("<assistant>")
print(f"an answer 2024-05-01 is learned as {date}; 2024-01-01T00:30:00+02:00 as {offset}; with a row that is no date "
      f"as {mixed}; with features as {told}; from_list {listed}")
assert date == told == "2024-05-01 00:00:00" and offset == "2023-12-31 22:30:00"
assert mixed == listed == "2024-05-01"
P
cd "$folder" && HF_HUB_OFFLINE=1 env/bin/python try.py 2>/dev/null
