"""Plans with `torch_compile`: passes take less time, compiling is counted, "auto" weighs.

pytest tests/cost/test_compiling.py
"""

import pytest

import rlhf_lab as lab
from rlhf_lab.cost import compiling
from rlhf_lab.cost.seconds import seconds
from rlhf_lab.cost.work import Work, product

STEPS = {"hardware": "cpu", "prompt_length": 20, "response_length": 40}


def planned(stage="ppo", **settings):
    return lab.plan(stage, "tiny", **{**STEPS, "max_steps": 10, **settings}).estimate


@pytest.mark.parametrize("stage", ["ppo", "sft", "dpo", "grpo"])
def test_passes_take_less_time_and_nothing_else_changes(stage):
    plain, fast = planned(stage), planned(stage, torch_compile=True)
    for at, before in plain.seconds_of.items():
        compiled = at[0] in compiling.PASSES
        assert fast.seconds_of[at] < before if compiled else fast.seconds_of[at] == before
    assert fast.flops == plain.flops and fast.peak == plain.peak
    once = compiling.compile_seconds(fast.setup, fast.hardware)
    assert fast.hours * 3600 == pytest.approx(10 * fast.step_seconds + once)
    row = fast.ledger.filter(phase="compile", quantity="seconds")
    assert row.total() == once > 0 and not plain.ledger.filter(phase="compile")


def test_products_stay_what_they_are():
    """Only what is no matrix product is fused: by hand, on a CPU of round figures."""
    cpu = lab.hardware("cpu")
    work = Work([product(1000, 64, 64, 4)], moved=1e9)
    phase = planned().phases[1]
    phase.name, phase.work = "forward", work
    before = seconds(work, cpu, "fp32")
    only = seconds(Work(work.products), cpu, "fp32")
    after = seconds(compiling.work_of(phase, True), cpu, "fp32")
    assert after == pytest.approx(only + compiling.KEPT * (before - only))
    phase.name = "rollout"
    assert compiling.work_of(phase, True) is work


def test_auto_weighs_what_it_takes_against_what_is_left_to_train():
    on, off = (planned(max_steps=n, torch_compile="auto") for n in (5000, 5))
    assert on.compiles[0] and not off.compiles[0]
    once = compiling.compile_seconds(off.setup, off.hardware)
    plain, fast = planned(), planned(torch_compile=True)
    saved = plain.step_seconds - fast.step_seconds
    for n in (2 * once / saved * 0.98, 2 * once / saved * 1.02):
        decided = planned(max_steps=round(n), torch_compile="auto").compiles[0]
        assert decided is (round(n) * saved > 2 * once)
    assert off.step_seconds == plain.step_seconds and on.step_seconds == fast.step_seconds
    for e, verdict in ((on, "on"), (off, "off")):
        line = next(x for x in e.caveats if x.startswith(f"torch_compile=auto is {verdict}: "))
        assert f"{once:.0f} s of compiling" in line


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "dpo"])
def test_runs_of_the_course_are_not_compiled(stage):
    assert not lab.plan(stage, "tiny", hardware="cpu", torch_compile="auto").estimate.compiles[0]


def test_a_gpu_is_not_modelled_and_says_so():
    asked = {"hardware": "h100", "torch_compile": True}
    plain, fast = planned(hardware="h100"), planned(**asked)
    assert fast.seconds_of == plain.seconds_of and not fast.ledger.filter(phase="compile")
    assert "not modelled: torch_compile on a gpu, which would change memory and time" in (
        lab.plan("ppo", "tiny", **{**STEPS, **asked}).warnings
    )
    auto = planned(hardware="h100", torch_compile="auto")
    assert not auto.compiles[0] and "not modelled on a gpu" in auto.caveats[0]


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"torch_compile": "always"}, "must be True, False or 'auto'"),
        (
            {"torch_compile": True, "load_in_4bit": True, "lora_r": 8},
            "does not go with load_in_4bit",
        ),
        ({"torch_compile_mode": "reduce-overhead"}, "torch_compile_mode has no effect here"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(settings, says):
    with pytest.raises(ValueError, match=says) as error:
        lab.plan("sft", "tiny", **settings)
    assert "\n" not in str(error.value)


def test_sharded_models_are_not_compiled():
    from rlhf_lab.launching import launched

    plan = lab.plan("ppo", "tiny", torch_compile=True)
    with pytest.raises(ValueError, match="shards models, whose layers are not compiled"):
        launched(plan, "fsdp2", 2, dry=True)


def test_what_is_no_choice_of_torch_compile_is_refused():
    for value in (1, "yes", None):
        with pytest.raises(ValueError, match="torch_compile must be True, False or 'auto', got "):
            lab.plan("ppo", "tiny", torch_compile=value)
    with pytest.raises(ValueError, match="torch_compile is of training"):
        lab.plan("inference", "tiny", torch_compile=True)
