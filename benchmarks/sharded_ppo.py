"""Sharded PPO iterations on this machine's CPU against their plans, rank by rank.

    DEEPSPEED_PYTHON=…/bin/python python benchmarks/sharded_ppo.py    # all cases
    python benchmarks/sharded_ppo.py --only fsdp2 adapters            # needs torch alone
    python benchmarks/sharded_ppo.py --compare                        # plan anew what was measured

Each case is the lab's trainer under FSDP2 or ZeRO in 2 or 4 processes (`sharded_ppo_worker.py`),
Llama of 5 million random weights in each role. DeepSpeed may live in an environment of its own,
which DEEPSPEED_PYTHON names; its buckets are as small as the model. Compared, of the process that
holds most:

    states   parameters of all roles, gradients and optimizer state, before an optimizer step
    peak     of live tensors, by torch's allocator, in the whole iteration
    rollout  the same while responses are sampled: with the weights that are gathered for it
    ledger   of the lab's own meter on each rank: peak, and its states
    sent     bytes of an iteration: every collective as called, times what a ring passes on of it;
             and the same by the meter, which counts those inside of phases

Cases run one after the other. Writes benchmarks/results/sharded_ppo.json after every case; a case
that is there is not run again, unless `--fresh`.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import sharded
from sharded import MODELS, NARROW, SIZES, SMALL, sent

from rlhf_lab.cost.estimate import Estimate, estimate
from rlhf_lab.cost.hardware import hardware

RESULTS = Path(__file__).parent / "results" / "sharded_ppo.json"
WORKER = Path(__file__).with_name("sharded_ppo_worker.py")
TARGETS = {"states": 0.02, "peak": 0.08, "rollout": 0.08, "ledger": 0.08, "sent": 0.04}
LIMITS = {"parameters": 0.02, "gradients": 0.02, "optimizer": 0.02, "peak": 0.08, "rollout": 0.08}
LIMITS |= {"sent": 0.04}
"""What a test holds the results to."""
STATES = ("parameters", "gradients", "optimizer")


def cases() -> Iterator[dict[str, object]]:
    """Each layout, and what changes the memory of each."""

    def case(ranks: int, **more: object) -> dict[str, object]:
        shape = {"batch": 2, "accumulation": 2, "prompt": 16, "response": 16}
        how = {"layout": "four", "once": True, "recomputed": False, "lora_r": 8}
        named = {"sharding": "fsdp2", "model": "5M", "ranks": ranks, "zero": {}}
        return {**named, **shape, **how, **more}

    for ranks in (2, 4):
        yield case(ranks, sharding="zero1", zero=SMALL)
        yield case(ranks, sharding="zero2", zero=SMALL)
        yield case(ranks, sharding="zero3", zero=NARROW)
    yield case(2, sharding="zero3", zero=NARROW, layout="adapters")
    yield case(2, sharding="zero3", zero=NARROW, once=False)
    yield case(2, sharding="zero2", zero=SMALL, layout="shared")

    for ranks in (2, 4):
        yield case(ranks)
        yield case(ranks, layout="adapters")
    yield case(2, once=False)
    yield case(2, layout="shared")
    yield case(2, accumulation=1, batch=4)
    yield case(2, recomputed=True, batch=4, accumulation=1, response=112)


def name(case: dict[str, object]) -> str:
    once = "" if case["once"] else ", gathered for every token"
    again = ", recomputed" if case["recomputed"] else ""
    times = f"{case['accumulation']}×" if case["accumulation"] != 1 else ""
    rows = f"{times}{case['batch']} rows of {case['prompt']}+{case['response']}"
    return f"{case['sharding']}, {case['ranks']} ranks, {case['layout']}, {rows}{once}{again}"


def measured(case: dict[str, object], found: dict) -> dict[str, float]:
    """Of the rank that has most."""
    ranks, n = found["ranks"], int(str(case["ranks"]))
    ledgers = [by_phase(rank["meter"]) for rank in ranks]
    return {
        **{part: max(rank["live"][part] for rank in ranks) for part in STATES},
        "peak": max(max(rank["peaks"].values()) for rank in ranks),
        "rollout": max(rank["peaks"]["rollout"] for rank in ranks),
        "ledger": max(max(sum(x.values()) for x in phases.values()) for phases in ledgers),
        "ledger states": max(
            sum(phases["optimizer"][part] for part in STATES) for phases in ledgers
        ),
        "sent": sent(ranks[0]["calls"], n),
        "ledger sent": max(rank["meter sent"] for rank in ranks),
    }


def by_phase(rows: list[list]) -> dict[str, dict[str, float]]:
    """Phase → component → bytes of all roles."""
    found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for _, phase, component, size in rows:
        found[phase][component] += size
    return found


def plan(case: dict[str, object]) -> Estimate:
    settings = {
        "sharding": case["sharding"],
        "gpus": case["ranks"],
        "per_device_train_batch_size": case["batch"],
        "gradient_accumulation_steps": case["accumulation"],
        "prompt_length": case["prompt"],
        "response_length": case["response"],
        "bf16": False,
        "padded": False,
        "optim": "adamw_torch_fused",
        "layout": case["layout"],
        "num_ppo_epochs": 1,
        "num_mini_batches": 1,
        "local_rollout_forward_batch_size": case["batch"],
        "ds3_gather_for_generation": case["once"],
        "gradient_checkpointing": case["recomputed"],
        **{k: v for k, v in dict(case["zero"]).items() if k in SIZES},
    }
    if case["layout"] == "adapters":
        settings |= {"lora_r": case["lora_r"], "lora_target_modules": "all-linear"}
    return estimate("ppo", MODELS[str(case["model"])], hardware("laptop", link=1e9), settings)


def planned(case: dict[str, object]) -> dict[str, float]:
    e = plan(case)
    last, rollout = e.phases[-1].bytes, e.phases[0]
    of = {part: sum(x for (_, c), x in last.items() if c == part) for part in STATES}
    return {
        **of,
        "peak": e.peak,
        "rollout": rollout.total,
        "ledger": e.peak,
        "ledger states": sum(of.values()),
        "sent": e.untimed_ledger.total(quantity="sent"),
        "ledger sent": e.untimed_ledger.total(quantity="sent"),
    }


def summary(rows: list[dict]) -> list[dict[str, str]]:
    """One line for each target: how many figures, median and worst."""
    kinds = {kind: (kind,) for kind in TARGETS} | {"states": (*STATES, "ledger states")}
    kinds |= {"sent": ("sent", "ledger sent")}
    return sharded.worst_by_kind(rows, kinds, TARGETS)


if __name__ == "__main__":
    sys.exit(sharded.main(sys.modules[__name__]))
