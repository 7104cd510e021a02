#!/usr/bin/env bash
# GRPOTrainer and RLOOTrainer train GPT-2 on responses at other positions than they were sampled at.
#
# Version: trl 1.16.0 with transformers 5.23.0, torch 2.13.0 (CPU); Python 3.11.
# Expected: the log-probabilities that are trained on are those of the tokens that were sampled, whatever the
#   lengths of the prompts in a batch: padding is masked.
# Behaviour: prompts are padded on the left. `generate` counts positions from the mask; the passes for old, new
#   and reference log-probabilities give the model no position_ids, and models that learn a vector for each place
#   (GPT-2, GPTBigCode, BioGPT, CTRL) begin to count at the padding. Each prompt that is shorter than its
#   batch's longest is read shifted by the difference: probabilities, ratio, KL and gradient are of another
#   context than the one that was sampled. Nothing is said; Llama and others with relative places do not show it.
# Remedy: prompts of one length; batches of one prompt; or a hook that makes position_ids of the mask.
# Seen (prompts of 2 and of 12 tokens; mean log-probability of a response's tokens by the trainer, and by the model
#   on that row alone): "gpt2: short -2.66 alone -2.26, long -1.54 alone -1.54; llama: short -1.23 alone -1.23, long
#   -1.73 alone -1.73"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 trl==1.16.0 transformers==5.23.0
cat > "$folder/try.py" <<'P'
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast)
from trl import GRPOConfig, GRPOTrainer

words = {w: i for i, w in enumerate("<pad> <eos> a b c d e f g h i j k l m n".split())}
raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
raw.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")
ends = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
GPT2 = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=32, n_layer=2, n_head=2, n_positions=64, embd_pdrop=0.0,
                                  attn_pdrop=0.0, resid_pdrop=0.0, **ends))
LLAMA = LlamaForCausalLM(LlamaConfig(vocab_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                     num_attention_heads=2, **ends))
prompts = ["a b", "c d e f g h i j k l m n"]


class Seen(GRPOTrainer):
    """Each row's mean log-probability by the trainer, and by the model on that row alone."""

    def _get_per_token_logps_and_entropies(self, model, ids, mask, kept, *args, **kwargs):
        out = super()._get_per_token_logps_and_entropies(model, ids, mask, kept, *args, **kwargs)
        if kwargs.get("compute_entropy"):
            for row, present, logps in zip(ids, mask, out[0], strict=True):
                end = present[-kept:].bool()
                alone = row[present.bool()][None]
                logits = self.model(input_ids=alone).logits[0, :-1].log_softmax(-1)
                own = logits.gather(-1, alone[0, 1:, None])[-int(end.sum()):].mean()
                name = "short" if int(present[:-kept].sum()) == 2 else "long"
                self.seen[name] = float(logps[end].mean()), float(own)
        return out


told, off = [], {}
for name, model in (("gpt2", GPT2), ("llama", LLAMA)):
    torch.manual_seed(0)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    args = GRPOConfig("out", use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=4,
                      num_generations=2, max_completion_length=8, max_steps=1, learning_rate=0.0, logging_steps=1,
                      disable_dropout=True, save_strategy="no")
    trainer = Seen(model, reward_funcs=lambda completions, **_: [float(len(c)) for c in completions], args=args,
                   train_dataset=Dataset.from_list([{"prompt": p} for p in prompts]), processing_class=tokenizer)
    trainer.seen = {}
    trainer.train()
    off[name] = {k: abs(a - b) for k, (a, b) in trainer.seen.items()}
    rows = ", ".join(f"{k} {a:.2f} alone {b:.2f}" for k, (a, b) in sorted(trainer.seen.items(), reverse=True))
    told.append(f"{name}: {rows}")
print("; ".join(told))
assert off["gpt2"]["short"] > 0.1 and off["gpt2"]["long"] < 1e-3
assert max(off["llama"].values()) < 1e-3
P
cd "$folder" && HF_HUB_OFFLINE=1 env/bin/python try.py 2>/dev/null | grep "gpt2: "
