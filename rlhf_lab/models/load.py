"""A model by name: bundled with the lab, a preset, a local folder, or an id on the hub.

`load("tiny")` gives a light handle: reading its config or tokenizer loads no weights. `.base`,
`.sft` and `.reward` each load a fresh model in fp32 on the CPU, so that training one of them
never changes what the next cell loads.
"""

from __future__ import annotations

import json
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from .hub import hub_reachable

BUNDLED = ("tiny", "small")

ADAPTER_FILE = "adapter_config.json"
"""What makes a folder one of peft's."""

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""How a conversation is written for a model that comes without a template of its own."""


def small_models_folder() -> Path:
    """Where the bundled checkpoints are: inside the installed package, or beside it in a clone."""
    package = Path(__file__).parents[1]
    inside = package / "small_models"
    return inside if inside.is_dir() else package.parent / "small_models"


@cache
def presets() -> dict[str, dict]:
    """Configs of well-known models by hub id, as dicts: enough to plan without a connection."""
    return json.loads((Path(__file__).parent / "presets.json").read_text())


class Model:
    """A light handle on a model and its stages. Make one with `load`.

    `name` is what the user said. `paths` maps a stage (base, sft, reward) to a folder or hub id;
    a stage that has no checkpoint of its own starts from the nearest earlier one. `reward_adapter`
    is the folder of a reward model that is a LoRA adapter on the SFT model.
    """

    def __init__(self, name: str, paths: dict[str, str], trust_remote_code: bool = False):
        self.name, self.paths, self.trust_remote_code = name, paths, trust_remote_code

    def __repr__(self) -> str:
        return f"Model({self.name!r}, {', '.join(self.paths)})"

    @cached_property
    def config(self):
        """The transformers config of the base model."""
        from transformers import AutoConfig

        if self.paths["base"] in presets():
            return AutoConfig.for_model(**presets()[self.paths["base"]])
        return _ask(AutoConfig, self.paths["base"], "config", **self._trust)

    def config_dict(self, stage: str = "base") -> dict:
        """The config of a stage's checkpoint as a dict; loads no transformers where the config is
        a preset's or lies in a folder."""
        path = self.paths.get(stage, self.paths["base"])
        if path in presets():
            return dict(presets()[path])
        file = Path(path) / "config.json"
        if file.is_file() or path == self.paths["base"]:
            return json.loads(file.read_text()) if file.is_file() else self.config.to_dict()
        from transformers import AutoConfig

        return _ask(AutoConfig, path, "config", **self._trust).to_dict()

    @cached_property
    def tokenizer(self):
        """The tokenizer, with a pad token that is not the eos token."""
        return load_tokenizer(self.paths["base"], self.trust_remote_code)

    @cached_property
    def reward_tokenizer(self):
        """The reward model's tokenizer: the model's own where the vocabulary is the same."""
        path = self.paths.get("reward")
        if path in (None, self.paths["base"]) or not _has_tokenizer(path):
            return self.tokenizer
        theirs = load_tokenizer(path, self.trust_remote_code)
        return self.tokenizer if same_vocabulary(theirs, self.tokenizer) else theirs

    @property
    def foreign_reward(self) -> bool:
        """Whether the reward model reads tokens of its own: it is given texts."""
        return self.reward_tokenizer is not self.tokenizer

    @property
    def context(self) -> int:
        """Tokens of prompt and response together that the model can take."""
        return int(getattr(self.config, "max_position_embeddings", None) or 2**31)

    @property
    def base(self):
        """A fresh copy of the pretrained model."""
        return load_causal_lm(self.paths["base"], self.tokenizer, self.trust_remote_code)

    @property
    def sft(self):
        """A fresh copy of the fine-tuned model; the base model where there is none."""
        path = self.paths.get("sft", self.paths["base"])
        return load_causal_lm(path, self.tokenizer, self.trust_remote_code)

    def sft_in_4bit(self, nested: bool = False):
        """The fine-tuned model with the matrices of its layers in NF4, to put adapters on."""
        from .quantized import load_in_4bit

        return load_in_4bit(
            self.paths.get("sft", self.paths["base"]),
            self.tokenizer,
            nested,
            self.trust_remote_code,
        )

    @property
    def reward(self):
        """A fresh copy of the reward model; a new head on the SFT model where there is none."""
        if "reward" in self.paths:
            return load_reward_model(
                self.paths["reward"], self.reward_tokenizer, self.trust_remote_code
            )
        return self.new_reward()

    def new_reward(self, seed: int = 0):
        """A reward model with a fresh head on the SFT model."""
        path = self.paths.get("sft", self.paths["base"])
        return new_reward_model(path, self.tokenizer, seed, self.trust_remote_code)

    def new_value(self):
        """A value model that says 0 of everything: a zero head on the SFT model (rule 15)."""
        model = self.new_reward()
        model.score.weight.data.zero_()
        return model

    @property
    def _trust(self) -> dict[str, bool]:
        return {"trust_remote_code": self.trust_remote_code}

    def with_stage(self, stage: str, path: str | Path) -> Model:
        """The same model with the checkpoint of one stage replaced."""
        return Model(self.name, {**self.paths, stage: str(path)}, self.trust_remote_code)


