"""What a response is worth: reward models and reward functions, weighted and added up.

A **source** is a reward model or a function in GRPOTrainer's calling convention. A reward model
with the policy's vocabulary reads the sampled token ids. One with another vocabulary reads the
text, in tokens of its own: special tokens stay behind, and its own eos ends a response that had
stopped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..data.chat import is_conversation
from ..data.reward_sources import RewardFunction
from ..data.schema import Message
from ..data.tokenize import prompt_of
from ..display import counted
from ..metering.meter import Meter, NoMeter
from ..models.tokenizer import same_vocabulary
from .executor import Executor
from .logprobs import AnyModel
from .losses import StopTokens, normalised_scores, score_constants
from .rollout import sequence_scores, shape_of
from .sampling import pad_prompts
from .texts import Row, Tokenizer, encode_pair


def call_reward(
    function: RewardFunction,
    rows: Sequence[Row],
    completions: Sequence[str],
    ids: list[list[int]],
    finite: bool = False,
) -> Tensor:
    """Call a reward function as GRPOTrainer does: prompts, completions, completion_ids, columns.

    → (b,) fp32; None ("does not apply") becomes NaN. Raises ValueError for what is no list of one
    number for each completion, with `finite` for a number that is none to learn from too.
    """
    names = dict.fromkeys(name for row in rows for name in row)  # tools are not in every row
    columns = {k: [r.get(k) for r in rows] for k in names if k not in ("prompt", "prompt_ids")}
    prompts, messages = [prompt_of(r) for r in rows], list[list[Message]]()
    if is_conversation(prompts[0]):
        messages = [[{"role": "assistant", "content": c}] for c in completions]
    values = function(
        prompts=prompts, completions=messages or completions, completion_ids=ids, **columns
    )
    try:
        count = len(values)
        numbers = [float("nan") if v is None else float(v) for v in values]
    except (TypeError, ValueError):
        raise ValueError(
            f"{name_of(function)} must give a list with a number, or None, for each "
            f"completion, and gave {str(values)[:60]!r}"
        ) from None
    if count != len(rows):
        raise ValueError(f"{name_of(function)} gave {count} rewards for {len(rows)} completions")
    for row, (value, number) in enumerate(zip(values, numbers, strict=True)):
        if finite and value is not None and not math.isfinite(number):
            raise ValueError(
                f"{name_of(function)} gave {number} for row {row} ({completions[row][:40]!r}): a "
                "reward is a finite number, or None where there is none"
            )
    return torch.tensor(numbers)


def name_of(source: object) -> str:
    """What a function or a model is called, in metrics and in complaints: a model as GRPOTrainer
    calls it, by the last part of where it came from."""
    path = str(getattr(getattr(source, "config", None), "_name_or_path", ""))
    own = getattr(source, "__name__", type(source).__name__)
    return path.rstrip("/").split("/")[-1] or str(own)


@dataclass
class Source:
    """One reward model or function; `tokenizer` of a model that does not read the policy's ids."""

    name: str
    function: AnyModel
    is_model: bool
    tokenizer: Tokenizer | None = None


