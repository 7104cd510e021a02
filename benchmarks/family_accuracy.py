"""How right is a plan of any family? `python benchmarks/family_accuracy.py [--only llama phi …]`

A small model of every decoder that transformers registers: one step of SFT, planned and x-rayed
(simulate/), in fp32 on a CPU and in bf16 on a GPU with attention written out. Families that
`cost/families.yaml` describes have to be within the band of all plans; of the others only the
matrices are known, and their errors are what `rough_activations` and `rough` (FLOPs) of
`cost/bands.yaml` are set by. Prints a line for each and writes results/family_accuracy.json, in
which families that were not asked for stay. About ten minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

from rlhf_lab.cost.architecture import architecture
from rlhf_lab.cost.estimate import Estimate
from rlhf_lab.cost.hardware import hardware
from rlhf_lab.cost.setup import Setup

RESULTS = Path(__file__).parent / "results" / "family_accuracy.json"
sys.path.append(str(Path(__file__).parents[1] / "tests" / "kit"))  # for `any_config`
WIDE = (
    {"vocab_size": 5000, "hidden_size": 256, "n_embd": 256, "d_model": 256}
    | dict.fromkeys("intermediate_size intermediate_size_mlp ffn_dim ffn_hidden_size".split(), 704)
    | dict.fromkeys("num_hidden_layers n_layer n_layers num_layers".split(), 4)
    | dict.fromkeys("num_attention_heads n_head n_heads".split(), 8)
    | dict.fromkeys("num_key_value_heads num_kv_heads".split(), 4)
    | dict.fromkeys("head_dim v_head_dim qk_nope_head_dim".split(), 32)
    | dict.fromkeys("kv_lora_rank q_lora_rank".split(), 64)
    | dict.fromkeys("num_experts num_local_experts n_routed_experts".split(), 8)
    | dict.fromkeys("moe_intermediate_size shared_expert_intermediate_size".split(), 128)
    | dict.fromkeys("max_position_embeddings n_positions max_seq_len".split(), 2048)
    | {"qk_rope_head_dim": 16, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
    | {"n_group": 1, "topk_group": 1, "pad_token_id": 0}
)
NO_DROPOUT = (
    *("attention_dropout", "hidden_dropout", "residual_dropout", "embedding_dropout", "dropout"),
    *("resid_pdrop", "embd_pdrop", "attn_pdrop", "activation_dropout"),
)
CASES: dict[str, dict[str, Any]] = {
    "fp32": {"gpu": False},
    "bf16, eager": {"gpu": True, "dtype": "bfloat16", "attn_implementation": "eager"},
}


def step(config: dict[str, Any], **more: Any) -> dict[str, float]:
    """Peak and FLOPs of a step of SFT, predicted and simulated, and what is loose in the peak."""
    from rlhf_lab.simulate.step import simulate_step

    model = architecture(config)
    setup = Setup(stage="sft", model=model, batch=2, prompt=64, response=64, **more)
    plan = Estimate(setup, hardware("h200" if setup.gpu else "laptop"))
    seen = simulate_step(setup, config)
    return {
        "predicted": plan.peak,
        "simulated": seen.peak,
        "low": plan.peak * plan.memory_band[0],
        "high": plan.peak * plan.memory_band[1],
        "flops": plan.flops,
        "flops counted": seen.flops,
    }


KINDS = "described", "by its matrices", "by its matrices, without fused kernels"


def kind_of(config: dict[str, Any]) -> str:
    """The last kind are state spaces and the like, which fake tensors run without their kernels;
    the plan's remarks say that its bands leave that out."""
    model = architecture(config)
    return KINDS[model.facts.rough + any("fused kernels" in line for line in model.remarks)]


def rows(families: list[str]) -> list[dict[str, Any]]:
    from any_config import small_config

    found = []
    for family in families:
        config = small_config(family, WIDE)
        for name, more in CASES.items():
            row: dict[str, Any] = {"family": family, "case": name}
            try:
                if config is None:
                    raise ValueError("transformers makes no small one of it")
                config |= dict.fromkeys((n for n in NO_DROPOUT if n in config), 0.0)
                if "kv_lora_rank" in config:  # latent attention: these follow from others
                    config["head_dim"] = config["qk_rope_head_dim"]
                    config["num_key_value_heads"] = config["num_attention_heads"]
                row |= {"kind": kind_of(config), **step(config, **more)}
                error = row["predicted"] / row["simulated"] - 1
                flops = row["flops"] / row["flops counted"] - 1
                inside = row["low"] <= row["simulated"] <= row["high"]
                line = f"{error:+7.2%} FLOPs {flops:+7.2%} {'' if inside else 'OUTSIDE'}"
            except Exception as problem:  # no decoder, or code that fake tensors cannot run
                line = row["refused"] = (str(problem).splitlines() or [type(problem).__name__])[0]
            print(f"{family} ({name}): {line}", flush=True)
            found.append(row)
    return found


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each kind of family: median and worst error, and how many are inside."""
    out = {}
    for kind in KINDS:
        of = [r for r in found if r.get("kind") == kind]
        errors = sorted(abs(r["predicted"] / r["simulated"] - 1) for r in of)
        flops = sorted(abs(r["flops"] / r["flops counted"] - 1) for r in of)
        inside = sum(r["low"] <= r["simulated"] <= r["high"] for r in of)
        out[kind] = {
            "cases": len(of),
            "inside the band": inside,
            "memory": {"median": errors[len(of) // 2], "worst": errors[-1]} if of else {},
            "flops": {"median": flops[len(of) // 2], "worst": flops[-1]} if of else {},
        }
    return out


def main() -> None:
    from any_config import TYPES

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", default=TYPES)
    wanted = parser.parse_args().only
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    before = json.loads(RESULTS.read_text())["rows"] if RESULTS.is_file() else []
    found = [r for r in before if r["family"] not in wanted]
    for family in wanted:
        found += rows([family])
        result = {"summary": summary(found), "rows": sorted(found, key=lambda r: r["family"])}
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(summary(found), indent=1))


if __name__ == "__main__":
    main()
