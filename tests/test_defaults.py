"""Defaults by the size of the model, and where they come from.

pytest tests/test_defaults.py
"""

from __future__ import annotations

import pytest
from families import make_folder

import rlhf_lab as lab
from rlhf_lab.defaults import BATCH, LITERATURE
from rlhf_lab.models.load import BUNDLED
from rlhf_lab.stages import ONLINE, STAGES, TRAINABLE

REAL = "smollm2-135m"
LARGE = "Qwen/Qwen2.5-7B"


@pytest.mark.parametrize("stage", TRAINABLE)
def test_models_row_23_a_real_model_is_not_trained_at_the_rate_of_a_tiny_one(stage):
    """PPO on SmolLM2-135M went at 1e-3, to 57 nats at once."""
    plan = lab.plan(stage, REAL)
    assert plan.settings["learning_rate"] <= 5e-5 < STAGES[stage].defaults["learning_rate"]
    assert plan.sources["learning_rate"] in plan.defaults_note
    assert plan.defaults_note in repr(plan.show()), "shown with the plan"


def test_a_printed_plan_says_where_each_setting_comes_from():
    rows = [{"prompt": f"a {i}", "completion": " b" * (i + 1)} for i in range(20)]
    plan = lab.plan("sft", REAL, lora_r=8, warmup_steps=3, data=rows)
    first, *lines, last = str(plan).splitlines()
    assert first == f"sft of {REAL}, hardware: here" and last == "the rest: defaults of SFTConfig"
    found = {
        item.partition("=")[0]: line.partition(": ")[0]
        for line in lines
        for item in line.partition(": ")[2].split(", ")
    }
    assert found.keys() == plan.settings.keys()
    assert found["lora_r"] == found["warmup_steps"] == "yours"
    assert found["num_train_epochs"] == "the lab's" and found["rows"] == "of your data"
    assert all(found[name] == source for name, source in plan.sources.items()) and plan.sources
    assert "TRL&#x27;s scripts/sft.py with LoRA" in plan._repr_html_()


@pytest.mark.parametrize("name", BUNDLED)
@pytest.mark.parametrize("stage", STAGES)
def test_bundled_models_keep_the_labs_own(stage, name):
    plan = lab.plan(stage, name)
    assert (
        plan.settings == dict(STAGES[stage].defaults)
        and not plan.sources
        and not plan.defaults_note
    )


@pytest.mark.parametrize(
    "stage, settings, rate",
    [
        ("ppo", {"layout": "shared"}, 3e-4),
        ("ppo", {"lora_r": 16}, 3e-3),
        ("ppo", {"layout": "adapters", "lora_r": 16}, 3e-3),
        ("dpo", {"lora_r": 8}, 3e-3),
        ("sft", {"lora_r": 8}, STAGES["sft"].defaults["learning_rate"]),
    ],
)
def test_a_small_models_adapters_and_shared_trunk_have_rates_of_their_own(stage, settings, rate):
    """A shared trunk diverged at the rate that four models take: gold 8.4 at 9 nats."""
    plan = lab.plan(stage, "tiny", **settings)
    assert plan.settings["learning_rate"] == rate
    assert bool(plan.sources) == (stage != "sft")
    mine = lab.plan(stage, "tiny", learning_rate=0.01, **settings)
    assert mine.settings["learning_rate"] == 0.01 and not mine.sources


def test_a_small_model_of_yours_is_trained_like_the_bundled_ones(tmp_path):
    """It is their size that the lab's settings were found for, not their names."""
    folder = make_folder(tmp_path, "llama")
    assert lab.plan("ppo", folder).settings == dict(STAGES["ppo"].defaults)


# TRL's config classes: an oracle that the table does not read.
OF_TRL = ("rloo", "grpo", "dpo", "kto")


@pytest.mark.parametrize("stage", OF_TRL)
def test_rates_said_to_be_trls_are_trls(stage):
    import trl

    plan = lab.plan(stage, REAL)
    config = {
        f.name: f for f in getattr(trl, f"{stage.upper()}Config").__dataclass_fields__.values()
    }
    for name in ("learning_rate", "beta"):
        if "Config" in plan.sources[name]:
            assert plan.settings[name] == config[name].default
    assert plan.settings["beta"] > 0, "a reference is held: the run's KL has a meaning"


