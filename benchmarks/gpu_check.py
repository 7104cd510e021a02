# ruff: noqa: E402
"""Do the plans hold on this machine's GPU? `python benchmarks/gpu_check.py [--minutes 9]`

Random models of 0.5B to 7B take real steps of SFT, reward, DPO and PPO, whole and with LoRA, in
bf16: memory (the CUDA allocator's), FLOPs (counted by operation) and seconds of each phase, against
the plan with the figures that `calibrate` finds here. Needs torch and transformers; accelerate for
PPO, peft for LoRA. Without a GPU tiny models run in fp32; memory is that of tensors, exactly.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import sys
import time
import traceback
import warnings
from collections import Counter, defaultdict
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

BEGAN = time.perf_counter()
sys.path.append(str(Path(__file__).resolve().parents[1]))  # where rlhf_lab is not installed

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from rlhf_lab.cost.estimate import Estimate, estimate
from rlhf_lab.cost.hardware import Hardware
from rlhf_lab.display import format_bytes, format_number, format_seconds, table
from rlhf_lab.metering.calibrate import calibrate
from rlhf_lab.metering.memory_tracker import GPU_BLOCK
from rlhf_lab.metering.meter import NoMeter
from rlhf_lab.models.load import presets
from rlhf_lab.simulate.account import StepAccount
from rlhf_lab.simulate.xray import fused_silu

HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STAGES = ("sft", "reward", "dpo", "ppo")
WORDING = {
    "bytes": format_bytes,
    "seconds": format_seconds,
    "flops": lambda value: format_number(value, "FLOP"),
}
HALF = "Qwen/Qwen2.5-0.5B"
ROUNDS = (  # model, LoRA rank, most rows (PPO: twice as many), tokens of a row (PPO: 256)
    (HALF, 0, 16, 512),
    (HALF, 16, 16, 512),
    ("meta-llama/Llama-2-7b-hf", 16, 8, 512),
    ("meta-llama/Llama-3.2-1B", 0, 16, 512),
    ("meta-llama/Llama-2-7b-hf", 0, 2, 512),
    ("meta-llama/Llama-3.2-3B", 16, 8, 512),
    ("meta-llama/Llama-3.2-3B", 0, 4, 512),
    ("Qwen/Qwen2.5-1.5B", 0, 4, 1024),
    ("Qwen/Qwen2.5-7B", 16, 2, 1024),
    (HALF, 0, 2, 256),
)
TINY = {
    "model_type": "llama",
    "vocab_size": 2000,
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
PPO = {"num_ppo_epochs": 2, "num_mini_batches": 1, "optim": "adamw_torch_fused"}
ROOM = 0.85  # share of the device's memory that a case may need: allocators do not use all of it
RATE = 1e-8  # learning rate: random weights that move may come to sample from NaN


@dataclass(frozen=True)
class Case:
    """A step of a stage; `batch` in sequences or pairs, lengths of every row (no padding)."""

    stage: str
    model: str = "tiny"
    lora_r: int = 0
    batch: int = 4
    prompt: int = 32
    response: int = 32
    dtype: str = "float32"

    @property
    def config(self) -> dict[str, Any]:
        return {**presets().get(self.model, TINY), "pad_token_id": 0}

    @property
    def critic(self) -> dict[str, Any]:
        """The reward model's; PPO's, and its value model's, are small but read the same tokens."""
        base = presets()[HALF] if self.stage == "ppo" and self.model in presets() else self.config
        return {**base, "num_labels": 1, "pad_token_id": 0, "vocab_size": self.config["vocab_size"]}

    def plan(self, hw: Hardware) -> Estimate:
        settings = PPO | {
            "per_device_train_batch_size": self.batch,
            "prompt_length": self.prompt,
            "response_length": self.response,
            "dtype": self.dtype,
            "lora_r": self.lora_r,
            "padded": False,
            "loss": "plain",
        }
        critics = {"reward": self.critic, "value": self.critic}
        return estimate(self.stage, self.config, hw, settings, **critics)

    def __str__(self) -> str:
        trained = f"LoRA {self.lora_r}" if self.lora_r else "full"
        return (
            f"{self.stage} {self.model.split('/')[-1]} {trained} {self.dtype} "
            f"{self.batch}×({self.prompt}+{self.response})"
        )


