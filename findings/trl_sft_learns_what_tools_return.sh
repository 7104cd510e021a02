#!/usr/bin/env bash
# SFTTrainer on prompt-completion rows with tools: the model learns to write what the tool returned, too.
#
# Version: trl 1.16.0 with transformers 5.23.0, torch 2.13.0 (CPU); Python 3.11.
# Expected: of a completion that is a call, the tool's result and an answer, the loss is of what the assistant writes: at
#   inference the result is put there by a program, and completion_only_loss keeps the user's words out just so.
# Behaviour: the completion mask marks every token behind the prompt: header and text of the tool's turn as well. A long
#   result (a page that was fetched) is most of what is learned, and the model learns to make results up. Nothing is
#   said. DPOTrainer compares whole completions alike.
# Remedy: rows of `messages` with assistant_only_loss=True and a template with {% generation %} (TRL brings such ones for
#   some families, whose text may differ from the model's own template); or a row for each assistant turn.
# Seen: "of 14 tokens that are learned 8 are the tool's turn: 'tool rain rain rain rain rain rain <eos>'; with
#   assistant_only_loss: 5, 0"
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
from trl import SFTConfig, SFTTrainer

words = {w: i for i, w in enumerate("<pad> <eos> user assistant tool how is it call weather rain wet take care".split())}
raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
PLAIN = "{% for m in messages %}{{ m.role }} {{ m.content }} <eos> {% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
MARKED = ("{% for m in messages %}{{ m.role }} {% if m.role == 'assistant' %}{% generation %}{{ m.content }} <eos>"
          "{% endgeneration %} {% else %}{{ m.content }} <eos> {% endif %}{% endfor %}"
          "{% if add_generation_prompt %}assistant {% endif %}")
prompt = [{"role": "user", "content": "how is it"}]
completion = [{"role": "assistant", "content": "call weather"}, {"role": "tool", "content": "rain " * 5 + "rain"},
              {"role": "assistant", "content": "wet"}]
pair = {"prompt": prompt, "completion": completion}


def learned(template, row, **settings):
    """Learned words of a row, in their order."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = template
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                         num_attention_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=None))
    args = SFTConfig("out", use_cpu=True, bf16=False, report_to="none", max_steps=1, gradient_checkpointing=False,
                     **settings)
    trainer = SFTTrainer(model, args, train_dataset=Dataset.from_list([row]), processing_class=tokenizer)
    (batch,) = trainer.get_train_dataloader()
    labels = batch["labels"][0]
    return tokenizer.convert_ids_to_tokens(labels[labels != -100])


both = learned(PLAIN, pair)
alone = learned(MARKED, {"messages": prompt + completion}, assistant_only_loss=True)
start = both.index("tool") if "tool" in both else len(both)
result = both[start : start + 8]
print(f"of {len(both)} tokens that are learned {len(result)} are the tool's turn: {' '.join(result)!r}; with "
      f"assistant_only_loss: {len(alone)}, {alone.count('rain')}")
assert both.count("rain") == 6 and "tool" in both and "rain" not in alone and "wet" in alone
P
cd "$folder" && OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 env/bin/python try.py 2>/dev/null
