"""accelerate reads the config that a plan writes.

pytest tests/launch/test_accelerate_config.py
"""

from __future__ import annotations

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

from rlhf_lab.cost.estimate import estimate
from rlhf_lab.launch.accelerate_config import accelerate_config
from rlhf_lab.models.load import presets

BASE = {"per_device_train_batch_size": 2, "prompt_length": 64, "response_length": 64}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"gpus": 8},
        {"gpus": 16, "nodes": 2, "sharding": "fsdp2"},
        {"gpus": 8, "sharding": "zero2"},
        {"gpus": 8, "sharding": "zero3", "offload": "all"},
        {"gpus": 2, "sharding": "fsdp2", "dtype": "bfloat16"},
    ],
)
def test_accelerate_parses_its_config(more, tmp_path):
    setup = estimate("sft", presets()["Qwen/Qwen2.5-0.5B"], "h100", {**BASE, **more}).setup
    file = tmp_path / "config.yaml"
    file.write_text(accelerate_config(setup))
    parsed = load_config_from_file(str(file))
    assert isinstance(parsed, ClusterConfig)
    assert parsed.num_processes == setup.gpus and parsed.num_machines == setup.nodes
    assert parsed.mixed_precision == "bf16"
    kind = {"zero2": "DEEPSPEED", "zero3": "DEEPSPEED", "fsdp2": "FSDP", "ddp": "MULTI_GPU"}
    assert parsed.distributed_type.value == kind.get(setup.sharding, "NO")
    if setup.sharding == "zero3":
        assert parsed.deepspeed_config["zero_stage"] == 3
        assert parsed.deepspeed_config["offload_param_device"] == "cpu"
    if setup.sharding == "fsdp2":
        assert parsed.fsdp_config["fsdp_version"] == 2