def test_rates_said_to_be_trls_of_sft_and_reward():
    from trl import RewardConfig, SFTConfig

    default = {
        c: c.__dataclass_fields__["learning_rate"].default for c in (SFTConfig, RewardConfig)
    }
    assert lab.plan("sft", LARGE).settings["learning_rate"] == default[SFTConfig]
    adapters = lab.plan("reward", LARGE, lora_r=16)
    assert adapters.settings["learning_rate"] == default[RewardConfig]


@pytest.mark.parametrize("stage", LITERATURE)
def test_larger_models_never_go_faster_and_adapters_never_slower(stage):
    """Every table falls with size; LoRA's rates are above those of the whole model."""
    for what in ("whole", "lora"):
        rates = LITERATURE[stage][what]
        sizes = [most for most, *_ in rates]
        assert sizes[-1] is None and sizes[:-1] == sorted(sizes[:-1])
        assert [r for _, r, _ in rates] == sorted((r for _, r, _ in rates), reverse=True)
        assert all(source for *_, source in rates)
    for name in (REAL, LARGE):
        rates = [lab.plan(stage, name, lora_r=r).settings["learning_rate"] for r in (0, 8)]
        assert rates[1] > rates[0]


def test_every_stage_that_trains_has_its_rates():
    assert LITERATURE.keys() == set(TRAINABLE)
    for stage, told in LITERATURE.items():
        assert {name for name, *_ in told.get("besides", [])} <= STAGES[stage].defaults.keys()


def test_what_you_say_wins_and_is_not_given_a_source():
    plan = lab.plan("dpo", REAL, learning_rate=3e-6, beta=0.3, per_device_train_batch_size=2)
    assert (plan.settings["learning_rate"], plan.settings["beta"]) == (3e-6, 0.3)
    assert plan.settings["per_device_train_batch_size"] == 2
    assert not plan.sources.keys() & {"learning_rate", "beta", *BATCH}


@pytest.fixture
def machine(monkeypatch):
    """`machine(gib)`: "here" has so much memory."""
    from rlhf_lab.cost import hardware

    def has(gib: float) -> None:
        made = hardware._cpu(gib * 2**30, 2, "this machine, 2 cores (a guess)", "a test")
        monkeypatch.setattr(hardware, "load_calibration", lambda: made)

    return has


@pytest.mark.parametrize("stage", TRAINABLE)
@pytest.mark.parametrize("gib", [8, 16, 64])
def test_a_batch_that_fits_here_is_as_many_rows_a_step(stage, gib, machine):
    """The rows of an optimizer step, and of a generation, are the lab's whatever the machine."""
    machine(gib)
    plan, own = lab.plan(stage, REAL), STAGES[stage].defaults
    batch = plan.settings["per_device_train_batch_size"]
    passes = plan.settings.get("gradient_accumulation_steps", 1)
    assert batch * passes == own["per_device_train_batch_size"]
    if STAGES[stage].groups:
        generation = batch * plan.settings["steps_per_generation"]
        assert generation == own["per_device_train_batch_size"] * own["steps_per_generation"]
    assert batch == 1 or plan.peak < gib * 2**30
    _ = plan.config(), plan.estimate.setup  # the trainer takes it, and the planner


def test_less_memory_is_a_smaller_batch(machine):
    batches = []
    for gib in (8, 16, 32, 128):
        machine(gib)
        batches.append(lab.plan("sft", REAL).settings["per_device_train_batch_size"])
    assert batches == sorted(batches) and batches[0] < batches[-1] == 32


def test_a_card_of_the_catalogue_is_planned_with_the_labs_batch():
    plan = lab.plan("sft", LARGE, hardware="h100")
    assert plan.settings["per_device_train_batch_size"] == 32
    assert "learning_rate" in plan.sources and not plan.sources.keys() & BATCH


def test_a_model_that_nobody_knows_counts_as_large(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "perceiver"}')
    plan = lab.plan("sft", tmp_path)
    assert plan.settings["learning_rate"] == 2e-5
    assert plan.settings["per_device_train_batch_size"] == 8


@pytest.mark.parametrize("stage", ONLINE)
def test_the_run_records_where_its_settings_come_from(stage, tmp_path):
    plan = lab.plan(stage, REAL)
    run = lab.Run.create(
        tmp_path, stage=stage, model=REAL, settings=plan.settings, sources=plan.sources
    )
    assert lab.Run.load(run.folder).config["sources"] == dict(plan.sources)
