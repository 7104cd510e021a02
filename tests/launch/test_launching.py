"""Every config with every stage: what would be started is what accelerate takes; what cannot be is
refused before anything starts.

pytest tests/launch/test_launching.py
"""

import json
import shlex
import shutil
import subprocess
import sys
from datetime import timedelta
from importlib.util import find_spec

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from rlhf_lab import launching, planning, training
from rlhf_lab.cli.main import main
from rlhf_lab.launch import launcher
from rlhf_lab.launch.accelerate_config import CONFIGS
from rlhf_lab.launch.launcher import Hosts, command
from rlhf_lab.launch.processes import meet
from rlhf_lab.launching import launched
from rlhf_lab.runs.run import Run
from rlhf_lab.stages import TRAINABLE
from rlhf_lab.training import check_first

BIG = "Qwen/Qwen2.5-7B"
SMALL = {"layout": "adapters", "load_in_4bit": True, "lora_r": 8}
TYPES = {"zero": "DEEPSPEED", "fsdp": "FSDP", "ddp": "MULTI_GPU"}


def plan(stage="sft", model="mini", hardware="h100", **settings):
    return planning.plan(stage, model, hardware=hardware, **settings)


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("how", CONFIGS)
def test_accelerate_takes_every_config_of_every_stage(how, nodes, tmp_path):
    for stage in TRAINABLE:
        if stage == "ppo" and how == "fsdp2-offload":
            continue
        made = launched(plan(stage), how, 8, nodes, dry=True)
        if how == "cpu":
            assert not made.config
            continue
        file = tmp_path / f"{stage}.yaml"
        file.write_text(made.config)
        hosts = Hosts(made.processes, nodes, "1", "host:99")
        line, env = command(str(file), ["train", stage], hosts)
        assert line[1:3] == ["-m", "accelerate.commands.launch"] and not env
        args, config, _ = _validate_launch_command(launch_command_parser().parse_args(line[3:]))
        kind = next(kind for name, kind in TYPES.items() if how.startswith(name))
        assert config.distributed_type.value == kind
        assert (args.num_processes, args.num_machines, args.mixed_precision) == (8, nodes, "bf16")
        assert args.training_script_args == ["train", stage]
        assert args.training_script == "rlhf_lab.cli" and args.module
        if nodes == 2:
            assert (args.machine_rank, args.main_process_ip, args.main_process_port) == (
                *(1, "host", 99),
            )
        if kind == "DEEPSPEED":
            assert args.zero_stage == int(how[4])
            assert (args.offload_optimizer_device == "cpu") == how.endswith("offload")
            assert (args.offload_param_device == "cpu") == (how == "zero3-offload")
        if kind == "FSDP":
            assert args.fsdp_version == 2
            assert str(args.fsdp_offload_params).lower() == str(how.endswith("offload")).lower()


@pytest.mark.parametrize("how", [how for how in CONFIGS if how.startswith("zero")])
def test_deepspeed_takes_its_part(how):
    if find_spec("deepspeed") is None:
        pytest.skip("needs DeepSpeed: pip install deepspeed")
    from deepspeed.runtime.config import DeepSpeedConfig

    given = yaml.safe_load(launched(plan(), how, 8, dry=True).config)["deepspeed_config"]
    zero = {"stage": given["zero_stage"]}
    for name in ("optimizer", "param"):
        zero |= {f"offload_{name}": {"device": given[f"offload_{name}_device"]}}
    sizes = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    assert DeepSpeedConfig({"zero_optimization": zero, **sizes}).zero_enabled


def test_the_head_says_what_each_device_holds():
    made = launched(plan("sft", BIG, per_device_train_batch_size=1), "fsdp2", 8, dry=True)
    head = made.config.splitlines()[0]
    assert head.startswith(f"# fsdp2: sft of {BIG} on 8 h100: ") and "as planned" in head
    alone = planning.plan("sft", BIG, hardware="h100", per_device_train_batch_size=1)
    assert made.plan.peak < alone.peak / 2