class Rewards:
    """Scores whole responses by every source.

    `model`: the reward model or None; `functions`: callables and further reward models, one or a
    list. `args`: a config with `reward_weights` (one for each source, the reward model first), and
    PPO's `normalize_scores` and `score_clip` (rule 16). `processing_class`: the reward models'
    tokenizer, or a list of one for each (None: the policy's). `stop_token_ids` end a response.
    Raises ValueError, one line, for what cannot be a source.
    """

    def __init__(
        self,
        model: AnyModel | None,
        functions: RewardFunction | Sequence[RewardFunction] | None,
        tokenizer: Tokenizer,
        args: object = None,
        processing_class: object = None,
        stop_token_ids: StopTokens = None,
        device: torch.device | None = None,
        executor: Executor | None = None,
    ):
        stops = (stop_token_ids,) if isinstance(stop_token_ids, int) else stop_token_ids
        self.tokenizer, self.stop_token_ids = tokenizer, frozenset(stops or ())
        self.passes: Callable[..., AbstractContextManager[object]] = lambda *models: nullcontext()
        """within which models may be called (`Replicated.passes`)"""
        self.executor = executor or Executor()
        self.normalise_scores = getattr(args, "normalize_scores", False)
        self.score_clip = getattr(args, "score_clip", None)
        weights = getattr(args, "reward_weights", None)
        self.mean: float | None = None
        self.std: float | None = None
        self.by_source: dict[str, Tensor] = {}  # of the last call, (b,) each; NaN: does not apply
        functions = [functions] if callable(functions) else list(functions or ())
        if model is None and not functions:
            raise ValueError("PPO needs a reward_model or reward_funcs")
        self.sources = _sources(model, functions, tokenizer, processing_class)
        self.further = [s.function for s in self.sources if s.is_model and s.function is not model]
        for reward_model in self.further:
            reward_model.eval().requires_grad_(False).to(device)
        if weights is not None and len(weights) != len(self.sources):
            raise ValueError(
                f"reward_weights has {counted(len(weights), 'number')} for "
                f"{counted(len(self.sources), 'source')} of "
                f"reward ({', '.join(s.name for s in self.sources)}): give one for each"
            )
        self.weights = [1.0] * len(self.sources) if weights is None else list(map(float, weights))

    # ------------------------------------------------------------------------------------ scoring

    def score(
        self,
        ids: Tensor,
        attention: Tensor,
        responses: Tensor,
        mask: Tensor,
        rows: Sequence[Row],
        chunk: int,
        meter: Meter | None = None,
    ) -> Tensor:
        """The weighted sum of the sources' scores of each response, `chunk` rows at a time through
        a model. ids, attention: (b, s); responses, mask: (b, t) → (b,) fp32.

        A source that gives None for a response adds nothing to it.
        """
        pairs = zip(responses, mask, strict=True) if self.reads_texts else ()
        answers = [ids[m].tolist() for ids, m in pairs]
        ends = [not self.stop_token_ids.isdisjoint(a) for a in answers]
        scores = self.score_answers(ids, attention, answers, ends, rows, chunk, meter)
        return scores.nan_to_num(0.0)

    @property
    def reads_texts(self) -> bool:
        """Whether a source needs the responses as text."""
        return any(not s.is_model or s.tokenizer is not None for s in self.sources)

    def score_answers(
        self,
        ids: Tensor,
        attention: Tensor,
        answers: list[list[int]],
        ends: Sequence[bool],
        rows: Sequence[Row],
        chunk: int,
        meter: Meter | None = None,
    ) -> Tensor:
        """The same where the tokens of the responses are known (`answers`) and whether each of
        them had stopped (`ends`). → (b,) fp32, NaN where no source applies."""
        meter = meter or NoMeter("ppo")
        scores: dict[str, Tensor] = {}
        read = {s.name: (ids, attention) for s in self.sources if s.is_model}
        # No role of its own: functions, and the work of reading text anew.
        with meter.phase("score") if self.reads_texts else nullcontext():
            if self.reads_texts:
                texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
            for source in self.sources:
                if source.tokenizer is not None:
                    theirs, mask = retokenised(source, self.tokenizer, rows, texts, ends)
                    read[source.name] = theirs.to(ids.device), mask.to(ids.device)
                elif not source.is_model:
                    value = call_reward(source.function, rows, texts, answers, finite=True)
                    scores[source.name] = value.to(ids.device)
        scores |= self._model_scores(read, chunk, meter)
        self.by_source = {s.name: scores[s.name] for s in self.sources}
        return weighted(list(self.by_source.values()), self.weights)

    def _model_scores(
        self, read: dict[str, tuple[Tensor, Tensor]], chunk: int, meter: Meter
    ) -> dict[str, Tensor]:
        """Each reward model's scores of the sequences that it reads: ids, mask (b, s). → (b,)."""
        if not read:
            return {}
        run = self.executor
        models = {s.name: s.function for s in self.sources if s.is_model}
        buckets = {name: run.length_buckets(mask, chunk) for name, (_, mask) in read.items()}
        # What FLOPs are linear in.
        shape = [n for name, (_, mask) in read.items() for n in shape_of(buckets[name], mask)]
        tokens = sum(int(mask.sum()) for _, mask in read.values())
        with meter.phase("score", "reward", shape, tokens), self.passes(*models.values()):
            return {
                name: run.map_chunks(partial(sequence_scores, models[name]), buckets[name], *pair)
                for name, pair in read.items()
            }

    # ------------------------------------------------------------------------ what is learned from

    def normalise(self, scores: Tensor) -> Tensor:
        """Rule 16: scores may be normalised by the first rollout: those of a whole rollout batch,
        all processes', as they are learned from.

        The mean and deviation of the first batch that comes by hold for the whole run. (b,) →
        (b,); without `normalise_scores` and `score_clip` the same tensor.
        """
        if self.normalise_scores and self.mean is None:
            self.mean, self.std = score_constants(scores)
        return normalised_scores(scores, self.mean, self.std, self.score_clip)

    def state_dict(self) -> dict[str, float | None]:
        """The constants of the normalisation; None before the first rollout."""
        return {"mean": self.mean, "std": self.std}

    def load_state_dict(self, state_dict: dict[str, float | None]) -> None:
        self.mean, self.std = state_dict["mean"], state_dict["std"]


