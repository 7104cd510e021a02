"""A published figure as the planner's arguments.

`call(figure)` turns a figure into the arguments of `rlhf_lab.cost.estimate.estimate`, with lists of
what it had to leave out (`missing`) and of what it wrote as something near (`nearly`). Nothing is
fitted here: this reads what the source says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import published_figures as figures
from published_figures import Figure

from rlhf_lab.cost.estimate import Estimate, estimate
from rlhf_lab.models.load import presets

DEVICES = ("a100-40", "a100-80", "h100", "h200", "v100", "rtx4090", "a6000", "l40s")
STAND_INS = {
    "a100-80-330w": "a100-80",
    "a800": "a100-80",
    "h800": "h100",
    "rtx3090-280w": "rtx3090",
    "a6000-ada": "rtx6000-ada",
}
"""Devices under another name, or that differ little where they are used: at less power, or with
slower links."""
TRAINING = {
    "pretraining": "sft",
    **{s: "sft" for s in ("sft", "lora sft", "qlora sft")},
    **{s: s for s in ("reward", "dpo", "kto", "ppo", "grpo")},
}
PRECISIONS: Mapping[str, dict[str, object]] = {
    "bf16": {"dtype": "bfloat16"},
    "fp16": {"dtype": "float16"},
    "fp32": {"dtype": "float32", "bf16": False},
    "bf16-amp": {"bf16": True},
    "fp16-deepspeed": {"fp16": True},
    "bf16-deepspeed": {"bf16": True},
}
OPTIMIZERS = {
    "adamw": "adamw_torch",
    "adamw_fused": "adamw_torch_fused",
    "adamw_8bit": "adamw_bnb_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
}
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
FORMATS = {
    "gptq-int4": "gptq",
    "awq-int4-g128": "awq",
    "fp8": "fp8",
    "int8": "int8_weight_only",
    "int4-g64": "int4_g64",
    "int4-g32": "int4_g32",
}
"""Weights of fewer bits that an engine serves."""
CHECKPOINTING: Mapping[str, dict[str, object]] = {
    "none": {"gradient_checkpointing": False},
    "full": {"gradient_checkpointing": True},
    "selective by operation": {"gradient_checkpointing": True, "selective_checkpointing": True},
    "every second layer": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"every_n_layers": 2},
    },
}
UNKNOWN = ("async_tensor_parallel", "distilled_from_logits")
"""Switches that the planner has no word for."""
ABOVE_ONE = ("pipeline_parallel", "context_parallel", "expert_parallel")
PARALLEL = tuple(w.replace("_", " ") for w in ABOVE_ONE)


@dataclass(kw_only=True)
class Call:
    """Arguments of `estimate`, and what they leave out."""

    stage: str = "sft"
    config: dict[str, object] = field(default_factory=dict)
    device: str = "a100-80"
    settings: dict[str, object] = field(default_factory=dict)
    roles: dict[str, dict[str, object]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    nearly: list[str] = field(default_factory=list)

    def plan(self) -> Estimate:
        """Raises ValueError, one line, for what the planner refuses."""
        return estimate(self.stage, self.config, self.device, self.settings, **self.roles)


def model_config(name: str, sequence: int | None = None) -> dict[str, object] | None:
    """A model's config as a dict; None where only its size is known. Learned positions are as many
    as the sequence has."""
    entry = figures.tables()["models"].get(name, {})
    if "like" in entry:
        return model_config(entry["like"], sequence)
    config = entry.get("config") or presets().get(name)
    if config and "n_positions" in config and sequence:
        return {**config, "n_positions": sequence}
    return config


def call(figure: Figure) -> Call:
    """The arguments that say what the figure was measured on."""
    said, c = figure.complete, Call()
    sequence = said.get("sequence")
    config = model_config(figure.model, sequence if isinstance(sequence, int) else None)
    if config is None:
        c.missing.append(f"model {figure.model}")
    c.config = dict(config or {})
    _device(figure, c)
    _precision(figure, said, c)
    if figure.stage in TRAINING:
        c.stage = TRAINING[figure.stage]
        _training(figure, said, c)
    else:
        c.stage = "inference"
        _inference(figure, said, c)
    c.missing += _doubts(figure)
    c.missing += [w.replace("_", " ") for w in UNKNOWN if said.get(w)]
    c.missing += [n for w, n in zip(ABOVE_ONE, PARALLEL) if _number(said, w) > 1]
    return c


def _doubts(figure: Figure) -> Iterator[str]:
    """What a figure's entry says of it that no plan can follow."""
    for word, kinds in (("doubt", figures.KINDS), ("doubt of rates", ("throughput", "hours"))):
        if word in figure.open and figure.kind in kinds:
            yield f"doubt: {figure.open[word]}"
    if figure.stage == "pretraining" and not {"micro_batch", "sharding"} & figure.config.keys():
        yield "how it was run: its micro-batch and sharding are assumed"