def load(name: str | Path | Model, *, trust_remote_code: bool = False) -> Model:
    """A handle on a bundled model, a preset, a local folder, or a hub id.

    `trust_remote_code` runs Python code that comes with the model: only for people you trust.
    Raises ValueError with one line that says what was looked for when nothing is found.
    """
    if isinstance(name, Model):
        return name
    folder = small_models_folder() / str(name)
    if str(name) in BUNDLED:
        stages = [s for s in ("base", "sft", "reward") if (folder / s / "config.json").is_file()]
        if "base" not in stages:
            raise ValueError(f"the bundled model {name!r} is missing from {folder}; reinstall")
        stages += [s for s in ("reward_adapter",) if (folder / s / ADAPTER_FILE).is_file()]
        return Model(str(name), {s: str(folder / s) for s in stages})
    local = Path(name).expanduser()
    if local.is_dir():
        return _local(local, trust_remote_code)
    hub_id = {i.split("/")[1].lower(): i for i in presets()}.get(str(name).lower(), str(name))
    if local.is_absolute() or hub_id.startswith((".", "~")) or hub_id.count("/") != 1:
        raise ValueError(
            f"no model {str(name)!r}: not bundled ({', '.join(BUNDLED)}), not a preset, not a "
            "folder, and not a hub id of the form owner/name"
        )
    return Model(str(name), {"base": hub_id}, trust_remote_code)


def _local(folder: Path, trust_remote_code: bool) -> Model:
    """A handle on a local folder; a reward model's folder is told by its architecture."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        raise ValueError(f"no config.json in the model folder {folder}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder / 'config.json'} is not JSON: {error}") from None
    if not isinstance(config, dict) or not config.get("model_type"):
        raise ValueError(f"{folder / 'config.json'} names no model_type: not a transformers model")
    paths = {"base": str(folder)}
    if any("SequenceClassification" in a for a in config.get("architectures") or []):
        paths["reward"] = str(folder)
    return Model(str(folder), paths, trust_remote_code)


# --------------------------------------------------------------------------------- loading weights


def load_tokenizer(path: str | Path, trust_remote_code: bool = False):
    """A tokenizer with eos, a pad token that is not eos (rule 6), and a chat template."""
    from transformers import AutoTokenizer

    tokenizer = _ask(AutoTokenizer, path, "tokenizer", trust_remote_code=trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer in {path} has no eos token, so no response would ever end: set "
            "eos_token in its tokenizer_config.json"
        )
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        _give_pad_token(tokenizer)
    if not tokenizer.chat_template:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _has_tokenizer(path: str | Path) -> bool:
    """Whether a checkpoint brings a tokenizer; on the hub they do."""
    names = ("tokenizer*.json", "tokenizer.model", "vocab.*", "*.spm", "spiece.model")
    return not Path(path).is_dir() or any(any(Path(path).glob(name)) for name in names)


def same_vocabulary(one, other) -> bool:
    """Whether two tokenizers mean the same by a token id."""
    return one is other or one.get_vocab() == other.get_vocab()


def _give_pad_token(tokenizer) -> None:
    """Set a pad token that no text uses, without growing the vocabulary when one is free.

    What families have: Llama 2 and Mistral `<unk>` (they write every character in bytes), Llama 3
    `<|finetune_right_pad_id|>`, Qwen and Gemma a pad token of their own. GPT-2 has nothing to
    spare and grows by one token.
    """
    vocabulary = tokenizer.get_vocab()
    written = set(tokenizer("\u2603 \U0001f9ff ? \x07", add_special_tokens=False)["input_ids"])
    reserved = ("<|pad|>", "<pad>", "[PAD]", "<|endoftext|>", "<|finetune_right_pad_id|>", "<unk>")
    for token in (*reserved, tokenizer.unk_token):
        taken = written | {tokenizer.eos_token_id, tokenizer.bos_token_id}
        if token in vocabulary and vocabulary[token] not in taken:
            tokenizer.pad_token = token
            return
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})


def load_causal_lm(
    path: str | Path, tokenizer=None, trust_remote_code: bool = False, **settings: Any
):
    """A language model in fp32, in eval mode (no dropout anywhere: rule 4). `settings` go to
    transformers' `from_pretrained`."""
    from transformers import AutoModelForCausalLM

    return _weights(AutoModelForCausalLM, path, tokenizer, trust_remote_code, **settings)


