#!/usr/bin/env bash
# KTOTrainer given pairs learns from a thousand good answers, and then from a thousand bad ones.
#
# Version: trl 1.16.0 with transformers 5.23.0, datasets 5.2.0; Python 3.11.
# Expected: pairs with `chosen` and `rejected` are taken apart (as the documentation says), and good and bad
#   answers are mixed: training shuffles its rows, in another order in each epoch.
# Behaviour: each 1,000 pairs become 1,000 good rows and behind them 1,000 bad ones, and KTO reads rows in
#   their order, in every epoch alike ("random" is refused, as the KL needs the batches as they were made).
#   With up to 1,000 pairs the first half of an epoch pushes everything up and the second, at other learning
#   rates, everything down; no batch sees both. Nothing is said.
# Remedy: trl.unpair_preference_dataset(pairs).shuffle(seed=0) before the trainer is made.
# Seen: "8 pairs, two epochs: ++++ ++++ ---- ---- ++++ ++++ ---- ----; 1200 pairs: 1000 +, 1000 -, 200 +, 200 -;
#   shuffled before: 3 of 4 batches hold both"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 trl==1.16.0 transformers==5.23.0 datasets==5.2.0
cat > "$folder/try.py" <<'P'
from itertools import groupby

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import KTOConfig, KTOTrainer, unpair_preference_dataset

words = {w: i for i, w in enumerate("<pad> <eos> a b c d e f g h i j k l m n".split())}
raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
raw.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")
config = LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                     num_attention_heads=2, pad_token_id=0, eos_token_id=1)


class Watched(KTOTrainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        seen.append("".join("+" if good else "-" for good in inputs["label"].tolist()))
        return super().compute_loss(model, inputs, *args, **kwargs)


def trainer(rows, epochs=1):
    torch.manual_seed(0)
    args = KTOConfig("out", use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
                     save_strategy="no", per_device_train_batch_size=4, num_train_epochs=epochs)
    return Watched(LlamaForCausalLM(config), LlamaForCausalLM(config), args, train_dataset=rows,
                   processing_class=tokenizer)


def pairs(n):
    return Dataset.from_list([{"prompt": "a " + "bcdefghi"[i % 8], "chosen": " j k", "rejected": " l m"}
                              for i in range(n)])


seen = []
trainer(pairs(8), epochs=2).train()
in_pairs = list(seen)
seen = []
trainer(unpair_preference_dataset(pairs(8)).shuffle(seed=0)).train()
mixed = sum({"+", "-"} == set(batch) for batch in seen)
labels = trainer(pairs(1200)).train_dataset["label"]
runs = [(len(list(run)), "+" if good else "-") for good, run in groupby(labels)]
print(f"8 pairs, two epochs: {' '.join(in_pairs)}; 1200 pairs: "
      f"{', '.join(f'{n} {sign}' for n, sign in runs)}; shuffled before: {mixed} of {len(seen)} batches hold both")
assert in_pairs == ["++++", "++++", "----", "----"] * 2
assert runs == [(1000, "+"), (1000, "-"), (200, "+"), (200, "-")] and mixed >= 3
P
cd "$folder" && HF_HUB_OFFLINE=1 env/bin/python try.py 2>/dev/null | tail -1
