#!/usr/bin/env bash
# GKDTrainer divides the loss of what the student samples by the length of the answers in the file.
#
# Version: trl 1.16.0 (trl.experimental.gkd) with transformers 5.23.0, torch 2.13.0 (CPU); Python 3.11.
# Expected: with lmbda=1 the student learns from its own samples alone; the answers of the data set, whose prompts are
#   used, change nothing: the loss is a mean over the sampled tokens, about the same for short and long answers.
# Behaviour: Trainer counts the batch's tokens to learn (num_items_in_batch) before training_step puts samples in the
#   answers' place, and GKD divides the samples' sum by that count. Answers of a few tokens (labels, numbers) and
#   samples of 64 make loss and gradient many times as large, long answers make them small; with lmbda between 0 and 1
#   sampled and given batches weigh unlike. seq_kd is the same. Nothing is said. trl.DistillationTrainer counts after
#   sampling. (The division came with TRL's pull request 6006, for what issue 4719 says of accumulation.)
# Remedy: answers as long as samples are; or pass num_items_in_batch=None on in an overridden compute_loss, and set
#   loss_is_scaled_for_ga = False.
# Seen: "loss and gradient norm of a step on samples: answers of one word 2.471 2.131, of 32 words 0.150 0.129, own
#   mean, one word 0.384 0.331, own mean, 32 words 0.384 0.331"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 trl==1.16.0 transformers==5.23.0
cat > "$folder/try.py" <<'P'
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.experimental.gkd import GKDConfig, GKDTrainer

words = {w: i for i, w in enumerate("<pad> <eos> user assistant a b c d e f g h i j k l".split())}
raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
raw.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")
tokenizer.chat_template = ("{% for m in messages %}{{ m.role }} {{ m.content }} {% if m.role == 'assistant' %}<eos>"
                           "{% endif %}{% endfor %}{% if add_generation_prompt %}assistant {% endif %}")
config = LlamaConfig(vocab_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                     pad_token_id=0, eos_token_id=1, bos_token_id=None)


def network(seed):
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    return model


class OwnMean(GKDTrainer):
    """Each batch's mean over the tokens that are learned."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs, return_outputs)


def first_step(answer, trainer=GKDTrainer):
    rows = [{"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}
            for prompt in ("a b", "c d", "e f", "g h", "a c", "b d", "e g", "f h")]
    args = GKDConfig("out", lmbda=1.0, max_new_tokens=32, max_length=64, per_device_train_batch_size=8, max_steps=1,
                     logging_steps=1, use_cpu=True, bf16=False, report_to="none", save_strategy="no", seed=0,
                     gradient_checkpointing=False, disable_dropout=True)
    trained = trainer(network(0), network(1), args=args, train_dataset=Dataset.from_list(rows),
                      processing_class=tokenizer)
    trained.train()
    line = trained.state.log_history[0]
    return line["loss"], line["grad_norm"]


short, long = "a", " ".join("abcdefgh" * 4)
found = {"answers of one word": first_step(short), "of 32 words": first_step(long),
         "own mean, one word": first_step(short, OwnMean), "own mean, 32 words": first_step(long, OwnMean)}
print("loss and gradient norm of a step on samples: "
      + ", ".join(f"{name} {loss:.3f} {norm:.3f}" for name, (loss, norm) in found.items()))
assert found["answers of one word"][0] > 4 * found["of 32 words"][0]
assert found["answers of one word"][1] > 4 * found["of 32 words"][1]
assert abs(found["own mean, one word"][0] - found["own mean, 32 words"][0]) < 1e-3
P
cd "$folder" && OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 env/bin/python try.py 2>/dev/null
