"""How right is the cost model? `python benchmarks/cost_accuracy.py [--only memory flops …]`

    parameters  counted from a config against transformers' own count, and peft's for LoRA
    memory      predicted peak against the simulated one, 200 cases from tiny models to 7B
    options     the same of 100 with other optimizers, layouts, critics, dropout of adapters, KTO
    measured    simulated peak against torch's profiler on real tensors, all four stages
    compiled    predicted peak with torch_compile against torch's profiler, compiled runs on a CPU
    flops       predicted against counted by operation, in the cases of `memory`
    seconds     predicted after `calibrate()` against the clock, by phase, real runs on this machine
    published   figures that others measured, against our plans of them
    serving     the same of inference (serving.py): predicted ÷ measured by kind
    peers       other estimators on the cases of `memory`
    speed       a plan, its remedies, the import, the command, the x-ray of a 7B step

Prints a table for each and writes benchmarks/results/cost_accuracy.json (sections that were not
asked for stay as they are there, and cases that were simulated before are not again, unless
`--fresh`). About 40 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import cost_cases
import plan_speed
import published
import serving

from rlhf_lab.cost.architecture import architecture
from rlhf_lab.cost.estimate import estimate
from rlhf_lab.display import format_bytes, table
from rlhf_lab.models.load import presets

RESULTS = Path(__file__).parent / "results" / "cost_accuracy.json"
DEVICE = {"cpu": "laptop", "gpu": "h200"}
sys.path.append(str(Path(__file__).parents[1] / "tests" / "kit"))  # for `real_steps`


def summary(errors: Iterable[float]) -> dict[str, float]:
    """Median and largest size of relative errors."""
    sizes = [abs(e) for e in errors]
    return {"cases": len(sizes), "median": statistics.median(sizes), "worst": max(sizes)}


# ------------------------------------------------------------------------------------- parameters


def parameters() -> dict[str, Any]:
    """Every preset and family, language and reward heads; adapters on all linear layers."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    known = {**presets(), **cost_cases.SMALL}
    rows = []
    for name, config in known.items():
        ours = architecture(config)
        for head, auto in (
            ("lm", AutoModelForCausalLM),
            ("score", AutoModelForSequenceClassification),
        ):
            more = {"num_labels": 1} if head == "score" else {}
            with torch.device("meta"):
                model = auto.from_config(AutoConfig.for_model(**{**config, **more}))
            theirs = sum(p.numel() for p in model.parameters())
            rows.append(
                {"model": name, "head": head, "ours": ours.parameters(head), "theirs": theirs}
            )
        with torch.device("meta"):
            plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
            model = get_peft_model(
                plain, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
            )
        theirs = sum(p.numel() for p in model.parameters() if p.requires_grad)
        rows.append(
            {
                "model": name,
                "head": "LoRA 16",
                "theirs": theirs,
                "ours": ours.lora_parameters(16, "all-linear"),
            }
        )
    wrong = [r for r in rows if r["ours"] != r["theirs"]]
    return {"rows": rows, "summary": {"cases": len(rows), "wrong": len(wrong)}}


# ----------------------------------------------------------------------------- memory, FLOPs, peers


def simulate(wanted: list[cost_cases.Case], known: list[dict[str, Any]]) -> Iterator[list[dict]]:
    """The cases, each planned and x-rayed: peaks in bytes, FLOPs of a step. Yields all rows so far.

    What is `known` of a case is not simulated again; it is always planned anew.
    """
    from rlhf_lab.simulate.step import simulate_step

    names = {str(case) for case in wanted}
    before = {row["case"]: row for row in known if row["case"] in names}
    rows = []
    for number, case in enumerate(wanted, 1):
        device = DEVICE[case.device]
        plan = estimate(case.stage, case.config, device, case.settings, **case.roles)
        row = before.pop(str(case), None)
        if row is None:
            start = time.perf_counter()
            seen = simulate_step(case.setup, case.config, case.roles)
            took = time.perf_counter() - start
            counted = sum(r.value for r in seen.ledger.filter(quantity="flops"))
            row = {
                "case": str(case),
                "stage": case.stage,
                "device": case.device,
                "simulated": seen.peak,
                "flops counted": counted,
                "seconds": took,
            }
        row |= {"predicted": plan.peak, "flops": plan.flops, "peak in": plan.peak_phase.name}
        rows.append(row)
        error = row["predicted"] / row["simulated"] - 1
        print(
            f"{number:4d} {error:+7.2%} {format_bytes(row['simulated']):>9} "
            f"{row['seconds']:5.1f} s  {case}",
            flush=True,
        )
        yield [*rows, *before.values()]


