"""The meter in TRL's and transformers' own trainers: nothing missed, nothing counted twice."""

import pytest
import torch
import trl

from rlhf_lab.metering.callback import MeterCallback
from rlhf_lab.metering.flop_counter import FlopCounter
from rlhf_lab.metering.meter import Meter, NoMeter

PLAIN = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
}


def rows(count: int = 22) -> list[dict]:
    """Preferences of different lengths; the last batch is smaller."""
    return [
        {
            "prompt_ids": [1, 2, 3][: 1 + i % 3],
            "chosen_ids": [4] * (1 + i % 7) + [14],
            "rejected_ids": [5, 6] * (1 + i % 4) + [14],
        }
        for i in range(count)
    ]


def trainer(stage, tiny, tmp_path, meter, lora=False, **settings):
    """One of TRL's trainers on tiny models, metered."""
    from peft import LoraConfig, get_peft_model

    from rlhf_lab.trainers.trl import Watch, make_trainer

    config = {"sft": trl.SFTConfig, "reward": trl.RewardConfig, "dpo": trl.DPOConfig}[stage]
    args = config(output_dir=str(tmp_path), **{**PLAIN, "num_train_epochs": 2, **settings})
    model = tiny.rm(1) if stage == "reward" else tiny.lm(0)
    if stage == "dpo" and not lora:  # TRL loads the reference from where the model came from
        model.save_pretrained(tmp_path / "model")
        model = type(model).from_pretrained(tmp_path / "model")
    if lora:
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    train = rows()
    if stage == "sft":
        train = [
            {
                "input_ids": r["prompt_ids"] + r["chosen_ids"],
                "completion_mask": [0] * len(r["prompt_ids"]) + [1] * len(r["chosen_ids"]),
            }
            for r in train
        ]
    if stage == "reward":
        train = [{k: r["prompt_ids"] + r[k] for k in ("chosen_ids", "rejected_ids")} for r in train]
    watch = [Watch(meter)]
    return make_trainer(stage, model, tiny.tokenizer(), train, train[:4], args, watch)


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        ("sft", {}),
        ("sft", {"gradient_accumulation_steps": 2}),
        ("sft", {"lora": True}),
        ("reward", {}),
        ("dpo", {}),
        ("dpo", {"lora": True}),
    ],
)
def test_flops_of_a_whole_run_equal_counting_every_step(stage, settings, tiny, tmp_path):
    meter = Meter(stage)
    made = trainer(stage, tiny, tmp_path, meter, **settings)
    with FlopCounter() as every:
        made.train()
    assert sum(meter.flops.values()) == every.total > 0
    role = "reward" if stage == "reward" else "policy"
    expected = {("forward", role), ("backward", role)}
    if stage == "dpo":
        expected.add(("reference", "reference"))
        assert meter.flops["reference", "reference"] > 0
        tokens = meter.tokens
        assert tokens["reference", "reference"] == tokens["forward", role] > 0
    assert set(meter.flops) == expected
    assert set(meter.seconds) == expected | {("optimizer", role)}
    assert max(fit.counted for fits in meter._passes.fits.values() for fit in fits.values()) <= 5
    if stage == "dpo" and not settings:  # the same model, frozen: the same forward pass
        assert meter.flops["reference", "reference"] == meter.flops["forward", "policy"]


@pytest.mark.parametrize("lora", [False, True])
def test_dpo_holds_a_reference_unless_it_trains_adapters(lora, tiny, tmp_path):
    meter = Meter("dpo")
    made = trainer("dpo", tiny, tmp_path, meter, lora=lora)
    made.train()
    parts = meter.ledger().pivot("role", "component", quantity="bytes", phase="reference")
    size = 4 * sum(p.numel() for p in tiny.lm(0).parameters())
    assert parts["reference"]["activations"] > 0
    assert parts["reference"].get("parameters", 0) == pytest.approx(0 if lora else size, rel=0.01)
    assert parts["policy"]["activations"] > 0  # its graph waits while the reference runs
    trained = 4 * sum(p.numel() for p in made.model.parameters() if p.requires_grad)
    assert parts["policy"]["optimizer"] == pytest.approx(2 * trained, rel=0.05)


@pytest.mark.parametrize("lora", [False, True])
def test_what_trls_fused_head_makes_is_logits(lora, tiny, tmp_path):
    """It calls no module, so no hook sees it: a tile of one row for each token of the batch."""
    from trl.kernels import ChunkedLogProbFunction as Head

    before = vars(Head)["forward"], vars(Head)["backward"]
    meter = Meter("sft")
    trainer("sft", tiny, tmp_path, meter, lora=lora, max_steps=3).train()
    for phase in ("forward", "backward"):
        parts = meter.ledger().pivot("role", "component", quantity="bytes", phase=phase)
        # Tiles are as wide as the vocabulary, and as 32,768 columns at most, in fp32.
        assert parts["policy"]["logits"] > 32_768 * 4
        assert parts["policy"]["activations"] < 32_768 * 4
    assert (vars(Head)["forward"], vars(Head)["backward"]) == before


