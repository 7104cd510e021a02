#!/usr/bin/env bash
# SFTTrainer does not use the `completion_mask` of rows that already have token ids, unless told to.
#
# Version: trl 1.16.0 with transformers 5.23.0, datasets 5.2; Python 3.11.
# Expected: rows {"input_ids", "completion_mask"}, the columns that TRL itself makes of a prompt and a
#   completion, are trained on as TRL trains on those: the loss is that of the completion's tokens.
# Behaviour: with `completion_only_loss` at its default, None, TRL looks for columns "prompt" and
#   "completion"; such rows have neither, the mask is dropped without a word, and the prompt is learned
#   as well. An `assistant_masks` column of the same rows would be used, whatever the settings.
# Remedy: completion_only_loss=True, or a `labels` column with -100 on the prompt.
# Seen: "texts 4 of 8, ids 8 of 8, ids and completion_only_loss 4 of 8 tokens are learned".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 trl==1.16.0 transformers==5.23.0 tokenizers
cat > "$folder/try.py" <<'P'
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

words = {w: i for i, w in enumerate("<pad> <eos> a b c d e f g h".split())}
raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
raw.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")
config = LlamaConfig(vocab_size=10, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                     num_attention_heads=1, pad_token_id=0, eos_token_id=1)
texts = [{"prompt": "a b c d", "completion": " e f g"}] * 2
ids = [{"input_ids": [2, 3, 4, 5, 6, 7, 8, 1], "completion_mask": [0] * 4 + [1] * 4}] * 2


def learned(rows, **settings):
    args = SFTConfig("out", use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
                     per_device_train_batch_size=1, remove_unused_columns=False, **settings)
    trainer = SFTTrainer(LlamaForCausalLM(config), args, train_dataset=Dataset.from_list(rows),
                         processing_class=tokenizer)
    labels = next(iter(trainer.get_train_dataloader()))["labels"]
    return f"{int((labels != -100).sum())} of {labels.numel()}"


print(f"texts {learned(texts)}, ids {learned(ids)}, ids and completion_only_loss "
      f"{learned(ids, completion_only_loss=True)} tokens are learned")
P
seen=$(cd "$folder" && HF_HUB_OFFLINE=1 env/bin/python try.py 2>/dev/null | tail -1)
echo "$seen"
[ "$seen" = "texts 4 of 8, ids 8 of 8, ids and completion_only_loss 4 of 8 tokens are learned" ]