def test_auto_is_the_first_that_fits():
    tiny, one = plan(), {"per_device_train_batch_size": 1}
    assert launched(tiny, "auto", 8, dry=True).how == "ddp"
    assert launched(planning.plan("sft"), "auto").how == "cpu"
    made = launched(plan("sft", BIG, **one), "auto", 8, dry=True)
    order = list(CONFIGS)
    before = order[1 : order.index(made.how)]
    assert made.plan.fits and made.how != "ddp"
    assert not any(launched(plan("sft", BIG, **one), h, 8, dry=True).plan.fits for h in before)
    assert launched(plan("ppo"), "auto", 8, dry=True).how == "ddp"
    with pytest.raises(ValueError, match="auto: nothing fits on 2 rtx-4090: with zero3-offload"):
        launched(plan("sft", "meta-llama/Llama-3.1-8B", "rtx-4090"), "auto", 2, dry=True)


@pytest.mark.parametrize(
    ("how", "settings", "more", "says"),
    [
        ("zero3", {"hardware": "here"}, {}, "shards GPUs, and there is none"),
        ("zero2-offload", {"stage": "ppo", "hardware": "here"}, {}, "and PPO under zero1, zero2"),
        ("fsdp2-offload", {"stage": "ppo"}, {}, "PPO's weights stay on the devices"),
        ("fsdp2", {"stage": "ppo", **SMALL}, {}, "shards no weights in 4 bits: choose"),
        ("zero3", {"stage": "ppo", **SMALL}, {}, "shards no weights in 4 bits: choose"),
        ("fsdp2", {"stage": "ppo", "use_vllm": True}, {}, "use_vllm samples with whole weights"),
        ("zero3", {"load_in_4bit": True, "lora_r": 8}, {}, "shards whole models, not yet adapters"),
        ("ddp", {"stage": "grpo", "num_generations": 3}, {}, "do not split into num_generations=3"),
        ("ddp", {}, {"nodes": 3}, "--processes 8: they do not split into --nodes 3"),
        ("zero9", {}, {}, "did you mean 'zero[123]'.* nor a file"),
    ],
)
def test_what_cannot_be(how, settings, more, says):
    with pytest.raises(ValueError, match=says):
        launched(plan(**settings), how, 8, dry=True, **more)


def test_what_is_missing_here_is_said_unless_it_is_only_looked_at(monkeypatch):
    monkeypatch.setattr(launching, "find_spec", lambda name: None)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    with pytest.raises(ValueError, match="zero2: needs DeepSpeed: pip install deepspeed"):
        launched(plan(), "zero2", 8)
    with pytest.raises(ValueError, match="--processes 9: there are 8 GPUs"):
        launched(plan(), "ddp", 9)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(ValueError, match="--processes 8: there are 0 GPUs"):
        launched(plan(), "ddp", 8)


def test_a_dry_run_shows_the_line_and_the_config(capsys, tmp_path):
    out = ["--out", str(tmp_path / "run")]
    how = ["--accelerate=fsdp2", "--processes", "4", "--hardware", "a100-80gb", "--dry-run"]
    assert main(["train", "dpo", "--model", "mini", *how, "--steps", "3", *out]) == 0
    line, _, head, *config = capsys.readouterr().out.splitlines()
    words = shlex.split(line)
    assert words[-7:] == ["dpo", "--model", "mini", "--steps", "3", *out]
    args = launch_command_parser().parse_args(words[3:])
    assert args.config_file == "accelerate.yaml" and head == "# accelerate.yaml"
    assert yaml.safe_load("\n".join(config))["num_processes"] == 4
    assert not (tmp_path / "run").exists()
    assert main(["train", "dpo", "--accelerate", "ddp", "--dry-run"]) == 0
    said = capsys.readouterr()
    assert "torch.distributed.run --nproc-per-node=2" in said.out
    assert "dpo: there is no GPU here: 2 processes on the CPU" in said.err


