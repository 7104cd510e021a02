"""Rebuild the bundled checkpoints: `python small_models/build.py` (two hours on two cores).

In order: a byte-level BPE tokenizer, a pretrained base in each size, and for the default size the
SFT model, the pairs sampled from it and the reward model, by the same functions that
`rlhf-lab train` runs. The same seed on the same machine gives the same weights.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path

import pretraining_text

from rlhf_lab.world import corpus

HERE = Path(__file__).parent
SIZES = {
    # name: (width, layers, heads, MLP width)
    "tiny": (96, 3, 4, 256),
    "small": (192, 3, 8, 512),
}
SHARE = {"tiny": 1.0, "small": 0.5}
"""Of the steps of each phase. `small` takes half, so that both sizes are built in two hours; that
is too few for it to come below the loss of `tiny` (their cards have both)."""
DEFAULT = "tiny"
PAIRS = {"train": 8192, "test": 5120}
ADAPTER = {"lora_r": 8, "learning_rate": 2e-3}
"""The reward model once more, as LoRA adapters and a score head on the SFT model."""
VOCABULARY, CONTEXT = 1024, 1024
SPECIAL = ["<|pad|>", pretraining_text.END, "<|user|>", "<|assistant|>", "<|system|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}"
    + pretraining_text.END
    + "{% else %}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer():
    """Byte-level BPE on the world's text and a list of common English words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = (HERE / "words.txt").read_text().split()
    documents = pretraining_text.web_text("train", 4000, seed=1, games=0.05, misfiled=0.5)
    text = [
        "\n".join(piece.removesuffix(pretraining_text.END) for piece, _ in d) for d in documents
    ]
    text += [f"{w} {w} {w.capitalize()}" for w in words for _ in range(3)]
    text += [r.prompt for r, _ in zip(corpus.requests("train", 2), range(2000), strict=False)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[1],
        additional_special_tokens=SPECIAL[2:],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        padding_side="left",
    )


def new_model(size: str, tokenizer, seed: int):
    """A Llama-style model with tied embeddings and random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    width, layers, heads, mlp = SIZES[size]
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            intermediate_size=mlp,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            # About 1/√width: with the usual 0.02 a model this narrow takes ten times as long to
            # find out that a later word can be copied from an earlier one.
            initializer_range=0.08,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )


PRETRAINING = {
    "lr_scheduler_type": "cosine",
    "warmup_steps": 50,
    "per_device_train_batch_size": 64,
    "adam_beta2": 0.98,
    "weight_decay": 0.05,
    "logging_steps": 50,
    "max_length": 256,
}
PHASES = {
    # What is hard to find comes first and alone. That a word came before is found within 200
    # steps of a memory game; that the heading can be copied, where every story keeps to it; that
    # a story departs from it, much sooner in two sentences than in seven. It then carries over.
    # Mood and sense, which need whole stories and many readers, come last and take longest.
    "faithful": {
        "documents": {"games": 0.5, "sketches": 0.25, "faithful": True},
        "learning_rate": 6e-3,
        "max_steps": 600,
    },
    "sketches": {
        "documents": {"games": 0.1, "sketches": 0.75, "misfiled": 0.5},
        "learning_rate": 6e-3,
        "max_steps": 2000,
        "lr_scheduler_type": "constant_with_warmup",
    },
    "stories": {
        "documents": {"games": 0.05, "sketches": 0.15},
        "learning_rate": 4e-3,
        "max_steps": 1600,
    },
    "more stories": {
        "documents": {"games": 0.05, "sketches": 0.1},
        "learning_rate": 4e-3,
        "max_steps": 3000,
    },
}
"""`documents`: what is read (`pretraining_text.web_text`). The rest overrides `PRETRAINING`."""


def phases_of(size: str, steps: int | None = None) -> dict[str, dict]:
    """`PHASES` with the steps that this size takes (or `steps` in each, for a trial)."""
    return {
        name: phase | {"max_steps": steps or round(SHARE[size] * phase["max_steps"])}
        for name, phase in PHASES.items()
    }


def build_base(size: str, tokenizer, seed: int, steps: int | None = None):
    """Pretrain one size on the world's web text. → the model, losses in nats per token."""
    from rlhf_lab.launch.launcher import prepare_process

    prepare_process()
    model, losses = new_model(size, tokenizer, seed), {}
    for number, (name, phase) in enumerate(phases_of(size, steps).items()):
        losses = pretrain(model, tokenizer, phase, seed + 100 * number)
        print(f"{size}, {name}: {losses}", flush=True)
    return model.eval(), losses


