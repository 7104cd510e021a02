"""A model by name: bundled with the lab, a preset, a local folder, or an id on the hub.

`load("tiny")` gives a light handle: reading its config or tokenizer loads no weights. `.base`,
`.sft` and `.reward` each load a fresh model in fp32 on the CPU, so that training one of them
never changes what the next cell loads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..display import by_surface
from ..runs.json_files import no_folder, packaged_folder
from .hub import fetch, find_config
from .names import ALIASES as ALIASES
from .names import BUNDLED as BUNDLED
from .names import nearest, same_sizes, short_names
from .names import presets as presets
from .structure import check_head
from .tokenizer import BareTokenizer, has_tokenizer, load_tokenizer, same_files, same_vocabulary
from .weights import in_4bit, load_causal_lm, load_reward_model, new_reward_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

ADAPTER_FILE = "adapter_config.json"
"""What makes a folder one of peft's."""


def small_models_folder() -> Path:
    """Where the bundled checkpoints are."""
    return packaged_folder("small_models")


def _preset(path: str) -> dict[str, object]:
    """The preset of a hub id as a new dict; {} where it has none."""
    return dict(presets().get(same_sizes().get(path, path), {}))


class Model:
    """A light handle on a model and its stages. Make one with `load`.

    `name` is the name it was loaded by. `paths` maps a checkpoint (base, sft, reward) to a folder
    or hub id; one that is not there starts from the nearest earlier one. `reward_adapter` is the
    folder of a reward model that is a LoRA adapter on the SFT model.
    """

    def __init__(
        self, name: str, paths: Mapping[str, str], trust_remote_code: bool = False
    ) -> None:
        self.name, self.paths, self.trust_remote_code = name, dict(paths), trust_remote_code
        self.replaced: dict[str, str] = {}
        """paths of other checkpoints than those that came with the name"""

    def __repr__(self) -> str:
        return f"Model({self.name!r}, {', '.join(self.paths)})"

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The transformers config of the base model."""
        return self._fetch_config(self.paths["base"])

    def config_dict(self, stage: str = "base") -> dict[str, object]:
        """The config of a stage's checkpoint as a dict; loads no transformers where the config is
        a preset's, or lies in a folder or in the hub's cache."""
        path = self.paths.get(stage, self.paths["base"])
        if known := _preset(path):
            return known
        if file := find_config(path):
            return _read_config(file)
        config = self.config if path == self.paths["base"] else self._fetch_config(path)
        return config.to_dict()

    def _fetch_config(self, path: str) -> PreTrainedConfig:
        from transformers import AutoConfig

        config: PreTrainedConfig
        if known := _preset(path):
            config = AutoConfig.for_model(str(known.pop("model_type")), **known)
        else:
            trust = self.trust_remote_code
            config = fetch(AutoConfig.from_pretrained, path, "config", trust_remote_code=trust)
        return config

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, with a pad token that is not the eos token."""
        return load_tokenizer(self.paths["base"], self.trust_remote_code)

    @cached_property
    def encoder(self) -> Tokenizer:
        """What makes the same tokens as `tokenizer`, for those who only count them: of a bundled
        model read without transformers."""
        folder = Path(self.paths["base"])
        if "tokenizer" in vars(self) or folder.parents[1:2] != (small_models_folder(),):
            return self.tokenizer
        return BareTokenizer(folder)  # type: ignore[return-value]  # as much as they ask of one

    @cached_property
    def reward_tokenizer(self) -> Tokenizer:
        """The reward model's tokenizer: the model's own where the vocabulary is the same."""
        path = self.paths.get("reward", self.paths["base"])
        if not self._brings_tokenizer(path):
            return self.tokenizer
        theirs = load_tokenizer(path, self.trust_remote_code)
        return self.tokenizer if same_vocabulary(theirs, self.tokenizer) else theirs

    def _brings_tokenizer(self, path: str) -> bool:
        """Whether a checkpoint has a tokenizer, and not the files of the model's own."""
        base = self.paths["base"]
        if path == base or not has_tokenizer(path):
            return False
        return not same_files(path, base)

    @property
    def foreign_reward(self) -> bool:
        """Whether the reward model reads tokens of its own: it is given texts."""
        if not self._brings_tokenizer(self.paths.get("reward", self.paths["base"])):
            return False  # without loading one
        return self.reward_tokenizer is not self.tokenizer

    @property
    def context(self) -> int:
        """Tokens of prompt and response together that the model can take."""
        whole = self.config_dict()  # without transformers
        text = whole.get("text_config")
        reads = (text if isinstance(text, dict) else whole).get("max_position_embeddings")
        if not isinstance(reads, int):
            reads = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        return int(reads or 2**31)

    def check_writes(self, trains: bool = False) -> None:
        """Raises ValueError where all there is is a reward model, and of one that `trains` where no
        trainer here knows its log-probabilities."""
        if "sft" not in self.paths and self.paths.get("reward") == self.paths["base"]:
            raise writes_nothing(self.name)
        if trains and self.name not in BUNDLED:
            config = self.config_dict()
            for part in (config, config.get("text_config")):
                check_head(str(part.get("model_type")) if isinstance(part, dict) else "")

    @property
    def base(self) -> PreTrainedModel:
        """A fresh copy of the pretrained model."""
        self.check_writes()
        return load_causal_lm(self.paths["base"], self.tokenizer, self.trust_remote_code)

    @property
    def sft(self) -> PreTrainedModel:
        """A fresh copy of the fine-tuned model; the base model where there is none."""
        self.check_writes()
        return load_causal_lm(self._sft_path, self.tokenizer, self.trust_remote_code)

    def in_4bit(self, stage: str = "sft", nested: bool = False) -> PreTrainedModel:
        """The base or the fine-tuned model with the matrices of its layers in NF4, to put adapters
        on."""
        path = self.paths["base"] if stage == "base" else self._sft_path
        load = partial(load_causal_lm, path, self.tokenizer, self.trust_remote_code)
        return in_4bit(load, nested)

    @property
    def reward(self) -> PreTrainedModel:
        """A fresh copy of the reward model; a new head on the SFT model where there is none."""
        if "reward" in self.paths:
            path, tokenizer = self.paths["reward"], self.reward_tokenizer
            return load_reward_model(path, tokenizer, self.trust_remote_code)
        return self.new_reward()

    def new_reward(self, seed: int = 0, four_bits: bool | None = None) -> PreTrainedModel:
        """A reward model with a fresh head on the SFT model; `four_bits`: on one in NF4, with
        quantised scales or without."""
        where = self._sft_path, self.tokenizer, seed, self.trust_remote_code
        load = partial(new_reward_model, *where)
        return load() if four_bits is None else in_4bit(load, four_bits)

    def new_value(self) -> PreTrainedModel:
        """A value model that gives 0 for every token: a zero head on the SFT model (rule 15: the
        value model starts as the reward model, or with a head of zeros)."""
        model = self.new_reward()
        model.get_parameter("score.weight").data.zero_()
        return model

    @property
    def teacher(self) -> Model:
        """The model that is distilled from (`with_stage("teacher", …)`). Raises ValueError where
        there is none."""
        if "teacher" not in self.paths:
            raise ValueError(
                f"distill needs a teacher for {self.name}: "
                + by_surface("give teacher_model='small'", "give --teacher-model small")
                + ", a folder, a hub id, or the model folder of a run"
            )
        path = self.paths["teacher"]
        return Model(path, {"base": path}, self.trust_remote_code)

    @property
    def _sft_path(self) -> str:
        return self.paths.get("sft", self.paths["base"])

    @property
    def others(self) -> dict[str, str]:
        """Models of other roles that it was given, as `lab.plan` takes them."""
        known = load(self.name).paths if self.name in BUNDLED else {}
        bundled, found = small_models_folder(), {}
        for role in ("reward", "value", "teacher", "draft"):
            path = self.paths.get(role)
            if path is not None and path not in (self.paths["base"], *known.values()):
                within = Path(path).is_relative_to(bundled)
                found[f"{role}_model"] = Path(path).parent.name if within else path
        return found

    def with_stage(self, stage: str, path: str | Path) -> Model:
        """The same model with the checkpoint of one stage replaced."""
        made = Model(self.name, {**self.paths, stage: str(path)}, self.trust_remote_code)
        made.replaced = {**self.replaced, stage: str(path)}
        if str(path) == self.paths.get(stage) and stage not in self.replaced:
            del made.replaced[stage]
        return made