def test_evaluation_is_not_training(tiny, tmp_path):
    plain, evaluated = Meter("sft"), Meter("sft")
    trainer("sft", tiny, tmp_path, plain).train()
    made = trainer("sft", tiny, tmp_path, evaluated, eval_strategy="steps", eval_steps=2)
    made.train()
    assert evaluated.seconds["evaluation", ""] > 0
    assert plain.flops == evaluated.flops and plain.tokens["forward", "policy"] > 0
    assert {k: v for k, v in evaluated.tokens.items() if v} == {
        k: v for k, v in plain.tokens.items() if v
    }
    assert "evaluate" not in vars(made) and "compute_loss" not in vars(made)
    assert "backward" not in vars(made.accelerator)


def test_a_plain_transformers_trainer(tiny, tmp_path):
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": torch.arange(8) % 13, "labels": torch.arange(8) % 13}] * 16
    plain = {k: v for k, v in PLAIN.items() if k != "gradient_checkpointing"}
    args = TrainingArguments(str(tmp_path), **plain, max_steps=5)
    meter, model = Meter("sft"), tiny.lm(0)
    Trainer(model, args, train_dataset=data, callbacks=[MeterCallback(meter)]).train()
    ledger = meter.ledger()
    assert ledger.total(quantity="tokens", phase="forward") == 5 * 4 * 8
    assert {r.quantity for r in ledger.filter(role="policy", phase="backward")} == {
        "seconds",
        "flops",
        "tokens",
        "bytes",
    }
    size = 4 * sum(p.numel() for p in model.parameters())
    assert ledger.total(quantity="bytes", phase="optimizer", component="gradients") == size


def test_a_stopped_run_is_left_clean(tiny, tmp_path, monkeypatch):
    """Ctrl-C within a step: after `close` the trainer and torch are as they were."""
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    meter = Meter("sft")
    made = trainer("sft", tiny, tmp_path, meter)
    monkeypatch.setattr(
        "torch.optim.AdamW.step", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        made.train()
    watch = next(c for c in made.callback_handler.callbacks if isinstance(c, MeterCallback))
    watch.close()
    assert _get_current_dispatch_mode() is None and not meter._blocks
    assert "compute_loss" not in vars(made)


def test_no_meter_leaves_the_trainer_alone(tiny, tmp_path):
    meter = NoMeter("sft")
    made = trainer("sft", tiny, tmp_path, meter, max_steps=1)
    made.train()
    assert len(meter.ledger()) == 0


TEXTS = [
    {"prompt": f"w{1 + i % 9}", "chosen": f"w{2 + i % 7} w3", "rejected": "w4"} for i in range(16)
]


@pytest.mark.parametrize("stage", ["sft", "dpo", "grpo"])
def test_in_a_script_of_ones_own(stage, tiny, tmp_path):
    """Nothing but TRL, and the callback by its public name."""
    from datasets import Dataset

    import rlhf_lab as lab

    tiny.lm(0).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    sizes = {"max_steps": 3, "output_dir": str(tmp_path / "out")}
    rows, more = TEXTS, {}
    if stage == "sft":
        rows = [{"prompt": r["prompt"], "completion": " " + r["chosen"]} for r in TEXTS]
    if stage == "grpo":
        sizes |= {"max_completion_length": 4, "num_generations": 2, "beta": 0.1}
        more["reward_funcs"] = lambda completion_ids, **_: [float(len(i)) for i in completion_ids]
    config = {"sft": trl.SFTConfig, "dpo": trl.DPOConfig, "grpo": trl.GRPOConfig}[stage]
    make = {"sft": trl.SFTTrainer, "dpo": trl.DPOTrainer, "grpo": trl.GRPOTrainer}[stage]
    costs = lab.MeterCallback(stage)
    made = make(
        str(tmp_path),
        args=config(**PLAIN, **sizes),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny.tokenizer(),
        callbacks=[costs],
        **more,
    )
    made.train()
    expected = {"sft": set(), "dpo": {"reference"}, "grpo": {"rollout", "reference"}}[stage]
    for quantity in ("seconds", "bytes"):
        phases = {row.phase for row in costs.ledger.filter(quantity=quantity)}
        assert phases >= {"forward", "backward", "optimizer"} | expected
    plan = lab.plan(stage, "mini", max_steps=3)
    assert "backward" in str(lab.compare(plan, costs))
    assert "compute_loss" not in vars(made)  # the trainer is as it was


def test_whose_the_trained_model_is():
    assert MeterCallback("reward").role == "reward" and MeterCallback("kto").role == "policy"
    with pytest.raises(ValueError, match="^meter='sftt': did you mean 'sft'. choose from sft, "):
        MeterCallback("sftt")
