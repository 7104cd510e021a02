"""accelerate's and DeepSpeed's config files, as settings of a plan.

Which keys are understood is in `accelerate_files.yaml`; those that are not are given back by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import TypeAlias

from ..runs.json_files import JsonObject
from ..runs.yaml_files import read_names
from ..stages import Setting, read_table
from .accelerate_config import SIZES

Read: TypeAlias = dict[str, Setting]
"""What a file says, by key."""
KEYS: Mapping[str, dict[str, Setting]] = read_table(__file__)
"""Keys that are understood."""
MIXED = "bf16", "fp16"
PREFIXES = {
    "fsdp_config": "fsdp_",
    "dynamo_config": "dynamo_",
    "parallelism_config": "parallelism_config_",
}
"""What names in a section begin with, or leave out."""
OFFLOADED = "optimizer", "param"
BATCH = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
}
WHOLE_BATCH = "train_batch_size"
"""DeepSpeed's name of the rows of a step, of all devices: the product of both and the devices."""
SINGLE, SEVERAL = "NO", ("MULTI_GPU", "MULTI_CPU")


def read_accelerate(file: Path) -> JsonObject:
    """What a file says that accelerate's own parser takes. Raises ValueError, one line."""
    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

    content = read_names(file)
    try:
        read = load_config_from_file(str(file))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no config of accelerate's: {error}") from None
    if not isinstance(read, ClusterConfig):
        raise ValueError(f"{file} is for SageMaker, which is not started here")
    return content


def accelerate_settings(content: JsonObject, path: Path) -> tuple[Read, list[str]]:
    """Devices, nodes, sharding, offload, precision, recomputed and compiled layers that
    accelerate's file asks for; and keys that are not understood.

    Raises ValueError, one line, for what is not planned.
    """
    kind, unread = _kind(content), list(_unread(content, KEYS["accelerate"]))
    settings: Read = {"gpus": process_count(content, path) or 1}
    settings["nodes"] = whole_number(content, "num_machines", path) or 1
    if kind == "DEEPSPEED":
        more, beside = deepspeed_settings(_section(content, "deepspeed_config", path), path)
        settings |= more
        unread += beside
    elif kind == "FSDP":
        settings |= _fsdp(_section(content, "fsdp_config", path), path)
    elif kind not in (SINGLE, *SEVERAL):
        raise ValueError(f"{path}: distributed_type {kind} is not planned")
    if several := _section(content, "parallelism_config", path):
        settings |= _parallelism(several, settings["gpus"], path)
    backend = content.get("dynamo_backend", _section(content, "dynamo_config", path).get("backend"))
    if str(backend).lower() == "inductor":
        settings["torch_compile"] = True
    if content.get("use_cpu") is True:
        settings["use_cpu"] = True
    if (mixed := content.get("mixed_precision")) in MIXED:
        settings[mixed] = True
    if settings["gpus"] == 1:
        settings.pop("nodes")
    return settings, unread


def process_count(content: JsonObject, path: Path) -> int | None:
    """How many in all; None where the file leaves it open. Raises ValueError, one line."""
    alone = 1 if _kind(content) == SINGLE else None
    return whole_number(content, "num_processes", path) or alone


def _kind(content: JsonObject) -> str:
    kind = content["distributed_type"]  # NO without quotes is a switch of YAML's
    return SINGLE if kind is False else str(kind)


def whole_number(content: JsonObject, name: str, path: Path) -> int | None:
    """A number of processes or machines; None where the file leaves it open (-1 or nothing).
    Raises ValueError, one line."""
    value = content.get(name, -1)
    if value == -1:
        return None
    if type(value) is not int or value < 1:
        raise ValueError(f"{path}: {name}={value!r}: write a whole number of at least 1")
    return value


def _section(content: JsonObject, name: str, path: Path) -> Read:
    """A section of the file, its names without what they may begin with. Raises ValueError."""
    if not isinstance(section := content.get(name) or {}, Mapping):
        raise ValueError(f"{path}: {name} holds no names with values, but {section!r:.40}")
    return _short(section, name)


def _short(section: Mapping[str, Setting], name: str) -> Read:
    return {str(key).removeprefix(PREFIXES.get(name, "")): v for key, v in section.items()}


def _fsdp(fsdp: Read, path: Path) -> Read:
    if str(fsdp.get("version", 1)) != "2":
        raise ValueError(f"{path}: FSDP 1 is not planned; write fsdp_version: 2")
    reshard = fsdp.get("reshard_after_forward", True)
    if _word(reshard) not in ("yes", "full_shard"):
        raise ValueError(f"{path}: fsdp_reshard_after_forward={reshard!r} is not planned")
    settings: Read = {"sharding": "fsdp2"}
    if _word(fsdp.get("offload_params")) == "yes":
        settings["offload"] = "all"
    if _word(fsdp.get("activation_checkpointing")) == "yes":
        settings["gradient_checkpointing"] = True
    return settings


