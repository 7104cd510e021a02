#!/usr/bin/env bash
# SFTTrainer: beside a column named `text`, completions are learned without their end.
#
# Version: trl 1.16.0 with transformers 5.23.0; Python 3.11.
# Expected: of rows with `prompt` and `completion`, the completion is learned with the eos token at its end,
#   and columns that are not used change nothing.
# Behaviour: where a row has a column named as dataset_text_field says (by default "text"), eos is appended to
#   that one; what is learned is prompt and completion all the same. So no row holds an eos, and the model
#   never learns to stop. Nothing is said. Met with instruction data that brings its rendered text along
#   (Alpaca: instruction, input, output, text), renamed to prompt and completion.
# Remedy: dataset.remove_columns("text"); or dataset_text_field="none of them".
# Seen: "without the column: learned c d <eos>; with it: c d; other text field: c d <eos>"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 trl==1.16.0 transformers==5.23.0
cat > "$folder/try.py" <<'P'
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

words = {w: i for i, w in enumerate("<pad> <eos> a b c d e f g h i j k l m n".split())}
raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
raw.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")
config = LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                     num_attention_heads=2, pad_token_id=0, eos_token_id=1)


def learned(row, **settings):
    args = SFTConfig("out", use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=1,
                     **settings)
    trainer = SFTTrainer(LlamaForCausalLM(config), args, train_dataset=Dataset.from_list([row] * 2),
                         processing_class=tokenizer)
    labels = next(iter(trainer.get_train_dataloader()))["labels"][0].tolist()
    return " ".join(tokenizer.convert_ids_to_tokens([i for i in labels if i != -100]))


row = {"prompt": "a b", "completion": " c d"}
whole = {**row, "text": "a b c d"}
alone, beside, other = learned(row), learned(whole), learned(whole, dataset_text_field="body")
print(f"without the column: learned {alone}; with it: {beside}; other text field: {other}")
assert alone == other == "c d <eos>" and beside == "c d"
P
cd "$folder" && HF_HUB_OFFLINE=1 env/bin/python try.py 2>/dev/null | tail -1
