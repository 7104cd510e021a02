"""What writes: the language model of a run, a folder or a name, found without loading it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..runs.run import Run
from .hub import find_config
from .load import BUNDLED, Model, load, small_models_folder, writes_nothing
from .packaged import PACKAGED
from .tokenizer import load_tokenizer, same_files
from .weights import load_causal_lm

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

    from ..data.schema import Prompt


@dataclass(frozen=True)
class Policy:
    """Folders (or hub ids) of weights and tokenizer; `name`: of the run or model. `bundled`: it has
    the bundled models' tokenizer, and prompts end with a line. `world`: what it learned are the
    bundled stories, so it answers requests and knows no turns of a conversation."""

    weights: str
    tokenizer: str
    name: str
    bundled: bool
    world: bool
    trust_remote_code: bool = False

    def load(self) -> tuple[PreTrainedModel, Tokenizer]:
        tokenizer = load_tokenizer(self.tokenizer, self.trust_remote_code)
        return load_causal_lm(self.weights, tokenizer, self.trust_remote_code), tokenizer

    def prompt(self, prompt: Prompt) -> Prompt:
        """A prompt as the model was trained on."""
        return prompt.rstrip() + "\n" if self.bundled and isinstance(prompt, str) else prompt


def run_or_model(of: Run | Model | str | Path) -> Run | Model:
    """A run, its folder or the model folder in it; else a model, its name, folder or hub id."""
    if isinstance(of, (str, Path)):
        folder = Path(of).expanduser()
        folder = folder.parent if folder.name == "model" else folder
        if (folder / "run.json").is_file():
            return Run.load(folder)
    return of if isinstance(of, Run) else load(of)


def find_policy(of: Run | Model | str | Path, stage: str = "sft") -> Policy:
    """The policy of a run, or of the `stage` ("sft" or "base") of a model (`run_or_model`). Raises
    FileNotFoundError for a run that kept no model, ValueError for what scores."""
    model = run_or_model(of)
    if isinstance(model, Run):
        if model.stage == "reward":
            raise writes_nothing(model.name)
        path, name, learned = str(model.model_path), model.name, model.config.get("data")
        return Policy(
            path, path, name, _is_bundled(path), _is_bundled(path) and learned == "stories"
        )
    if stage not in ("base", "sft"):
        raise ValueError(f"stage {stage!r} writes nothing; choose base or sft")
    model.check_writes()
    base = model.paths["base"]
    path, bundled = model.paths.get(stage, base), _is_bundled(base)
    if path not in PACKAGED:
        find_config(path)  # where there is nobody to ask, that is said now
    name = Path(model.name).name + "-base" * (stage == "base" and "sft" in model.paths)
    return Policy(path, base, name, bundled, bundled, model.trust_remote_code)


def _is_bundled(path: str) -> bool:
    return any(same_files(path, small_models_folder() / name / "base") for name in BUNDLED)
