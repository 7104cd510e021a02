"""DeepSpeed's own files, by themselves and behind accelerate's and axolotl's.

pytest tests/cli/test_deepspeed_files.py
"""

from __future__ import annotations

import json

import pytest

import rlhf_lab as lab
from rlhf_lab.cli.config_files import read_config
from rlhf_lab.cli.main import main
from rlhf_lab.launching import launched

ZERO3 = {
    "zero_optimization": {
        "stage": 3,
        "offload_param": {"device": "cpu"},
        "reduce_bucket_size": "auto",
        "stage3_max_live_parameters": 1e9,
    },
    "bf16": {"enabled": "auto"},
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": 4,
}


@pytest.mark.parametrize("by", ["itself", "accelerate", "axolotl"])
def test_what_deepspeeds_config_leaves_to_the_trainer_is_as_the_plan_says(by, tmp_path):
    """transformers fills "auto" in: batches from its arguments, bucket sizes from the width."""
    (tmp_path / "ds.json").write_text(json.dumps(ZERO3).replace("1000000000.0", "1e9"))
    files = {
        "itself": "",
        "accelerate": "distributed_type: DEEPSPEED\nnum_processes: 8\n"
        "deepspeed_config: {deepspeed_config_file: ds.json}\n",
        "axolotl": "base_model: tiny\ndeepspeed: ds.json\n",
    }
    (tmp_path / "other.yaml").write_text(files[by])
    found = read_config(tmp_path / ("ds.json" if by == "itself" else "other.yaml"))
    assert found.unread == ["reduce_bucket_size: auto"]
    expected = {"sharding": "zero3", "offload": "all", "gradient_accumulation_steps": 4}
    expected["stage3_max_live_parameters"] = 1e9
    assert found.settings | expected == found.settings
    assert "per_device_train_batch_size" not in found.settings and "bf16" not in found.settings
    plan = lab.plan("sft", "Qwen/Qwen2.5-7B", hardware="h100", **found.settings | {"gpus": 8})
    assert plan.estimate.setup.stage3_max_live_parameters == 10**9
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": "auto"}}')
    with pytest.raises(ValueError, match="ZeRO stage 'auto' is not planned: write 0, 1, 2 or 3"):
        read_config(tmp_path / ("ds.json" if by == "itself" else "other.yaml"))


def test_a_batch_that_deepspeeds_file_says_otherwise_is_said(tmp_path, capsys):
    """DeepSpeed's own check: rows of a step = rows of a device × passes × devices."""
    file = tmp_path / "ds.json"
    line = ["plan", "sft", "--hardware", "h100", "--gpus", "4", "--config", str(file)]
    file.write_text(
        json.dumps(ZERO3 | {"train_micro_batch_size_per_gpu": 2, "train_batch_size": 32})
    )
    assert main(line) == 0  # 2 rows × 4 passes × 4 devices
    agreed = capsys.readouterr().out
    assert "DeepSpeed does not start" not in agreed and "train_batch_size" not in agreed
    assert main([*line, "--batch", "8"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    file_says = "in DeepSpeed's file"
    assert f"per_gpu is 2 {file_says}, per_device_train_batch_size 8 here" in said
    step = "128 here (8 rows × 4 passes × 4 devices)"
    assert f"train_batch_size is 32 {file_says}, {step}: DeepSpeed does not start" in said
    assert "not read: train_batch_size" not in said


def test_training_refuses_it_before_deepspeed_does(tmp_path):
    sizes = {"train_micro_batch_size_per_gpu": 2, "train_batch_size": 40}
    (tmp_path / "ds.json").write_text(json.dumps(ZERO3 | sizes))
    file = tmp_path / "acc.yaml"
    file.write_text(
        "distributed_type: DEEPSPEED\nnum_processes: 4\n"
        "deepspeed_config: {deepspeed_config_file: ds.json, zero3_init_flag: false}\n"
    )
    more = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    plan = lab.plan("sft", "Qwen/Qwen2.5-0.5B", hardware="h100", **more)
    with pytest.raises(ValueError, match="train_batch_size is 40 in DeepSpeed's file, 32 here"):
        launched(plan, str(file), dry=True)
    (tmp_path / "ds.json").write_text(json.dumps(ZERO3 | sizes | {"train_batch_size": 32}))
    assert launched(plan, str(file), dry=True).processes == 4
