"""Our PPO against TRL 1.12.0's: speed, gold reward, memory; and what ours promises by itself.

    python benchmarks/ppo_vs_trl.py                        # every section, an hour and a half
    python benchmarks/ppo_vs_trl.py --only speed memory    # some of them
    python benchmarks/ppo_vs_trl.py --quick                # one short repeat of each: does it run?

    speed    episodes/s at equal work: the same four models, prompts and settings, 64 x 1 responses
             and 16 optimizer steps an iteration; 40 new tokens, and a limit of 128 that the
             responses reach half of. One process for each side, in turn: while one trains, the
             other sleeps. Warm-up iterations, loading and imports do not count.
    gold     gold reward and KL of held-out responses against training seconds (`ppo_vs_trl_gold`)
    memory   peak at equal work with a vocabulary of 50,257: by the kernel (resident set) and by
             torch's allocator, in a fresh process each
    rate     share of the machine's matrix products in the update phase (`ppo_vs_trl_rate`)
    layouts  four models, a shared trunk, adapters: gold reward, KL, memory (`ppo_vs_trl_lab`)
    real     SmolLM2-135M-Instruct (`make real`), all weights and LoRA: speed, memory
             (`ppo_vs_trl_real`)
    resume   training killed at random moments and resumed: is the curve the same?

Both sides run in float32 with the same optimizer, each with the allocator settings that it brings:
rlhf_lab sets glibc's (`launch/launcher.py`), TRL does not. Speed therefore has workers of TRL with
those settings, too, and with `torch_compile`, and ratios are to the fastest TRL. At equal work ours
does as TRL does: no gradient clipping, the score one position later. Let nothing else run
meanwhile: two trainings at once are ten times slower each. Results:
benchmarks/results/ppo_vs_trl.json, section by section; a section that is run replaces its own part.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from ppo_parity_setup import ROOT, make_world, random_world, trl_python
from ppo_vs_trl_report import (
    EQUAL,
    GIB,
    RESULTS,
    Options,
    Worker,
    job_of,
    keep,
    median,
    repository,
    show,
    show_targets,
    spread,
    target,
)

# -------------------------------------------------------------------------------------------- speed

CASES = {"equal work": {"response_length": 40}, "short responses": {"response_length": 128}}
FASTER = {"equal work": 1.3, "short responses": 1.5}
COMPILED_FASTER = {"equal work": 1.65, "short responses": 1.8}
"""The least of ours over the fastest row of TRL's, without and with `torch_compile`."""
COMPILED = {"torch_compile": True}
SIDES: dict[str, tuple[str, bool, dict]] = {
    "TRL": ("TRL", False, {}),
    "TRL, our malloc": ("TRL", True, {}),
    "TRL, torch_compile": ("TRL", True, COMPILED),
    "ours": ("ours", True, {}),
    "ours, torch_compile": ("ours", True, COMPILED),
}
"""Row of the table: side, whether glibc's allocator is set as rlhf_lab sets it, more settings."""


def speed(options: Options) -> dict:
    """Episodes a second of both sides in turn, in the same world from the same start."""
    folder = options.scratch / "speed"
    folder.mkdir()
    make_world(folder, str(options.model), 1024)
    cases: dict[str, dict] = {}
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(Worker(side, options, malloc))
            for name, (side, malloc, _) in SIDES.items()
        }
        versions = {name: w.ask("versions") for name, w in workers.items()}
        for case, more in CASES.items():
            settings = {name: EQUAL | more | own for name, (*_, own) in SIDES.items()}
            runs: dict[str, list[dict]] = {name: [] for name in workers}
            failed: dict[str, str] = {}
            for repeat in range(options.repeats):
                for name in (n for n in workers if n not in failed):
                    try:
                        found = _timed(workers[name], folder, settings[name], repeat, options)
                        runs[name].append(found)
                    except RuntimeError as error:
                        if name != "TRL, torch_compile":  # which TRL need not be able to do
                            raise
                        failed[name] = str(error).strip().splitlines()[-1]
                        print(f"{name} fails: {failed[name]}", flush=True)
            runs = {name: found for name, found in runs.items() if name not in failed}
            cases[case] = _case(case, EQUAL | more, runs, bool(cases)) | {"failed": failed}
            cases[case]["phases"] = {
                name: _phases(workers[name], folder, settings[name], options)
                for name in ("ours", "ours, torch_compile")
            }
    targets = [t for c in cases.values() for t in c.pop("targets")]
    return {"model": options.model.name, "versions": versions, "cases": cases, "targets": targets}