def _parallelism(several: Read, gpus: int, path: Path) -> Read:
    """Devices that share one layer, between shards of FSDP2. Raises ValueError for other ways."""
    sizes = {name: whole_number(several, name, path) or 1 for name in several if "_size" in name}
    for name in ("dp_replicate_size", "cp_size", "sp_size"):
        if (size := sizes.get(name, 1)) > 1:
            raise ValueError(f"{path}: parallelism_config: {name}={size} is not planned")
    shards, tensor = sizes.get("dp_shard_size", 1), sizes.get("tp_size", 1)
    if shards * tensor != gpus:
        raise ValueError(
            f"{path}: parallelism_config: dp_shard_size={shards} times tp_size={tensor} are not "
            f"num_processes={gpus}"
        )
    return {"tensor_parallel": tensor} if tensor > 1 else {}


def deepspeed_settings(content: JsonObject, path: Path) -> tuple[Read, list[str]]:
    """Of accelerate's deepspeed_config, or of DeepSpeed's own file that it or another file names;
    and keys of DeepSpeed's file that are not understood. Raises ValueError, one line."""
    if named := content.get("deepspeed_config_file"):
        here = Path(str(named))  # which accelerate reads; a file beside its own is meant too
        file = here if here.is_file() else path.parent / here
        return deepspeed_file_settings(read_names(file), file)
    optimizer, weights = (content.get(f"offload_{w}_device", "none") for w in OFFLOADED)
    settings = _zero(content.get("zero_stage", 2), optimizer, weights, path)
    if isinstance(passes := content.get("gradient_accumulation_steps"), int):  # else "auto"
        settings["gradient_accumulation_steps"] = passes
    return settings, []


def deepspeed_file_settings(content: JsonObject, path: Path) -> tuple[Read, list[str]]:
    """DeepSpeed's own config, and keys that are not understood. What is "auto" there is as the
    plan's settings say; a size that is, which transformers makes of the model's width, is planned
    as DeepSpeed's default, and named. Raises ValueError, one line."""
    zero = _section(content, "zero_optimization", path)
    moved = (_section(zero, f"offload_{what}", path) for what in OFFLOADED)
    optimizer, weights = (one.get("device", "none") for one in moved)
    settings = _zero(zero.get("stage", 0), optimizer, weights, path)
    given = {ours: content.get(theirs, "auto") for theirs, ours in BATCH.items()}
    read = [x for x in SIZES if _stage(x) <= zero.get("stage", 0)]  # others wait for their stage
    given |= {name: zero[name] for name in read if name in zero}
    settings |= {name: value for name, value in given.items() if value != "auto"}
    unread = [f"{name}: auto" for name in SIZES if given.get(name) == "auto"]
    on = [name for name in MIXED if _section(content, name, path).get("enabled") is True]
    return settings | dict.fromkeys(on, True), [*unread, *_unread(content, KEYS["deepspeed"])]


def check_batch(found: Read, unread: list[str], settings: Mapping[str, object]) -> list[str]:
    """What a file for DeepSpeed says of the batch otherwise than a plan's settings, a line each:
    neither transformers nor DeepSpeed starts then. `found`, `unread`: what the file gave; where the
    rows of a step are the plan's, they are no longer unread."""
    rows, passes, gpus = (int(str(settings.get(n) or 1)) for n in (*BATCH.values(), "gpus"))
    (micro, ours), wrong = [*BATCH.items()][0], []
    if found.get(ours, rows) != rows:
        wrong.append(f"{micro} is {found[ours]} in DeepSpeed's file, {ours} {rows} here")
    whole = next((line for line in unread if line.startswith(f"{WHOLE_BATCH}: ")), None)
    if whole:
        unread.remove(whole)
        if (size := whole.partition(": ")[2]) != str(rows * passes * gpus):
            wrong.append(
                f"{WHOLE_BATCH} is {size} in DeepSpeed's file, {rows * passes * gpus} here "
                f"({rows} rows × {passes} passes × {gpus} devices)"
            )
    return [f"{line}: DeepSpeed does not start; write auto in the file" for line in wrong]


def _stage(size: str) -> int:
    """The least ZeRO stage that a size is read by."""
    return 3 if size.startswith("stage3_") else 1


def _zero(stage: Setting, optimizer: str, weights: str, path: Path) -> Read:
    """Sharding and offload."""
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"{path}: ZeRO stage {stage!r} is not planned: write 0, 1, 2 or 3")
    if "nvme" in (optimizer, weights):
        raise ValueError(f"{path}: offload to NVMe is not planned")
    found: Read = {"sharding": f"zero{stage}" if stage else "ddp"}
    if "cpu" in (optimizer, weights):
        found["offload"] = "all" if weights == "cpu" else "optimizer"
    return found


def _unread(
    content: Mapping[str, Setting], known: Mapping[str, Setting], inside: str = ""
) -> Iterator[str]:
    """Names, with their values, that `known`, a table of `KEYS`, does not have."""
    free, only = known.get("any", "").split(), known.get("only", {})
    for key, value in content.items():
        section = known.get("inside", {}).get(key)
        if section and isinstance(value, Mapping):
            yield from _unread(_short(value, key), section, f"{inside}{key}.")
        elif key in free or value in (None, "", "auto") or section and not value:
            continue
        elif not any(fnmatch(_word(value), pattern) for pattern in only.get(key, ())):
            yield f"{inside}{key}: {value}"


def _word(value: object) -> str:
    """A value as the table writes it: switches are yes or no, and 1e9 is its digits."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    word = str(value).lower()
    return {"true": "yes", "false": "no", "none": "no"}.get(word, word)
