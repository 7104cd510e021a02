#!/usr/bin/env bash
# TRL's DPO and reward trainers cannot group rows by length, and SFT ignores the column that says it.
#
# Version: trl 1.16.0 with transformers 5.23.0, torch 2.13.0 (CPU); Python 3.11.
# Expected: with train_sampling_strategy="group_by_length", a column named by length_column_name holds the
#   lengths, as transformers' documentation of the two settings says.
# Behaviour: columns that a trainer does not use are dropped before the sampler is made, that one too. SFT
#   then takes the length of input_ids, whatever the column says; DPO and reward trainers, whose rows have
#   no input_ids, raise a ValueError that speaks of input_ids when training starts.
# Remedy: remove_unused_columns=False.
# Seen: "DPO: ValueError, kept [4, 5, 6]; reward: ValueError, kept [4, 5, 6]; SFT: [4, 5, 6], kept [100, 99, 98]".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 trl==1.16.0 accelerate==1.15.0 datasets==5.2.0
cat > "$folder/try.py" <<'P'
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

words = {w: i for i, w in enumerate("<pad> <eos> a b c d".split())}
raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
raw.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")
config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                     num_attention_heads=1, pad_token_id=0, eos_token_id=1, num_labels=1)
pairs = [{"prompt": "a b", "chosen": " c" * (1 + i % 7), "rejected": " d", "length": 4 + i % 7}
         for i in range(64)]
texts = [{"prompt": "a b", "completion": " c" * (1 + i % 7), "length": 100 - i % 7}
         for i in range(64)]
common = dict(output_dir="out", per_device_train_batch_size=4, max_steps=2, use_cpu=True,
              bf16=False, gradient_checkpointing=False, report_to="none", disable_tqdm=True,
              train_sampling_strategy="group_by_length", length_column_name="length")


def lengths(trainer, settings, model, rows, **more):
    reference = {"ref_model": model(config)} if trainer is DPOTrainer else {}
    made = trainer(model(config), args=settings(**common, **more), processing_class=tokenizer,
                   train_dataset=Dataset.from_list(rows), **reference)
    try:
        sampler = made.get_train_dataloader().batch_sampler
    except ValueError as error:
        assert "input_ids" in str(error), error
        return "ValueError"
    while hasattr(sampler, "batch_sampler"):
        sampler = sampler.batch_sampler
    return str(list(sampler.sampler.lengths[:3]))


found = []
for name, *what in (("DPO", DPOTrainer, DPOConfig, LlamaForCausalLM, pairs),
                    ("reward", RewardTrainer, RewardConfig, LlamaForSequenceClassification, pairs),
                    ("SFT", SFTTrainer, SFTConfig, LlamaForCausalLM, texts)):
    kept = lengths(*what, remove_unused_columns=False)
    found.append(f"{name}: {lengths(*what)}, kept {kept}")
print("; ".join(found))
wanted = "DPO: ValueError, kept [4, 5, 6]; reward: ValueError, kept [4, 5, 6]; "
assert found and "; ".join(found) == wanted + "SFT: [4, 5, 6], kept [100, 99, 98]", "it has changed"
P
cd "$folder" && OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$folder/env/bin/python" try.py
