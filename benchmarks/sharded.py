"""Sharded SFT steps on this machine's CPU against their plans.

    DEEPSPEED_PYTHON=…/bin/python python benchmarks/sharded.py      # all cases, half an hour
    python benchmarks/sharded.py --only fsdp2                       # needs torch alone
    python benchmarks/sharded.py --compare                          # plan anew what was measured

Each case is a training in 2 or 4 processes (`sharded_worker.py`) of a Llama or Mixtral of 5 to 50
million random weights. DeepSpeed may live in an environment of its own, which DEEPSPEED_PYTHON
names. Compared, of the device that holds most:

    components  parameters, gradients after backward, optimizer, bucket in backward, and weights
                that are whole between forward and backward
    peak        of live tensors in the whole step, by torch's allocator
    sent        bytes of a step by collective, as called, times what a ring passes on of them

Cases run one after the other. Writes benchmarks/results/sharded.json after every case; a case that
is there is not run again, unless `--fresh`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from types import ModuleType

from rlhf_lab.cost.estimate import Estimate, estimate
from rlhf_lab.cost.hardware import hardware
from rlhf_lab.cost.phases import pass_config, policy_segments
from rlhf_lab.cost.sharding import Row, between
from rlhf_lab.cost.states import states
from rlhf_lab.display import table
from rlhf_lab.launch.accelerate_config import SIZES
from rlhf_lab.metering.collectives import ring_bytes

RESULTS = Path(__file__).parent / "results" / "sharded.json"
WORKER = Path(__file__).with_name("sharded_worker.py")
TARGETS = {"components": 0.02, "peak": 0.08, "sent": 0.05}


def _llama(hidden: int, layers: int, vocabulary: int, **more: object) -> dict[str, object]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 8 * hidden // 3 // 64 * 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "vocab_size": vocabulary,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        **more,
    }


MODELS = {
    "5M": _llama(192, 8, 4096),
    "20M": _llama(384, 8, 8192),
    "20M tied": _llama(384, 9, 12000, tie_word_embeddings=True),
    "48M": _llama(576, 9, 10000),
    "29M, 4 experts": {
        **_llama(384, 4, 4096),
        "model_type": "mixtral",
        "intermediate_size": 1024,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
}
SMALL = {"reduce_bucket_size": 2_000_000}
NARROW = {
    **SMALL,
    "stage3_prefetch_bucket_size": 500_000,
    "stage3_max_live_parameters": 10_000_000,
    "stage3_max_reuse_distance": 10_000_000,
    "stage3_param_persistence_threshold": 1_000,
}
"""DeepSpeed's defaults at a fiftieth and a hundredth: a small model meets its limits as a large one
meets the real ones."""


def cases() -> Iterator[dict[str, object]]:
    """Every scheme in both precisions on 2 and 4 processes, and what changes each of them."""

    def case(
        sharding: str, precision: str, ranks: int, model: str = "20M", **more: object
    ) -> dict[str, object]:
        shape = {"batch": 2, "length": 64, "accumulation": 1, "zero": {}, "units": "accelerate"}
        named = {"sharding": sharding, "precision": precision, "ranks": ranks, "model": model}
        return {**named, **shape, **more}

    for ranks in (2, 4):
        for sharding in ("zero1", "zero2", "zero3", "fsdp2"):
            for precision in ("fp32", "bf16"):
                yield case(sharding, precision, ranks)
    for sharding in ("zero1", "zero2", "zero3"):
        yield case(sharding, "bf16", 2, zero=SMALL)
        yield case(sharding, "fp32", 2, "5M", batch=4, accumulation=2, zero=SMALL)
    yield case("zero2", "bf16", 2, "48M", batch=4, length=128, zero=SMALL)
    yield case("zero3", "bf16", 2, zero=NARROW)
    yield case("zero3", "bf16", 2, "29M, 4 experts", zero=SMALL)
    for precision in ("fp32", "bf16"):
        yield case("fsdp2", precision, 2, units="root")
        yield case("fsdp2", precision, 2, "20M tied")
        yield case("fsdp2", precision, 2, "5M", accumulation=3)
    yield case("fsdp2", "bf16", 2, "48M", batch=4, length=128)
    yield case("fsdp2", "bf16", 2, "29M, 4 experts")
    yield case("zero2", "bf16", 4, "5M", accumulation=3, zero=SMALL)
    yield case("fsdp2", "bf16", 4, "5M", batch=8, length=128)


def name(case: dict[str, object]) -> str:
    zero = "" if not case["zero"] else ", narrow" if case["zero"] == NARROW else ", small bucket"
    units = ", one root unit" if case["units"] == "root" else ""
    times = f", {case['accumulation']} micro-batches" if case["accumulation"] != 1 else ""
    rows = (
        "" if (case["batch"], case["length"]) == (2, 64) else f", {case['batch']}×{case['length']}"
    )
    head = f"{case['sharding']} {case['precision']}, {case['ranks']} ranks, {case['model']}"
    return head + rows + times + zero + units


# ------------------------------------------------------------------------------------------ measure


def measure(worker: Path, together: list[dict[str, object]], limit: float) -> Iterator[dict]:
    """What the ranks of these cases report, one case after the other. Raises RuntimeError with the
    end of their output."""
    python = sys.executable
    if under_zero(together[0]):
        python = os.environ.get("DEEPSPEED_PYTHON", python)
    asked = [{**case, "config": MODELS[str(case["model"])]} for case in together]
    command = [python, str(worker), json.dumps(asked)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    with tempfile.TemporaryFile("w+") as log:
        with subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=log, text=True
        ) as process:
            watch = threading.Timer(limit * len(together), process.terminate)
            watch.start()
            for line in process.stdout or ():
                if line.startswith("RESULT "):
                    yield json.loads(line.removeprefix("RESULT "))
            watch.cancel()
        if process.returncode:
            log.seek(0)
            raise RuntimeError(log.read()[-3000:])


def measured(case: dict[str, object], found: dict) -> dict[str, float]:
    """Of the rank that has most: bytes by component, peak, and bytes sent."""
    ranks, n = found["ranks"], int(str(case["ranks"]))

    def most(moment: str, component: str) -> float:
        return max(rank["live"][moment][component] for rank in ranks)

    return {
        "parameters": most("backward", "parameters"),
        "gradients": most("backward", "gradients"),
        "optimizer": most("backward", "optimizer"),
        "bucket": max(rank["bucket"] for rank in ranks),
        "whole": most("forward", "whole"),
        "peak": max(max(rank["peaks"].values()) for rank in ranks),
        "sent": sent(ranks[0]["calls"], n),
    }


def sent(calls: dict[str, tuple[int, int]], processes: int) -> float:
    """Bytes that a process sends. calls: name → (number, bytes of all)."""
    return sum(ring_bytes(name, size, processes) for name, (_, size) in calls.items())


# --------------------------------------------------------------------------------------------- plan


def plan(case: dict[str, object]) -> Estimate:
    zero = {k: v for k, v in dict(case["zero"]).items() if k in SIZES}
    settings = {
        "sharding": case["sharding"],
        "gpus": case["ranks"],
        "per_device_train_batch_size": case["batch"],
        "prompt_length": 0,
        "response_length": case["length"],
        "gradient_accumulation_steps": case["accumulation"],
        "bf16": case["precision"] == "bf16",
        "loss": "plain",
        "padded": False,
        "optim": "adamw_torch_fused",
        "fsdp_units": case["units"],
        **zero,
    }
    return estimate("sft", MODELS[str(case["model"])], hardware("laptop", link=1e9), settings)


def planned(case: dict[str, object]) -> dict[str, float]:
    e = plan(case)
    s, last = e.setup, e.phases[-1].bytes
    state = states(s, s.model, "lm", trained=True)
    p = pass_config(s, s.model, s.batch, s.length, trained=True)
    row = Row(policy_segments(s, s.model, p, s.batch * s.response), state)
    return {
        "parameters": last["policy", "parameters"],
        "gradients": last["policy", "gradients"],
        "optimizer": last["policy", "optimizer"],
        "bucket": state.bucket,
        "whole": between(s, [row]),
        "peak": e.peak,
        "sent": e.untimed_ledger.total(quantity="sent"),
    }


def compared(now: dict[str, float], was: dict[str, float]) -> dict[str, dict[str, float]]:
    """Component → measured, planned and error; of what is not there, nothing."""
    return {
        part: {"measured": was[part], "planned": now[part], "error": now[part] / was[part] - 1}
        for part in was
        if max(was[part], now[part]) > 1e-4 * was["peak"]
    }


def summary(rows: list[dict]) -> list[dict[str, str]]:
    """One line for each target: how many cases, median and worst."""
    kinds = {
        "components": ("parameters", "gradients", "optimizer", "bucket", "whole"),
        "peak": ("peak",),
        "sent": ("sent",),
    }
    return worst_by_kind(rows, kinds, TARGETS)


def worst_by_kind(
    rows: list[dict], kinds: dict[str, tuple[str, ...]], targets: dict[str, float]
) -> list[dict[str, str]]:
    """A line for each kind of figure, which has these parts."""
    lines = []
    for kind, parts in kinds.items():
        found = [
            (abs(x["error"]), row["case"])
            for row in rows
            for p, x in row["parts"].items()
            if p in parts
        ]
        worst = max(found)
        lines.append(
            {
                "what": kind,
                "figures": str(len(found)),
                "target": f"{targets[kind]:.0%}",
                "median": f"{statistics.median(e for e, _ in found):.2%}",
                "worst": f"{worst[0]:.2%}",
                "missed": str(sum(e > targets[kind] for e, _ in found)),
                "worst case": worst[1],
            }
        )
    return lines


def arguments(doc: str) -> argparse.Namespace:
    """What the command line asks of measured cases."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], help="cases whose names have these words")
    parser.add_argument("--fresh", action="store_true", help="run cases that are there again")
    parser.add_argument("--compare", action="store_true", help="run none: plan anew, and compare")
    parser.add_argument("--limit", type=float, default=600, help="seconds for a case at most")
    return parser.parse_args()


