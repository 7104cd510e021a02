#!/usr/bin/env bash
# OnlineDPOTrainer: gradient_accumulation_steps=8 makes the gradient eight times as large; the logged loss stays.
#
# Version: trl 1.16.0 (trl.experimental.online_dpo) with transformers 5.23.0, accelerate 1.15.0, torch 2.13.0 (CPU);
#   Python 3.11.
# Expected: 16 prompts in one batch, or in eight of two that are accumulated, are the same step: the mean of 16 losses
#   and its gradient, as in DPOTrainer and every other trainer.
# Behaviour: the trainer's own training_step gives each batch's mean to accelerator.backward, and divides what it
#   returns for the log alone; transformers leaves accelerate nothing to divide by. Gradients add up: grad_norm is as
#   many times as large, so that max_grad_norm=1.0, the default, clips steps that one batch would not clip, and SGD's
#   steps are as many times as long. Adam hides it but for the clipping. Nothing is said.
# Remedy: one batch for each step; or max_grad_norm times gradient_accumulation_steps (Adam).
# Seen (16 prompts a step): "batches of 16, 8, 4, 2: gradient norm 0.9, 2.4, 4.8, 9.3, SGD's step 0.009, 0.024, 0.048,
#   0.093, loss 0.6931, 0.6931, 0.6931, 0.6931"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 trl==1.16.0 transformers==5.23.0 accelerate==1.15.0
cat > "$folder/try.py" <<'P'
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

words = {w: i for i, w in enumerate("<pad> <eos> a b c d e f g h i j k l m n".split())}
raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
raw.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", padding_side="left")
config = LlamaConfig(vocab_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                     pad_token_id=0, eos_token_id=1, bos_token_id=None)
rows = Dataset.from_list([{"prompt": "a b c"}, {"prompt": "d e f"}] * 8)


def length(completions, **_):
    return [float(len(text)) for text in completions]


def first_step(batch):
    """Gradient norm, length of SGD's step and loss, of 16 prompts in batches of a size."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    start = [weight.detach().clone() for weight in model.parameters()]
    args = OnlineDPOConfig("out", use_cpu=True, bf16=False, report_to="none", save_strategy="no", max_new_tokens=8,
                           per_device_train_batch_size=batch, gradient_accumulation_steps=16 // batch, max_steps=1,
                           logging_steps=1, optim="sgd", learning_rate=0.01, lr_scheduler_type="constant",
                           max_grad_norm=0.0, gradient_checkpointing=False)
    run = OnlineDPOTrainer(model=model, reward_funcs=length, args=args, train_dataset=rows, processing_class=tokenizer)
    run.train()
    step = sum(float((now - then).pow(2).sum()) for now, then in zip(run.model.parameters(), start)) ** 0.5
    line = run.state.log_history[0]
    return line["grad_norm"], step, line["loss"]


norms, steps, losses = zip(*map(first_step, (16, 8, 4, 2)))
print("batches of 16, 8, 4, 2: gradient norm " + ", ".join(f"{x:.1f}" for x in norms) + ", SGD's step "
      + ", ".join(f"{x:.3f}" for x in steps) + ", loss " + ", ".join(f"{x:.4f}" for x in losses))
assert norms[3] > 5 * norms[0] and steps[3] > 5 * steps[0] and max(losses) - min(losses) < 1e-3
P
cd "$folder" && OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 env/bin/python try.py 2>/dev/null
