"""What do other public estimators say of the same memory cases? `python benchmarks/peers.py`

One function per peer: `name(case) -> bytes per GPU`, None where the peer cannot say. A case is one
of `cost_cases`, or the like with `gpus` and `sharding`. No peer knows of a second model (reference,
reward, value): a figure is for training one causal LM on the case's sequences, two for a pair. Left
out is what a peer lists as CUDA context and fragmentation: figures are held against the peak of the
allocator. accelerate is ours already; the rest run in PEERS_PYTHON (this Python if not set):

    python -m venv P && P/bin/pip install torch setuptools wheel vramcalc fitcheck-llm "fire<0.6"
    P/bin/pip install --no-build-isolation deepspeed; P/bin/pip install --no-deps llm-analysis
"""

import json
import logging
import os
import sys
from dataclasses import replace
from functools import cache
from importlib import metadata
from subprocess import PIPE, Popen
from types import SimpleNamespace

PEERS = {}


def peer(package: str, cannot: str):
    """Register a peer. `cannot`: traits of a case (see `facts`) that it does not support."""

    def register(function):
        def estimated(case) -> int | None:
            known = facts(case)
            unsupported = set(cannot.split()) & set(known["traits"])
            return None if unsupported else ask(function.__name__, known)

        PEERS[function.__name__] = package, function, estimated
        return estimated

    return register


@peer("accelerate", cannot="lora sgd other zero1 zero2 zero3 fsdp2")
def accelerate(c):
    """`estimate-memory`, Adam: the largest state, not their sum; no head, no activations."""
    from accelerate.commands import estimate as e

    with e.init_empty_weights():
        model = e.AutoModel.from_config(e.AutoConfig.for_model(**c.config), dtype="float32")
    size, precision = e.calculate_maximum_sizes(model)[0], "bfloat16" if c.half else "float32"
    return max(e.estimate_training_usage(size, precision).values())


@peer("deepspeed", cannot="lora sgd other float32 none ddp zero1 fsdp2")
def deepspeed(c):
    """`estimate_zero{2,3}_model_states_mem_needs` (2 on one GPU): 16 bits, Adam; no activations."""
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    known = {"total_params": c.params, "num_gpus_per_node": c.gpus, "cpu_offload": False}
    if c.sharding != "zero3":
        return stage_1_and_2.estimate_zero2_model_states_mem_needs(**known)[1]
    known |= {"largest_layer_params": c.largest, "cpu_offload_params": False}
    return stage3.estimate_zero3_model_states_mem_needs(**known)[1]


@peer("llm-analysis", cannot="lora other float32 fsdp2")
def llm_analysis(c):
    """`training`: all; 16 bits, a master copy, ZeRO; an MLP of 2 x 4 x hidden, as it reads it."""
    from llm_analysis.analysis import ActivationRecomputation, DSZeRO, LLMAnalysis
    from llm_analysis.config import ModelConfig, ParallelismConfig, get_gpu_config_by_name

    model = ModelConfig("case", c.layers, c.heads, c.hidden, c.vocab, c.length, c.kv_heads)
    gpu = replace(get_gpu_config_by_name("h100-sxm-80gb"), mem_per_GPU_in_GB=10**6)  # all fits
    zero = int(c.sharding[-1]) if c.sharding.startswith("zero") else 0
    master = 2 if c.dtype == "bfloat16" and not zero else 4
    found = LLMAnalysis(model, gpu, parallelism_config=ParallelismConfig(dp_size=c.gpus)).training(
        batch_size_per_gpu=c.sequences,
        gradient_accumulation_steps=1,
        seq_len=c.length,
        activation_recomputation=ActivationRecomputation(2 * c.gradient_checkpointing),
        ds_zero=DSZeRO(zero),
        master_weights_dtype_bytes=master,
        flash_attn=c.flash,
        other_op_bytes=2 * master * (c.optimizer == "adamw"),
    )
    return int(found["(weight+op_state+grad+act)_memory_per_gpu"])


@peer("vramcalc", cannot="other gpus")
def vramcalc(c):
    """`estimate`: all; one GPU, llama, mistral, qwen2, gemma and gemma2, LoRA of attention only."""
    from vramcalc import arch, estimate

    if c.config["model_type"] not in arch.SUPPORTED_MODEL_TYPES:
        return None
    return estimate(
        c.config,
        mode="train",
        dtype="bf16" if c.half else "fp32",
        batch=c.sequences,
        seq_len=c.length,
        lora_rank=c.lora_r or None,
        grad_checkpoint=c.gradient_checkpointing,
        optimizer=c.optimizer,
        attn_impl=c.attention,
        precision="amp" if c.mixed else "pure",
    ).total