def load_reward_model(path: str | Path, tokenizer=None, trust_remote_code: bool = False):
    """A reward model: one score per sequence, in fp32, in eval mode."""
    from transformers import AutoConfig
    from transformers import AutoModelForSequenceClassification as Auto

    try:
        return _weights(Auto, path, tokenizer, trust_remote_code, num_labels=1)
    except ValueError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        labels = _ask(AutoConfig, path, "config", trust_remote_code=trust_remote_code).num_labels
    raise ValueError(f"the model in {path} has {labels} labels: a reward model has one, its score")


HEAD = {"score.weight", "score.bias"}
"""The weights that a language model lacks as a reward model."""


def new_reward_model(path: str | Path, tokenizer, seed: int = 0, trust_remote_code: bool = False):
    """A reward model on the trunk of a language model, with a fresh score head.

    The head is drawn with standard deviation 1/√(d+1), d its input width (rule 15; Huang et al.
    2403.17031, detail 11).
    """
    import torch
    from transformers import AutoModelForSequenceClassification as Auto

    model = _weights(Auto, path, tokenizer, trust_remote_code, HEAD, num_labels=1)
    head = model.score.weight
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.copy_(torch.randn(head.shape, generator=generator) / (head.shape[1] + 1) ** 0.5)
    return model


def _weights(
    auto: Any,
    path: str | Path,
    tokenizer,
    trust_remote_code: bool,
    may_lack: frozenset[str] | set[str] = frozenset(),
    **settings,
):
    """Load weights (safetensors only) and make room for every token of the tokenizer.

    transformers draws at random what a checkpoint lacks, and says so in a warning: here only what
    `may_lack` names may be missing.
    """
    import torch

    with _quiet():
        model, found = _ask(
            auto,
            path,
            "model",
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
            **settings,
        )
        if lacks := sorted(set(found["missing_keys"]) - may_lack):
            what = "no score head" if set(lacks) <= HEAD else f"{len(lacks)} weights missing"
            raise ValueError(
                f"cannot load a model from {path}: {what} ({lacks[0]}, …): not a "
                f"{'reward' if 'num_labels' in settings else 'language'} model, or "
                "not a whole one"
            )
        model.eval()
        if tokenizer is not None:
            model.config.pad_token_id = tokenizer.pad_token_id
            if len(tokenizer) > model.get_input_embeddings().num_embeddings:
                model.resize_token_embeddings(len(tokenizer))
    return model


class _quiet:
    """transformers says nothing below an error while this lasts."""

    def __enter__(self):
        from transformers.utils import logging

        self.verbosity = logging.get_verbosity()
        logging.set_verbosity_error()

    def __exit__(self, *_):
        from transformers.utils import logging

        logging.set_verbosity(self.verbosity)


def _ask(auto: Any, path: str | Path, what: str, **settings) -> Any:
    """`auto.from_pretrained`; whatever goes wrong becomes one line that says what to do."""
    local = Path(path).is_dir()
    offline = not local and not hub_reachable()
    try:
        with _quiet():
            return auto.from_pretrained(str(path), local_files_only=offline, **settings)
    except Exception as error:  # damaged files raise whatever their parsers raise
        if offline:
            raise ValueError(
                f"no {what} {str(path)!r}: neither a folder here nor in the hub's cache, and the "
                "hub cannot be reached; download the model elsewhere and give its folder"
            ) from None
        raise ValueError(f"cannot load a {what} from {path}: {_reason(path, error)}") from None


def _reason(path: str | Path, error: Exception) -> str:
    """The first line of an error, or a better word where we know one."""
    folder = Path(path)
    if "trust_remote_code" in str(error) or "custom code" in str(error):
        return (
            "it brings Python code of its own; if you trust its makers, load it with "
            "trust_remote_code=True (--trust-remote-code)"
        )
    if (
        folder.is_dir()
        and not list(folder.glob("*.safetensors"))
        and (list(folder.glob("*.bin")) + list(folder.glob("*.pt*")))
    ):
        return "its weights are pickled (.bin), which can run code; convert them to safetensors"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
