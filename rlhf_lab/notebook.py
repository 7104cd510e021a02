"""What a notebook opens to look and to play: each widget with the lab's functions handed to it.

The figures to study (`lab.curves`, `frontier`, `stage_costs`, `compare(…).figure()`) are functions
of runs, plans and ledgers, and need nothing from here.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .data.load import Data, load_data
from .data.messages import Row
from .display import Listed, numbered
from .models.load import load
from .models.policy import Policy, find_policy
from .models.tokenizer import load_tokenizer
from .models.weights import load_causal_lm
from .runs.run import Run
from .stages import STAGES

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .charts.schedule import Batching
    from .data.schema import Prompt
    from .models.load import Model
    from .planning import Plan
    from .trainers.batches import Sequences
    from .widgets.chat import Chat
    from .widgets.dashboard import Replay
    from .widgets.guess import Answer, Guess
    from .widgets.inspector import Inspector
    from .widgets.labeller import Labeller
    from .widgets.planner import Planner


GREEDY = 1e-6
"""A temperature at which sampling takes the likeliest token."""


def planner(of: Plan | str | None = None, /, **state: object) -> Planner:
    """The slider app: what a stage takes in memory, time and money.

    `of`: a plan to begin with, to the same figures; its settings that no control shows stand beside
    the controls. Or a link: that of the planner's web page, which `lab.planner().link` gives too.
    `state`: any argument of `lab.plan`, and the `planner.state` of an earlier one. Raises
    ValueError for a setting that no control can show.
    """
    from .planning import plan
    from .widgets.planner import Planner
    from .widgets.planner_link import settings_of

    if isinstance(of, str):
        return Planner(plan, **{**settings_of(of), **state})
    return Planner(plan, of, **state)


def dashboard(run: Run | str | Path) -> Replay:
    """The dashboard of a run on disk (or its folder), finished or still being written."""
    from .cost.hardware import hardware
    from .widgets.dashboard import Replay

    return Replay(Run.load(run), hardware("here").memory)


def inspect(*runs: Run | str | Path) -> Inspector:
    """What runs (or their folders) wrote: step by step, token by token, side by side.

    PPO keeps the figures of some tokens; for other samples a button computes them, from the run's
    model and the model it began as.
    """
    from .widgets.inspector import Inspector

    return Inspector(*map(Run.load, runs), score=_score)


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
    pairs, and for `n` below 1.
    """
    from .widgets.labeller import Labeller

    if n < 1:
        raise ValueError(f"n={n}: give the number of pairs to label, 1 or more")
    data = load_data(data)
    pairs = data.preferences.train[:n]
    if not pairs:
        raise ValueError(f"{data.name} has no pairs to label: no chosen and rejected fields")
    gold = data.gold_reward if data.has_gold else None
    return Labeller(pairs, out, gold, data.annotator, who=who, seed=seed, feedback=feedback)


def guess(
    question: str, choices: Sequence[str] = (), *, unit: str = "", value: Answer | None = None
) -> Guess:
    """A question to answer before a run, a number in `unit` or one of `choices`; its
    `reveal(predicted=…, measured=…)` later shows your answer beside the true one.

    `value`: the answer, where no widget can be shown. Raises ValueError for one that is no number,
    or none of the choices.
    """
    from .widgets.guess import Guess

    return Guess(question, choices, unit=unit, value=value)


def generate(
    model: Run | Model | str | Path,
    prompt: Prompt,
    n: int = 1,
    *,
    stage: str = "sft",
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
) -> Listed[str]:
    """`n` answers to a prompt of yours (text or messages), from the model of a run, or from the
    `stage` ("sft" or "base") of a model or its name. `temperature` 0 takes the likeliest token.

    Requests of the bundled world end with a line: a bundled model's prompt gets that end. Raises
    FileNotFoundError for a run that kept no model, ValueError for another stage.
    """
    if max_new_tokens < 1 or n < 1 or temperature < 0:
        raise ValueError("generate: n and max_new_tokens are at least 1, temperature at least 0")
    found = find_policy(model, stage)
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    texts = _sampled(*found.load(), found.prompt(prompt), n, seed=seed, **settings)
    return Listed(texts, lambda rows: [{"": i, "answer": t} for i, t in enumerate(rows, 1)])


