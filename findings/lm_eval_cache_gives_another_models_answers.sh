#!/usr/bin/env bash
# lm-evaluation-harness: with one use_cache for two models, the second gets the first one's score.
#
# Version: lm_eval 0.4.13 with transformers 5.23.0, torch 2.13.0 (CPU); Python 3.11
#   (EleutherAI/lm-evaluation-harness#2715 and #4063, open).
# Expected: answers are stored by model and request; other weights, or another model's name, are asked anew.
# Behaviour: the key is the request alone. A model before and after training, the checkpoints of a run, base and adapter:
#   all of them have the figures of the one that was evaluated first, under their own names in the results, and the
#   model is not run. Nothing is said beyond the cache's path.
# Met in sweeps over checkpoints with -c / --use_cache in the command.
# Remedy: a cache path for each model and checkpoint, or none.
# Seen (accuracy on 100 questions): "without a cache 0.28 and 0.30, with one 0.28 and 0.28; with a path each 0.28 and
#   0.30; requests that reached the second model: 0 of 400"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0
"$folder/env/bin/pip" install --quiet lm_eval==0.4.13
cat > "$folder/try.py" <<'P'
import json
import random
from pathlib import Path

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LETTERS = "abcdefghijklmnop"
chance = random.Random(0)
rows = [{"question": " ".join(chance.sample(LETTERS, 4)), "choices": chance.sample(LETTERS, 4), "right": i % 4}
        for i in range(100)]
Path("small.jsonl").write_text("\n".join(map(json.dumps, rows)))
Path("small.yaml").write_text("""task: small
dataset_path: json
dataset_kwargs: {data_files: {test: small.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: right
metric_list: [{metric: acc}]
""")
words = {word: i for i, word in enumerate(["<pad>", "<eos>", *LETTERS])}
raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
raw.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")
asked = []


class Counting(HFLM):
    def loglikelihood(self, requests, **settings):
        asked.append(len(requests))
        return super().loglikelihood(requests, **settings)


def make(seed):
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), hidden_size=32, intermediate_size=32,
                                         num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64,
                                         pad_token_id=0, eos_token_id=1)).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.5)
    model.save_pretrained(f"model_{seed}")
    tokenizer.save_pretrained(f"model_{seed}")
    return f"model_{seed}"


def accuracy(model, cache=None):
    judged = lm_eval.simple_evaluate(model=Counting(pretrained=model, device="cpu", batch_size=20), tasks=["small"],
                                     bootstrap_iters=0, use_cache=cache,
                                     task_manager=TaskManager(include_path=".", include_defaults=False))
    return judged["results"]["small"]["acc,none"]


one, two = make(1), make(2)
plain = accuracy(one), accuracy(two)
first = accuracy(one, "answers")
asked.clear()
shared = first, accuracy(two, "answers")
reached = sum(asked)
each = accuracy(one, "answers_1"), accuracy(two, "answers_2")
print(f"without a cache {plain[0]:.2f} and {plain[1]:.2f}, with one {shared[0]:.2f} and {shared[1]:.2f}; with a path each "
      f"{each[0]:.2f} and {each[1]:.2f}; requests that reached the second model: {reached} of 400")
assert plain == each and plain[0] != plain[1]
assert shared == (plain[0], plain[0]) and reached == 0
P
cd "$folder" && HF_HOME="$folder" HF_HUB_OFFLINE=1 env/bin/python try.py 2>/dev/null | tail -1
