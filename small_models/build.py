"""Rebuild the bundled checkpoints: `make small_models`, one size `ARGS="--only tiny"`.

In order: a byte-level BPE tokenizer; for each size a pretrained base (`pretraining.py`) and its SFT
model; the pairs sampled from the SFT model of the default size (`pairs.py`); for each size a reward
model, for the default size once more as LoRA adapters. SFT and reward models are trained by the
functions that `rlhf-lab train` runs.

What was killed goes on where it was: pretraining from its last chunk, the rest from the last part
that was finished. The same seed on the same machine gives the same weights. Each size takes less
than 150 minutes on two cores.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pairs
import pretraining
import pretraining_text
from cards import write_card

HERE = Path(__file__).parent
DEFAULT = "tiny"
ADAPTER = {"lora_r": 8, "learning_rate": 2e-3}
"""The reward model once more, as LoRA adapters and a score head on the SFT model."""


class Build:
    """The parts of the bundled models in `out`; `work` keeps what is half done.

    A part is made again when what it is made from has changed: its recipe, seed or files.
    """

    def __init__(self, out: Path, work: Path, seed: int, most_chunks: int) -> None:
        self.out, self.work, self.seed, self.most_chunks = out, work, seed, most_chunks
        self.pairs_file = out / "pairs.jsonl.gz"
        self.tokenizer = pretraining.build_tokenizer()
        self._done_file = work / "done.json"
        work.mkdir(parents=True, exist_ok=True)

    def size(self, name: str) -> None:
        """Every part of one size."""
        recipe = json.dumps(pretraining.recipe(name), sort_keys=True).encode()
        smaller = pretraining.GROWN.get(name)
        if smaller and not (self.out / smaller / "base").is_dir():
            raise SystemExit(f"{name} grows from {smaller}: build that first (--only {smaller})")
        recipe += self._bytes_of(smaller, "base") if smaller else b""
        self._part(f"{name}/base", self._base, name, recipe)
        self._part(f"{name}/sft", self._sft, name, self._bytes_of(name, "base") + settings("sft"))
        if name == DEFAULT:
            self._part("pairs.jsonl.gz", self._pairs, name, self._bytes_of(name, "sft"))
            self._part("lengths.json.gz", self._lengths, name, self.pairs_file.read_bytes())
        if not self.pairs_file.is_file():
            raise SystemExit(
                f"no pairs yet in {self.out}: build {DEFAULT} first (--only {DEFAULT})"
            )
        sources = self._bytes_of(name, "sft") + self.pairs_file.read_bytes() + settings("reward")
        self._part(f"{name}/reward", self._reward, name, sources)
        if name == DEFAULT:
            adapter = json.dumps(ADAPTER).encode()
            self._part(f"{name}/reward_adapter", self._adapter, name, sources + adapter)

    def _part(self, part: str, make: Callable[[str], None], name: str, sources: bytes) -> None:
        """Make it, unless it is there and was made from the same."""
        key = hashlib.sha256(sources + f"{self.seed} {self.most_chunks}".encode()).hexdigest()
        if self._done().get(part) == key and (self.out / part).exists():
            print(f"{part}: there already", flush=True)
            return
        start = time.monotonic()
        make(name)
        new = self._done_file.with_suffix(".new")
        new.write_text(json.dumps(self._done() | {part: key}, indent=1))
        os.replace(new, self._done_file)
        print(f"{part}: done in {(time.monotonic() - start) / 60:.1f} min", flush=True)

    def _done(self) -> dict[str, str]:
        """Finished parts, each with a digest of what it was made from."""
        return json.loads(self._done_file.read_text()) if self._done_file.is_file() else {}

    # ------------------------------------------------------------------------------- the parts

    def _base(self, name: str) -> None:
        from rlhf_lab.launch.launcher import prepare_process

        prepare_process()
        smaller = pretraining.GROWN.get(name)
        grown = self._model(smaller, "base").base if smaller else None
        state = pretraining.Pretraining(name, self.tokenizer, self.seed, self.work, grown)
        state.run(self.most_chunks)
        new = self.work / f"{name}-base"
        state.model.eval().save_pretrained(new)
        self.tokenizer.save_pretrained(new)
        figures = {"parameters": state.model.num_parameters(), "tokens read": state.place.tokens}
        figures |= state.losses()
        write_card(new, f"{name}: base model", state.description, self.seed, figures)
        self._adopt(new, f"{name}/base")

    def _sft(self, name: str) -> None:
        run = self._train("sft", name, self._model(name, "base"))
        known = pretraining.read_stories(self.work, name, self.seed)
        rows = _data(self.seed).sft.train
        known |= {pretraining_text.digest(row["completion"]) for row in rows}
        model = self._model(name, "base").with_stage("sft", run.model_path)
        sampled = pairs.sample_pairs(model.sft, self.tokenizer, "train", 4096, self.seed + 1, 0)
        stories = [row[which] for row in sampled for which in ("first", "second")]
        fresh = pairs.written_stories([row["prompt"] for row in sampled], self.seed)
        share = pretraining_text.memorised_share
        more = {
            f"share of {len(stories)} sampled stories found in the text trained on": share(
                stories, known
            ),
            "the same of fresh stories by the world's writers": share(fresh, known),
        }
        self._adopt_run(run, f"{name}/sft", f"{name}: SFT model", more)

    def _pairs(self, name: str) -> None:
        model = self._model(name, "base", "sft")
        rows = [
            row
            for split, count in pairs.PAIRS.items()
            for row in pairs.sample_pairs(model.sft, self.tokenizer, split, count, self.seed)
        ]
        new = self.work / self.pairs_file.name
        pairs.write_pairs(rows, new)
        os.replace(new, self.pairs_file)

    def _lengths(self, name: str) -> None:
        """How long the bundled rows are, so that a plan need not tokenise them."""
        from rlhf_lab.data.lengths import row_lengths
        from rlhf_lab.stages import STAGES, TRAINABLE

        model, data = self._model(name, "base"), _data(self.seed, self.pairs_file)
        stage_of = {STAGES[stage].rows: stage for stage in TRAINABLE}
        found = {rows: asdict(row_lengths(stage, model, data)) for rows, stage in stage_of.items()}
        text = json.dumps(found, separators=(",", ":"))
        # Without a time in it: the same lengths are the same bytes.
        (self.out / "lengths.json.gz").write_bytes(gzip.compress(text.encode(), mtime=0))

    def _reward(self, name: str) -> None:
        run = self._train("reward", name, self._model(name, "base", "sft"))
        self._adopt_run(run, f"{name}/reward", f"{name}: reward model")

    def _adapter(self, name: str) -> None:
        """It belongs to the SFT model beside it."""
        run = self._train("reward", name, self._model(name, "base", "sft"), **ADAPTER)
        new = self.work / f"{name}-adapter"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        for file in ("adapter_model.safetensors", "score.json"):
            shutil.copy(run.folder / "adapter" / file, new / file)
        config = json.loads((run.folder / "adapter" / "adapter_config.json").read_text())
        config |= {
            "base_model_name_or_path": f"small_models/{name}/sft",
            "target_modules": sorted(config["target_modules"]),
        }
        (new / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        title = f"{name}: reward adapter, for the SFT model"
        write_card(new, title, recipe_of(run), self.seed, figures_of(run), library="peft")
        self._adopt(new, f"{name}/reward_adapter")

    # --------------------------------------------------------------------------------- helpers

    def _train(self, stage: str, name: str, model, **settings):
        from rlhf_lab import planning, training

        plan = planning.plan(stage, model, seed=self.seed, **settings)
        folder = self.work / f"run-{name}-{stage}{'-lora' * ('lora_r' in settings)}"
        data = _data(self.seed, self.pairs_file)
        return training.train(plan, data, out=folder, overwrite=True)

    def _model(self, name: str, *stages: str):
        from rlhf_lab.models.load import Model

        return Model(name, {stage: str(self.out / name / stage) for stage in stages})

    def _bytes_of(self, name: str, stage: str) -> bytes:
        return (self.out / name / stage / "model.safetensors").read_bytes()

    def _adopt_run(self, run, part: str, title: str, more: dict | None = None) -> None:
        new = self.work / part.replace("/", "-")
        shutil.rmtree(new, ignore_errors=True)
        shutil.copytree(run.model_path, new)
        write_card(new, title, recipe_of(run), self.seed, figures_of(run) | (more or {}))
        self._adopt(new, part)

    def _adopt(self, new: Path, part: str) -> None:
        """A finished checkpoint, in the place of the one that was there."""
        if (new / "model.safetensors").is_file():
            store_in_16_bits(new / "model.safetensors")
        target = self.out / part
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(target, ignore_errors=True)
        shutil.move(new, target)


def settings(stage: str) -> bytes:
    """The lab's settings of a stage, as they stand."""
    from rlhf_lab.stages import STAGES

    return json.dumps(dict(STAGES[stage].defaults), sort_keys=True).encode()


