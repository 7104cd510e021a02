"""Is our PPO the same as TRL 1.12.0's `trl.experimental.ppo.PPOTrainer`?

    python benchmarks/ppo_parity.py                # both parts, on the bundled `tiny` model
    python benchmarks/ppo_parity.py --part 1       # about a minute
    python benchmarks/ppo_parity.py --part 2 --seeds 8 --iterations 40

Part 1, exact: both trainers get the same models, prompts and responses. Rewards, advantages,
returns, losses, the gradient of every parameter, and the weights after a full iteration of 4 epochs
x 4 minibatches must agree to 1e-5 in float32, and to 1e-9 in float64 (where a difference that
float32 would excuse as rounding has nowhere to hide). Exit status 1 when they do not.

Part 2, statistical: whole runs with the same settings but each trainer's own sampling noise, over
several seeds, one after the other. Mean score and KL over the last third of each run are compared
by an exact permutation test.

TRL runs in its own environment, `.venv-trl112` beside the repository's `.venv`, made on the first
call with the versions of constraints.txt: TRL 1.12.0 runs with transformers 5.23. Where the two
trainers differ by design, ours is set as TRL's is: the score one position later where padding
exists (`as_trl`), no gradient clipping (TRL's PPO never clips, whatever `max_grad_norm` says),
and TRL's divisor of the logits, temperature + 1e-7. Results: benchmarks/results/ppo_parity.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
VENV = ROOT / ".venv-trl112"
RESULTS = HERE / "results" / "ppo_parity.json"
TRL = "1.12.0"
LIMITS = {"float32": 1e-5, "float64": 1e-9}
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
ROWS = 32  # responses of part 1
ONCE = COMMON | {
    "per_device_train_batch_size": ROWS,
    "total_episodes": ROWS,
    "response_length": 24,
    "num_mini_batches": 1,
    "num_ppo_epochs": 1,
    "local_rollout_forward_batch_size": ROWS // 2,
    "temperature": 0.7,
}
CASES = {
    "k1": {},
    "k1, whitened rewards": {"whiten_rewards": True},
    "k3": {"kl_estimator": "k3"},
    "k3, whitened rewards": {"kl_estimator": "k3", "whiten_rewards": True},
    "no penalty, gamma 0.98": {"missing_eos_penalty": None, "temperature": 1.0, "gamma": 0.98},
    "4 epochs x 4 minibatches": {
        "num_mini_batches": 4,
        "num_ppo_epochs": 4,
        "learning_rate": 1e-3,
        "whiten_rewards": True,
    },
}


# ------------------------------------------------------------------------------ TRL's environment


def trl_python() -> Path:
    """The interpreter of `.venv-trl112`; makes and fills that environment when it is missing."""
    python = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    done = VENV / ".installed"
    if done.is_file():
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
    for wanted in ([torch_pin], [f"trl=={TRL}", "transformers", "accelerate", "datasets"]):
        subprocess.run(pip + wanted, check=True)
    done.touch()
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
    """Responses of the disturbed policy, cut to a designed set of endings. (ROWS, length)

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
        stop_token_id=None,
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
    return (as_trl(base) if job.get("late_score", True) else base)(
        args,
        load_tokenizer(folder / "tokenizer"),
        load_causal_lm(folder / "policy").to(dtype),
        load_causal_lm(folder / "ref").to(dtype),
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
                    (trainer, "response_values", 3),
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


# ------------------------------------------------------------------------------ part 1: exact

QUANTITIES = {  # row of the table: which tensors it covers
    "log-probs, policy": "logprobs",
    "log-probs, reference": "ref_logprobs",
    "values": "values",
    "scores": "scores",
    "rewards": "rewards",
    "advantages": "advantages",
    "returns": "returns",
    "policy loss": "pg_loss",
    "value loss": "vf_loss",
    "total loss": "loss",
    "gradients, policy": "gradient/policy.",
    "gradients, value model": "gradient/value.",
    "weights after, policy": "weight/policy.",
    "weights after, value model": "weight/value.",
}
LOGGED = {  # our metric: TRL's
    "score": "objective/scores",
    "kl": "objective/kl",
    "pg_loss": "loss/policy_avg",
    "vf_loss": "loss/value_avg",
    "clipfrac": "policy/clipfrac_avg",
    "vf_clipfrac": "val/clipfrac_avg",
}


def relative_to(gap: float, size: float) -> float:
    return gap / size if size > 1e-6 else 0.0


def difference(ours: dict, theirs: dict) -> dict[str, tuple[float, float]]:
    """For each quantity the largest absolute difference, and the same relative to its size.

    Relative: divided by the largest magnitude in TRL's tensor; left out where that is 0 but for
    rounding, as the first policy loss is (ratio 1, whitened advantages).
    """
    out = {}
    for label, key in QUANTITIES.items():
        names = [n for n in theirs if n == key or (key.endswith(".") and n.startswith(key))]
        if sorted(names) != sorted(n for n in ours if n == key or n in names):
            raise SystemExit(f"{label}: the two sides have different tensors")
        gaps, relative = [0.0], [0.0]
        for name in names:
            a, b = ours[name].double(), theirs[name].double()
            for x, y in ((a.shape, b.shape), (ours[name].dtype, theirs[name].dtype)):
                if x != y:
                    raise SystemExit(f"{name}: ours is {x}, TRL's is {y}")
            gap = (a - b).abs().max().item()
            gaps.append(gap if math.isfinite(gap) else math.inf)
            relative.append(relative_to(gaps[-1], b.abs().max().item()))
        out[label] = max(gaps), max(relative)
    return out


def logged_gap(ours: dict, theirs: dict, estimator: str) -> tuple[float, float]:
    """Largest difference between the metrics that both log under some name."""
    renamed = {"kl": "kl_k3"} if estimator == "k3" else {}  # TRL logs the estimator it uses
    pairs = [(ours[renamed.get(a, a)], theirs[b]) for a, b in LOGGED.items()]
    gaps = [abs(a - b) for a, b in pairs]
    return max(gaps), max(relative_to(g, abs(b)) for g, (_, b) in zip(gaps, pairs, strict=True))


def worst(of: list[dict]) -> dict[str, tuple[float, float]]:
    return {k: (max(d[k][0] for d in of), max(d[k][1] for d in of)) for k in of[0]}


def table(title: str, rows: dict, limit: float | None) -> None:
    print(f"\n{title}")
    print(f"  {'quantity':30} {'largest difference':>19} {'relative':>10}")
    for label, (gap, relative) in rows.items():
        verdict = "" if limit is None else "ok" if gap <= limit else "DIFFERS"
        print(f"  {label:30} {gap:19.2e} {relative:10.1e}  {verdict}")


def part1(python: Path, model: str, threads: int) -> tuple[bool, dict]:
    """One iteration on injected rollouts, in every case and both precisions."""
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_world(folder, model, ROWS)
        disturb(folder)
        responses = draw_responses(folder, ONCE["response_length"])
        jobs = []
        for i, (dtype, (name, change)) in enumerate(itertools.product(LIMITS, CASES.items())):
            settings = ONCE | change
            shuffle = random.Random(i)
            orders = [shuffle.sample(range(ROWS), ROWS) for _ in range(settings["num_ppo_epochs"])]
            jobs.append(
                {
                    "name": f"job{i}",
                    "case": name,
                    "dtype": dtype,
                    "inject": True,
                    "settings": settings,
                    "orders": orders,
                }
            )
        versions = run_trl(python, folder, jobs, threads)
        gaps: dict = {d: {} for d in LIMITS}
        for job in jobs:
            found, log = our_iteration(folder, job, responses)
            theirs = load_file(folder / f"{job['name']}.trl.safetensors")
            trl_log = json.loads((folder / f"{job['name']}.trl.json").read_text())["log"][0]
            result = difference(found, theirs)
            if job["dtype"] == "float32":  # both log in float32
                kind = job["settings"]["kl_estimator"]
                result["logged metrics"] = logged_gap(log, trl_log, kind)
            gaps[job["dtype"]][job["case"]] = result
            if job["case"] == "4 epochs x 4 minibatches" and job["dtype"] == "float32":
                clipped = log["clipfrac"], log["vf_clipfrac"]
        late, default = (
            our_iteration(folder, jobs[0] | {"late_score": flag}, responses)[0]
            for flag in (True, False)
        )
        placement = difference(default, late)  # what our default changes

    print(
        f"\nPart 1: one iteration on {ROWS} injected responses, model {model}, "
        f"{len(CASES)} cases: {'; '.join(CASES)}"
    )
    ok = True
    for dtype, limit in LIMITS.items():
        rows = worst(list(gaps[dtype].values()))
        table(f"{dtype}: ours - TRL, worst of all cases (limit {limit:g})", rows, limit)
        ok &= all(gap <= limit for gap, _ in rows.values())
    print(
        f"  (in the 16 steps of the last case {clipped[0]:.0%} of policy ratios and "
        f"{clipped[1]:.0%} of values were clipped)"
    )
    title = "For information: our default (score on the stop token) - the placement of TRL and N+"
    table(title, placement, None)
    print(f"\nPart 1: {'equal' if ok else 'NOT EQUAL'}")
    return ok, {
        "model": model,
        "equal": ok,
        "limits": LIMITS,
        "gaps": gaps,
        "trl": versions,
        "clipped": clipped,
        "default_placement": placement,
    }


# ----------------------------------------------------------------- part 2: whole runs, statistical


def permutation_test(a: list[float], b: list[float]) -> float:
    """Two-sided p-value of the difference of means, over every split of the pooled values."""
    pooled, n = a + b, len(a)
    if math.comb(len(pooled), n) <= 200_000:
        splits = itertools.combinations(range(len(pooled)), n)
    else:
        draw = random.Random(0)
        splits = [draw.sample(range(len(pooled)), n) for _ in range(100_000)]
    total, observed, as_large, count = sum(pooled), abs(sum(a) / n - sum(b) / len(b)), 0, 0
    for chosen in splits:
        part = sum(pooled[i] for i in chosen)
        gap = abs(part / n - (total - part) / len(b))
        as_large += gap >= observed - 1e-12
        count += 1
    return as_large / count


def mean_sd(values: list[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def bands_overlap(a: list[list[float]], b: list[list[float]]) -> float:
    """Share of iterations at which mean +- sd over the seeds of the two sides overlap."""
    hits = 0
    for x, y in zip(zip(*a, strict=True), zip(*b, strict=True), strict=True):
        (m, s), (n, t) = mean_sd(list(x)), mean_sd(list(y))
        hits += abs(m - n) <= s + t + 1e-3  # the KL before any update is 0, all but rounding
    return hits / len(a[0])


def part2(python: Path, model: str, threads: int, seeds: int, iterations: int, rate: float):
    """Whole runs of both trainers, seed by seed, never two at a time."""
    common = COMMON | {"learning_rate": rate}
    batch = common["per_device_train_batch_size"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_world(folder, model, 1024)
        jobs = [
            # Seeds far apart: accelerate reseeds with seed + epoch, so that in TRL the second pass
            # over the prompts with seed 1 would have the order and the noise of seed 2's first.
            {
                "name": f"seed{1000 * s}",
                "dtype": "float32",
                "inject": False,
                "settings": common | {"seed": 1000 * s, "total_episodes": batch * iterations},
            }
            for s in range(1, seeds + 1)
        ]
        print(
            f"\nPart 2: {seeds} seeds x {iterations} iterations of {batch} responses, "
            f"model {model}",
            flush=True,
        )
        versions = run_trl(python, folder, jobs, threads)
        theirs = [json.loads((folder / f"{j['name']}.trl.json").read_text()) for j in jobs]
        ours = []
        for job in jobs:
            trainer = our_trainer(folder, job)
            began = time.perf_counter()
            log = trainer.train().log_history
            ours.append({"seconds": time.perf_counter() - began, "log": log})
            print(f"ours {job['name']}: {ours[-1]['seconds']:.1f} s", flush=True)

    rates = [[line["learning_rate"] for line in run["log"]] for run in ours]
    trl_rates = [[line["lr"] for line in run["log"] if "lr" in line] for run in theirs]
    if rates != trl_rates:
        raise SystemExit(f"the learning rates differ: {rates[0]}, TRL has {trl_rates[0]}")

    result: dict = {
        "model": model,
        "settings": common,
        "seeds": seeds,
        "iterations": iterations,
        "trl": versions,
        "quantities": {},
    }
    last = max(1, iterations // 3)
    print(f"\n  mean over the last {last} of {iterations} iterations; mean +- sd over the seeds")
    heads = f"{'ours':>18} {'TRL':>18} {'ours - TRL, 2 SE':>20} {'p':>7} {'bands overlap':>14}"
    print(f"  {'':8} {heads}")
    same = True
    for name in ("score", "kl"):
        curves = [[line[name] for line in run["log"]] for run in ours]
        key = LOGGED[name]
        trl_curves = [[line[key] for line in run["log"] if key in line] for run in theirs]
        a, b = ([statistics.mean(c[-last:]) for c in side] for side in (curves, trl_curves))
        (m, s), (n, t), p = mean_sd(a), mean_sd(b), permutation_test(a, b)
        error = 2 * math.sqrt((s**2 + t**2) / seeds)
        share = bands_overlap(curves, trl_curves)
        same &= p > 0.05 and share >= 0.9
        print(
            f"  {name:8} {m:9.3f} +- {s:5.3f} {n:9.3f} +- {t:5.3f} {m - n:11.3f} +- {error:5.3f} "
            f"{p:7.3f} {share:13.0%}"
        )
        result["quantities"][name] = {
            "ours": a,
            "trl": b,
            "ours_mean_sd": (m, s),
            "trl_mean_sd": (n, t),
            "p": p,
            "difference": m - n,
            "two_standard_errors": error,
            "bands_overlap": share,
            "ours_curves": curves,
            "trl_curves": trl_curves,
        }
        for side, lines in (("ours", curves), ("TRL", trl_curves)):
            first, final = (statistics.mean(c[i] for c in lines) for i in (0, -1))
            print(f"           {side}: {first:.3f} at the first iteration, {final:.3f} at the last")
    seconds = [statistics.mean(r["seconds"] for r in side) / iterations for side in (ours, theirs)]
    print(f"  seconds an iteration: ours {seconds[0]:.2f}, TRL {seconds[1]:.2f}")
    if (least := 2 / math.comb(2 * seeds, seeds)) > 0.05:
        verdict, same = f"too few seeds to tell (p cannot fall below {least:.2f})", None
    else:
        verdict = "indistinguishable" if same else "DIFFERENT"
    print(f"\nPart 2: {verdict}; needs p > 0.05 and overlapping bands in 90% of the iterations")
    result |= {"indistinguishable": same, "seconds_per_iteration": seconds}
    return same, result


def our_versions() -> dict:
    from importlib.metadata import version

    names = ("torch", "transformers", "accelerate", "safetensors")
    return {n: version(n) for n in names} | {"python": sys.version.split()[0]}


def main() -> int:
    bundled = ROOT / "small_models" / "tiny"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--part", choices=("1", "2", "both"), default="both")
    parser.add_argument(
        "--model",
        default=os.path.relpath(bundled) if (bundled / "reward").is_dir() else "random",
        help="folder with sft/ and reward/ (default: small_models/tiny), or 'random'",
    )
    parser.add_argument("--seeds", type=int, default=5, help="runs of each trainer in part 2")
    parser.add_argument("--iterations", type=int, default=20, help="iterations of a run in part 2")
    parser.add_argument("--learning-rate", type=float, default=COMMON["learning_rate"])
    parser.add_argument("--threads", type=int, default=0, help="torch threads (0: torch's choice)")
    parser.add_argument("--trl-python", type=Path, help=f"an interpreter that has TRL {TRL}")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the numbers go")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"], os.environ["CUDA_VISIBLE_DEVICES"] = "1", ""
    python = args.trl_python or trl_python()
    sys.path.insert(0, str(ROOT))

    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    results = json.loads(args.out.read_text()) if args.out.is_file() else {}
    results["ours"], fine = our_versions(), True
    if args.part in ("1", "both"):
        equal, results["part1"] = part1(python, args.model, args.threads)
        fine &= equal
    if args.part in ("2", "both"):
        same, results["part2"] = part2(
            python, args.model, args.threads, args.seeds, args.iterations, args.learning_rate
        )
        fine &= same is not False
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