def _number(said: Mapping[str, object], word: str) -> float:
    value = said.get(word, 0)
    return value if isinstance(value, (int, float)) else 0


def _device(figure: Figure, c: Call) -> None:
    name = str(figure.hardware["name"])
    c.device = STAND_INS.get(name, name)
    if c.device not in (*DEVICES, *STAND_INS.values()):
        c.device = "a100-80"  # memory does not ask which GPU it is
        if figure.kind != "memory":
            c.missing.append(f"hardware {name}")
    elif name in STAND_INS:
        c.nearly.append(f"{name} as {c.device}")
    c.settings |= {"gpus": figure.hardware["gpus"], "nodes": figure.hardware["nodes"]}


def _precision(figure: Figure, said: Mapping[str, object], c: Call) -> None:
    precision = str(said.get("precision", "bf16"))
    if precision == "fp8-amp" and figure.kind == "memory":  # states and activations stay as wide
        precision = "bf16-amp"
        c.nearly.append("products in 8 bits as in 16")
    narrow = precision == "bf16" and said.get("autocast") == "bf16"
    if narrow and said.get("sharding") == "fsdp" and not said.get("lora"):
        # accelerate 0.34 and later, FSDP and mixed precision: what is trained is made fp32.
        precision = "bf16-amp"
    if precision not in PRECISIONS:
        c.missing.append(f"precision {precision}")
    c.settings |= PRECISIONS.get(precision, {})
    quantised = said.get("quantisation")
    if quantised in ("nf4", "nf4-dq"):
        double = quantised == "nf4-dq" or bool(said.get("double_quantisation"))
        c.settings |= {"load_in_4bit": True, "use_bnb_nested_quant": double}
        if said.get("kbit_upcasts"):  # peft's prepare_model_for_kbit_training: the rest in fp32
            c.settings |= {"dtype": "float32", "bf16": True}
    elif quantised and figure.stage in TRAINING:
        c.missing.append(f"weights in {quantised}")
    elif quantised:
        c.settings["quantization"] = FORMATS[str(quantised)]
    if _number(said, "tensor_parallel") > 1:
        c.settings["tensor_parallel"] = said["tensor_parallel"]


def _inference(figure: Figure, said: Mapping[str, object], c: Call) -> None:
    for word, name in (
        ("batch", "per_device_train_batch_size"),
        ("prompt", "prompt_length"),
        ("response", "response_length"),
    ):
        if word in said:
            c.settings[name] = said[word]
        elif word == "response":
            c.settings[name] = 1
        elif figure.stage != "serving" or word != "batch":
            c.missing.append(word)
    if figure.stage == "serving" and "requests" not in said:
        c.missing.append("requests")
    elif figure.stage == "serving":  # as many at once as there is room for
        c.settings |= {"concurrency": said["requests"], "max_num_seqs": 4096}
        c.settings |= {"kv_cache_dtype": said.get("kv_precision", "auto")}
    quantised = c.settings.get("quantization") is not None
    if said.get("engine") == "vllm" or said.get("compile") or quantised:
        c.settings["engine"] = "vllm"
        if said.get("engine") != "vllm":
            c.nearly.append("compiled code as an engine")
        if figure.stage != "serving":  # no room is kept for other requests
            tokens = max(1, int(_number(said, "batch") * _number(said, "prompt")))
            c.settings |= {"max_num_batched_tokens": tokens, "max_num_seqs": said.get("batch", 1)}
    if c.settings.get("engine") == "vllm" and c.settings.get("load_in_4bit"):
        c.missing.append("weights in NF4 in compiled code")