def pretrain(model, tokenizer, phase: dict, seed: int) -> dict[str, float]:
    """One phase with TRL's SFTTrainer. → loss per token on held-out and on trained documents."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from rlhf_lab.trainers.trl import trl_settings

    settings = PRETRAINING | phase
    documents = settings.pop("documents")
    count = settings["max_steps"] * settings["per_device_train_batch_size"]
    train = web_rows("train", count, seed, tokenizer, **documents)
    held_out = web_rows("validation", 512, seed, tokenizer, **documents)
    with tempfile.TemporaryDirectory() as scratch:
        args = SFTConfig(seed=seed, **trl_settings(settings, scratch))
        trainer = SFTTrainer(
            model,
            args,
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(train),
            eval_dataset={
                "held-out": Dataset.from_list(held_out),
                "trained": Dataset.from_list(train[:512]),
            },
        )
        trainer.train()
        found = trainer.evaluate()
    return {
        f"{name} loss, nats per token": found[f"eval_{name}_loss"]
        for name in ("held-out", "trained")
    }


def web_rows(split: str, count: int, seed: int, tokenizer, **documents) -> list[dict]:
    """Documents as token ids, with the pieces that are learned marked."""
    ids_of = lru_cache(100_000)(lambda text: tokenizer(text)["input_ids"])
    rows = []
    for document in pretraining_text.web_text(split, count, seed, **documents):
        row = {"input_ids": [], "completion_mask": []}
        for text, learned in document:
            row["input_ids"] += ids_of(text)
            row["completion_mask"] += [int(learned)] * len(ids_of(text))
        rows.append(row)
    return rows


def save(model, tokenizer, folder: Path, card: str) -> None:
    """A checkpoint in the transformers layout, with its card."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card)


def card(title: str, recipe: str, seed: int, figures: dict) -> str:
    """A model card: what it is, how it was made, what was measured."""
    lines = [
        f"- {name}: {value:.4g}" if isinstance(value, float) else f"- {name}: {value}"
        for name, value in figures.items()
    ]
    front = json.dumps({"license": "apache-2.0", "library_name": "transformers"})
    return (
        f"---\n{front}\n---\n# {title}\n\nMade by `small_models/build.py` (seed {seed}) on the "
        f"bundled world of rlhf_lab, which writes its own text.\n\n{recipe}\n\n"
        "## Measured when it was built\n\n" + "\n".join(lines) + "\n"
    )


def build_stages(seed: int) -> None:
    """SFT model, the pairs sampled from it, reward model: by the functions that users run."""
    from rlhf_lab import planning, training
    from rlhf_lab.ppo.texts import sample_ids

    with tempfile.TemporaryDirectory() as scratch:
        sft = training.train(planning.plan("sft", DEFAULT, seed=seed), out=Path(scratch) / "sft")
        model = planning.load(DEFAULT).with_stage("sft", sft.model_path)
        rows = []
        for split, count in PAIRS.items():
            prompts = [r.prompt for r, _ in zip(corpus.requests(split, seed + 11), range(count))]
            ids = sample_ids(model.sft, model.tokenizer, prompts, samples=2, seed=seed + 5)
            pairs = [model.tokenizer.batch_decode(two, skip_special_tokens=True) for two in ids]
            rows += [
                {"split": split, "prompt": prompt, "first": first, "second": second}
                for prompt, (first, second) in zip(prompts, pairs, strict=True)
                if first != second
            ]
        with gzip.GzipFile(HERE / "pairs.jsonl.gz", "wb", mtime=0) as file:
            file.write("".join(json.dumps(r) + "\n" for r in rows).encode())
        reward = training.train(
            planning.plan("reward", model, seed=seed), out=Path(scratch) / "reward"
        )
        _adopt(sft, HERE / DEFAULT / "sft", "SFT model", seed, memorised(rows, seed))
        _adopt(reward, HERE / DEFAULT / "reward", "Reward model", seed)
        adapter = training.train(
            planning.plan("reward", model, seed=seed, **ADAPTER), out=Path(scratch) / "adapter"
        )
        _adopt_adapter(adapter, HERE / DEFAULT / "reward_adapter", seed)


