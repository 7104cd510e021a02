"""TRL's stages on the processes that torchrun started: what `trainers/test_processes.py` runs. No
test itself.

torchrun --nproc-per-node 2 trl_processes.py FOLDER
"""

import json
import sys
from pathlib import Path
from unittest.mock import patch

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

ROWS, STEPS = 16, 4
LOSSES = {  # by name: stage, what is set
    "sft": ("sft", {}),
    "reward": ("reward", {}),
    "dpo": ("dpo", {"beta": 0.5}),
    "dpo with sft": ("dpo", {"loss_type": ["sft"]}),
    "kto": ("kto", {"loss_type": "apo_zero_unpaired"}),
    "kto with its KL": ("kto", {"loss_type": "kto"}),
    "rloo": ("rloo", {}),
    "grpo": ("grpo", {"beta": 0.1}),
    "grpo, bnpo": ("grpo", {"loss_type": "bnpo"}),
}


def examples(stage: str) -> list[dict]:
    """Rows whose lengths differ from each other, so that two processes hold unlike numbers of
    tokens; of KTO a good one
    after a bad one: of a batch of one label TRL makes tensors of the default type, which is not the
    other process' then."""
    rows: list[dict] = []
    for i in range(ROWS):
        prompt = [1 + i % 9, 2 + i % 5]
        long, short = [3 + (i + k) % 9 for k in range(1 + i % 6)] + [14], [1 + i % 11, 14]
        pair = {"chosen_ids": prompt + long, "rejected_ids": prompt + short}
        rows.append(
            {
                "sft": {"input_ids": prompt + long, "completion_mask": [0, 0] + [1] * len(long)},
                "reward": pair,
                "dpo": {"prompt_ids": prompt, "chosen_ids": long, "rejected_ids": short},
                "kto": {"prompt_ids": prompt, "completion_ids": long, "label": i % 2 > 0},
            }.get(stage, {"prompt": " ".join(f"w{n}" for n in prompt)})
        )
    if stage == "kto":  # the answer of the row beside it: the same pairs in a batch of any size
        for i, row in enumerate(rows):
            row["KL_completion_ids"] = rows[i ^ 1]["completion_ids"]
    return rows


def train(name: str, ranks: int, folder: Path, rows: int = 2, passes: int | None = None) -> dict:
    """Steps of 8 rows, `rows` at once on each process. → parameters, what was logged."""
    import conftest

    from rlhf_lab.metering.meter import NoMeter
    from rlhf_lab.planning import plan
    from rlhf_lab.trainers import online, trl

    stage, settings = LOSSES[name]
    samples = stage in ("rloo", "grpo")
    passes = passes or 8 // (rows * ranks)
    if samples:
        more = {"num_generations": 2, "num_iterations": 1, "steps_per_generation": passes}
        settings = {**more, "response_length": 6, **settings}
    common = {"learning_rate": 0.05, "max_grad_norm": 0.5, "logging_steps": 1, "seed": 0}
    sizes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": passes}
    settings = {**common, **sizes, "max_steps": STEPS, "save_strategy": "no", **settings}
    args = plan(stage, "mini", **settings).config(str(folder / "unused"))
    logged, tokenizer = [], conftest.tokenizer()
    model = (conftest.reward_model if stage == "reward" else conftest.language_model)(0).double()

    def log(step, **metrics):
        logged.append({"step": step, **metrics})

    def reference():
        return conftest.language_model(0).double()

    if samples:
        scores = online.RewardFunction(
            None, tokenizer, args, meter=NoMeter(), reward_funcs=count_ones
        )
        watch = online.SamplingWatch(NoMeter(), scores, log)
        given = model, reference() if args.beta else None, tokenizer, examples(stage)
        trainer = online.online_trainer(stage, *given, args, scores, watch)
        trainer._generate_single_turn = canned if stage == "rloo" else lambda *a: (canned(*a), None)
    else:
        watch = trl.Watch(NoMeter(), log)
        given = model, tokenizer, examples(stage), []
        trainer = trl.make_trainer(stage, *given, args, [watch], reference)
    trainer.train()
    weights = {n: p.detach().flatten().tolist() for n, p in trainer.model.named_parameters()}
    return {"weights": weights, "logged": logged}


def count_ones(completion_ids, **_):
    return [float(sum(i % 3 == 1 for i in ids)) for ids in completion_ids]


def canned(prompt_ids, *_):
    """Responses that depend on the prompt and their place in its group alone: sampled ones would be
    others on another number of processes."""
    made = []
    for place, ids in enumerate(prompt_ids):
        key = sum(ids) + 7 * (place % 2)
        made.append([1 + (key * (k + 3)) % 12 for k in range(1 + key % 5)] + [14])
    return made


def run(stage: str, folder: Path, rows: int = 4, **how) -> str:
    """A whole training of the lab, of little. → its status."""
    import rlhf_lab as lab
    from rlhf_lab.data import load
    from rlhf_lab.trainers import prepare

    few = {"sft": 64, "preferences": 64, "prompts": 64, "test": 8, "test_pairs": 8}
    online = {"response_length": 8, "num_generations": 2} if stage == "grpo" else {}
    settings = {"max_steps": 4, "logging_steps": 1, "per_device_train_batch_size": rows, **online}
    plan = lab.plan(stage, "mini", seed=0, **settings)
    # For as long as it trains: a test calls this in its own process too.
    with patch.dict(load.STORY_ROWS, few), patch.object(prepare, "HELD_OUT", 8):
        return lab.train(plan, out=folder / stage, quiet=True, **how).status


def fails_everywhere() -> str:
    from rlhf_lab.launch.processes import once

    def broken():
        raise ValueError("no rows")

    try:
        once(broken)
    except ValueError as error:
        return f"{error}, {error.__notes__}"
    return ""


def main(folder: Path) -> None:
    from accelerate import PartialState

    from rlhf_lab.launch.processes import any_process

    state, output = PartialState(cpu=True), {}
    rank, ranks = state.process_index, state.num_processes
    output["error"] = fails_everywhere()
    output["asked"] = [any_process(rank == 1), any_process(False)]
    for stage in ("reward", "grpo"):
        output[stage] = run(stage, folder)
    calls = []
    # Only the second process is asked to end, and both do, after the same step.
    how = {"should_stop": lambda: calls.append(1) or rank == 1 and len(calls) >= 2}
    output["sft"] = run("sft", folder, **how)
    torch.set_default_dtype(torch.float64)
    output["equal"] = {name: train(name, ranks, folder) for name in LOSSES}
    (folder / f"{rank}.json").write_text(json.dumps(output))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
