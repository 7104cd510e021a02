#!/usr/bin/env bash
# A folder named `vllm` beside a notebook keeps TRL's online trainers from being imported.
#
# Version: trl 1.16.0 with transformers 5.23.0; Python 3.11.
# Expected: vLLM is not installed, so TRL does without it: `trl.GRPOTrainer` is imported, and samples
#   with transformers. A folder of that name (a checkout, outputs of a comparison) is no package.
# Behaviour: Python finds the folder as a namespace package, transformers' check takes it for an
#   installed one of version "N/A", and TRL, which compares that with the versions it supports, ends
#   in InvalidVersion. `trl.SFTTrainer` is imported as ever, which hides the cause.
# Remedy: another name for the folder, or another working folder.
# Seen: "without SFTTrainer works, GRPOTrainer works", "with SFTTrainer works, GRPOTrainer Invalid
#   version: 'N/A'".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 trl==1.16.0 transformers==5.23.0
cat > "$folder/try.py" <<'P'
import sys
import trl
try:
    getattr(trl, sys.argv[1])
    print("works")
except RuntimeError as error:
    print(str(error).splitlines()[-1])
P
mkdir -p "$folder/without" "$folder/with/vllm"
cp "$folder/try.py" "$folder/without"; mv "$folder/try.py" "$folder/with"
seen=""
for where in without with; do
  for name in SFTTrainer GRPOTrainer; do
    line=$(cd "$folder/$where" && "$folder/env/bin/python" try.py "$name" 2>/dev/null)
    echo "$where $name $line"
    seen="$seen$line;"
  done
done
[ "$seen" = "works;works;works;Invalid version: 'N/A';" ]