def memorised(rows: list[dict], seed: int) -> dict[str, float]:
    """Share of sampled stories that stand word for word in the text trained on.

    Beside it, the same share of stories that the world's paid writers wrote for the same
    requests: they cannot have memorised anything, so that much is chance.
    """
    from rlhf_lab import planning
    from rlhf_lab.world import generator

    trained = [row["completion"] for row in planning.load_data("stories", seed=seed).sft.train]
    for number, phase in enumerate(phases_of(DEFAULT).values()):
        count = phase["max_steps"] * PRETRAINING["per_device_train_batch_size"]
        read = pretraining_text.web_text("train", count, seed + 100 * number, **phase["documents"])
        trained += [document[1][0].removesuffix(pretraining_text.END) for document in read]
    rng = random.Random(seed)
    fresh = [
        generator.write_story(generator.read_request(r["prompt"]), rng, corpus.PAID) for r in rows
    ]
    sampled = pretraining_text.memorised_share([r["first"] for r in rows], trained)
    return {
        f"share of {len(rows)} sampled stories found in the text trained on": sampled,
        "the same of fresh stories by the world's writers": pretraining_text.memorised_share(
            fresh, trained
        ),
    }


def _adopt(run, folder: Path, title: str, seed: int, more: dict | None = None) -> None:
    """Copy a run's model into the repository, with a card from the run's summary."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(run.model_path, folder)
    _write_card(run, folder, title, seed, more)


def _adopt_adapter(run, folder: Path, seed: int) -> None:
    """The same of a run's reward adapter, which belongs to the SFT model beside it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in ("adapter_model.safetensors", "score.json"):
        shutil.copy(run.folder / "adapter" / name, folder / name)
    config = json.loads((run.folder / "adapter" / "adapter_config.json").read_text())
    config |= {
        "base_model_name_or_path": f"small_models/{DEFAULT}/sft",
        "target_modules": sorted(config["target_modules"]),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    _write_card(run, folder, "Reward adapter, for the SFT model", seed)


def _write_card(run, folder: Path, title: str, seed: int, more: dict | None = None) -> None:
    settings = ", ".join(f"{k}={v}" for k, v in run.config["settings"].items())
    leave_out = {"seconds", "tokens_per_second", "peak_bytes", "dropped"}
    figures = {k: v for k, v in run.summary.items() if k not in leave_out} | (more or {})
    recipe = f"Recipe: `rlhf-lab train {run.stage}` with {settings}."
    (folder / "README.md").write_text(card(f"{DEFAULT}: {title}", recipe, seed, figures))


def main() -> None:
    """Rebuild everything, or the parts that are named."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=[*SIZES, "stages"], help="one base, or the stages")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="pretraining steps (for a trial)")
    args = parser.parse_args()
    tokenizer = build_tokenizer()
    for size in SIZES:
        if args.only in (None, size):
            model, losses = build_base(size, tokenizer, args.seed, args.steps)
            phases = phases_of(size, args.steps)
            recipe = f"Pretrained on headed stories and comments on them: {PRETRAINING}, {phases}."
            figures = {"parameters": model.num_parameters()} | losses
            text = card(f"{size}: base model", recipe, args.seed, figures)
            save(model, tokenizer, HERE / size / "base", text)
    if args.only in (None, "stages"):
        build_stages(args.seed)


if __name__ == "__main__":
    main()
