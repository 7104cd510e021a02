"""What writes: the language model of a run, a folder or a name, found without loading it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..runs.run import Run
from .load import BUNDLED, Model, load, small_models_folder, writes_nothing
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


def find_policy(model: Run | Model | str | Path, stage: str = "sft") -> Policy:
    """The policy of a run (or its folder), or of the `stage` ("sft" or "base") of a model or its
    name. Raises FileNotFoundError for a run that kept no model, ValueError for what scores."""
    if isinstance(model, (str, Path)):
        folder = Path(model).parent if Path(model).name == "model" else Path(model)
        model = Run.load(folder) if (folder / "run.json").is_file() else model
    if isinstance(model, Run):
        if model.stage == "reward":
            raise writes_nothing(model.name)
        path, name, learned = str(model.model_path), model.name, model.config.get("data")
        return Policy(
            path, path, name, _is_bundled(path), _is_bundled(path) and learned == "stories"
        )
    handle = load(model)
    if stage not in ("base", "sft"):
        raise ValueError(f"stage {stage!r} writes nothing; choose base or sft")
    handle.check_writes()
    base = handle.paths["base"]
    path, bundled = handle.paths.get(stage, base), _is_bundled(base)
    name = Path(handle.name).name + "-base" * (stage == "base" and "sft" in handle.paths)
    return Policy(path, base, name, bundled, bundled, handle.trust_remote_code)


def _is_bundled(path: str) -> bool:
    return any(same_files(path, small_models_folder() / name / "base") for name in BUNDLED)