@pytest.mark.parametrize("to", ["slurm", "skypilot"])
def test_a_text_for_a_cluster(to, capsys, tmp_path):
    line = ["launch", "dpo", "--to", to, "--model", BIG, "--accelerate", "zero3"]
    line += ["--processes", "16", "--nodes", "2", "--hardware", "h100", "--out", "it's"]
    assert main(line) == 0
    text = capsys.readouterr().out
    if to == "skypilot":
        task = yaml.safe_load(text)
        assert task["resources"] == {"accelerators": "H100:8"} and task["num_nodes"] == 2
        assert "deepspeed" in task["setup"]
        text = task["run"]
    else:
        assert "#SBATCH --nodes=2\n" in text and "#SBATCH --gpus-per-node=8\n" in text
    # The shell of a host, with a Python, srun and scontrol that only say what they are given.
    bash, here = shutil.which("bash"), tmp_path / "bin"
    here.mkdir()
    tools = {
        "python": f"#!{sys.executable}\nimport sys; print(sys.argv[1:])\n",
        "srun": f'#!{bash}\nexec "$@"\n',
        "scontrol": f"#!{bash}\necho first; echo second\n",
    }
    for name, program in tools.items():
        (here / name).write_text(program)
        (here / name).chmod(0o755)
    env = {"PATH": f"{here}:/usr/bin:/bin", "SKYPILOT_NODE_IPS": "first\nsecond"}
    env |= {"SLURM_NODEID": "1", "SKYPILOT_NODE_RANK": "1", "SLURM_JOB_NODELIST": "x"}
    done = subprocess.run(
        [bash, "-c", text], env=env, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    words = eval(done.stdout.splitlines()[-1])
    args = launch_command_parser().parse_args(words[2:])
    assert (args.machine_rank, args.main_process_ip, args.num_processes) == (1, "first", 16)
    assert args.training_script_args[-3:] == ["--out", "it's", "--resume"]
    assert yaml.safe_load((tmp_path / "accelerate.yaml").read_text())["num_machines"] == 2


FILE = {
    **{"distributed_type": "MULTI_GPU", "num_processes": 16, "num_machines": 2},
    **{"machine_rank": 1, "main_process_ip": "10.0.0.1", "main_process_port": 29501},
}


def of_file(tmp_path, **more):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({k: v for k, v in (FILE | more).items() if v is not None}))
    return file


def test_a_cluster_gets_the_processes_and_hosts_of_a_file(tmp_path, capsys):
    """Which host is which the scheduler says; flags win over the file."""
    line = ["launch", "sft", "--to", "skypilot", "--model", "mini", "--hardware", "h100"]
    line += ["--accelerate", str(of_file(tmp_path)), "--out", "x"]
    for flags, nodes, each in ([], 2, 8), (["--processes", "4", "--nodes", "1"], 1, 4):
        assert main([*line, *flags]) == 0
        task = yaml.safe_load(capsys.readouterr().out)
        assert (task["num_nodes"], task["resources"]["accelerators"]) == (nodes, f"H100:{each}")
        written = yaml.safe_load(task["run"].partition("<<'END'\n")[2].partition("END")[0])
        assert written == {
            **{"distributed_type": "MULTI_GPU", "num_processes": nodes * each},
            "num_machines": nodes,
        }
        assert f"sft of mini on {nodes * each} h100: " in task["run"]
        words = shlex.split(task["run"].splitlines()[-1])
        args = launch_command_parser().parse_args(
            [w.replace("$SKYPILOT_NODE_RANK", "1") for w in words[3:]]
        )
        assert args.num_processes == nodes * each
        assert args.main_process_ip == ("$HEAD" if nodes == 2 else None)


def test_one_host_is_the_one_that_a_file_says(tmp_path, capsys):
    line = ["train", "sft", "--accelerate", str(of_file(tmp_path)), "--hardware", "h100"]
    for flags, rank in ([], 1), (["--machine-rank", "0"], 0):
        assert main([*line, "--dry-run", *flags]) == 0
        words = shlex.split(capsys.readouterr().out.splitlines()[0])
        args, config, _ = _validate_launch_command(
            launch_command_parser().parse_args(
                ["--config_file", str(of_file(tmp_path)), *words[5:]]
            )
        )
        where = args.machine_rank, args.main_process_ip, args.main_process_port
        assert where == (rank, "10.0.0.1", 29501) and config.num_machines == 2


def test_one_process_of_a_file_trains_where_there_is_no_gpu(tmp_path, capsys):
    """accelerate's own number of processes of `distributed_type: NO` is 1."""
    none = dict.fromkeys(FILE)
    file = of_file(tmp_path, **none | {"distributed_type": "NO", "use_cpu": True})
    made = launched(plan(hardware="here"), str(file))
    assert (made.processes, made.nodes, made.warning) == (1, 1, "")
    assert main(["launch", "sft", "--to", "slurm", "--accelerate", str(file)]) == 2
    assert "--to slurm is for GPUs: say which (--hardware)" in capsys.readouterr().err
    with pytest.raises(ValueError, match="several processes on GPUs, and there is none"):
        launched(plan(hardware="here"), str(file), 2, dry=True)