def _timed(worker: Worker, folder: Path, settings: dict, repeat: int, options: Options) -> dict:
    """One repeat: a fresh trainer, its warm-up, and the iterations that count."""
    job = job_of(folder, settings, options.warm_up + options.iterations, 1000 * (repeat + 1))
    found = worker.ask("train", warm_up=options.warm_up, **job)
    episodes = found["iterations"] * settings["per_device_train_batch_size"]
    counted = found["log"][options.warm_up :]
    last = counted[-max(1, len(counted) // 3) :]
    mean = {
        n: sum(line[n] for line in lines) / len(lines)
        for n, lines in (("length", counted), ("score", last), ("kl", last))
    }
    return {"episodes_per_second": episodes / found["seconds"], **found, **mean}


def _case(case: str, settings: dict, runs: dict[str, list[dict]], cached: bool) -> dict:
    """The table of a case, and its targets; `cached`: the same processes compiled for another."""
    rows, rates = [], {}
    for name, found in runs.items():
        of = {
            n: [run[n] for run in found] for n in ("episodes_per_second", "length", "score", "kl")
        }
        rates[name] = median(of["episodes_per_second"])
        rows.append(
            {
                "side": name,
                "episodes/s": spread(of["episodes_per_second"]),
                "mean response": f"{median(of['length']):.1f}",
                "score at the end": spread(of["score"]),
                "KL": spread(of["kl"]),
            }
        )
    fastest = max(rate for name, rate in rates.items() if name.startswith("TRL"))
    ratios = {n: rates[n] / fastest for n in ("ours", "ours, torch_compile")}
    compiling = compiling_of(runs, cached)
    show(f"speed, {case}: at most {settings['response_length']} new tokens", rows)
    shown = [{"what": n, "figure": f"{v:.3g}"} for n, v in compiling.items()]
    if cached:
        shown.append({"what": "compiling", "figure": "none: what was compiled before was used"})
    show("ours, torch_compile", shown)
    targets = [
        target(f"{case}: {n} / fastest TRL, episodes/s", ratios[n], least[case], at_least=True)
        for n, least in (("ours", FASTER), ("ours, torch_compile", COMPILED_FASTER))
    ]
    if case == "short responses":
        longest = max(median([r["length"] for r in found]) for found in runs.values())
        share = longest / settings["response_length"]
        targets.append(target("short responses: length / limit", share, 0.5, at_least=False))
    found = {"settings": settings, "ratios": ratios, "compiling": compiling, "runs": runs}
    return found | {"targets": targets}


def compiling_of(runs: dict[str, list[dict]], cached: bool) -> dict[str, float]:
    """An iteration over one without compiling. Unless it is `cached` from a case before: what
    compiling takes, from an empty cache and once more in the same process (the least that there
    is), and, where it takes and saves something, after how many iterations it has paid."""
    first = [run["first"] for run in runs["ours, torch_compile"]]
    seconds = first[0] - median(first[1:] or first)
    plain, fast = (
        median(run["seconds"] / run["iterations"] for run in runs[name])
        for name in ("ours", "ours, torch_compile")
    )
    found = {"iteration / without": fast / plain}
    if not cached:
        found["seconds, from an empty cache"] = seconds
        if seconds > 0 and plain > fast:
            found["break-even, iterations"] = seconds / (plain - fast)
    return found


def _phases(worker: Worker, folder: Path, settings: dict, options: Options) -> dict[str, float]:
    """Seconds of an iteration of ours by phase, from one more run with a meter."""
    count = options.warm_up + options.iterations
    found = worker.ask("phases", warm_up=options.warm_up, **job_of(folder, settings, count, 1000))
    names = dict.fromkeys(n for line in found["phases"] for n in line)
    phases = {n: median([line.get(n, 0.0) for line in found["phases"]]) for n in names}
    whole = median(found["wall"])
    rest = whole - sum(phases.values())
    phases |= {"between phases": rest}
    show(
        f"ours, an iteration of {whole:.3f} s by phase",
        [
            {"phase": n, "seconds": f"{s:.3f}", "share": f"{s / whole:.0%}"}
            for n, s in phases.items()
        ],
    )
    return phases


# ------------------------------------------------------------------------------------------- memory

VOCABULARY = 50_257
LARGE = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 688,
    "vocab_size": VOCABULARY,
}
FACTOR = 0.5


def sized_world(folder: Path, prompts: int, **sizes) -> None:
    """`random_world` with models of other sizes; its prompts have 3 to 20 tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    folder.mkdir()
    random_world(folder, prompts)
    config = LlamaConfig(
        num_labels=1,
        max_position_embeddings=128,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        tie_word_embeddings=True,
        **sizes,
    )
    torch.manual_seed(0)
    for roles, made in (
        (("policy", "ref"), LlamaForCausalLM),
        (("reward", "value"), LlamaForSequenceClassification),
    ):
        model = made(config)
        for role in roles:
            model.save_pretrained(folder / role)


def memory(options: Options) -> dict:
    """Peak memory of two whole iterations: the second has the optimizer's state there."""
    folder = options.scratch / "memory"
    sized_world(folder, 256, **LARGE)
    weights = sum(f.stat().st_size for f in folder.glob("*/model.safetensors"))
    job = job_of(folder, EQUAL, 2, 1000)
    runs: dict[str, list[dict]] = {"TRL": [], "ours": []}
    for profiler in (*[False] * options.repeats, True):
        for side, found in runs.items():
            with Worker(side, options, malloc=side == "ours") as worker:
                answer = worker.ask("memory", profiler=profiler, **job)
            found.append({"profiler": profiler, **answer})
    return _memory_report(weights, runs)


def _memory_report(weights: int, runs: dict[str, list[dict]]) -> dict:
    rows, ratios = [], {}
    for profiler, witness in ((False, "resident set"), (True, "torch's allocator")):
        whole, bare = {}, {}
        for side, found in runs.items():
            growth = median([r["growth"] for r in found if r["profiler"] is profiler])
            whole[side] = growth + weights
            bare[side] = growth - median([r["state"] for r in found])
            rows.append(
                {
                    "witness": witness,
                    "side": side,
                    "peak, GiB": f"{whole[side] / GIB:.2f}",
                    "of it weights": f"{weights / GIB:.2f}",
                    "optimizer state": f"{(growth - bare[side]) / GIB:.2f}",
                    "everything else": f"{bare[side] / GIB:.2f}",
                }
            )
        for name, of in (("peak", whole), ("peak less weights and optimizer state", bare)):
            ratios[f"{name}, {witness}"] = of["ours"] / of["TRL"]
    show(f"memory: vocabulary {VOCABULARY:,}, 64 responses of 40 tokens", rows)
    show("ours / TRL", [{"": n, "ratio": f"{r:.3f}"} for n, r in ratios.items()])
    targets = [
        target(f"ours / TRL, {n}", r, FACTOR, at_least=False)
        for n, r in ratios.items()
        if n.startswith("peak, ")
    ]
    return {
        "model": LARGE,
        "settings": EQUAL,
        "weights": weights,
        "runs": runs,
        "ratios": ratios,
        "targets": targets,
    }


# ------------------------------------------------------------------------------------- command line


def sections() -> dict:
    """Sections by name, in the order in which they run."""
    import ppo_vs_trl_gold
    import ppo_vs_trl_lab
    import ppo_vs_trl_rate
    import ppo_vs_trl_real

    return {
        "speed": speed,
        "gold": ppo_vs_trl_gold.gold,
        "memory": memory,
        "rate": ppo_vs_trl_rate.rate,
        "layouts": ppo_vs_trl_lab.layouts,
        "resume": ppo_vs_trl_lab.resume,
        "real": ppo_vs_trl_real.real,
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    known = ("speed", "gold", "memory", "rate", "layouts", "resume", "real")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=known,
        default=known,
        metavar="SECTION",
        help=f"of {', '.join(known)}",
    )
    parser.add_argument("--repeats", type=int, default=5, help="of every measurement [5]")
    parser.add_argument("--iterations", type=int, default=10, help="of a repeat of speed [10]")
    parser.add_argument("--threads", type=int, default=2, help="torch threads of a worker [2]")
    parser.add_argument(
        "--budget",
        type=float,
        default=90,
        help="gold: TRL's seconds of training; ours has half [90]",
    )
    parser.add_argument("--seeds", type=int, default=5, help="layouts: seeds of each [5]")
    parser.add_argument("--kills", type=int, default=20, help="resume: trainings to kill [20]")
    parser.add_argument(
        "--model",
        type=Path,
        default=ROOT / "small_models" / "tiny",
        help="folder with sft/ and reward/",
    )
    parser.add_argument(
        "--quick", action="store_true", help="one short repeat of everything: does it run?"
    )
    parser.add_argument("--trl-python", type=Path, help="an interpreter that has TRL 1.12.0")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the numbers go")
    args = parser.parse_args()
    if args.quick:
        args.repeats, args.iterations, args.seeds, args.kills = 1, 2, 1, 1
        args.budget = min(args.budget, 20)
    return args


def main() -> int:
    """Exit status 1 when a target is missed."""
    args = arguments()
    os.environ["HF_HUB_OFFLINE"], os.environ["CUDA_VISIBLE_DEVICES"] = "1", ""
    python = args.trl_python or trl_python()
    repository()
    from transformers.utils import logging

    logging.disable_progress_bar()
    if (load := os.getloadavg()[0]) > 0.5:
        print(f"the machine is busy (load {load:.1f}): what is timed now is not to be trusted")
    met = True
    for name, section in sections().items():
        if name not in args.only:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            options = Options(
                python,
                args.model,
                args.repeats,
                args.iterations,
                args.threads,
                args.budget,
                args.quick,
                args.kills,
                args.seeds,
                Path(scratch),
            )
            found = section(options)
            if picture := found.pop("picture", None):
                args.out.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(picture, args.out.with_name(f"{args.out.stem}_{name}.svg"))
        show_targets(found)
        keep(args.out, name, found, options)
        met &= all(t["met"] for t in found.get("targets", []))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
