"""What writes: the language model of a run, a folder or a name, found without loading it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..runs.run import Run
from .load import BUNDLED, Model, load
from .tokenizer import load_tokenizer
from .weights import load_causal_lm

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

    from ..data.schema import Prompt


@dataclass(frozen=True)
class Policy:
    """Folders (or hub ids) of weights and tokenizer; `name`: of the run or model. `bundled`: it is,
    or was trained from, a bundled model, whose prompts end with a line. `world`: what it learned
    are the bundled stories, so it answers requests and knows no turns of a conversation."""

    weights: str
    tokenizer: str
    name: str
    bundled: bool = False
    world: bool = False
    trust_remote_code: bool = False

    def load(self, **settings: object) -> tuple[PreTrainedModel, Tokenizer]:
        """`settings`: of transformers' `from_pretrained`."""
        tokenizer = load_tokenizer(self.tokenizer, self.trust_remote_code)
        trust = self.trust_remote_code
        return load_causal_lm(self.weights, tokenizer, trust, **settings), tokenizer

    def prompt(self, prompt: Prompt) -> Prompt:
        """A prompt as the model was trained on."""
        return prompt.rstrip() + "\n" if self.bundled and isinstance(prompt, str) else prompt


def find_policy(model: Run | Model | str | Path, stage: str = "sft") -> Policy:
    """The policy of a run (or its folder), or of the `stage` ("sft" or "base") of a model or its
    name. Raises FileNotFoundError for a run that kept no model, ValueError for another stage."""
    if isinstance(model, (str, Path)) and (Path(model) / "run.json").is_file():
        model = Run.load(model)
    if isinstance(model, Run):
        path, bundled = str(model.model_path), model.config["model"] in BUNDLED
        world = bundled and model.config.get("data") == "stories"
        return Policy(path, path, model.name, bundled, world)
    handle = load(model)
    if stage not in ("base", "sft"):
        raise ValueError(f"stage {stage!r} writes nothing; choose base or sft")
    path = handle.paths.get("sft" if stage == "sft" else "base", handle.paths["base"])
    bundled = handle.name in BUNDLED
    trust, tokenizer = handle.trust_remote_code, handle.paths["base"]
    name = f"{Path(handle.name).name}" + "-base" * (stage == "base" and "sft" in handle.paths)
    return Policy(path, tokenizer, name, bundled, bundled, trust)
