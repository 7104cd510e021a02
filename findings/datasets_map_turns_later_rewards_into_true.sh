#!/usr/bin/env bash
# datasets.map: where a thousand rewards are True or False, a later reward of .5 is True.
#
# Version: datasets 5.2.0 with pyarrow 26.0.1; Python 3.11.
# Expected: a column of True, False and .5 is one of numbers, or an error says that .5 is no truth value, as one says
#   that .5 is no whole number.
# Behaviour: the first 1,000 rows (writer_batch_size) fix the type, and later values are cast to it. Whole numbers
#   refuse .5 (ArrowInvalid); truth values take every number but 0 for True, and whole numbers take texts: "007" is 7.
#   Partial credit is full credit, without a word. map with batched=True and Dataset.from_generator do the same; the
#   same rows in another order, with a .5 among the first thousand, are kept as they are.
# Met with a scorer that returns `answer == truth`, and partial credit for rare cases; a filter by reward or a mean of
#   it is of other rewards then.
# Remedy: features=… to map, with Value("float32"); or float(reward) in every branch.
# Seen: "mean reward 0.3667 as returned: 0.4667 behind a thousand rows (bool), 0.3667 before them, 0.3667 with
#   features; 0 and 1 instead of False and True: ArrowInvalid; '007' behind 7s: 7"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet datasets==5.2.0 pyarrow==26.0.1
cat > "$folder/try.py" <<'P'
from datasets import Dataset, Features, Value

rows = Dataset.from_dict({"given": [i % 3 for i in range(1500)]})


def scored(partial_from, right=True, wrong=False, **how):
    """Rows with right or wrong rewards, and .5 in 300 rows from one on."""
    def score(row, i):
        partial = partial_from <= i < partial_from + 300
        return {"reward": 0.5 if partial else right if row["given"] == 0 else wrong}
    return rows.map(score, with_indices=True, **how)


def mean(data):
    return sum(map(float, data["reward"])) / len(data)


written = (400 + 0.5 * 300) / 1500  # a third of the 1,200 others is right
late, early = scored(1000), scored(0)
told = scored(1000, features=Features({"given": Value("int64"), "reward": Value("float32")}))
try:
    scored(1000, right=1, wrong=0)
    whole = "read"
except Exception as error:
    whole = type(error).__name__
text = rows.map(lambda _, i: {"answer": 7 if i < 1000 else "007"}, with_indices=True)[-1]["answer"]
print(f"mean reward {written:.4f} as returned: {mean(late):.4f} behind a thousand rows "
      f"({late.features['reward'].dtype}), {mean(early):.4f} before them, {mean(told):.4f} with features; "
      f"0 and 1 instead of False and True: {whole}; '007' behind 7s: {text!r}")
assert late.features["reward"].dtype == "bool" and abs(mean(late) - written) > 0.05
assert abs(mean(early) - written) < 1e-9 and abs(mean(told) - written) < 1e-6
assert whole == "ArrowInvalid" and text == 7
P
cd "$folder" && HF_HOME="$folder" env/bin/python try.py 2>/dev/null