FSDP2 = {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2}}


@pytest.mark.parametrize(
    ("stage", "file", "says"),
    [
        ("sft", {"distributed_type": None}, "no config of accelerate's: A `distributed_type`"),
        ("sft", {"beta": 1}, r"no config of accelerate's: .*unknown keys \(\['beta'\]\)"),
        ("sft", {"distributed_type": "MEGATRON_LM"}, "MEGATRON_LM is not planned"),
        ("sft", {"num_processes": None}, "says no num_processes: give --processes"),
        ("sft", {"num_processes": 15}, "--processes 15: they do not split into --nodes 2"),
        (
            "sft",
            FSDP2 | {"parallelism_config": {"tp_size": 2, "dp_shard_size": 8}},
            "tp_size=2 is planned only",
        ),
        ("ppo", {"distributed_type": "FSDP", "fsdp_config": None}, "FSDP 1 is not planned"),
        (
            "ppo",
            FSDP2 | {"fsdp_config": {"fsdp_version": 2, "fsdp_offload_params": True}},
            "PPO's weights stay on the devices",
        ),
        (
            "ppo",
            FSDP2 | {"fsdp_config": {"version": 2, "activation_checkpointing": True}},
            "PPO does not do this of it: gradient_checkpointing",
        ),
        (
            "ppo",
            FSDP2 | {"fsdp_config": {"fsdp_version": 2, "fsdp_layers": 3}},
            "PPO does not do this of it: fsdp_config.layers: 3",
        ),
        ("dpo", FSDP2 | {"settings": {"lora_r": 8}}, "shards whole models, not yet adapters"),
    ],
)
def test_a_file_is_refused_as_a_name_is(stage, file, says, tmp_path):
    settings = file.pop("settings", {})
    with pytest.raises(ValueError, match=says):
        launched(plan(stage, **settings), str(of_file(tmp_path, **file)), dry=True)


def test_what_is_not_planned_of_a_file_is_said(tmp_path, capsys):
    line = ["train", "sft", "--hardware", "h100", "--dry-run", "--accelerate"]
    for fsdp, says in [
        ({"fsdp_version": 2, "fsdp_layers": 3}, "not planned: fsdp_config.layers: 3"),
        ({"fsdp_version": 1}, "FSDP 1 is not planned"),
    ]:
        file = of_file(tmp_path, **FSDP2 | {"fsdp_config": fsdp})
        assert main([*line, str(file)]) == 0
        out, error = capsys.readouterr()
        assert says in error and error.count("\n") == 1
        assert yaml.safe_load(out.partition("\n")[2])["fsdp_config"] == fsdp
    assert "on 16 h100: not planned (" in out


