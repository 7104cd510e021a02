"""Which device trains, and in which precision, on machines that are not here.

pytest tests/models/test_device.py

A faked device answers what torch's own queries answer there; nothing is computed on it.
"""

from __future__ import annotations

import pytest
import torch

import rlhf_lab as lab
from rlhf_lab.models.device import compute_dtype, device_settings
from rlhf_lab.stages import TRAINABLE

CAPABILITY = {"T4": (7, 5), "V100": (7, 0), "A100": (8, 0), "H100": (9, 0)}
"""Compute capabilities, NVIDIA's list of GPUs."""
PRECISION = {
    "no GPU": {"use_cpu": True, "bf16": False, "fp16": False},
    "Apple": {"use_cpu": True, "bf16": False, "fp16": False},
    "T4": {"use_cpu": False, "bf16": False, "fp16": True},
    "V100": {"use_cpu": False, "bf16": False, "fp16": True},
    "A100": {"use_cpu": False, "bf16": True, "fp16": False},
    "H100": {"use_cpu": False, "bf16": True, "fp16": False},
}


def fake(monkeypatch, machine: str) -> None:
    """torch says what it says on that machine. Of a T4 it says that bf16 is supported: it is
    emulated, at a tenth of the speed."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: machine == "Apple")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: machine in CAPABILITY)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: machine in CAPABILITY)
    if machine in CAPABILITY:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: CAPABILITY[machine])


@pytest.mark.parametrize("machine", PRECISION)
def test_device_and_precision_of_a_machine(machine, monkeypatch):
    fake(monkeypatch, machine)
    assert device_settings({}) == PRECISION[machine]
    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16}
    names = [name for name in wanted if PRECISION[machine][name]]
    assert compute_dtype() == (wanted[names[0]] if names else torch.float32)


@pytest.mark.parametrize("given", [{"bf16": False}, {"fp16": False}, {"fp16": True}])
def test_a_precision_of_yours_is_kept_and_the_other_stays_off(given, monkeypatch):
    fake(monkeypatch, "A100")
    chosen = {**device_settings(given), **given}
    assert chosen == {"use_cpu": False, "bf16": False, "fp16": False} | given


def test_the_cpu_can_be_asked_for_where_there_is_a_gpu(monkeypatch):
    fake(monkeypatch, "T4")
    assert device_settings({"use_cpu": True}) == {"bf16": False, "fp16": False}


@pytest.mark.parametrize(
    ("machine", "says"), [("Apple", "no float64"), ("no GPU", "there is no GPU here")]
)
def test_a_device_that_cannot_train_is_refused_in_one_line(machine, says, monkeypatch):
    fake(monkeypatch, machine)
    with pytest.raises(ValueError, match=f"use_cpu=False: .*{says}") as error:
        lab.plan("ppo", "tiny", use_cpu=False).config()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("machine", ["Apple", "no GPU"])
@pytest.mark.parametrize("stage", TRAINABLE)
def test_every_stage_trains_in_fp32_on_the_cpu_without_a_gpu_of_use(stage, machine, monkeypatch):
    """The stage's own config, as TRL and transformers read it: they would take Apple's GPU."""
    fake(monkeypatch, machine)
    args = lab.plan(stage, "tiny").config()
    assert args.device == torch.device("cpu")
    assert not args.bf16 and not args.fp16


@pytest.mark.parametrize("stage", TRAINABLE)
@pytest.mark.parametrize("machine", ["T4", "A100"])
def test_every_stage_trains_in_16_bits_on_a_gpu(stage, machine, monkeypatch):
    """And in those that the GPU multiplies itself; making the config needs no device."""
    from transformers import TrainingArguments

    fake(monkeypatch, machine)
    monkeypatch.setattr(TrainingArguments, "device", torch.device("cpu"))
    monkeypatch.setattr(TrainingArguments, "world_size", 1)
    args = lab.plan(stage, "tiny").config()
    assert {n: getattr(args, n) for n in PRECISION[machine]} == PRECISION[machine]


@pytest.mark.parametrize(("name", "precision"), [("t4", "fp16"), ("a100", "bf16")])
def test_a_plan_predicts_the_precision_that_will_train(name, precision):
    setup = lab.plan("sft", "tiny", hardware=name).estimate.setup
    assert getattr(setup, precision) and setup.bf16 != setup.fp16
    assert not lab.plan("sft", "tiny").estimate.setup.fp16, "this machine has no GPU"


@pytest.mark.parametrize(("machine", "found"), [("Apple", "no float64"), ("no GPU", "none")])
def test_the_doctor_says_what_is_not_used(machine, found, monkeypatch):
    from rlhf_lab.cli import doctor

    fake(monkeypatch, machine)
    (gpu,) = doctor._gpu()
    assert gpu.what == "GPU" and found in gpu.found and "CPU" in gpu.remedy
