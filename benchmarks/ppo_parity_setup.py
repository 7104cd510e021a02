"""What `ppo_parity.py` compares: TRL's own environment, models and prompts for both sides, and our
trainer set as TRL's is (its docstring says where the two differ on purpose).
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
VENV = ROOT / ".venv-trl112"
TRL = "1.12.0"
OTHERS = [f"trl=={TRL}", "transformers", "accelerate", "datasets", "peft"]
EPSILON = 1e-7  # what TRL adds to the temperature

# Names that both PPOConfigs know.
COMMON = {
    "per_device_train_batch_size": 64,
    "gradient_accumulation_steps": 1,
    "num_mini_batches": 4,
    "num_ppo_epochs": 4,
    "local_rollout_forward_batch_size": 64,
    "response_length": 40,
    "stop_token": "eos",
    "missing_eos_penalty": 1.0,
    "temperature": 1.0,
    "kl_coef": 0.05,
    "kl_estimator": "k1",
    "whiten_rewards": False,
    "gamma": 1.0,
    "lam": 0.95,
    "cliprange": 0.2,
    "cliprange_value": 0.2,
    "vf_coef": 0.1,
    "learning_rate": 3e-4,
    "lr_scheduler_type": "linear",
    "adam_epsilon": 1e-5,
    "weight_decay": 0.0,
    "seed": 0,
}


# ------------------------------------------------------------------------------ TRL's environment


def trl_python() -> Path:
    """The interpreter of `.venv-trl112`; makes and fills that environment when it is missing."""
    python = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    done = VENV / ".installed"
    if done.is_file() and done.read_text() == " ".join(OTHERS):
        return python
    print(f"making {VENV.name} with TRL {TRL} (once; a large download)", flush=True)
    shutil.rmtree(VENV, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    (VENV / ".gitignore").write_text("*\n")
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    constraints = VENV / "constraints.txt"
    constraints.write_text("\n".join(p for p in pins if not p.startswith("trl==")) + "\n")
    torch_pin = next(p for p in pins if p.startswith("torch=="))
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pip += ["-c", str(constraints)]
    for wanted in ([torch_pin], OTHERS):
        subprocess.run(pip + wanted, check=True)
    done.write_text(" ".join(OTHERS))
    return python


def run_trl(python: Path, folder: Path, jobs: list[dict], threads: int) -> dict:
    """Run TRL's half on the jobs; → the versions it ran with."""
    (folder / "job.json").write_text(json.dumps({"threads": threads, "jobs": jobs}))
    quiet = {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    quiet |= {"TRANSFORMERS_VERBOSITY": "error", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    quiet |= {"PYTHONWARNINGS": "ignore::FutureWarning", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    quiet |= {"TOKENIZERS_PARALLELISM": "false"}
    command = [str(python), str(HERE / "ppo_parity_trl.py"), str(folder)]
    subprocess.run(command, check=True, env=os.environ | quiet)
    return json.loads((folder / "trl_versions.json").read_text())


# -------------------------------------------------------------------------- models and prompts


def random_world(folder: Path, prompts: int) -> None:
    """Random Llamas of 30k parameters, a tokenizer and random prompts of 3 to 20 tokens."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        LlamaForSequenceClassification,
        PreTrainedTokenizerFast,
    )

    words = {"<pad>": 0, "<end>": 1} | {f"w{i}": i for i in range(2, 64)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w2"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<end>", padding_side="left"
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        initializer_range=0.3,
        num_labels=1,
        max_position_embeddings=128,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "policy")
    LlamaForSequenceClassification(config).save_pretrained(folder / "reward")
    draw, made = random.Random(0), {}  # a dict: distinct, in the order drawn
    while len(made) < prompts:
        made[tuple(draw.randrange(2, 64) for _ in range(draw.randint(3, 20)))] = None
    (folder / "prompts.json").write_text(json.dumps(list(made)))


def bundled_world(folder: Path, model: Path, prompts: int) -> None:
    """The SFT and reward checkpoints under `model`, and instructions of the bundled world."""
    from rlhf_lab.data.tokenize import encode_prompt
    from rlhf_lab.models.tokenizer import load_tokenizer
    from rlhf_lab.models.weights import load_causal_lm, load_reward_model
    from rlhf_lab.world import corpus

    tokenizer = load_tokenizer(model / "sft")
    tokenizer.save_pretrained(folder / "tokenizer")
    load_causal_lm(model / "sft").save_pretrained(folder / "policy")
    load_reward_model(model / "reward").save_pretrained(folder / "reward")
    texts = {r.prompt: None for r in itertools.islice(corpus.requests("train", 0), 3 * prompts)}
    tokens = [encode_prompt(tokenizer, t) for t in itertools.islice(texts, prompts)]
    (folder / "prompts.json").write_text(json.dumps(tokens))


def make_world(folder: Path, model: str, prompts: int) -> None:
    """policy, reward, tokenizer and prompts in `folder`; reference and value are copies of them."""
    if model == "random":
        random_world(folder, prompts)
    else:
        bundled_world(folder, Path(model), prompts)
    shutil.copytree(folder / "policy", folder / "ref")
    shutil.copytree(folder / "reward", folder / "value")


def disturb(folder: Path) -> None:
    """Noise on policy and value model, so that KL and value error are not zero."""
    import torch
    from safetensors.torch import load_file, save_file

    torch.manual_seed(1)
    for role in ("policy", "value"):
        file = folder / role / "model.safetensors"
        weights = load_file(file)
        for name, w in weights.items():
            if w.dim() > 1:  # not the norms
                weights[name] = w + 0.05 * w.std() * torch.randn_like(w)
        save_file(weights, file, metadata={"format": "pt"})


def draw_responses(folder: Path, length: int):
    """Responses of the disturbed policy, cut to a designed set of endings. (rows, length)

    By turns: a stop token alone, an early stop, a later one, a stop at the very last position,
    and no stop at all.
    """
    import torch
    from safetensors.torch import save_file

    from rlhf_lab.models.tokenizer import load_tokenizer
    from rlhf_lab.models.weights import load_causal_lm
    from rlhf_lab.ppo.sampling import generate, pad_prompts, row_keys

    tokenizer = load_tokenizer(folder / "tokenizer")
    pad, stop = tokenizer.pad_token_id, tokenizer.eos_token_id
    ids, mask = pad_prompts(json.loads((folder / "prompts.json").read_text()), pad)
    rows = torch.arange(len(ids))
    drawn = generate(
        load_causal_lm(folder / "policy"),
        ids,
        mask,
        row_keys(0, 0, rows, 0 * rows),
        max_new_tokens=length,
        stop_token_ids=None,
        pad_token_id=pad,
    )
    drawn[(drawn == pad) | (drawn == stop)] = next(i for i in range(3) if i not in (pad, stop))
    ends = itertools.cycle([0, length // 6, length // 2, length - 1, None, length - 5])
    for row, end in zip(drawn, ends, strict=False):
        if end is not None:
            row[end], row[end + 1 :] = stop, pad
    save_file({"responses": drawn}, folder / "responses.safetensors")
    return drawn


# ------------------------------------------------------------------------------- our half


def our_trainer(folder: Path, job: dict, base=None, **extra):
    """Our PPOTrainer with the models, prompts and settings of a job."""
    import torch

    from rlhf_lab.models.tokenizer import load_tokenizer
    from rlhf_lab.models.weights import load_causal_lm, load_reward_model
    from rlhf_lab.ppo.config import PPOConfig
    from rlhf_lab.ppo.trainer import PPOTrainer

    settings = dict(job["settings"])
    settings["temperature"] += EPSILON
    args = PPOConfig(
        output_dir=str(folder / "our_output"),
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        **({"max_grad_norm": 0.0} | settings),
    )
    dtype = getattr(torch, job["dtype"])
    prompts = json.loads((folder / "prompts.json").read_text())
    base = base or PPOTrainer
    reference = load_causal_lm(folder / "ref").to(dtype) if args.layout != "adapters" else None
    if "lora" in job:
        from peft import LoraConfig

        extra["peft_config"] = LoraConfig(**job["lora"])
    return (as_trl(base) if job.get("late_score", True) else base)(
        args,
        load_tokenizer(folder / "tokenizer"),
        load_causal_lm(folder / "policy").to(dtype),
        reference,
        load_reward_model(folder / "reward").to(dtype),
        [{"input_ids": p} for p in prompts],
        load_reward_model(folder / "value").to(dtype) if args.layout == "four" else None,
        **extra,
    )


def one_later(mask):
    """A mask with one more position where padding exists. (b, t) -> (b, t)"""
    import torch

    return torch.cat([torch.ones_like(mask[:, :1]), mask[:, :-1]], 1)


def as_trl(base):
    """A trainer of ours whose values, rewards and returns go one position beyond the response,
    where TRL puts its score.

    Whatever `base` does with values or rewards is given the longer mask; log-probabilities and
    advantages keep the response's own.
    """
    from rlhf_lab.ppo import layouts, losses, trainer

    plain = {name: getattr(losses, name) for name in ("whiten", "vf_loss")}

    def longer(function, place):
        def call(*args, **kwargs):
            args = list(args)
            args[place] = one_later(args[place])
            return function(*args, **kwargs)

        return call

    def whiten(values, mask, shift_mean=True):
        return plain["whiten"](values, mask if shift_mean else one_later(mask), shift_mean)

    class AsTRL(base):
        @contextmanager
        def longer_masks(self):
            with ExitStack() as stack:
                for module, name, place in (
                    (trainer, "token_values", 3),
                    (layouts, "token_values", 3),
                    (losses, "token_rewards", 2),
                    (losses, "compute_gae", 2),
                    (losses, "explained_variance", 2),
                ):
                    new = longer(getattr(module, name), place)
                    stack.enter_context(mock.patch.object(module, name, new))
                stack.enter_context(mock.patch.object(losses, "whiten", whiten))
                stack.enter_context(mock.patch.object(losses, "vf_loss", self.longer_vf_loss))
                yield

        def longer_vf_loss(self, values, old_values, returns, mask, clip):
            """Its mean is over the longer mask's tokens of the minibatch."""
            both = plain["vf_loss"](values, old_values, returns, one_later(mask), clip)
            return tuple(x * self.share for x in both)

        def make_rollout(self, *args):
            with self.longer_masks():
                return super().make_rollout(*args)

        def update(self, *args):
            with self.longer_masks():
                return super().update(*args)

        def train_minibatch(self, mb, adv):
            self.share = mb.mask.sum().double() / one_later(mb.mask).sum()
            return super().train_minibatch(mb, adv)

    return AsTRL


@contextmanager
def double_precision(on: bool):
    """In the float64 check, `.float()` inside rlhf_lab keeps float64 (a float32 run is unchanged).

    Only there: transformers' own `.float()` calls, in position embeddings, are the same on both
    sides and stay what they are; for its norms see `parity_precision.py`.
    """
    import torch

    single = torch.Tensor.float

    def to_fp32(tensor, *args, **kwargs):
        ours = sys._getframe(1).f_globals.get("__name__", "").startswith("rlhf_lab")
        return tensor.double() if ours else single(tensor, *args, **kwargs)

    if not on:
        yield
        return
    with mock.patch.object(torch.Tensor, "float", to_fp32):
        yield


def our_iteration(folder: Path, job: dict, responses):
    """One iteration of ours on given responses. → (tensors as TRL's half writes them, log)."""
    import torch
    from parity_precision import exact_norms

    from rlhf_lab.ppo.rollout import Samples
    from rlhf_lab.ppo.sampling import pad_prompts
    from rlhf_lab.ppo.trainer import PPOTrainer

    found: dict = {}
    steps: dict[str, list] = {"pg_loss": [], "vf_loss": [], "loss": []}

    class Recorded(PPOTrainer):
        def next_prompts(self, iteration):
            return torch.arange(len(self.train_dataset))

        def sample(self, rows, index, iteration):
            prompts = [row["input_ids"] for row in rows]
            ids, mask = pad_prompts(prompts, self.tokenizer.pad_token_id)
            return Samples(index, ids, mask, responses[index])

        def update(self, rollout, advantages, iteration):
            found.update({n: getattr(rollout, n) for n in ("logprobs", "ref_logprobs", "values")})
            found.update(vars(advantages))
            orders = iter([torch.tensor(o) for o in job["orders"]])
            with mock.patch.object(torch, "randperm", lambda *a, **k: next(orders)):
                return super().update(rollout, advantages, iteration)

        def compute_losses(self, mb, adv, tokens):
            loss, sums, ratio = super().compute_losses(mb, adv, tokens)
            for name, value in (("pg_loss", sums[0]), ("vf_loss", sums[1]), ("loss", loss)):
                steps[name].append(value.detach().double())
            return loss, sums, ratio

    trainer = our_trainer(folder, job, Recorded)
    optimizer_step = trainer.optimizer.step

    def recording_step(*args, **kwargs):
        if len(steps["loss"]) == 1:  # the first step of the iteration
            for name, p in trainer.roles.trained.named_parameters():
                found[f"gradient/{name}"] = p.grad.detach().clone()
        return optimizer_step(*args, **kwargs)

    trainer.optimizer.step = recording_step
    with double_precision(job["dtype"] == "float64"), exact_norms(job["dtype"]):
        state = trainer.train()
    found.update({name: torch.stack(values) for name, values in steps.items()})
    for name, p in trainer.roles.trained.named_parameters():
        found[f"weight/{name}"] = p.detach().clone()
    return found, state.log_history[-1]


def our_versions() -> dict:
    from importlib.metadata import version

    names = ("torch", "transformers", "accelerate", "safetensors")
    return {n: version(n) for n in names} | {"python": sys.version.split()[0]}