@peer("fitcheck-llm", cannot="other gpus ungated lora-on-float32")
def fitcheck(c):
    """`estimate` less overhead: all; one GPU, gated MLPs, a master copy in full 16-bit training."""
    from fitcheck import ModelConfig, TrainingConfig, estimate, get_gpu

    model = ModelConfig(
        "case",
        c.params,
        c.hidden,
        c.layers,
        c.heads,
        c.kv_heads,
        c.ffn,
        c.vocab,
        c.head_dim,
        c.tied,
    )
    found = estimate(
        model,
        TrainingConfig(
            precision="bf16" if c.half else "fp32",
            optimizer=c.optimizer,
            batch_size=c.sequences,
            optimizer_dtype="fp32" if c.lora_r or c.dtype == "float32" else "bf16",
            seq_len=c.length,
            lora_targets=[f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")],
            grad_checkpoint=c.gradient_checkpointing,
            flash_attn=c.flash,
            lora_rank=c.lora_r or None,
        ),
        get_gpu("h100"),
    )
    return int((found.total_mib - found.overhead_mib) * 2**20)


@cache
def shape(config: str) -> dict:
    """What peers want to know of a model, counted on one without storage."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    c = AutoConfig.for_model(**json.loads(config))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(c)
    own = [sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules()]
    return {
        "params": model.num_parameters(),
        "largest": max(own),
        "layers": c.num_hidden_layers,
        "hidden": c.hidden_size,
        "heads": c.num_attention_heads,
        "vocab": c.vocab_size,
        "kv_heads": getattr(c, "num_key_value_heads", None) or c.num_attention_heads,
        "head_dim": getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads,
        "ffn": getattr(c, "intermediate_size", None),
        "tied": c.tie_word_embeddings,
    }


def facts(case) -> dict:
    """The case and its model in plain values, for another Python; `traits` not all can take."""
    from rlhf_lab.stages import STAGES  # here: the other Python has no rlhf_lab

    gpus, sharding = getattr(case, "gpus", 1), getattr(case, "sharding", "none")
    optimizer = "adamw" if case.optim.startswith("adamw_torch") else case.optim
    half, mixed = case.bf16 or case.dtype == "bfloat16", case.bf16 and case.dtype == "float32"
    gated = case.config["model_type"] in "llama mistral qwen2 qwen3 gemma phi3".split()
    traits = {
        "lora": case.lora_r,
        "lora-on-float32": case.lora_r and mixed,
        "float32": not half,
        "sgd": optimizer == "sgd",
        "other": optimizer not in ("adamw", "sgd"),
        "gpus": gpus > 1,
        sharding: gpus > 1,
        "ungated": not gated,
    }
    plain = ("config", "dtype", "lora_r", "gradient_checkpointing")
    return (
        {name: getattr(case, name) for name in plain}
        | shape(json.dumps(case.config))
        | {
            "sequences": case.batch * STAGES[case.stage].answers,
            "half": half,
            "length": case.prompt + case.response,
            "optimizer": optimizer,
            "gpus": gpus,
            "attention": case.attn_implementation[:5],
            "flash": case.attn_implementation != "eager",
            "sharding": sharding,
            "mixed": mixed,
            "traits": [t for t, there in traits.items() if there],
        }
    )


@cache
def other_python() -> tuple[Popen, dict]:
    """The process that the peers run in, and their versions there."""
    python = os.environ.get("PEERS_PYTHON") or sys.executable
    there = Popen([python, __file__, "--serve"], stdin=PIPE, stdout=PIPE, text=True)
    return there, json.loads(there.stdout.readline())


def ask(name: str, known: dict) -> int | None:
    """A peer's figure: a line with the question, a line with the answer; accelerate runs here."""
    if name == "accelerate":
        return PEERS[name][1](SimpleNamespace(**known))
    there, versions = other_python()
    if name not in versions:
        return None
    print(json.dumps([name, known]), file=there.stdin, flush=True)
    return json.loads(there.stdout.readline())  # empty if it failed: its error is printed above


def serve() -> None:
    """Answer `ask`: first the versions. What else the peers print is dropped."""
    answers, sys.stdout = sys.stdout, open(os.devnull, "w")
    logging.disable(logging.CRITICAL)
    here = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    versions = {name: here[p[0]] for name, p in PEERS.items() if p[0] in here}
    print(json.dumps(versions), file=answers, flush=True)
    for line in sys.stdin:
        name, known = json.loads(line)
        print(json.dumps(PEERS[name][1](SimpleNamespace(**known))), file=answers, flush=True)


def peers() -> dict[str, tuple]:
    """{name: (version, function, what it covers)} of the peers that can be asked."""
    found = other_python()[1] | {"accelerate": metadata.version("accelerate")}
    return {n: (found[n], p[2], p[1].__doc__) for n, p in PEERS.items() if n in found}


def main() -> None:
    from cost_cases import Case

    found, size = peers(), {"batch": 2, "prompt": 256, "response": 256}
    print(*(f"{n} {found[n][::2] if n in found else 'not there'}" for n in PEERS), sep="\n")
    for case in (
        Case("sft", "meta-llama/Llama-3.2-1B", dtype="bfloat16", **size),
        Case("dpo", "Qwen/Qwen2.5-0.5B", bf16=True, **size),
        Case("ppo", "EleutherAI/pythia-410m", bf16=True, **size),
    ):
        print(case, {n: (b := p[1](case)) and f"{b / 2**30:.2f} GiB" for n, p in found.items()})


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["--serve"] else main()