def _training(figure: Figure, said: Mapping[str, object], c: Call) -> None:
    set_ = c.settings
    if "micro_batch" in said:
        set_["per_device_train_batch_size"] = said["micro_batch"]
    else:
        c.missing.append("micro-batch")
    set_["gradient_accumulation_steps"] = said.get("accumulation", 1)
    shares, rows = int(_number(said, "tensor_parallel")), int(_number(said, "micro_batch"))
    if figure.kind == "memory" and shares > 1 and rows % shares == 0 and said.get("sharding"):
        # Sequence parallel: norms and what is kept are shares too, so that a device holds as much
        # as with a share of the rows and of all weights.
        set_ |= {"per_device_train_batch_size": rows // shares, "tensor_parallel": 1}
        c.nearly.append("shares of layers and sequences as shares of rows")
    _lengths(figure, said, c)
    _size_of_run(figure, said, c)
    _sharding(figure, said, c)
    optimizer = str(said.get("optimizer", "adamw"))
    if optimizer in OPTIMIZERS:
        fused = optimizer == "adamw" and said.get("fused_step")
        set_["optim"] = "adamw_torch_fused" if fused else OPTIMIZERS[optimizer]
    else:
        c.missing.append(f"optimizer {optimizer}")
    checkpointing = str(said.get("checkpointing", "none"))
    if checkpointing not in CHECKPOINTING:
        c.missing.append(f"checkpointing {checkpointing}")
    set_ |= CHECKPOINTING.get(checkpointing, {})
    set_["activation_offloading"] = bool(said.get("offload_activations"))
    if said.get("fused_kernels") or said.get("compile"):
        set_["use_liger_kernel"] = True
        if said.get("compile"):
            c.nearly.append("what a compiler fuses as Liger's kernels")
    set_["loss"] = loss = str(said.get("loss", "plain"))
    if loss == "fused" and said.get("chunked_loss"):
        set_["loss"] = "chunked"
    set_["optimizer_in_backward"] = bool(said.get("optimizer_in_backward"))
    attention = {"flash": "flash_attention_2"}
    set_["attn_implementation"] = attention.get(str(said.get("attention")), said.get("attention"))
    _adapters(said, c)
    if c.stage == "ppo":
        _ppo(said, c)
    elif c.stage == "grpo":
        set_["num_generations"] = said.get("num_generations")
        if "num_generations" not in said:
            c.missing.append("size of a group")


def _lengths(figure: Figure, said: Mapping[str, object], c: Call) -> None:
    set_ = c.settings
    if "prompt" in said:
        set_ |= {"prompt_length": said["prompt"], "response_length": said.get("response", 1)}
        return
    longest = said.get("sequence", said.get("longest"))
    if longest is None:
        c.missing.append("length")
        return
    padded = "sequence" not in said and said.get("micro_batch") != 1
    set_ |= {"prompt_length": 0, "response_length": longest, "padded": padded}
    if "sequence" not in said and figure.kind != "memory":
        c.missing.append("average length")


def _size_of_run(figure: Figure, said: Mapping[str, object], c: Call) -> None:
    """Rows, epochs, steps: only hours ask."""
    if figure.kind != "hours":
        return
    c.settings["num_train_epochs"] = said.get("epochs", 1)
    if "tokens" in said and _number(said, "sequence"):
        c.settings["rows"] = round(_number(said, "tokens") / _number(said, "sequence"))
    elif "steps" in said or "iterations" in said:
        c.settings["max_steps"] = said.get("steps", said.get("iterations"))
    elif "rows" in said:
        c.settings["rows"] = said["rows"]
    else:
        c.missing.append("size of the data")


def _sharding(figure: Figure, said: Mapping[str, object], c: Call) -> None:
    sharding, offload = said.get("sharding"), said.get("offload", "none")
    if sharding == "zero0" and figure.kind == "memory":
        # Master weights whole on every rank, as ZeRO-1 on one.
        c.settings |= {"sharding": "zero1", "gpus": 1, "nodes": 1}
        return
    if sharding == "zero0":
        c.settings |= {"sharding": "ddp", "dtype": "float16", "fp16": False}
        c.nearly.append("ZeRO-0 as DDP")
    elif sharding == "hsdp":  # sharded in a node, copied between nodes
        nodes = int(_number(figure.hardware, "nodes"))
        gpus = int(_number(figure.hardware, "gpus")) // nodes
        c.settings |= {"sharding": "fsdp2", "gpus": gpus, "nodes": 1}
        c.nearly.append("HSDP as FSDP2 of one node")
    elif sharding:
        c.settings["sharding"] = "fsdp2" if sharding == "fsdp" else sharding
        if sharding == "fsdp":  # one unit of all that is in no layer
            c.settings["fsdp_units"] = "root"
            if "transformers" in figure.software:  # which recomputed reentrantly then
                c.settings["fsdp_version"] = 1
    c.settings["offload"] = offload


def _adapters(said: Mapping[str, object], c: Call) -> None:
    lora = said.get("lora")
    if not isinstance(lora, Mapping):
        return
    targets = list(lora.get("targets", []))
    if c.config.get("model_type") == "gpt_neox" and "q_proj" in targets:
        targets = ["query_key_value"]
        c.nearly.append("adapters of q and v as those of one map")
    if "qkv" in targets:
        targets = ["q_proj", "k_proj", "v_proj", *(t for t in targets if t != "qkv")]
        c.nearly.append("one matrix for q, k, v as three")
    c.settings |= {
        "lora_r": lora["r"],
        "lora_target_modules": tuple(targets) or "all-linear",
        "adapter_dtype": DTYPES[str(said.get("lora_dtype", "fp32"))],
    }


def _ppo(said: Mapping[str, object], c: Call) -> None:
    c.settings |= {
        "num_ppo_epochs": said.get("ppo_epochs", 1),
        "num_mini_batches": said.get("mini_batches", 1),
        "local_rollout_forward_batch_size": said.get("micro_batch", 1),
        "ema": bool(said.get("ema")),
        "joint_update": False,
    }
    for role, word in (("value", "critic"), ("reward", "reward")):
        if word in said and (other := model_config(str(said[word]))):
            c.roles[role] = dict(other)