def memory(rows: list[dict[str, Any]]) -> dict[str, Any]:
    by_stage = {
        s: summary(r["predicted"] / r["simulated"] - 1 for r in rows if r["stage"] == s)
        for s in dict.fromkeys(r["stage"] for r in rows)
    }
    all_of_them = summary(r["predicted"] / r["simulated"] - 1 for r in rows)
    return {"rows": rows, "summary": {"all": all_of_them, **by_stage}}


def flops(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"summary": summary(r["flops"] / r["flops counted"] - 1 for r in rows)}


def peers(count: int, seed: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Other estimators on the same cases, their errors beside ours."""
    import peers as others

    out, cases = {}, cost_cases.cases(count, seed)
    for name, (version, function, covers) in others.peers().items():
        errors = []
        for case, row in zip(cases, rows, strict=True):
            estimated = function(case)
            if estimated:
                errors.append(estimated / row["simulated"] - 1)
        if errors:
            out[f"{name} {version}"] = {**summary(errors), "covers": covers}
    ours = summary(r["predicted"] / r["simulated"] - 1 for r in rows)
    return {"summary": {"rlhf_lab": ours, **out}}


# --------------------------------------------------------------------------------------- measured


def measured() -> dict[str, Any]:
    """Simulated against torch.profiler's Total Allocated on real tensors."""
    from real_steps import real_step

    from rlhf_lab.simulate.step import simulate_step

    rows = []
    for case in cost_cases.small_cases():
        seen = simulate_step(case.setup, case.config)
        real = real_step(case.setup, case.config, by="profiler")
        plan = estimate(case.stage, case.config, DEVICE[case.device], case.settings)
        rows.append(
            {
                "case": str(case),
                "simulated": seen.peak,
                "measured": real.peak,
                "predicted": plan.peak,
            }
        )
        print(f"{seen.peak / real.peak - 1:+.3%} {plan.peak / real.peak - 1:+.3%}  {case}")
    return {
        "rows": rows,
        "summary": {
            "simulated": summary(r["simulated"] / r["measured"] - 1 for r in rows),
            "predicted": summary(r["predicted"] / r["measured"] - 1 for r in rows),
        },
    }


def compiled(known: list[dict[str, Any]]) -> Iterator[list[dict]]:
    """Compiled runs: the plan against torch.profiler's Total Allocated on real tensors. Yields all
    rows so far; what is `known` is not measured again. Compiling takes half a minute a case."""
    import torch
    from real_steps import real_step

    from rlhf_lab.ppo.compiled import compiled as cached

    before = {row["case"]: row["measured"] for row in known}
    rows = []
    for case in cost_cases.compiled_cases():
        name, device = str(case), DEVICE[case.device]
        plan, plain = (
            estimate(case.stage, case.config, device, {**case.settings, "torch_compile": on})
            for on in (True, False)
        )
        if name not in before:
            torch._dynamo.reset()  # what was compiled for other lengths serves these too
            cached.cache_clear()
            before[name] = real_step(case.setup, case.config, by="profiler").peak
        seen = {"measured": before[name], "predicted": plan.peak, "without": plain.peak}
        rows.append({"case": name, "stage": case.stage, **seen})
        off = (x / before[name] - 1 for x in (plan.peak, plain.peak))
        print("{:+7.2%} (without torch_compile {:+7.2%})  ".format(*off) + name, flush=True)
        yield [*rows]


def compiled_summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "predicted": summary(r["predicted"] / r["measured"] - 1 for r in rows),
        "as without torch_compile": summary(r["without"] / r["measured"] - 1 for r in rows),
    }


# ---------------------------------------------------------------------------------------- seconds