def writes_nothing(name: str) -> ValueError:
    """What is raised where a reward model is to write."""
    return ValueError(f"{name} is a reward model: it scores, and writes nothing")


def load(name: str | Path | Model, *, trust_remote_code: bool = False) -> Model:
    """A handle on a bundled model, a preset, a local folder, or a hub id.

    `trust_remote_code` runs Python code that comes with the model: only for people you trust.
    Raises ValueError with one line that says what was looked for when nothing is found.
    """
    if isinstance(name, Model):
        return name
    local = Path(name).expanduser()
    if local.name in BUNDLED and local.resolve().parent == small_models_folder().resolve():
        name = local.name  # a bundled model by its folder
    folder = small_models_folder() / str(name)
    if str(name) in BUNDLED:
        stages = [s for s in ("base", "sft", "reward") if (folder / s / "config.json").is_file()]
        if "base" not in stages:
            raise ValueError(f"the bundled model {name!r} is missing from {folder}; reinstall")
        stages += [s for s in ("reward_adapter",) if (folder / s / ADAPTER_FILE).is_file()]
        return Model(str(name), {s: str(folder / s) for s in stages})
    if local.is_dir() and name != "":  # which Path takes for the folder here
        return _local(local, trust_remote_code)
    hub_id = short_names().get(str(name).lower(), str(name))
    among_runs = "runs" in local.parts[:-1] or any(local.parent.glob("*/run.json"))
    if local.is_absolute() or hub_id.startswith(".") or "/" in hub_id and among_runs:
        later = "; a run saves its model at its end: train that first, also for a dry run"
        raise ValueError(no_folder(local) + later * (local.name == "model"))
    if hub_id.count("/") != 1:
        raise ValueError(
            f"no model {str(name)!r}: {nearest(str(name))}not bundled ({', '.join(BUNDLED)}), "
            "not a preset, not a folder, and not a hub id of the form owner/name"
        )
    return Model(str(name), {"base": hub_id}, trust_remote_code)


def _local(folder: Path, trust_remote_code: bool) -> Model:
    """A handle on a local folder, of a run on its model; the architecture in its config tells a
    reward model."""
    if (folder / "run.json").is_file():
        from ..runs.run import Run

        folder = Run.load(folder).model_path
    config = _read_config(folder / "config.json")
    paths = {"base": str(folder)}
    if gives_scores(config):
        paths["reward"] = str(folder)
    return Model(str(folder), paths, trust_remote_code)


def gives_scores(config: Mapping[str, object]) -> bool:
    """Whether a checkpoint's config.json is that of a reward model."""
    return "SequenceClassification" in str(config.get("architectures"))


def _read_config(file: Path) -> dict[str, object]:
    """A checkpoint's config.json. Raises ValueError, one line, for what is none."""
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError:
        raise ValueError(f"no config.json in the model folder {file.parent}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(config, dict) or not config.get("model_type"):
        raise ValueError(f"{file} names no model_type: not a transformers model")
    return config
