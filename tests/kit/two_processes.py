"""PPO on the processes that torchrun started: what `test_distributed.py` runs. No test itself.

torchrun --nproc-per-node 2 two_processes.py '[{"out": FILE, "settings": …, "layout": …}, …]'
"""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

torch.set_num_threads(1)


def whole(parameter):
    """All of it, on every process."""
    if hasattr(parameter, "full_tensor"):
        return parameter.full_tensor()
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter)
    return parameter


def held(parameter):
    """What this process has of it, between passes."""
    return getattr(parameter, "_local_tensor", getattr(parameter, "ds_tensor", parameter))


def train(job: dict) -> None:
    import conftest
    from ppo_kit import PROMPTS

    from rlhf_lab.ppo import trainer as module
    from rlhf_lab.ppo.config import PPOConfig

    sharding, dtype = job["sharding"], getattr(torch, job["dtype"])
    torch.set_default_dtype(dtype)
    os.environ["ACCELERATE_USE_FSDP"] = str(sharding == "fsdp2")
    os.environ["ACCELERATE_USE_DEEPSPEED"] = str(sharding.startswith("zero"))
    os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = sharding[-1]
    layout, lora = job["layout"], None
    if layout == "adapters":
        from peft import LoraConfig

        lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    calls, logged = [], []

    def length(completions, completion_ids, **_):
        calls.append(len(completions))
        return [0.1 * len(ids) for ids in completion_ids]

    trainer = module.PPOTrainer(
        PPOConfig(**job["settings"]),
        conftest.tokenizer(),
        conftest.language_model(0).to(dtype),
        None,
        conftest.reward_model(1).to(dtype),
        [{"prompt": p} for p in PROMPTS * 2],
        conftest.reward_model(1).to(dtype) if layout == "four" else None,
        eval_dataset=[{"prompt": p} for p in PROMPTS[:5]],
        reward_funcs=length,
        peft_config=lora,
        on_log=lambda step, metrics: logged.append({"step": step, **metrics}),
        metric_funcs={"tokens": lambda completion_ids, **_: [len(i) for i in completion_ids]},
    )
    with pytest.MonkeyPatch.context() as patch:
        if job["broken"]:  # all processes work on the same rows: what a test must see
            patch.setattr(
                module, "shard_rows", lambda a, rows: rows[: len(rows) // a.num_processes]
            )
        trainer.train(resume_from_checkpoint=job["resume"])
    trained = {
        n: whole(p).detach().flatten().tolist()
        for n, p in trainer.roles.trained.named_parameters()
        if p.requires_grad
    }
    every = [p for m in vars(trainer.roles).values() if m for p in m.parameters()]
    every = {id(p): p for p in every}.values()
    rank = trainer.accelerator.process_index
    output = {
        "rank": rank,
        "ranks": trainer.accelerator.num_processes,
        "logged": logged,
        "trained": trained,
        "calls": calls,
        "seed": torch.initial_seed(),
        "numbers": sum(getattr(p, "ds_numel", p.numel()) for p in every),
        "here": sum(held(p).numel() for p in every),
    }
    Path(job["out"]).with_suffix(f".{rank}.json").write_text(json.dumps(output))


if __name__ == "__main__":
    for job in json.loads(sys.argv[1]):
        train(job)