def main(of: ModuleType) -> int:
    """Run the cases of a benchmark that are not there yet, plan all of them, and compare."""
    args = arguments(of.__doc__)
    known = {"versions": {}, "rows": []}
    if of.RESULTS.exists():
        known = json.loads(of.RESULTS.read_text())
    rows = {row["case"]: row for row in known["rows"]}

    def save() -> None:
        known["rows"] = [
            {"case": of.name(case), **row, "parts": compared(of.planned(case), row["measured"])}
            for case in of.cases()
            if (row := rows.get(of.name(case)))
        ]
        draft = of.RESULTS.with_suffix(".tmp")
        draft.write_text(json.dumps(known, indent=1) + "\n")
        draft.replace(of.RESULTS)

    def missing(case: dict[str, object]) -> bool:
        wanted = all(word in of.name(case) for word in args.only)
        return wanted and (args.fresh or of.name(case) not in rows)

    wanted = [] if args.compare else sorted(filter(missing, of.cases()), key=under_zero)
    groups = [list(group) for _, group in groupby(wanted, under_zero)]
    found = (one for group in groups for one in measure(of.WORKER, group, args.limit))
    for case, one in zip(wanted, found, strict=True):
        known["versions"] |= one["versions"]
        ranks = [{k: v for k, v in x.items() if "meter" not in k} for x in one["ranks"]]
        rows[of.name(case)] = {"measured": of.measured(case, one), "ranks": ranks}
        save()
        print(of.name(case), flush=True)
    save()
    for row in known["rows"]:
        print(row["case"], {k: f"{x['error']:+.2%}" for k, x in row["parts"].items()})
    lines = of.summary(known["rows"])
    print(table(lines))
    return int(any(int(line["missed"]) for line in lines))


def under_zero(case: dict[str, object]) -> bool:
    """Whether a case is DeepSpeed's: those run in a process that imports it."""
    return str(case["sharding"]).startswith("zero")


if __name__ == "__main__":
    sys.exit(main(sys.modules[__name__]))