def cases(hw: Hardware) -> list[Case]:
    """Every stage early, then other sizes; a batch is halved until it fits."""
    if hw.kind != "gpu":
        return [Case(stage, lora_r=r) for r in (0, 8) for stage in STAGES]
    made, dtype = [], "bfloat16" if "bf16" in hw.flops else "float32"
    for name, rank, batch, length in ROUNDS:
        for stage in STAGES:
            rows, half = (2 * batch, 128) if stage == "ppo" else (batch, length // 2)
            case = Case(stage, name, rank, rows, half, half, dtype)
            while case.batch > 1 and case.plan(hw).peak > ROOM * hw.memory:
                case = replace(case, batch=case.batch // 2)
            made.append(case)
    return made


class Probe(NoMeter):
    """Of each step seconds by phase, `laps`, and most bytes, `peaks`; or phases for `tracker`."""

    def __init__(self):
        super().__init__()
        self.tracker, self.laps, self.peaks = None, [], Counter()

    def synchronize(self, *phase: str) -> float:
        """Wait for the device; → the time. Peaks since the last call are kept for `phase`."""
        if HERE.type == "cpu":
            return time.perf_counter()
        torch.cuda.synchronize()
        now, peak = time.perf_counter(), torch.cuda.max_memory_allocated()
        for name in ("step", *phase):
            self.peaks[name] = max(self.peaks[name], peak)
        torch.cuda.reset_peak_memory_stats()
        return now

    @contextmanager
    def phase(self, name: str, role: str = "", *_: Any, **__: Any):
        """A phase of the step; the arguments are those of a meter."""
        if self.tracker is not None:
            self.tracker.enter(name, role)
            yield
        else:
            self.synchronize()
            start = time.perf_counter()
            yield
            self.laps[-1][name] += self.synchronize(name) - start


def make(case: Case, critic: bool = False, adapters: bool = False) -> torch.nn.Module:
    """A model of random weights, made where it runs."""
    auto = "AutoModelForSequenceClassification" if critic else "AutoModelForCausalLM"
    config = transformers.AutoConfig.for_model(**(case.critic if critic else case.config))
    name = "dtype" if hasattr(config, "dtype") else "torch_dtype"  # before transformers 4.56
    with HERE:
        model = getattr(transformers, auto).from_config(
            config, attn_implementation="sdpa", **{name: getattr(torch, case.dtype)}
        )
    model = model.to(HERE).train()
    if adapters and case.lora_r:
        from peft import LoraConfig, get_peft_model

        kind = "SEQ_CLS" if critic else "CAUSAL_LM"  # peft trains the score head whole
        lora = LoraConfig(task_type=kind, r=case.lora_r, target_modules="all-linear")
        model = get_peft_model(model, lora)
    return model


def plain(case: Case, probe: Probe) -> tuple:
    """SFT, reward and DPO, written out: logits whole, AdamW fused. → what `measured` takes."""
    is_sft, is_reward, is_dpo = (case.stage == stage for stage in STAGES[:3])
    model = make(case, is_reward, adapters=True)
    reference = make(case).requires_grad_(False) if is_dpo and not case.lora_r else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)
    rows = case.batch if is_sft else 2 * case.batch
    ids = torch.randint(2, TINY["vocab_size"], (rows, case.prompt + case.response)).to(HERE)
    following = F.pad(ids[:, 1:], (0, 1), value=-100).flatten()

    def better(scores: Tensor) -> Tensor:
        chosen, rejected = scores.float().chunk(2)
        return -F.logsigmoid(chosen - rejected).mean()

    def logprobs(logits: Tensor) -> Tensor:
        rows = logits.float().view(-1, logits.shape[-1])
        return -F.cross_entropy(rows, following, reduction="none").view(ids.shape).sum(1)

    def step() -> None:
        with probe.phase("forward", "policy"):
            out = model(input_ids=ids, use_cache=False, **({"labels": ids} if is_sft else {}))
            loss = out.loss if is_sft else better(out.logits) if is_reward else logprobs(out.logits)
        if is_dpo:
            with probe.phase("reference", "reference"), torch.no_grad():
                with model.disable_adapter() if case.lora_r else nullcontext():
                    theirs = logprobs(reference(input_ids=ids, use_cache=False).logits)
            loss = better(0.1 * (loss - theirs))
        del out  # trainers keep the logits until here, for their metrics
        with probe.phase("backward", "policy"):
            loss.backward()
        with probe.phase("optimizer", "policy"):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step, [model, reference], optimizer, [ids, following]


def ppo(case: Case, probe: Probe) -> tuple:
    """Iterations of the lab's own trainer, as `plain`."""
    from rlhf_lab.ppo.config import PPOConfig
    from rlhf_lab.ppo.trainer import PPOTrainer

    args = PPOConfig(
        output_dir="nowhere",
        per_device_train_batch_size=case.batch,
        learning_rate=RATE,
        response_length=case.response,
        stop_token=None,
        temperature=1.0,
        bf16=False,
        use_cpu=HERE.type == "cpu",
        report_to="none",
        save_strategy="no",
        **PPO,
    )
    models = [make(case, adapters=True), make(case), make(case, True), make(case, True)]
    rows = [{"input_ids": [5] * case.prompt}] * case.batch
    ids = argparse.Namespace(pad_token_id=0, eos_token_id=1)
    trainer = PPOTrainer(args, ids, *models[:3], rows, models[3], meter=probe)
    return (
        lambda: trainer.update(*trainer.make_rollout(trainer.next_prompts(0), 0, 0.05)[:2], 0),
        models,
        trainer.optimizer,
        [],
    )


def predicted(plan: Estimate) -> dict[str, dict[str, float]]:
    """What a plan predicts of a "step", and of each phase of it."""
    figures = {"step": {"bytes": plan.peak, "flops": plan.flops, "seconds": plan.step_seconds}}
    for f in plan.phases:
        phase = figures.setdefault(f.name, dict.fromkeys(WORDING, 0.0))
        phase["bytes"] = max(phase["bytes"], f.total)
        phase["flops"] += f.work.flops * f.times
    for (name, _), spent in plan.seconds_of.items():
        figures[name]["seconds"] += spent
    return figures


def measured(case: Case, end: float, row: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """The same, after a step to warm up: up to three by the clock, one under a tracker."""
    probe, gpu = Probe(), HERE.type == "cuda"
    step, models, optimizer, held = (ppo if case.stage == "ppo" else plain)(case, probe)
    for number in range(4):
        if number == 1:  # the first was to warm up
            probe.laps, probe.peaks = [], Counter()
        if number < 2 or time.perf_counter() < end:
            probe.laps.append(Counter(step=-probe.synchronize()))
            step()
            probe.laps[-1]["step"] += probe.synchronize()
    held += [t for m in models for t in (*m.parameters(), *m.buffers())]
    held += [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
    tracker = probe.tracker = StepAccount(GPU_BLOCK if gpu else 1)
    tracker.own("", "", held)
    flops, tensors = {}, {}
    try:
        with fused_silu(), tracker:
            step()
        flops = {name: n for (name, _), n in tracker.flops.items()}
        tensors = {name: sum(parts.values()) for (name, _), parts in tracker.peaks.items()}
        flops["step"], tensors["step"] = sum(flops.values()), tracker.peak
    except Exception as error:  # seconds and the allocator's bytes are worth having
        row["result"] = f"not counted: {error!r}"[:300]
    most = probe.peaks if gpu else tensors
    return {
        name: {
            "bytes": most.get(name),
            "tensors": tensors.get(name),
            "flops": flops.get(name),
            "seconds": median(lap[name] for lap in probe.laps),
        }
        for name in probe.laps[0]
    }


def run_case(case: Case, hw: Hardware, end: float) -> dict[str, Any]:
    """One case as a row: predicted, measured, errors by phase; or why it was left out."""
    plan = case.plan(hw)
    row = {"case": str(case), **vars(case), "result": "", "predicted": predicted(plan)}
    row["allocated before"] = torch.cuda.memory_allocated()  # 0 without a GPU
    need = (30 if case.stage == "ppo" else 10) + 7 * plan.step_seconds
    wanted = ["peft"] * bool(case.lora_r) + ["accelerate"] * (case.stage == "ppo")
    why = [f"{name} is not installed" for name in wanted if not find_spec(name)]
    why += [f"needs {format_bytes(plan.peak)}"] * (plan.peak > ROOM * hw.memory)
    why += [f"no time left for about {need:.0f} s"] * (time.perf_counter() + need > end)
    if why:
        return row | {"result": f"skipped: {', '.join(why)}"}
    try:
        found = row["measured"] = measured(case, end, row)
        row["errors"] = {
            name: {q: v / found[name][q] - 1 for q, v in figures.items() if v and found[name][q]}
            for name, figures in row["predicted"].items()
            if name in found
        }
    except Exception as error:  # out of memory, or what the libraries here do not know
        row["result"] = f"FAILED: {error!r}"[:300]
        traceback.print_exc(limit=-3)
    return row


def show(row: dict[str, Any]) -> str:
    """A case as a table: step and phases, predicted → measured."""
    lines = [{"phase": name} for name in row.get("errors", ())]
    for line in lines:
        predicted, found, off = (row[k][line["phase"]] for k in ("predicted", "measured", "errors"))
        for q, wording in WORDING.items():
            line[q] = f"{wording(predicted[q])} → {wording(found[q])}"
            line[f"{q} "] = f"{off[q]:+.1%}" if q in off else "–"
    return f"{row['case']} {row['result']}" + (f"\n{table(lines)}" if lines else "")


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Sizes of the relative errors of steps, in all and by stage, and of single phases."""
    sizes: dict[str, Any] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for name, off in row.get("errors", {}).items():
            for kind in ("steps", row["stage"]) if name == "step" else ("phases",):
                for q, error in off.items():
                    sizes[kind][q].append(abs(error))
    return {
        kind: {q: {"cases": len(s), "median": median(s), "worst": max(s)} for q, s in of.items()}
        for kind, of in sizes.items()
    }


def check(hw: Hardware, selected: list[Case], end: float, out: Path) -> dict[str, Any]:
    """Run the cases until `end` (of perf_counter); the file is written after each."""
    names = ("torch", "transformers", "accelerate", "peft")
    found = {
        "device": hw.name,
        "python": sys.version.split()[0],
        "cuda": torch.version.cuda,
        "versions": {n: version(n) for n in names if find_spec(n)},
        "hardware": hw.to_dict(),
        "summary": {},
        "rows": [],
    }
    for case in selected:
        found["rows"].append(run_case(case, hw, end))
        gc.collect()  # trainers hold themselves in circles
        torch.cuda.empty_cache()  # does nothing without a GPU
        print(f"\n[{time.perf_counter() - BEGAN:.0f} s] {show(found['rows'][-1])}", flush=True)
        found["summary"] = summary(found["rows"])
        out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9, help="all of it, calibration included")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    hw = calibrate(save=False, seconds=20 if HERE.type == "cuda" else 8)
    print(f"{hw.name}: {hw.flops} FLOP/s, {hw.bandwidth:.3g} B/s, {hw.op_seconds:.2g} s an op")
    args.out.mkdir(parents=True, exist_ok=True)
    out = args.out / f"gpu_check-{re.sub('[^A-Za-z0-9]+', '-', hw.name)}.json"
    selected = [case for case in cases(hw) if args.only in str(case)]
    found = check(hw, selected, BEGAN + 60 * args.minutes, out)
    rows = [
        {
            "errors of": kind,
            **{
                q: f"{e['median']:.1%}, worst {e['worst']:.1%} of {e['cases']}"
                for q, e in of.items()
            },
        }
        for kind, of in found["summary"].items()
    ]
    print(f"\n{table(rows)}\n{out}")


if __name__ == "__main__":
    main()
