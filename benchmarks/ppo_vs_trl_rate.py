"""How much of the machine does our update phase reach? The section `rate` of `ppo_vs_trl.py`.

The machine's rate is that of square fp32 matrix products (the best of three sizes, on the same
threads), measured before and after; their mean counts. The update phase is the meter's forward,
backward and optimizer seconds. The work is what real tokens need and no more: for a row of p prompt
and t response tokens, n = p + t,

    block      2 · N_block · n                   N_block: weights of attention and MLP maps
    attention  4 · L · a·d · n·(n + 1)/2         scores, and scores · v, of causal pairs
    head       2 · h · V · t  (policy)           2 · h · t  (value)

forward, and twice that backward (Kaplan et al. 2020, section 2.1); policy and value model, every
epoch. Padding, what attention recomputes, entropy and softmax count as nothing. So the share that
is reported cannot be raised by computing more.

The rest is named from torch's profiler on one update: seconds by group of operations, and what no
operation took is Python's. The profiler slows an update down; by how much stands beside the table.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from ppo_parity_setup import ROOT, bundled_world, make_world
from ppo_vs_trl_report import EQUAL, Options, Worker, job_of, median, show, target

UPDATE = ("forward", "backward", "optimizer")
TWO_MILLION = {
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "intermediate_size": 512,
    "vocab_size": 1024,
}
SHARE = 0.6
AT = ("small", "random 2M")
"""The models that the target is for."""


def forward_flops(
    config: Mapping, rows: Sequence[tuple[int, int]], head: int, causal: bool = True
) -> int:
    """FLOPs of a pass over unpadded rows of (prompt, response) tokens.

    `head`: outputs of the head, applied at each response token. `causal`: only the query-key pairs
    that a causal mask lets through; torch's FlopCounterMode counts all n².
    """
    from rlhf_lab.cost.architecture import architecture

    parts = architecture(config).by_part()
    block = parts["attention"] + parts["mlp"]
    width = config["hidden_size"]
    heads = config["num_attention_heads"]
    inner = heads * (config.get("head_dim") or width // heads)
    flops = 0
    for prompt, response in rows:
        n = prompt + response
        pairs = n * (n + 1) // 2 if causal else n * n
        flops += 2 * block * n + 4 * config["num_hidden_layers"] * inner * pairs
        flops += 2 * width * head * response
    return flops


def update_flops(config: Mapping, rows: Sequence[tuple[int, int]], epochs: int) -> int:
    """FLOPs that one update phase needs: policy and value, forward and backward."""
    both = sum(forward_flops(config, rows, head) for head in (config["vocab_size"], 1))
    return 3 * epochs * both


# --------------------------------------------------------------------------------------- the worlds


def small_world(folder: Path, tiny: Path, prompts: int) -> None:
    """The bundled prompts with the bundled `small` base model; its critics have a new head."""
    from rlhf_lab.models.tokenizer import load_tokenizer
    from rlhf_lab.models.weights import load_causal_lm, new_reward_model

    folder.mkdir()
    bundled_world(folder, tiny, prompts)
    base = ROOT / "small_models" / "small" / "base"
    load_causal_lm(base).save_pretrained(folder / "policy")
    critic = new_reward_model(base, load_tokenizer(folder / "tokenizer"))
    critic.save_pretrained(folder / "reward")
    for copy, of in (("ref", "policy"), ("value", "reward")):
        shutil.copytree(folder / of, folder / copy)


def worlds(options: Options) -> dict[str, Path]:
    """Folders with models and prompts, by the name of the model."""
    from ppo_vs_trl import sized_world

    found = {n: options.scratch / n.replace(" ", "_") for n in ("tiny", *AT)}
    found["tiny"].mkdir()
    make_world(found["tiny"], str(options.model), 1024)
    small_world(found["small"], options.model, 1024)
    sized_world(found["random 2M"], 1024, **TWO_MILLION)
    return found


# ------------------------------------------------------------------------------------------ section


def rate(options: Options) -> dict:
    """The share of the machine's rate at three sizes, and where the rest of the time goes."""
    models, targets = {}, []
    with Worker("ours", options, malloc=True) as worker:
        for name, folder in worlds(options).items():
            models[name] = _one(worker, folder, name, options)
            if name in AT:
                targets.append(
                    target(
                        f"{name}: share of the machine's rate in the update",
                        models[name]["share"],
                        SHARE,
                        at_least=True,
                    )
                )
    show(
        "update phase, equal work, real tokens only",
        [
            {
                "model": n,
                "GFLOP needed": f"{m['needed'] / 1e9:.1f}",
                "seconds": f"{m['seconds']:.3f}",
                "GFLOP/s": f"{m['rate'] / 1e9:.0f}",
                "machine": f"{m['machine'] / 1e9:.0f}",
                "share": f"{m['share']:.0%}",
                "computed / needed": f"{m['computed_over_needed']:.2f}",
            }
            for n, m in models.items()
        ],
    )
    for name, found in models.items():
        _show_rest(name, found)
    return {"settings": EQUAL, "models": models, "targets": targets}


def _one(worker: Worker, folder: Path, name: str, options: Options) -> dict:
    config = json.loads((folder / "policy" / "config.json").read_text())
    skip, epochs = options.warm_up, EQUAL["num_ppo_epochs"]
    products, seconds, needed = [], [], []
    for repeat in range(options.repeats):
        job = job_of(folder, EQUAL, skip + options.iterations, 1000 * (repeat + 1), warm_up=skip)
        products.append(worker.ask("products", seconds=1.5))
        found = worker.ask("phases", **job)
        products.append(worker.ask("products", seconds=1.5))
        seconds += [sum(line.get(p, 0.0) for p in UPDATE) for line in found["phases"]]
        needed += [update_flops(config, rows, epochs) for rows in found["rows"]]
    machine = sum(p["best"] for p in products) / len(products)
    rates = [n / s for n, s in zip(needed, seconds, strict=True)]
    counted = worker.ask("phases", flops=True, **job_of(folder, EQUAL, 2, 1000, warm_up=0))
    least = sum(update_flops(config, rows, epochs) for rows in counted["rows"])
    computed = sum(sum(line.get(p, 0) for p in UPDATE) for line in counted["flops"])
    profile = worker.ask("profile", **job_of(folder, EQUAL, 0, 1000, warm_up=skip))
    return {
        "config": {k: config[k] for k in TWO_MILLION},
        "machine": machine,
        "machine_products": products,
        "seconds": median(seconds),
        "needed": median(needed),
        "rate": median(rates),
        "share": median(rates) / machine,
        "rates": rates,
        "all_seconds": seconds,
        "computed_over_needed": computed / least,
        "profile": profile,
    }


def _show_rest(name: str, found: dict) -> None:
    """Where the time of an update goes, from the profile."""
    profile = found["profile"]
    wall, groups = profile["wall"], dict(profile["groups"])
    needed = found["needed"] / found["machine"]
    products = groups.pop("matrix products", 0.0)
    split = {
        "products of real tokens at the machine's rate": needed,
        "products: padding, and shapes that run slower": products - needed,
    }
    rest = sorted(groups.items(), key=lambda item: -item[1])
    show(
        f"{name}: one update under the profiler, {wall:.3f} s (without it {found['seconds']:.3f})",
        [
            {"part": n, "seconds": f"{s:.3f}", "share": f"{s / wall:.0%}"}
            for n, s in (*split.items(), *rest)
        ],
    )