def store_in_16_bits(file: Path) -> None:
    """Half the bytes: weights as float16. The config beside them goes on to say float32, so that
    every loader makes them that again, and what was measured afterwards is what is loaded."""
    import torch
    from safetensors.torch import load_file, save_file

    weights = {name: weight.to(torch.float16) for name, weight in load_file(file).items()}
    if not all(torch.isfinite(w).all() for w in weights.values()):
        raise ValueError(f"{file} holds weights that float16 cannot")
    save_file(weights, file, metadata={"format": "pt"})


def _data(seed: int, pairs_file: Path | None = None):
    """The world's data, with the pairs of this build."""
    from rlhf_lab.data.load import load_data, read_pairs, story_preferences

    data = load_data("stories", seed=seed)
    if pairs_file is None or not pairs_file.is_file():
        return data
    return replace(data, preferences=story_preferences(read_pairs(pairs_file), data.annotator))


def recipe_of(run) -> str:
    settings = ", ".join(f"{k}={v}" for k, v in run.config["settings"].items())
    return f"Recipe: `rlhf-lab train {run.stage}` with {settings}."


def figures_of(run) -> dict:
    leave_out = {"seconds", "tokens_per_second", "peak_bytes", "dropped"}
    return {k: v for k, v in run.summary.items() if k not in leave_out}


def main() -> None:
    """Rebuild everything, or one size."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=pretraining.SIZES, help="one size")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE, help="where the checkpoints go")
    parser.add_argument(
        "--work",
        type=Path,
        default=HERE.parent / "build" / "small_models",
        help="what is half done; a build that was killed goes on from it",
    )
    parser.add_argument("--again", action="store_true", help="throw away what is done: start anew")
    parser.add_argument(
        "--most-chunks",
        type=int,
        default=pretraining.MOST_CHUNKS,
        help=f"of {pretraining.CHUNK} pretraining steps in each phase (fewer for a trial)",
    )
    args = parser.parse_args()
    if args.again:
        shutil.rmtree(args.work, ignore_errors=True)
    build = Build(args.out, args.work, args.seed, args.most_chunks)
    for name in sorted(pretraining.SIZES, key=lambda name: name != DEFAULT):
        if args.only in (None, name):
            build.size(name)


if __name__ == "__main__":
    main()
