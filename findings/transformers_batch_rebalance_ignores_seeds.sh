#!/usr/bin/env bash
# transformers: train_sampling_strategy="batch_rebalance" draws one order of rows, whatever the seeds say.
#
# Version: transformers 5.23.0 with torch 2.13.0 (CPU), datasets 5.2.0; Python 3.11.
# Expected: as with random rows, another seed or data_seed trains on the rows in another order.
# Behaviour: the sampler is made without a seed and keeps its default. Runs of "several seeds" differ in
#   everything but the order of their data. ("group_by_length" follows seed, and not data_seed.)
#   Its passes have unlike numbers of rows; losses that are means over a pass (a sum over tokens that is
#   divided by num_items_in_batch is none) weigh rows of small passes more.
# Seen: "random: seed counts, data_seed counts; group_by_length: seed counts, data_seed ignored;
#   batch_rebalance: seed ignored, data_seed ignored, passes of 3 to 5 rows".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0
cat > "$folder/try.py" <<'P'
import torch
from datasets import Dataset
from torch import nn
from transformers import Trainer, TrainingArguments

ROWS = Dataset.from_list([{"input_ids": [i] * (1 + i % 8)} for i in range(32)])
seen = []


def collate(rows):
    seen.append([row["input_ids"][0] for row in rows])
    return {"x": torch.ones(len(rows), 1)}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.line = nn.Linear(1, 1)

    def forward(self, x):
        return {"loss": self.line(x).mean()}


def order(strategy, **seeds):
    seen.clear()
    args = TrainingArguments("out", per_device_train_batch_size=4, gradient_accumulation_steps=2,
                             num_train_epochs=1, use_cpu=True, report_to="none", disable_tqdm=True,
                             save_strategy="no", remove_unused_columns=False,
                             train_sampling_strategy=strategy, **seeds)
    Trainer(Model(), args, train_dataset=ROWS, data_collator=collate).train()
    return [list(rows) for rows in seen]


found = {}
for strategy in ("random", "group_by_length", "batch_rebalance"):
    first = order(strategy, seed=0)
    found[strategy] = first != order(strategy, seed=1), first != order(strategy, seed=0, data_seed=5)
    words = ["counts" if counts else "ignored" for counts in found[strategy]]
    sizes = sorted({len(rows) for rows in first})
    print(f"{strategy}: seed {words[0]}, data_seed {words[1]}, passes of {sizes} rows")
assert found == {"random": (True, True), "group_by_length": (True, False),
                 "batch_rebalance": (False, False)}, "it has changed"
P
cd "$folder" && OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$folder/env/bin/python" try.py
