"""What a notebook opens to look and to play: each widget with the lab's functions handed to it.

    lab.planner()                     sliders: what would it cost?
    lab.dashboard(run)                the curves of a run on disk, step by step
    lab.inspect(sft, ppo, dpo)        what the models wrote, token by token
    lab.label("stories", n=20)        you are the annotator

The figures to study (`lab.curves`, `frontier`, `stage_costs`, `compare(…).figure()`) are functions
of runs, plans and ledgers, and need nothing from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from .data.load import Data, load_data
from .data.messages import Row
from .models.load import load
from .models.tokenizer import load_tokenizer
from .models.weights import load_causal_lm
from .runs.run import Run
from .stages import STAGES

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .widgets.dashboard import Replay
    from .widgets.inspector import Inspector
    from .widgets.labeller import Labeller
    from .widgets.planner import Planner


def planner(**state: object) -> Planner:
    """The slider app: what a stage takes in memory, time and money.

    `state`: any argument of `lab.plan` to begin with, and the `planner.state` of an earlier one.
    Raises ValueError for a setting that no control can show.
    """
    from .planning import plan
    from .widgets.planner import Planner

    return Planner(plan, **state)


def dashboard(run: Run | str | Path) -> Replay:
    """The dashboard of a run on disk (or its folder), finished or still being written."""
    from .cost.hardware import hardware
    from .widgets.dashboard import Replay

    return Replay(_opened(run), hardware("here").memory)


def inspect(*runs: Run | str | Path) -> Inspector:
    """What runs (or their folders) wrote: step by step, token by token, side by side.

    PPO keeps the figures of some tokens; for other samples a button computes them, from the run's
    model and the model it began as.
    """
    from .widgets.inspector import Inspector

    return Inspector(*map(_opened, runs), score=_score)


def label(
    data: Data | str | Path = "stories",
    n: int = 20,
    out: str | Path = "my_preferences.jsonl",
    *,
    who: str = "",
    seed: int = 0,
    feedback: str = "end",
) -> Labeller:
    """You are the annotator: `n` of the data's pairs to label. Each answer is in `out` at once, and
    the same `out` goes on where you stopped.

        mine = lab.label(data)                                       # click, or ← and →
        mine_too = data.with_preferences(mine.preferences)           # held-out pairs stay
        reward = lab.train("reward", mine_too)                       # a reward model of your taste
        tiny = lab.load("tiny").with_stage("reward", reward.model_path)
        lab.train(lab.plan("ppo", tiny))                             # and a policy that pleases it

    `who`, `seed`, `feedback`: as in `widgets.labeller.Labeller`. Raises ValueError for data without
    pairs.
    """
    from .widgets.labeller import Labeller

    data = load_data(data)
    pairs = data.preferences.train[:n]
    if not pairs:
        raise ValueError(f"{data.name} has no pairs to label: no chosen and rejected fields")
    gold = data.gold_reward if data.has_gold else None
    return Labeller(pairs, out, gold, data.annotator, who=who, seed=seed, feedback=feedback)


def _opened(run: Run | str | Path) -> Run:
    return run if isinstance(run, Run) else Run.load(run)


def _score(run: Run, row: Row) -> Mapping[str, object]:
    """Figures of a sample's tokens under the model that wrote it and the one the run began as."""
    from .ppo.texts import score_tokens

    if row.get("when") in (None, "held-out"):
        raise ValueError(
            "the model of that step is gone: only samples from before and after training "
            "can be scored"
        )
    policy, reference, tokenizer = _models(run.folder.resolve(), run.stage, run.config["model"])
    before = row.get("when") in ("sft", "base") and row["when"] != run.stage
    prompt = row.get("prompt_ids", row["prompt"])  # runs of version 0.1 have texts alone
    response = row.get("ids", str(row["response"]))
    return score_tokens(reference if before else policy, reference, tokenizer, prompt, response)


@lru_cache(maxsize=3)
def _models(
    folder: Path, stage: str, model: str
) -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase]:
    path = folder / "model"
    handle = load(model)
    from_base = stage in STAGES and STAGES[stage].starts_from == "base"
    reference = handle.base if from_base else handle.sft
    return load_causal_lm(path), reference, load_tokenizer(path)