def _sampled(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    n: int,
    *,
    temperature: float,
    **settings: Any,
) -> list[str]:
    from .ppo.texts import sample_ids

    settings |= {"samples": n, "temperature": temperature or GREEDY}
    (ids,) = sample_ids(model, tokenizer, [prompt], **settings)
    texts: list[str] = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return texts


def chat(
    *models: Run | Model | str | Path | tuple[str, str],
    **named: Run | Model | str | Path | tuple[str, str],
) -> Chat:
    """A widget that asks models the same thing, side by side: runs, models, names, folders, and
    ("tiny", "base") for a name's other stage; `named` ones under your name for them. Each question
    stands alone: no model remembers the ones before.

    Answers to requests of the bundled world show their gold reward; a prompt with words that this
    world does not know is answered too, and that is said. Other models read the prompt as a user's
    turn of their chat template.
    """
    from .widgets.chat import Chat
    from .world.generator import KNOWN_WORDS, draw_request, read_request
    from .world.gold_reward import gold_reward

    given = [*models, *named.values()]
    if not given:
        raise ValueError("chat: name a model at least, or two: lab.chat('tiny', run)")
    policies = [find_policy(*m) if isinstance(m, tuple) else find_policy(m) for m in given]
    world, load_once = any(p.world for p in policies), cache(Policy.load)

    def answer(policy: Policy, prompt: str, **settings: Any) -> tuple[str, float | None]:
        turn: Prompt = [{"role": "user", "content": prompt}]
        written = policy.prompt(prompt) if policy.bundled else turn
        (text,) = _sampled(*load_once(policy), written, 1, **settings)
        return text, gold_reward(prompt, text) if read_request(prompt) else None

    def note(prompt: str) -> str:
        words = dict.fromkeys(re.findall("[a-z]+", prompt.lower()))
        unknown = ", ".join(w for w in words if w not in KNOWN_WORDS)
        if not world or (read_request(prompt) and not unknown):
            return ""
        why = f"words that the stories do not have: {unknown}" if unknown else "no such request"
        return f"Models of the bundled stories never learned to answer this ({why})."

    rng = random.Random(0)
    examples = [draw_request(rng).prompt for _ in range(8)] if world else []
    names = numbered([*(p.name for p in policies[: len(models)]), *named])
    return Chat({n: partial(answer, p) for n, p in zip(names, policies)}, examples, note)


def batch(
    stage: str, model: Model | str, data: Data, rows: int = 2, *, split: str = "train"
) -> dict[str, Sequences]:
    """The first `rows` rows of a stage, to train on or held out ("test"), as tensors padded on the
    right, eos included.

    → {"completion": …} for SFT, {"chosen": …, "rejected": …} for the reward model and DPO; each a
    `Sequences` of `ids` (b, t), `real` (b, t), True where a token is no padding, and `response`
    (b, t), True where it belongs to the response. Raises ValueError for a stage without answers.
    """
    from .trainers.batches import first_batch

    return first_batch(stage, load(model).tokenizer, data, rows, split)


def continuous_batching(
    model: Run | Model | str | Path = "mini",
    *,
    requests: int = 256,
    slots: int = 32,
    mean: float = 64,
    longest: int = 512,
    seed: int = 0,
) -> Batching:
    """The same requests through transformers' engine as static batches and continuously.

    Requests are prompts of the stories, answered greedily until each has a length drawn for it:
    geometric with this `mean`, cut at `longest` (tokens). `slots`: requests that run at once.
    Raises ValueError for sizes that are none, and where the model's context is too short.
    """
    import numpy

    from .charts.schedule import Batching
    from .deploy.schedule import trace

    if min(requests, slots, mean, longest) < 1:
        raise ValueError("requests, slots, mean and longest are at least 1")
    policy, tokenizer = find_policy(model).load()
    texts = [str(row["prompt"]) for row in load_data("stories").prompts.train]
    prompts = [tokenizer(texts[i % len(texts)])["input_ids"] for i in range(requests)]
    context = getattr(policy.config, "max_position_embeddings", None)
    if context and context < (needed := max(map(len, prompts)) + longest):
        raise ValueError(
            f"longest={longest}: with its prompt {needed}, and the model takes {context}"
        )
    drawn = numpy.random.default_rng(seed).geometric(1 / mean, requests).clip(max=longest)
    lengths = [int(length) for length in drawn]
    both = (trace(policy, prompts, lengths, slots, static=static) for static in (True, False))
    return Batching(*both)


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