def weighted(scores: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ weight · score over the sources that apply. (b,) each → (b,), NaN where none does.

    A source alone, of weight 1, is returned as it is.
    """
    if len(scores) == 1 and weights[0] == 1:
        return scores[0]
    total = torch.as_tensor(
        sum(w * s.nan_to_num(0.0) for w, s in zip(weights, scores, strict=True))
    )
    nowhere = torch.stack([s.isnan() for s in scores]).all(0)
    return total.masked_fill(nowhere, float("nan"))


# ------------------------------------------------------------------------------------- the sources


def _sources(
    model: AnyModel | None,
    functions: list[AnyModel],
    tokenizer: Tokenizer,
    processing_class: object,
) -> list[Source]:
    """The reward model first, then the functions and models in their order, each with a name."""
    sources: list[Source] = []
    for function in ([] if model is None else [model]) + functions:
        is_model = function is model or isinstance(function, nn.Module)
        if not is_model and not callable(function):
            raise ValueError(f"reward_funcs: {function!r} is neither a function nor a reward model")
        if is_model:
            check_reward_model(function)
        name = "model" if function is model else name_of(function)
        sources.append(Source(_unused(name, sources), function, is_model))
    models, tokenizers = [s for s in sources if s.is_model], processing_class
    if not isinstance(tokenizers, (list, tuple)):
        tokenizers = [tokenizers] * len(models)
    if len(tokenizers) != len(models):
        raise ValueError(
            f"reward_processing_class: {len(tokenizers)} tokenizers for {len(models)} "
            "reward models; give one for each"
        )
    for source, theirs in zip(models, tokenizers, strict=True):
        if theirs is not None and not same_vocabulary(theirs, tokenizer):
            source.tokenizer = theirs
    return sources


def _unused(name: str, sources: list[Source]) -> str:
    taken, number, wanted = {s.name for s in sources}, 1, name
    while name in taken:
        number += 1
        name = f"{wanted}_{number}"
    return name


def check_reward_model(model: AnyModel) -> None:
    """Raises ValueError for a transformers model that is no reward model: it needs a `score` head
    with one output."""
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        return
    names = (name.split(".")[-1] for name, _ in model.named_modules())
    labels = int(getattr(model.config, "num_labels", 1))
    if getattr(model, "score", None) is None and "score" not in names:
        raise ValueError(
            f"{type(model).__name__} is no reward model that can be used here: it has no `score` "
            "head, as AutoModelForSequenceClassification makes for a decoder"
        )
    if labels != 1:
        raise ValueError(
            f"a reward model gives one score, {type(model).__name__} has {labels} "
            "labels: load it with num_labels=1, if it was trained so"
        )


# --------------------------------------------------------------------------- another vocabulary


def retokenised(
    source: Source,
    policy_tokenizer: Tokenizer,
    rows: Sequence[Row],
    texts: list[str],
    ends: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """Prompts and responses in tokens of the source's own. → left-padded ids and mask, (b, s').

    A prompt of ready-made ids is decoded with the policy's tokenizer first. Raises ValueError for
    a row that is longer than the reward model can read.
    """
    theirs, sequences = source.tokenizer, []
    assert theirs is not None
    for row, text, ended in zip(rows, texts, ends, strict=True):
        prompt = prompt_of(row)
        if prompt and not isinstance(prompt, str) and not is_conversation(prompt):
            prompt = str(policy_tokenizer.decode(list(prompt), skip_special_tokens=True))
        sequences.append(encode_pair(theirs, {**row, "prompt": prompt}, text, ended))
    longest = max(map(len, sequences))
    room = getattr(getattr(source.function, "config", None), "max_position_embeddings", None)
    if room and longest > room:
        raise ValueError(
            f"reward model {source.name!r} takes {room} tokens, and a prompt with its "
            f"response is {longest} in its tokenizer: use shorter ones"
        )
    pad = theirs.pad_token_id
    return pad_prompts(sequences, theirs.eos_token_id if pad is None else pad)
