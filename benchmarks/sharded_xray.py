"""One rank of a 7B model under FSDP2 on eight ranks, without a GPU: memory of the real code.

    python benchmarks/sharded_xray.py

A process group of PyTorch's that sends nothing ("fake") says that there are eight ranks; tensors
are fake, so a step of 7B runs on a laptop. Model, units and optimizer are those of
`sharded_worker.py`, made by accelerate's own function; PyTorch's FSDPMemTracker follows every
tensor of rank 0 through forward and backward, with the optimizer's states there. Its peak stands
beside the plan's. The first case is one that `sharded.py` has measured in two real processes: how
far the tracker is from them. Writes benchmarks/results/sharded_xray.json.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "sharded_xray.json"
MEASURED = RESULTS.with_name("sharded.json")
TOLERANCE = 0.05
SHAPE = {"sharding": "fsdp2", "precision": "bf16", "accumulation": 1, "units": "accelerate"}
CASES = {
    "fsdp2 bf16, 2 ranks, 20M": {"model": "20M", "ranks": 2, "batch": 2, "length": 64},
    "Qwen2.5-7B, 1×1024": {"model": "Qwen/Qwen2.5-7B", "ranks": 8, "batch": 1, "length": 1024},
    "Qwen2.5-7B, 4×1024": {"model": "Qwen/Qwen2.5-7B", "ranks": 8, "batch": 4, "length": 1024},
    "Llama-2-7b, 2×1024": {
        "model": "meta-llama/Llama-2-7b-hf",
        **{"ranks": 8, "batch": 2, "length": 1024},
    },
}


def config(model: str) -> dict:
    from sharded import MODELS

    from rlhf_lab.models.load import load

    return MODELS[model] if model in MODELS else load(model).config.to_dict()


def simulated(case: dict) -> dict[str, int]:
    """Bytes of rank 0 at the peak of forward and backward, by what the tracker calls them."""
    import os
    from unittest.mock import patch

    import sharded_worker
    import torch
    import torch.distributed as dist
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp._fully_shard import _fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(case["ranks"])}
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=case["ranks"])
    mesh = init_device_mesh("cpu", (case["ranks"],))  # reads numbers, which fake tensors have not
    sharded_worker.LAYERS += ("Qwen2DecoderLayer",)
    with FakeTensorMode(), patch.object(_fully_shard, "_init_default_mesh", lambda *_: mesh):
        model = sharded_worker.accelerate_fsdp(sharded_worker.llama(case), case)
        adam = torch.optim.AdamW(sharded_worker.groups(model), lr=1e-4, fused=True)
        rows = torch.randint(case["config"]["vocab_size"], (case["batch"], case["length"]))

        def passes() -> None:
            model(input_ids=rows, labels=rows).loss.backward()

        passes()
        adam.step()
        adam.zero_grad()
        tracker = FSDPMemTracker(model, adam)
        tracker.track_inputs((rows,))
        with tracker:
            passes()
            (snapshot,) = tracker.get_tracker_snapshot("peak").values()
    return {str(kind).rpartition(".")[-1].lower(): int(size) for kind, size in snapshot.items()}


def main() -> int:
    if len(sys.argv) == 2:  # a case in a process of its own, which has one process group
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        case = json.loads(sys.argv[1])
        print("RESULT " + json.dumps(simulated({**case, "config": config(case["model"])})))
        return 0
    from sharded import MODELS, plan

    rows, wrong = {}, 0
    measured = {row["case"]: row["measured"] for row in json.loads(MEASURED.read_text())["rows"]}
    for name, given in CASES.items():
        case = {**SHAPE, **given, "zero": {}}
        command = [sys.executable, __file__, json.dumps(case)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = json.loads(said.partition("RESULT ")[2])
        MODELS[case["model"]] = config(case["model"])
        predicted = max(sum(phase.bytes.values()) for phase in plan(case).phases[:2])
        row = {"simulated": found, "predicted": predicted, "error": predicted / found["total"] - 1}
        if name in measured:
            row["measured"] = measured[name]["peak"]
            row["tracker's error"] = found["total"] / row["measured"] - 1
        wrong += abs(row["error"]) > TOLERANCE
        rows[name] = row
        print(name, {k: v for k, v in row.items() if k != "simulated"}, flush=True)
    document = {"tolerance": TOLERANCE, "cases": rows}
    document["versions"] = {p: version(p) for p in ("torch", "transformers", "accelerate")}
    RESULTS.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
