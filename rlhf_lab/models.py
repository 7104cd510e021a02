"""A model by name: bundled with the lab, a local folder, or an id on the hub.

`load("tiny")` gives a light handle: reading its config or tokenizer loads no weights. `.base`,
`.sft` and `.reward` each load a fresh model in fp32 on the CPU, so that training one of them
never changes what the next cell loads.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path

BUNDLED = ("tiny", "small")


def small_models_folder() -> Path:
    """Where the bundled checkpoints are: inside the installed package, or beside it in a clone."""
    inside = Path(__file__).parent / "small_models"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "small_models"


class Model:
    """A light handle on a model and its stages. Make one with `load`.

    `name` is what the user said. `paths` maps a stage (base, sft, reward) to a folder or hub id;
    a stage that has no checkpoint of its own starts from the nearest earlier one.
    """

    def __init__(self, name: str, paths: dict[str, str]):
        self.name, self.paths = name, paths

    def __repr__(self) -> str:
        return f"Model({self.name!r}, {', '.join(self.paths)})"

    @cached_property
    def config(self):
        """The transformers config of the base model."""
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.paths["base"])

    @cached_property
    def tokenizer(self):
        """The tokenizer, with a pad token that is not the eos token."""
        return load_tokenizer(self.paths["base"])

    @property
    def base(self):
        """A fresh copy of the pretrained model."""
        return load_causal_lm(self.paths["base"])

    @property
    def sft(self):
        """A fresh copy of the fine-tuned model; the base model where there is none."""
        return load_causal_lm(self.paths.get("sft", self.paths["base"]))

    @property
    def reward(self):
        """A fresh copy of the reward model; a new head on the SFT model where there is none."""
        if "reward" in self.paths:
            return load_reward_model(self.paths["reward"])
        return new_reward_model(self.paths.get("sft", self.paths["base"]), self.tokenizer)

    def with_stage(self, stage: str, path: str | Path) -> Model:
        """The same model with the checkpoint of one stage replaced."""
        return Model(self.name, {**self.paths, stage: str(path)})


def load(name: str | Path | Model) -> Model:
    """A handle on a bundled model, a local folder in the transformers layout, or a hub id.

    Raises ValueError with one line that says what was looked for when nothing is found.
    """
    if isinstance(name, Model):
        return name
    folder = small_models_folder() / str(name)
    if str(name) in BUNDLED:
        stages = [s for s in ("base", "sft", "reward") if (folder / s / "config.json").is_file()]
        if "base" not in stages:
            raise ValueError(f"the bundled model {name!r} is missing from {folder}; reinstall")
        return Model(str(name), {s: str(folder / s) for s in stages})
    local = Path(name).expanduser()
    if local.is_dir():
        return _local(local)
    if local.is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") != 1:
        raise ValueError(
            f"no model {str(name)!r}: not bundled ({', '.join(BUNDLED)}), not a folder, "
            "and not a hub id of the form owner/name"
        )
    return Model(str(name), {"base": str(name)})


def _local(folder: Path) -> Model:
    """A handle on a local folder; a reward model's folder is told by its architecture."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        raise ValueError(f"no config.json in the model folder {folder}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder / 'config.json'} is not JSON: {error}") from None
    architectures = config.get("architectures") or []
    if any("SequenceClassification" in a for a in architectures):
        return Model(str(folder), {"base": str(folder), "reward": str(folder)})
    return Model(str(folder), {"base": str(folder)})


# --------------------------------------------------------------------------------- loading weights


def load_tokenizer(path: str | Path):
    """A tokenizer whose pad token exists and is not eos (rule 6: pad ≠ eos)."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load a tokenizer from {path}: {_first_line(error)}") from None
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        _give_pad_token(tokenizer)
    return tokenizer


def _give_pad_token(tokenizer) -> None:
    """Set a pad token that no text uses, without growing the vocabulary when one is free."""
    vocabulary = tokenizer.get_vocab()
    reserved = ("<|pad|>", "<pad>", "[PAD]", "<|endoftext|>", "<|finetune_right_pad_id|>", "<unk>")
    for token in (*reserved, tokenizer.unk_token):
        if token in vocabulary and vocabulary[token] != tokenizer.eos_token_id:
            tokenizer.pad_token = token
            return
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})


def load_causal_lm(path: str | Path):
    """A language model in fp32, in eval mode (no dropout anywhere: rule 4)."""
    import torch
    from transformers import AutoModelForCausalLM

    return _load(AutoModelForCausalLM, path, dtype=torch.float32)


def load_reward_model(path: str | Path):
    """A reward model: one score per sequence, in fp32, in eval mode."""
    import torch
    from transformers import AutoModelForSequenceClassification

    return _load(AutoModelForSequenceClassification, path, dtype=torch.float32, num_labels=1)


def _load(cls, path, **settings):
    try:
        return cls.from_pretrained(path, **settings).eval()
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load a model from {path}: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def new_reward_model(path: str | Path, tokenizer, seed: int = 0):
    """A reward model on the trunk of a language model, with a fresh score head.

    The head is drawn with standard deviation 1/√(d+1), d its input width (rule 15; Huang et al.
    2403.17031, detail 11).
    """
    import torch
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the missing score head is what we are here to add
    try:
        model = load_reward_model(path)
    finally:
        logging.set_verbosity(verbosity)
    head = model.score.weight
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.copy_(torch.randn(head.shape, generator=generator) / (head.shape[1] + 1) ** 0.5)
    model.config.pad_token_id = tokenizer.pad_token_id
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    return model
