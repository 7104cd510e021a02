#!/usr/bin/env bash
# NEFTune's noise shrinks with the batch where rows are packed or laid end to end.
#
# Version: trl 1.16.0 with transformers 5.23.0; Python 3.11.
# Expected: neftune_noise_alpha adds noise of at most alpha / sqrt(L d) to each embedding, L the tokens of a
#   row (2310.05914). padding_free and packing save time, and change nothing else.
# Behaviour: the hook takes L from the shape that the embedding sees. With padding_free=True or packing (which
#   turns it on) that is one row, the whole batch: 16 rows get a quarter of the noise that they get padded,
#   and another batch size is another strength. No word is said.
# Remedy: neftune_noise_alpha times the square root of the rows in a batch; or padding.
# Seen (16 rows of 9 tokens, alpha 5, d 16): "by hand 0.417, padded 0.417, padding_free 0.104, packed 0.104"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 trl==1.16.0 transformers==5.23.0
cat > "$folder/try.py" <<'P'
import math

import torch
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
rows = Dataset.from_list([{"text": "a b c d e f g h"}] * 16)  # 9 tokens with eos


def largest_noise(batch, **settings):
    torch.manual_seed(0)
    model, noise = LlamaForCausalLM(config), []

    def look(layer, args, kwargs):
        came = args[0] if args else kwargs["hidden_states"]
        noise.append(float((came - model.model.embed_tokens.weight[ids[-1]]).abs().max()))

    ids = []
    model.model.embed_tokens.register_forward_pre_hook(lambda layer, args: ids.append(args[0]))
    model.model.layers[0].register_forward_pre_hook(look, with_kwargs=True)
    args = SFTConfig("out", use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
                     save_strategy="no", max_steps=1, neftune_noise_alpha=5.0,
                     per_device_train_batch_size=batch, **settings)
    SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer).train()
    return noise[0]


hand = 5 / math.sqrt(9 * 16)
padded, free = largest_noise(16), largest_noise(16, padding_free=True, max_length=None)
packed = largest_noise(8, packing=True, max_length=18)  # two rows in each
print(f"by hand {hand:.3f}, padded {padded:.3f}, padding_free {free:.3f}, packed {packed:.3f}")
assert abs(padded / hand - 1) < 0.02
assert abs(free * 4 / hand - 1) < 0.02 and abs(packed * 4 / hand - 1) < 0.02
P
cd "$folder" && HF_HUB_OFFLINE=1 env/bin/python try.py 2>/dev/null | tail -1
