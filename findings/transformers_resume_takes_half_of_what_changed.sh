#!/usr/bin/env bash
# resume_from_checkpoint with other settings: some count from there on, and the learning rate does not.
#
# Version: transformers 5.23.0 with torch 2.13.0 (CPU), accelerate 1.15.0, datasets 5.2.0; Python 3.11.
# Expected: who resumes a run that went astray at a third of the learning rate, or with weight decay, trains on with
#   it, as with max_grad_norm or max_steps; or is told that it is not taken.
# Behaviour: learning_rate, weight_decay and the betas come out of optimizer.pt and scheduler.pt, and what the new
#   TrainingArguments say is dropped without a word (it does compare logging_steps, save_steps and the batch
#   size with the checkpoint's, and warns of those). max_steps is taken: a linear schedule is laid over the new
#   number of steps, so that the rate jumps up in the middle of its way down.
# Remedy: begin anew from the checkpoint's model (from_pretrained); or set trainer.optimizer.param_groups and
#   trainer.lr_scheduler.base_lrs in a callback's on_train_begin.
# Seen (rates of steps 5 to 8 after a checkpoint at 4, in 1e-4; the run had 10, linear over 8 steps):
#   "as before 5.00 3.75 2.50 1.25; rate 1 instead of 10: 5.00 3.75 2.50 1.25; max_steps 16: 5.00 6.88 6.25 5.63; weight
#   decay of the optimizer when 0.5 is asked for: 0.0"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0
cat > "$folder/try.py" <<'P'
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, default_data_collator

rows = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}] * 40


def trainer(**changed):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                                         num_attention_heads=2))
    settings = {"max_steps": 8, "learning_rate": 1e-3, **changed}
    args = TrainingArguments("out", use_cpu=True, report_to=[], per_device_train_batch_size=4, logging_steps=1,
                             save_steps=4, lr_scheduler_type="linear", **settings)
    return Trainer(model, args, train_dataset=rows, data_collator=default_data_collator)


def rates(**changed):
    resumed = trainer(**changed)
    resumed.train(resume_from_checkpoint="out/checkpoint-4")
    logged = [1e4 * line["learning_rate"] for line in resumed.state.log_history if "learning_rate" in line]
    return [round(rate, 2) for rate in logged[4:8]], resumed.optimizer.param_groups[0]["weight_decay"]


trainer().train()
before, _ = rates()
rate, _ = rates(learning_rate=1e-4)
_, decay = rates(weight_decay=0.5)
steps, _ = rates(max_steps=16)
told = [" ".join(f"{r:.2f}" for r in found) for found in (before, rate, steps)]
print(f"as before {told[0]}; rate 1 instead of 10: {told[1]}; max_steps 16: {told[2]}; weight decay of the optimizer when "
      f"0.5 is asked for: {decay}")
assert before == rate == [5.0, 3.75, 2.5, 1.25] and decay == 0.0
assert steps[1] > before[1] and steps[1] == 6.88
P
cd "$folder" && HF_HUB_OFFLINE=1 env/bin/python try.py 2>/dev/null | grep "as before"
