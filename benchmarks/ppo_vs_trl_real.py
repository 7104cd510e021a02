"""A real model, TRL's PPO and ours: the section `real` of `ppo_vs_trl.py`.

SmolLM2-135M-Instruct with its vocabulary of 49,152 (`make real`): 16 responses of at most 64 tokens
an iteration, sampled until the model's own end; two epochs of two minibatches. Reward and value
model are the same network with a new head, the same files for both sides.

    full    all weights of policy and value model train; four models on both sides
    LoRA    the policy has an adapter, and is the reference without it; the value model trains
            whole, as TRL 1.12.0 has it. Our row `one base` is what rlhf_lab has besides: policy,
            value and reference on one base, each with an adapter. It trains fewer weights, so it
            is shown and no target

Speed: one iteration a repeat, the sides in turn (it takes two minutes of a core, beside which a
warm-up is nothing), in seconds of the process' own CPU time: with `--threads 1` they are those of
the clock on a quiet machine, and on another do not count what it does besides. Memory: the highest
resident set of a fresh process in two iterations, less what it had before its models were loaded:
imports do not count.
"""

from __future__ import annotations

import itertools
import json
from contextlib import ExitStack
from pathlib import Path

from ppo_vs_trl_report import EQUAL, GIB, Options, Worker, job_of, median, show, spread, target

MODEL = "smollm2-135m"
EPISODES = 16
SETTINGS = EQUAL | {
    "per_device_train_batch_size": EPISODES,
    "local_rollout_forward_batch_size": EPISODES,
    "response_length": 64,
    "num_mini_batches": 2,
    "num_ppo_epochs": 2,
    "learning_rate": 1e-6,
}
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
ROWS: dict[str, tuple[str, dict]] = {
    "full: TRL": ("TRL", {}),
    "full: ours": ("ours", {}),
    "LoRA: TRL": ("TRL", {"lora": LORA}),
    "LoRA: ours": ("ours", {"lora": LORA}),
    "LoRA: ours, one base": ("ours", {"lora": LORA, "layout": "adapters"}),
}
"""Row of the table: side, and what its job has besides."""
PAIRS = {name: (f"{name}: ours", f"{name}: TRL") for name in ("full", "LoRA")}
FASTER, SMALLER = 1.4, 0.5


def real_world(folder: Path, prompts: int) -> None:
    """The model in its four roles, its tokenizer, and requests of the lab's world as it reads
    them: in its chat template."""
    import rlhf_lab as lab
    from rlhf_lab.world import corpus

    folder.mkdir()
    model = lab.load(MODEL)
    tokenizer = model.tokenizer
    tokenizer.save_pretrained(folder / "tokenizer")
    for roles, made in ((("policy", "ref"), model.base), (("reward", "value"), model.new_reward())):
        for role in roles:
            made.save_pretrained(folder / role)
    found: dict[tuple[int, ...], None] = {}  # distinct, in the order drawn
    for request in itertools.islice(corpus.requests("train", 0), 4 * prompts):
        asked = [{"role": "user", "content": request.prompt}]
        ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        found[tuple(ids)] = None
    chosen = list(itertools.islice(found, prompts))
    (folder / "prompts.json").write_text(json.dumps(chosen))


def real(options: Options) -> dict:
    """Speed in turn, then the memory of fresh processes."""
    folder = options.scratch / "real"
    real_world(folder, 128)
    jobs = {}
    for name, (_, more) in ROWS.items():
        settings = SETTINGS | {k: v for k, v in more.items() if k == "layout"}
        rest = {"lora": more["lora"]} if more else {}
        rest |= {"late_score": False} if "layout" in more else {}
        jobs[name] = settings, rest
    speeds = _speeds(folder, jobs, options)
    peaks = _peaks(folder, jobs, options)
    return _report(speeds, peaks)


def _speeds(folder: Path, jobs: dict, options: Options) -> dict[str, list[dict]]:
    """One iteration a repeat. → runs by row."""
    runs: dict[str, list[dict]] = {name: [] for name in jobs}
    with ExitStack() as stack:
        sides = {
            side: stack.enter_context(Worker(side, options, malloc=True))
            for side in dict.fromkeys(side for side, _ in ROWS.values())
        }
        for repeat in range(options.repeats):
            for name, (settings, rest) in jobs.items():
                job = job_of(folder, settings, 1, 1000 * (repeat + 1), warm_up=0, **rest)
                found = sides[ROWS[name][0]].ask("train", **job)
                found["length"] = found["log"][0]["length"]
                runs[name].append(found)
                told = f"{found['cpu_seconds']:.0f} CPU s, {found['seconds']:.0f} s"
                print(f"{name}: an iteration of {told}", flush=True)
    return runs


def _peaks(folder: Path, jobs: dict, options: Options) -> dict[str, dict]:
    """Two whole iterations in a process of its own."""
    peaks = {}
    for name, (settings, rest) in jobs.items():
        side = ROWS[name][0]
        with Worker(side, options, malloc=side == "ours") as worker:
            before = worker.ask("resident")["bytes"]
            job = job_of(folder, settings, 2, 1000, **rest)
            found = worker.ask("memory", profiler=False, **job)
        peaks[name] = {"imported": before, **found}
    return peaks


def _report(speeds: dict[str, list[dict]], peaks: dict[str, dict]) -> dict:
    rows, rates, sizes = [], {}, {}
    for name, runs in speeds.items():
        each = [EPISODES / run["cpu_seconds"] for run in runs]
        rates[name] = median(each)
        sizes[name] = peaks[name]["resident_peak"] - peaks[name]["imported"]
        rows.append(
            {
                "row": name,
                "episodes/CPU s": spread(each),
                "mean response": f"{median(run['length'] for run in runs):.1f}",
                "resident peak, GiB": f"{sizes[name] / GIB:.2f}",
                "with imports, GiB": f"{peaks[name]['resident_peak'] / GIB:.2f}",
            }
        )
    show(f"{MODEL}: {EPISODES} responses of at most {SETTINGS['response_length']} tokens", rows)
    targets = []
    for name, (ours, theirs) in PAIRS.items():
        of = f"{name}: ours / TRL"
        faster, smaller = rates[ours] / rates[theirs], sizes[ours] / sizes[theirs]
        targets.append(target(f"{of}, episodes/CPU s", faster, FASTER, at_least=True))
        targets.append(target(f"{of}, resident peak", smaller, SMALLER, at_least=False))
    return {
        "model": MODEL,
        "settings": SETTINGS,
        "lora": LORA,
        "runs": speeds,
        "peaks": peaks,
        "targets": targets,
    }
