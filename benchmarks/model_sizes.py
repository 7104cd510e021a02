"""Whether the bundled models get better with size: `python benchmarks/model_sizes.py`.

Three figures of each size, on what no stage has trained on and the same for all: loss of the base
model on held-out documents, gold reward of the SFT model's stories, accuracy of the reward model on
held-out pairs (those of the default size's SFT model). Beside each step from one size to the next
its standard error, of the paired differences. `--builds 1=FOLDER 2=FOLDER` measures builds of other
seeds instead (`make small_models ARGS="--seed 1 --out FOLDER"`), beside the seeds measured before.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "model_sizes.json"
sys.path[:0] = [str(ROOT), str(ROOT / "small_models")]

import pairs  # noqa: E402
import pretraining  # noqa: E402

from rlhf_lab.data.load import annotate  # noqa: E402
from rlhf_lab.models.load import Model, small_models_folder  # noqa: E402
from rlhf_lab.ppo.texts import sample_ids, score_texts  # noqa: E402
from rlhf_lab.world import corpus  # noqa: E402
from rlhf_lab.world.gold_reward import (  # noqa: E402
    Annotator,
    accuracy_ceiling,
    gold_parts,
    gold_reward,
)

SEED = 9001
"""Of the requests, which no build has read."""
STAGES = ("base", "sft", "reward")
MIDDLE = "tiny"
"""the size whose SFT model writes the pairs"""


def models_of(folder: Path) -> dict[str, Model]:
    return {
        name: Model(name, {stage: str(folder / name / stage) for stage in STAGES})
        for name in pretraining.SIZES
        if all((folder / name / stage / "config.json").is_file() for stage in STAGES)
    }


@torch.no_grad()
def losses(model: Model, documents: int) -> tuple[list[float], float]:
    """Summed nats of each held-out document, and the mean number of its learned tokens."""
    base, reader = model.base, pretraining.Reader(model.tokenizer)
    mixture = pretraining.PHASES["stories"]["documents"]
    sums: list[float] = []
    tokens = 0
    for ids, learned in reader.batches("test", documents // pretraining.BATCH, SEED, mixture):
        logits = base(ids[:, :-1]).logits
        nats = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), ids[:, 1:], reduction="none"
        )
        sums += (nats * learned[:, 1:]).sum(1).tolist()
        tokens += int(learned[:, 1:].sum())
    return sums, tokens / len(sums)


def golds(model: Model, prompts: list[str]) -> tuple[list[float], dict[str, float]]:
    """Gold reward of one story for each prompt, and the means of its parts."""
    ids = sample_ids(model.sft, model.tokenizer, prompts, seed=SEED)
    texts = model.tokenizer.batch_decode([one for (one,) in ids], skip_special_tokens=True)
    parts = [gold_parts(p, t) for p, t in zip(prompts, texts, strict=True)]
    means = {name: sum(p[name] for p in parts) / len(parts) for name in parts[0]}
    return [gold_reward(p, t) for p, t in zip(prompts, texts, strict=True)], means


class Judged:
    """Held-out pairs with the annotator's labels, each answer scored once a model."""

    def __init__(self, rows: list[pairs.Pair], annotator: Annotator) -> None:
        self.rows = annotate(rows, annotator)
        self.ceiling = accuracy_ceiling(self.rows, annotator)
        rng = random.Random(SEED)
        stories = [(r["prompt"], r["chosen"]) for r in self.rows[:4096]]
        broken = [(p, s, pairs.broken(s, rng)) for p, s in stories]
        self.broken = [
            row for row in broken if gold_reward(row[0], row[1]) > gold_reward(row[0], row[2])
        ]

    def right(self, model: Model) -> tuple[list[float], list[float], float]:
        """Whether the chosen answer scores higher, for each pair; whether the one of higher gold
        does, where golds differ; share of whole stories that score above themselves broken."""
        reward, tokenizer = model.reward, model.tokenizer
        prompts = [r["prompt"] for r in self.rows]
        score = {
            side: score_texts(reward, tokenizer, prompts, [r[side] for r in self.rows])
            for side in ("chosen", "rejected")
        }
        above = (score["chosen"] > score["rejected"]).tolist()
        gaps = [
            gold_reward(r["prompt"], r["chosen"]) - gold_reward(r["prompt"], r["rejected"])
            for r in self.rows
        ]
        noise_free = [float(a == (g > 0)) for a, g in zip(above, gaps, strict=True) if g]
        asked, whole, broken = zip(*self.broken, strict=True)
        grammar = score_texts(reward, tokenizer, asked, whole) > score_texts(
            reward, tokenizer, asked, broken
        )
        return [float(a) for a in above], noise_free, float(grammar.float().mean())


def step(before: list[float], after: list[float], scale: float = 1.0) -> dict[str, float]:
    """Mean paired difference with its standard error, and how many of them it is."""
    gaps = [(b - a) / scale for a, b in zip(before, after, strict=True)]
    mean = sum(gaps) / len(gaps)
    variance = sum((g - mean) ** 2 for g in gaps) / (len(gaps) - 1)
    error = math.sqrt(variance / len(gaps))
    return {"difference": mean, "standard_error": error, "errors": mean / error}


def measure(folder: Path, count: int) -> dict:
    models = models_of(folder)
    prompts = [r.prompt for r, _ in zip(corpus.requests("test", SEED), range(4096), strict=False)]
    writer = models[MIDDLE]
    rows = pairs.sample_pairs(writer.sft, writer.tokenizer, "test", count, SEED)
    judged = Judged(rows, Annotator(seed=SEED))
    found: dict = {"pairs": len(rows), "accuracy_ceiling": judged.ceiling, "sizes": {}, "steps": {}}
    each: dict[str, tuple[list[float], ...]] = {}
    length = 1.0
    for name, model in models.items():
        nats, length = losses(model, 4096)
        gold, parts = golds(model, prompts)
        right, noise_free, grammar = judged.right(model)
        each[name] = nats, gold, right, noise_free
        found["sizes"][name] = {
            "parameters": model.base.num_parameters(),
            "held_out_loss": sum(nats) / len(nats) / length,
            "gold_reward": sum(gold) / len(gold),
            "gold_parts": parts,
            "accuracy": sum(right) / len(right),
            "noise_free_accuracy": sum(noise_free) / len(noise_free),
            "whole_above_broken": grammar,
        }
        print(name, json.dumps(found["sizes"][name]), flush=True)
    figures = ("held_out_loss", "gold_reward", "accuracy", "noise_free_accuracy")
    for small, large in zip(list(each)[:-1], list(each)[1:], strict=True):
        found["steps"][f"{small} to {large}"] = {
            figure: step(a, b, length if figure == "held_out_loss" else 1.0)
            for figure, a, b in zip(figures, each[small], each[large], strict=True)
        }
        print(f"{small} to {large}", json.dumps(found["steps"][f"{small} to {large}"]), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--builds", nargs="*", default=[], metavar="SEED=FOLDER")
    parser.add_argument("--pairs", type=int, default=20480)
    args = parser.parse_args()
    found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for seed, folder in [b.split("=", 1) for b in args.builds] or [("0", small_models_folder())]:
        print(f"seed {seed}: {folder}", flush=True)
        found[seed] = measure(Path(folder), args.pairs)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
