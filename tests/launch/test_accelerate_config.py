"""accelerate reads the config that a plan writes.

pytest tests/launch/test_accelerate_config.py
"""

from __future__ import annotations

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

from rlhf_lab.cost.estimate import estimate
from rlhf_lab.cost.seconds import communication
from rlhf_lab.launch.accelerate_config import accelerate_config
from rlhf_lab.models.load import presets

BASE = {"per_device_train_batch_size": 2, "prompt_length": 64, "response_length": 64}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"gpus": 8},
        {"gpus": 16, "nodes": 2, "sharding": "fsdp2"},
        {"gpus": 16, "sharding": "fsdp2"},
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
    # Beside bf16 weights accelerate's FSDP2 would make fp32 of what is trained: twice the plan.
    assert parsed.mixed_precision == ("no" if "dtype" in more else "bf16")
    kind = {"zero2": "DEEPSPEED", "zero3": "DEEPSPEED", "fsdp2": "FSDP", "ddp": "MULTI_GPU"}
    assert parsed.distributed_type.value == kind.get(setup.sharding, "NO")
    if setup.sharding == "zero3":
        assert parsed.deepspeed_config["zero_stage"] == 3
        assert parsed.deepspeed_config["offload_param_device"] == "cpu"
    if setup.sharding == "fsdp2":
        assert parsed.fsdp_config["fsdp_version"] == 2


def exchange(e):
    """Seconds of a step that the devices send for."""
    return sum(communication(e.setup, e.hardware, f.sent) for f in e.average)


@pytest.mark.parametrize("more, machines", [({}, 2), ({"nodes": 1}, 1), ({"nodes": 4}, 4)])
def test_more_gpus_than_a_machine_holds_are_more_machines(more, machines):
    """16 H100 are two machines of 8, unless the user says otherwise; exchanges are slower then."""
    config = presets()["Qwen/Qwen2.5-0.5B"]
    e = estimate("sft", config, "h100", {**BASE, "gpus": 16, "sharding": "zero3", **more})
    assert e.setup.nodes == machines
    assert f"num_machines: {machines}\n" in accelerate_config(e.setup)
    assert (exchange(e) > exchange(e.changed(nodes=1))) == (machines > 1)


def test_a_tpu_has_no_accelerate_config():
    setup = estimate("sft", presets()["Qwen/Qwen2.5-0.5B"], "tpu-v5e", BASE).setup
    with pytest.raises(ValueError, match="a TPU is planned only"):
        accelerate_config(setup, "tpu")


@pytest.mark.parametrize("more", [{"reduce_bucket_size": 1000}, {"fsdp_units": "root"}])
def test_what_no_field_of_it_can_say_is_refused(more):
    sharding = "fsdp2" if "fsdp_units" in more else "zero2"
    settings = {**BASE, "gpus": 2, "sharding": sharding, **more}
    setup = estimate("sft", presets()["Qwen/Qwen2.5-0.5B"], "h100", settings).setup
    with pytest.raises(ValueError, match="is planned only: accelerate's configuration has no"):
        accelerate_config(setup)