def seconds() -> dict[str, Any]:
    """Each phase of each run: the median of its steps by the clock, against the plan's seconds."""
    from real_steps import real_step

    from rlhf_lab.metering.calibrate import calibrate

    start, rows = time.perf_counter(), []
    hw = calibrate(save=False)
    took = time.perf_counter() - start
    print(f"calibrated in {took:.1f} s: {hw.name}, {hw.source}")
    for case in cost_cases.timed_cases():
        seen = real_step(case.setup, case.config, by="clock")
        predicted: dict[str, float] = {}
        plan = estimate(case.stage, case.config, hw, case.settings)
        for (phase, _), value in plan.seconds_of.items():
            predicted[phase] = predicted.get(phase, 0.0) + value
        clock = {r.phase: r.value for r in seen.ledger.filter(quantity="seconds")}
        for phase, value in clock.items():
            times = {"measured": value, "predicted": predicted[phase]}
            rows.append({"case": str(case), "phase": phase, **times})
        error = sum(predicted[p] for p in clock) / sum(clock.values()) - 1
        print(f"{error:+7.1%} {sum(clock.values()):7.3f} s a step  {case}", flush=True)

    def errors(**where: str) -> list[float]:
        return [
            r["predicted"] / r["measured"] - 1
            for r in rows
            if all(r[k] == v for k, v in where.items())
        ]

    whole = []
    for case in dict.fromkeys(r["case"] for r in rows):
        of = [r for r in rows if r["case"] == case]
        whole.append(sum(r["predicted"] for r in of) / sum(r["measured"] for r in of) - 1)
    by_phase = {p: summary(errors(phase=p)) for p in dict.fromkeys(r["phase"] for r in rows)}
    return {
        "hardware": hw.to_dict(),
        "calibration": took,
        "rows": rows,
        "summary": {"every phase": summary(errors()), "whole steps": summary(whole), **by_phase},
    }


# -------------------------------------------------------------------------------------- published


def compare_published() -> dict[str, Any]:
    rows = [
        {**f._asdict(), "error": f.error, "kind": kind}
        for kind, figures in (("memory", published.memory()), ("time", published.time()))
        for f in figures
    ]
    return {
        "rows": rows,
        "summary": {
            kind: summary(r["error"] for r in rows if r["kind"] == kind)
            for kind in ("memory", "time")
        },
    }


def compare_serving() -> dict[str, Any]:
    """Each figure, and by kind those that constants were fitted to and the locked ones."""
    found = serving.rows()
    return {"rows": found, "summary": serving.summary(found)}


# ------------------------------------------------------------------------------------------- main

OPTION_CASES = 100
SECTIONS = (
    "parameters",
    "memory",
    "options",
    "measured",
    "compiled",
    "flops",
    "seconds",
    "published",
    "serving",
    "peers",
    "speed",
)


def run(
    only: Iterable[str], count: int, seed: int, fresh: bool, before: str | None
) -> dict[str, Any]:
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    wanted = set(only)
    if wanted & {"memory", "flops", "peers"}:
        known = found.get("memory", {}).get("rows", []) if not fresh else []
        for rows in simulate(cost_cases.cases(count, seed), known):
            found["memory"] = memory(rows)
            save(found)
        found["flops"] = flops(rows)
        if "peers" in wanted:
            found["peers"] = peers(count, seed, rows)
    if "options" in wanted:
        known = found.get("options", {}).get("rows", []) if not fresh else []
        for rows in simulate(cost_cases.option_cases(OPTION_CASES), known):
            found["options"] = memory(rows)
            found["options"]["summary"]["FLOPs"] = flops(rows)["summary"]
            save(found)
    if "compiled" in wanted:
        known = found.get("compiled", {}).get("rows", []) if not fresh else []
        for rows in compiled(known):
            found["compiled"] = {"rows": rows, "summary": compiled_summary(rows)}
            save(found)
    plain = {
        "parameters": parameters,
        "measured": measured,
        "published": compare_published,
        "serving": compare_serving,
        "seconds": seconds,
        "speed": partial(plan_speed.speed, before),
    }
    for name in wanted & plain.keys():
        found[name] = plain[name]()
    return found


def save(found: dict[str, Any]) -> None:
    """Write what is known so far: a run that is stopped goes on where it was."""
    RESULTS.parent.mkdir(exist_ok=True)
    draft = RESULTS.with_suffix(".tmp")
    draft.write_text(json.dumps(found, indent=1) + "\n")
    draft.replace(RESULTS)


def show(found: dict[str, Any], wanted: Iterable[str]) -> None:
    for name in SECTIONS:
        if name in wanted and name in found:
            summary = found[name]["summary"]
            nested = all(isinstance(v, dict) for v in summary.values())
            rows = [{"": k, **v} for k, v in summary.items()] if nested else [summary]
            print(f"\n{name}\n{table([{k: _text(v) for k, v in r.items()} for r in rows])}")


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--cases", type=int, default=208, help="cases of memory and flops")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true", help="simulate every case again")
    parser.add_argument("--before", help="a checkout of an earlier build, to time beside this one")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    found = run(args.only, args.cases, args.seed, args.fresh, args.before)
    save(found)
    show(found, args.only)


if __name__ == "__main__":
    main()
