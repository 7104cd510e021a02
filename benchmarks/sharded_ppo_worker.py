"""Sharded PPO iterations on a CPU: what is live on each rank, what it sends. Started by
`sharded_ppo.py`.

    python benchmarks/sharded_ppo_worker.py '[{"ranks": 2, "layout": "four", …}, …]'

The lab's own trainer on models of random weights, prompts and responses of one length. One
iteration makes optimizer states; the next is looked at by torch's profiler (the allocator's peak in
every phase) and a dispatch mode (every collective with its payload). What is live before an
optimizer step is told apart by the names that FSDP2 and DeepSpeed give their tensors. Rank 0 prints
a line of JSON for each case, with the figures of all ranks.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from sharded_worker import (
    Sent,
    events,
    fsdp_parts,
    in_ranks,
    join,
    live_bytes,
    report,
    storage_bytes,
    zero_parts,
)
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_lab.metering.meter import Meter, NoMeter
from rlhf_lab.models.load import load
from rlhf_lab.ppo.config import PPOConfig
from rlhf_lab.ppo.sharding import FullyShard
from rlhf_lab.ppo.trainer import PPOTrainer

PHASE = "phase: "


class Phases(NoMeter):
    """Marks the trainer's phases for the profiler."""

    @contextmanager
    def phase(self, phase: str, *_: object, **__: object):
        with record_function(PHASE + phase):
            yield


def trainer_of(case: dict, folder: str, meter: Meter) -> PPOTrainer:
    """The trainer of a case, on models of random weights."""
    config = AutoConfig.for_model(**case["config"], pad_token_id=0)
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_config(config)
    critics = []
    for _ in range(2 if case["layout"] == "four" else 1):
        config = AutoConfig.for_model(**case["config"], pad_token_id=0, num_labels=1)
        critics.append(AutoModelForSequenceClassification.from_config(config))
    lora, reward = None, critics[0]
    if case["layout"] == "adapters":
        from peft import LoraConfig

        lora = LoraConfig("CAUSAL_LM", r=case["lora_r"], target_modules="all-linear")
        reward = LoraConfig("SEQ_CLS", r=case["lora_r"], target_modules="all-linear")
    batch = case["batch"]
    args = PPOConfig(
        output_dir=folder,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=case["accumulation"],
        max_steps=2,
        layout=case["layout"],
        response_length=case["response"],
        stop_token=None,
        temperature=1.0,
        num_ppo_epochs=1,
        local_rollout_forward_batch_size=batch,
        report_to="none",
        save_strategy="no",
        optim="adamw_torch_fused",
        max_kl_per_token=None,
        use_cpu=True,
        ds3_gather_for_generation=case["once"],
        activation_checkpointing=case["recomputed"],
    )
    rows = batch * case["accumulation"] * case["ranks"] * 2
    return PPOTrainer(
        args,
        load("tiny").tokenizer,
        policy,
        None,
        reward,
        [{"input_ids": [5] * case["prompt"]}] * rows,
        critics[1] if case["layout"] == "four" else None,
        peft_config=lora,
        meter=meter,
    )


def components(trainer: PPOTrainer) -> dict[str, int]:
    """Bytes of this rank by component, of all roles."""
    if isinstance(trainer.sharding, FullyShard):
        roots = nn.ModuleList(trainer.sharding.roots)
        parts = fsdp_parts(SimpleNamespace(model=roots, optimizer=trainer.optimizer))
    else:
        parts = zero_parts(SimpleNamespace(model=trainer.model))
        for role in (trainer.reference, trainer.reward_model):
            parts["parameters"] += [getattr(p, "ds_tensor", p) for p in role.parameters()]
    seen: set[int] = set()
    return {name: storage_bytes(tensors, seen) for name, tensors in parts.items()}


def peaks(profiler: profile) -> dict[str, int]:
    """Highest bytes above the start in each phase."""
    seen = list(events(profiler))
    spans = sorted(
        (event.start_time_ns, event.end_time_ns, event.name.removeprefix(PHASE))
        for event, _ in seen
        if event.name.startswith(PHASE)
    )
    found: dict[str, int] = {}
    at = 0
    for time_ns, now in live_bytes(seen):
        while at < len(spans) and spans[at][1] < time_ns:
            at += 1
        if at < len(spans) and spans[at][0] <= time_ns:
            name = spans[at][2]
            found[name] = max(found.get(name, 0), now)
    return found


def look(case: dict) -> dict:
    """An iteration to settle, and one that is looked at."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(case, folder, Phases("ppo"))
        trainer.iterate(0)
        gc.collect()
        there = (x for x in gc.get_objects() if isinstance(x, Tensor))
        start, live = storage_bytes(there, set()), dict[str, int]()
        inside = getattr(trainer.sharding, "zero", trainer.optimizer)  # DeepSpeed steps by itself
        step = inside.step

        def looked(*args: object, **kwargs: object) -> object:
            live.update(live or components(trainer))
            return step(*args, **kwargs)

        inside.step = looked
        with (
            Sent() as sent,
            profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
        ):
            trainer.iterate(1)
        above = peaks(profiler)
    calls = {k: [len(v), sum(v)] for k, v in sent.calls.items()}
    return {"live": live, "peaks": {k: start + v for k, v in above.items()}, "calls": calls}


def measured_by_meter(case: dict) -> dict[str, object]:
    """What the lab's meter says of this rank: role, phase, component, bytes; and bytes sent in an
    iteration."""
    with tempfile.TemporaryDirectory() as folder:
        meter = Meter("ppo", flops=False)
        trainer = trainer_of(case, folder, meter)
        trainer.train()
    ledger = meter.ledger()
    rows = [
        [row.role, row.phase, row.component, row.value] for row in ledger.filter(quantity="bytes")
    ]
    return {"meter": rows, "meter sent": ledger.total(quantity="sent") / trainer.state.max_steps}


def run(case: dict, rank: int, port: int) -> None:
    """One rank of one case."""
    join(case, rank, port)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    zero = case["sharding"].startswith("zero")
    os.environ[f"ACCELERATE_USE_{'DEEPSPEED' if zero else 'FSDP'}"] = "true"
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump({"zero_optimization": {"stage": int(case["sharding"][-1]), **case["zero"]}}, file)
        file.flush()
        if zero:
            os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = file.name
        found = look(case)
        gc.collect()
        found |= measured_by_meter(case)
    report(case, found)


if __name__ == "__main__":
    sys.exit(in_ranks(run))
