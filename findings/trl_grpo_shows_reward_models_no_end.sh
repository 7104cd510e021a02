#!/usr/bin/env bash
# GRPOTrainer shows a reward model other tokens than RewardTrainer teaches one on: no eos, no bos.
#
# Version: trl 1.16.0 with transformers 5.23.0; Python 3.11.
# Expected: a model that RewardTrainer made, given to GRPOTrainer (RLOO alike) as a reward function, is asked
#   about plain texts as it was taught: bos (where the tokenizer writes one), prompt, answer, eos; its score
#   is read at the eos.
# Behaviour: the answer is decoded without special tokens, joined to the prompt, and tokenized without them:
#   no bos, and no eos where the policy has written one. The score is read at the last word, where the model
#   has not been taught to give one, and an answer that was cut looks like one that ended. Nothing is said.
#   (Conversations get both from their chat template.)
# Remedy: a reward function that gives the model bos, prompt and `completion_ids`.
# Seen: "taught on <bos> a b c d e <eos>, asked about a b c d e; of 45 pairs of answers, ranked as taught: 24"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 trl==1.16.0 transformers==5.23.0
cat > "$folder/try.py" <<'P'
import itertools

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer

words = {w: i for i, w in enumerate("<pad> <bos> <eos> a b c d e f g h i j k l m".split())}
raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
raw.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<bos>",
                                    eos_token="<eos>")
size = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
common = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none",
          "save_strategy": "no", "max_steps": 1, "per_device_train_batch_size": 8}
torch.manual_seed(0)
model = LlamaForSequenceClassification(LlamaConfig(**size, num_labels=1)).eval()
for weight in model.parameters():
    if weight.dim() > 1:
        torch.nn.init.normal_(weight, std=0.3)
pair = {"prompt": "a b c ", "chosen": "d e", "rejected": "f g"}
trainer = RewardTrainer(model, RewardConfig("taught", **common), processing_class=tokenizer,
                        train_dataset=Dataset.from_list([pair] * 8))
taught = next(iter(trainer.get_train_dataloader()))["input_ids"][0].tolist()

asked, sampled = [], []
model.eval().register_forward_pre_hook(
    lambda module, args, kwargs: asked.append(kwargs["input_ids"].tolist()), with_kwargs=True)


def answers(prompts, completions, completion_ids, **columns):  # what the policy has written
    sampled.extend(completion_ids)
    return [0.0] * len(prompts)


policy = LlamaForCausalLM(LlamaConfig(**size))
grpo = GRPOTrainer(policy, [model, answers], processing_class=tokenizer, train_dataset=Dataset.from_list(
    [{"prompt": "a b c "}] * 8), reward_processing_classes=[tokenizer, None],
    args=GRPOConfig("asked", num_generations=8, max_completion_length=40, **common))
grpo.train()
ended = sum(ids[-1] == 2 for ids in sampled)
tokens = {token for row in asked[-1] for token in row}
assert ended >= 4 and not tokens & {1, 2}, (ended, tokens)  # bos and eos


def as_grpo_asks(answer):
    ids = [words[w] for w in answer.split()] + [2]
    rows = [{"prompt": "a b c "}]
    grpo._calculate_rewards(rows, ["a b c "], tokenizer.batch_decode([ids], skip_special_tokens=True), [ids])
    return asked[-1][0]


@torch.no_grad()
def score(ids):
    return float(model(input_ids=torch.tensor([ids])).logits)


texts = ["d e", *(f"{a} {b}" for a, b in zip("fghijklma", "ghijklmab"))]
how = {text: (score([1, *(words[w] for w in f"a b c {text}".split()), 2]), score(as_grpo_asks(text)))
       for text in texts}
kept = sum((how[a][0] > how[b][0]) == (how[a][1] > how[b][1]) for a, b in itertools.combinations(texts, 2))
read = [" ".join(tokenizer.convert_ids_to_tokens(ids)) for ids in (taught, as_grpo_asks("d e"))]
print(f"taught on {read[0]}, asked about {read[1]}; of 45 pairs of answers, ranked as taught: {kept}")
assert read == ["<bos> a b c d e <eos>", "a b c d e"] and kept < 40
P
cd "$folder" && HF_HUB_OFFLINE=1 env/bin/python try.py 2>/dev/null | tail -1