def test_a_batch_that_nobody_gave_is_named_where_nothing_fits(capsys):
    """And what is proposed fits; a batch of yours is kept, and the question asked in full."""
    line = ["train", "sft", "--accelerate", "auto", "--processes", "8", "--hardware", "h100"]
    line += ["--model", BIG, "--dry-run"]
    assert main(line) == 2
    error = capsys.readouterr().err
    assert "nothing fits" in error and "the batch of 32 rows is a default" in error
    assert main([*line, *shlex.split(error.partition("this one fits: ")[2])]) == 0
    capsys.readouterr()
    assert main([*line, "--set", "per_device_train_batch_size=64"]) == 2
    asked = shlex.split(capsys.readouterr().err.partition("what to change: rlhf-lab ")[2])
    assert main([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == BIG and not found["fits"] and found["cheaper"]
    whole = launched(plan("sft", BIG, per_device_train_batch_size=64), "zero3-offload", 8, dry=True)
    assert found["peak_bytes"] == whole.plan.peak


def test_a_script_that_does_not_fit_says_so_beside_it(capsys):
    line = ["launch", "sft", "--to", "slurm", "--model", BIG, "--accelerate", "fsdp2"]
    line += ["--processes", "16", "--nodes", "2", "--hardware", "h100", "--out", "x"]
    assert main(line) == 0
    out, error = capsys.readouterr()
    assert out.startswith("#!/bin/bash\n") and error.startswith("sft: does not fit: ")
    assert main([*line, *shlex.split(error.partition("this one fits: ")[2])]) == 0
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("train sft --accelerate ddp --hardware h100", "is to look only: add --dry-run"),
        ("train sft --accelerate ddp --nodes 2", "--nodes 2 needs --main-address"),
        ("train sft --dry-run", "--dry-run needs --accelerate"),
        ("launch sft --to slurm", "launch needs --accelerate"),
        ("launch sft --to slurm --accelerate cpu", "--to slurm is for GPUs"),
    ],
)
def test_one_line_of_the_command_line(line, says, capsys):
    assert main(line.split()) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_a_timeout_holds_on_cpus_too(monkeypatch):
    """transformers makes nothing of `ddp_timeout` there; benchmarks/two_hosts.py unplugs a host."""
    met = []
    monkeypatch.setattr("accelerate.PartialState", lambda **how: met.append(how))
    meet(7)
    monkeypatch.setenv("WORLD_SIZE", "2")
    meet(7)  # on GPUs
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    check_first(plan("sft", hardware="here", ddp_timeout=9))
    assert met == [{"cpu": True, "timeout": timedelta(seconds=9)}]


@pytest.mark.parametrize("how", ["fsdp2", "fsdp2-offload"])
def test_fsdp2_reaches_the_processes_of_every_stage(how, tmp_path, monkeypatch):
    """What accelerate's launcher tells them, read by its own plugin: layers are the units of what a
    stage trains, a language model or one with a score head; adapters are refused."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.launch import prepare_multi_gpu_env
    from torch.distributed.fsdp import CPUOffloadPolicy

    stages = [stage for stage in TRAINABLE if stage != "ppo"]
    file = tmp_path / "accelerate.yaml"
    told = []
    for stage in stages:
        file.write_text(launched(plan(stage), how, 8, dry=True).config)
        line, _ = command(str(file), ["train", stage], Hosts(8))
        args, _, _ = _validate_launch_command(launch_command_parser().parse_args(line[3:]))
        told.append(prepare_multi_gpu_env(args))
        with pytest.raises(ValueError, match="shards whole models, not yet adapters"):
            launched(plan(stage, lora_r=8), how, 8, dry=True)
        with pytest.raises(ValueError, match="shards GPUs, and there is none"):
            launched(plan(stage, hardware="here"), how, 2)
    assert all(env == told[0] for env in told)
    for name, value in told[0].items():
        if name.startswith(("FSDP", "ACCELERATE_USE_FSDP")):
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
    assert isinstance(plugin.cpu_offload, CPUOffloadPolicy) == how.endswith("offload")
    assert plugin.state_dict_type.name == "FULL_STATE_DICT" and not plugin.activation_checkpointing
    mini = planning.plan("sft", "mini").model
    for model in (mini.sft, mini.new_reward()):
        plugin.set_auto_wrap_policy(model)
        (unit,) = plugin.auto_wrap_policy.keywords["transformer_layer_cls"]
        assert unit is type(model.model.layers[0])


def test_that_it_does_not_fit_is_said_by_both_doors(tmp_path, capsys, monkeypatch):
    file = str(of_file(tmp_path, num_machines=1, num_processes=8))
    planned = plan("sft", BIG)
    line = ["train", "sft", "--model", BIG, "--hardware", "h100", "--accelerate", file, "--dry-run"]
    assert main(line) == 0
    of_command = capsys.readouterr().err
    monkeypatch.setattr("torch.cuda.device_count", lambda: 16)
    monkeypatch.setattr(launcher, "launch", lambda *_: 0)  # nothing is started
    monkeypatch.setattr(Run, "load", lambda folder: folder)
    for quiet in (False, True):
        training.train(planned, accelerate=file, out=tmp_path / "run", quiet=quiet)
        of_python = capsys.readouterr().out
        assert of_python.partition(";")[0] == of_command.partition(";")[0] * (not quiet)
    assert not planned.fits and of_command.startswith("sft: does not fit: ")
