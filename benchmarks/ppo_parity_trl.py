"""TRL's half of `ppo_parity.py`: runs TRL 1.12.0's own PPOTrainer and records what it computed.

Not started by hand: `ppo_parity.py` starts it in the benchmark's own environment, as
`python ppo_parity_trl.py FOLDER`. FOLDER holds the models in the transformers layout (policy, ref,
reward, value), a tokenizer, prompts.json (token ids) and job.json. Every job of job.json is one
`PPOTrainer.train()`:

- `inject`: the responses are given (responses.safetensors) instead of sampled, and the tensors of
  the iteration are written to NAME.safetensors;
- otherwise a whole run, whose logged metrics are written to NAME.json.

TRL's files are not changed. Injection replaces `batch_generation`; recording wraps
`accelerator.backward`, where all of an iteration's tensors are local variables of `train`.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import __version__ as accelerate_version
from datasets import Dataset
from datasets import __version__ as datasets_version
from parity_precision import exact_norms
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
    set_seed,
)
from transformers import __version__ as transformers_version
from trl import __version__ as trl_version
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

ROWS = ("rewards", "advantages", "returns", "logprobs", "ref_logprobs", "values", "scores")
MASKED = ("logprobs", "ref_logprobs")  # TRL fills these with a constant beyond the end
SAFE = {  # what TRL needs to run on a CPU in full precision, and to write nothing
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "num_sample_generations": 0,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}


def load_models(folder: Path, dtype: torch.dtype) -> dict:
    """policy, ref, reward, value; fresh from disk."""
    models = {n: AutoModelForCausalLM for n in ("policy", "ref")}
    models |= {n: AutoModelForSequenceClassification for n in ("reward", "value")}
    models = {n: c.from_pretrained(folder / n, dtype=dtype) for n, c in models.items()}
    for name in ("reward", "value"):  # our reward models carry a constant that TRL does not know
        offset = getattr(models[name].config, "score_offset", 0.0)
        models[name].score.register_forward_hook(lambda m, i, out, offset=offset: out + offset)
    return models


class KeepLog(TrainerCallback):
    """Keeps every logged line instead of printing it."""

    def __init__(self):
        self.lines = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.lines.append(dict(logs, step=state.global_step))


def make_trainer(folder: Path, job: dict, log: KeepLog) -> PPOTrainer:
    # PPO takes no seed for the order of the prompts: it uses whatever torch's generator holds.
    set_seed(job["settings"]["seed"])
    models = load_models(folder, getattr(torch, job["dtype"]))
    lora = None
    if "lora" in job:  # then the policy without its adapter is the reference
        lora, models["ref"] = LoraConfig(**job["lora"]), None
    prompts = json.loads((folder / "prompts.json").read_text())
    trainer = PPOTrainer(
        args=PPOConfig(output_dir=str(folder / "trl_output"), **SAFE, **job["settings"]),
        processing_class=AutoTokenizer.from_pretrained(folder / "tokenizer", padding_side="left"),
        model=models["policy"],
        ref_model=models["ref"],
        reward_model=models["reward"],
        value_model=models["value"],
        train_dataset=Dataset.from_dict({"input_ids": prompts}),
        peft_config=lora,
        callbacks=[log],
    )
    trainer.remove_callback(ppo_trainer.PrinterCallback)
    trainer.accelerator.print = lambda *args: None
    return trainer


def inject(folder: Path, job: dict, trainer: PPOTrainer) -> dict[str, torch.Tensor]:
    """One iteration on given responses. → what it computed, rows in the order of prompts.json."""
    prompts = json.loads((folder / "prompts.json").read_text())
    row_of = {tuple(p): i for i, p in enumerate(prompts)}
    given = load_file(folder / "responses.safetensors")["responses"]
    found: dict[str, torch.Tensor] = {}
    steps: dict[str, list] = {"pg_loss": [], "vf_loss": [], "loss": []}
    orders = iter(job["orders"])  # which rows make each epoch's minibatches

    @torch.no_grad()
    def batch_generation(model, queries, _batch, pad_token_id, config):
        rows = [row_of[tuple(q[q != pad_token_id].tolist())] for q in queries]
        found["order"] = torch.tensor(rows)
        both = torch.cat([queries, given[rows]], 1)
        logits = ppo_trainer.forward(model, both, pad_token_id).logits[:, queries.shape[1] - 1 : -1]
        return both, logits / config.temperature

    def permutation(size):
        wanted = torch.tensor(next(orders))  # in rows of prompts.json; TRL's rows are shuffled
        return torch.argsort(found["order"])[wanted].numpy()

    def trained():
        for role in ("policy", "value_model"):
            for name, p in getattr(trainer.model, role).named_parameters():
                yield f"{role.removesuffix('_model')}.{name}", p

    backward = trainer.accelerator.backward

    def recording_backward(loss):
        local = sys._getframe(1).f_locals  # of PPOTrainer.train
        for name in steps:
            steps[name].append(local[name].detach().double())
        backward(loss)
        if "rewards" not in found:  # the first step of the iteration
            for name in ROWS:
                value = local[name].detach()
                if name in MASKED:
                    value = value.masked_fill(local["padding_mask"], 0)
                found[name] = value[torch.argsort(found["order"])].contiguous()
            for name, p in trained():
                found[f"gradient/{name}"] = p.grad.detach().clone()

    trainer.accelerator.backward = recording_backward
    originals = ppo_trainer.batch_generation, np.random.permutation
    ppo_trainer.batch_generation, np.random.permutation = batch_generation, permutation
    # Quotients of counts (the variance's n / (n - 1)) take torch's default precision.
    torch.set_default_dtype(getattr(torch, job["dtype"]))
    try:
        with exact_norms(job["dtype"]):
            trainer.train()
    finally:
        ppo_trainer.batch_generation, np.random.permutation = originals
        torch.set_default_dtype(torch.float32)
    found |= {name: torch.stack(values) for name, values in steps.items()}
    found |= {f"weight/{name}": p.detach().clone() for name, p in trained()}
    return found


def main(folder: Path) -> None:
    work = json.loads((folder / "job.json").read_text())
    if work["threads"]:
        torch.set_num_threads(work["threads"])
    versions = {
        "trl": trl_version,
        "transformers": transformers_version,
        "accelerate": accelerate_version,
        "datasets": datasets_version,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
    }
    (folder / "trl_versions.json").write_text(json.dumps(versions))
    for job in work["jobs"]:
        log = KeepLog()
        trainer = make_trainer(folder, job, log)
        began = time.perf_counter()
        if job["inject"]:
            save_file(inject(folder, job, trainer), folder / f"{job['name']}.trl.safetensors")
        else:
            trainer.train()
        seconds = time.perf_counter() - began
        result = {"seconds": seconds, "log": log.lines}
        (folder / f"{job['name']}.trl.json").write_text(json.dumps(result))
        print(f"TRL  {job['name']}: {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
