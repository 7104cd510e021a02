"""RLOO and GRPO: policy gradients without a critic, thin over TRL's trainers.

Both draw several responses to a prompt and compare each with the others of its group, where PPO
asks a value model: RLOO with the mean of the others (Ahmadian et al., 2402.14740), GRPO with the
group's mean, in units of its standard deviation (Shao et al., 2402.03300). So they hold one model
less, and need `num_generations` responses to a prompt.

What is ours is what makes them comparable with our PPO: the same tokens, the same reward model
scoring them in the same way, positions counted from the mask, and metrics of the same names.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias
from unittest.mock import patch

import torch
import trl
from torch import Tensor, nn
from transformers import GenerationConfig, Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..data.reward_sources import RewardFunction as Function
from ..data.reward_sources import gold_metrics
from ..data.schema import Example, Prompt
from ..data.tokenize import prompt_text, row_prompt_ids, stop_ids
from ..metering.meter import Meter, NoMeter
from ..ppo.logprobs import AnyModel
from ..ppo.losses import kl_estimate, missing_stop_score
from ..ppo.rewards import Rewards, call_reward
from ..ppo.sampling import pad_prompts, positions_of
from ..ppo.texts import which_ended
from ..runs.progress import note
from ..stages import Setting
from .diverged import broken_weight, diverged
from .job import Figures, Job, before_and_after, evaluate_policy, run_trainer
from .trl import Counter, Rows, Watch, make_trainer

if TYPE_CHECKING:  # of TRL's two the one whose names the mixins below rely on
    from trl import GRPOConfig as ConfigBase
    from trl import GRPOTrainer as TrainerBase

    from ..planning import TrainerArgs
else:
    ConfigBase = TrainerBase = object

# ---------------------------------------------------------------------------------------- settings


@dataclass
class ResponseLength(ConfigBase):
    """`response_length`, as PPOConfig has it, and checks of what is sampled."""

    response_length: int | None = field(
        default=None, metadata={"help": "Most tokens of a response: TRL's max_completion_length."}
    )

    def __post_init__(self) -> None:
        if self.response_length is None:
            self.response_length = self.max_completion_length
        self.max_completion_length = self.response_length
        if self.response_length < 1:  # type: ignore[operator]  # TRL's default is a number
            raise ValueError(f"response_length must be ≥ 1, got {self.response_length}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        super().__post_init__()  # type: ignore[no-untyped-call]


@dataclass
class _PPONames(ResponseLength):
    """Settings that PPOConfig has too, under its names."""

    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Subtracted from the score of a response that never stops."}
    )


@dataclass
class RLOOConfig(_PPONames, trl.RLOOConfig):
    """TRL's RLOOConfig and what PPO has too."""


@dataclass
class GRPOConfig(_PPONames, trl.GRPOConfig):
    """TRL's GRPOConfig and what PPO has too."""


LogMetric: TypeAlias = Callable[[str, float], None]
Inputs: TypeAlias = tuple[object, ...]


class RewardFunction:
    """The rewards as one reward function, called as TRL's trainers call one.

    The reward model's score is that of the sampled ids (a response that was cut has no eos),
    `score_offset` included, less a penalty for a response that never stops: what our PPO makes of
    it.
    `metric_funcs` are called in the same way, and only logged.
    """

    def __init__(
        self,
        model: AnyModel | None,
        tokenizer: Tokenizer,
        args: TrainerArgs,
        *,
        meter: Meter | None = None,
        metric_funcs: dict[str, Function] | None = None,
        on_sample: Callable[[int, list[Example]], None] | None = None,
        reward_funcs: Function | Sequence[Function] | None = None,
        reward_tokenizer: Tokenizer | None = None,
    ) -> None:
        self.model, self.tokenizer, self.args = model, tokenizer, args
        self.device = torch.device("cpu")
        if model is not None:
            self.device = next(model.eval().requires_grad_(False).parameters()).device
        self.rewards = Rewards(
            model, reward_funcs, tokenizer, args, reward_tokenizer, device=self.device
        )
        self.meter, self.metric_funcs = meter or NoMeter("grpo"), metric_funcs or {}
        self.on_sample, self.episodes = on_sample, 0
        self.rows: Rows = []  # those that `row` counts
        self.meter.watch("reward", model)

    def __call__(
        self,
        prompts: list[Prompt],
        completions: list[object],
        completion_ids: list[list[int]],
        *,
        trainer_state: TrainerState | None = None,
        log_metric: LogMetric = lambda name, value: None,
        **columns: list[Setting],
    ) -> list[float | None]:
        rows = [self.rows[i] for i in columns.get("row", [])] or [{"prompt": p} for p in prompts]
        stopped = self.stopped(completion_ids)
        asked = (row_prompt_ids(self.tokenizer, row) for row in rows)
        whole = [p + ids for p, ids in zip(asked, completion_ids, strict=True)]
        ids, mask = pad_prompts(whole, self.tokenizer.pad_token_id)
        sequences = ids.to(self.device), mask.to(self.device)
        ends, chunk = stopped.tolist(), self.args.per_device_train_batch_size
        with torch.no_grad():
            rewards = self.rewards.score_answers(
                *sequences, completion_ids, ends, rows, chunk, self.meter
            ).cpu()
        scores = missing_stop_score(rewards, stopped, self.args.missing_eos_penalty)
        self.episodes += len(prompts)
        log_metric("ours/reward", float(rewards.nanmean()))
        for name, value in self.rewards.by_source.items():
            log_metric(f"ours/rewards/{name}", float(value.nanmean()))
        log_metric("stopped", float(stopped.float().mean()))
        with self.meter.phase("evaluation"):
            means, samples = read_responses(
                self.tokenizer,
                rows,
                completion_ids,
                self.metric_funcs,
                {"reward": scores},
                every=self.args.num_generations,
            )
        for name, mean in means.items():
            log_metric(name, mean)
        if self.on_sample and trainer_state is not None and trainer_state.is_world_process_zero:
            self.on_sample(trainer_state.global_step + 1, samples)
        return [None if s != s else s for s in scores.tolist()]  # NaN: no source applies

    def metric_names(self, args: TrainingArguments) -> dict[str, str]:
        clipped = "clipfrac" if isinstance(args, trl.GRPOConfig) else "response_clipfrac"
        names = {f"ours/rewards/{s.name}": f"rewards/{s.name}" for s in self.rewards.sources}
        own = {name: name for name in self.metric_funcs}
        return {**own, **names, **METRIC_NAMES, "clip_ratio/region_mean": clipped}

    def stopped(self, completion_ids: list[list[int]]) -> Tensor:
        """Which responses ended by themselves: short of the limit, or with eos. → (n,) bool."""
        return torch.tensor(which_ended(self.tokenizer, completion_ids, self.args.response_length))


def read_responses(
    tokenizer: Tokenizer,
    rows: Rows,
    ids: list[list[int]],
    functions: Mapping[str, Function],
    scores: Mapping[str, Tensor] | None = None,
    every: int = 1,
) -> tuple[dict[str, float], list[Example]]:
    """→ means of the metrics of responses, which nothing learns from, and the first of four groups
    of `every` for the record, with these and other `scores`."""
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    values = {name: call_reward(f, rows, texts, ids) for name, f in functions.items()}
    samples = [
        {"prompt": prompt_text(rows[i]), "response": texts[i]}
        | {name: float(of_rows[i]) for name, of_rows in {**(scores or {}), **values}.items()}
        for i in range(0, min(len(rows), 4 * every), every)
    ]
    return {name: float(of_rows.nanmean()) for name, of_rows in values.items()}, samples


# ----------------------------------------------------------------------------------------- trainer


class OwnSampling(TrainerBase):
    """What is ours where TRL's trainers sample: tokens, and no settings but those of the plan."""

    args: TrainerArgs
    model: AnyModel
    inputs: Rows = []
    """the rows that are sampled from now"""

    def keep_conventions(self, *models: AnyModel | None) -> None:
        """Positions counted from the mask, and no dropout, in these models."""
        for model in filter(None, models):
            whole = model.get_base_model() if hasattr(model, "peft_config") else model
            whole.base_model.register_forward_pre_hook(_position, with_kwargs=True)
            if self.args.disable_dropout:
                no_dropout(whole)

    def _tokenize_prompts(
        self, prompts: list[Prompt]
    ) -> tuple[list[list[int]], None, dict[str, object]]:
        rows = self.inputs
        if [row["prompt"] for row in rows] != prompts:
            rows = [{"prompt": p} for p in prompts]
        return [row_prompt_ids(self._tokenizer, row) for row in rows], None, {}

    def _generate_single_turn(self, *args: Setting, **kwargs: Setting) -> Setting:
        """Rule 1: what TRL sets is all there is. transformers would take the rest (`min_p`,
        `suppress_tokens`, `min_new_tokens`, …) from the model's own generation config."""
        model = self.model
        whole = model.get_base_model() if hasattr(model, "peft_config") else model
        with patch.object(whole, "generation_config", GenerationConfig()):
            return super()._generate_single_turn(*args, **kwargs)  # type: ignore[no-untyped-call]


class _PPOConventions(OwnSampling):
    """What else is ours in TRL's RLOO and GRPO: positions, and one KL for both."""

    ref_model: AnyModel
    _logprobs: list[Tensor]

    def __init__(self, *args: Setting, **kwargs: Setting) -> None:
        super().__init__(*args, **kwargs)
        self.keep_conventions(self.model, self.ref_model)

    def _get_per_token_logps_and_entropies(
        self, model: AnyModel, *args: Setting, **kwargs: Setting
    ) -> tuple[Tensor, ...]:
        out: tuple[Tensor, ...] = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        self._logprobs.append(out[0].detach())
        return out

    def _generate_and_score_completions(self, inputs: Rows) -> Example:
        self._logprobs, self.inputs = [], inputs
        if name := broken_weight(self.model):  # there is nothing to sample from
            stage = "grpo" if isinstance(self.args, trl.GRPOConfig) else "rloo"
            raise diverged(stage, self.args, f"{name} holds NaN or infinity")
        output: Example = super()._generate_and_score_completions(inputs)
        if self.beta and "ref_per_token_logps" not in output:  # RLOO keeps their sums only
            output["old_per_token_logps"], output["ref_per_token_logps"] = self._logprobs
        return output

    def _compute_loss(self, model: AnyModel, inputs: Example) -> Tensor:
        self._logprobs = []
        loss: Tensor = super()._compute_loss(model, inputs)  # type: ignore[no-untyped-call]
        if "ref_per_token_logps" in inputs:
            # Without old log-probabilities this is the first step after sampling: π is π_old.
            old = inputs.get("old_per_token_logps", self._logprobs[0])
            self._log_kl(old, inputs["ref_per_token_logps"], inputs["completion_mask"])
        return loss

    @torch.no_grad()
    def _log_kl(self, old: Tensor, reference: Tensor, mask: Tensor) -> None:
        """KL of the policy that sampled, in nats per response, as PPO's metrics of those names.

        old, reference, mask: (b, t). All slices of a generation are of a size, so that the mean
        of their means is that of the whole.
        """
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, kind in (("kl", "k1"), ("kl_k3", "k3")):
            kl = (kl_estimate(old, reference, kind) * mask).sum(1)
            metrics[f"ours/{name}"].append(float(self.accelerator.gather(kl).mean()))


def _position(module: nn.Module, args: Inputs, kwargs: Example) -> tuple[Inputs, Example]:
    """Positions counted from the mask in scoring passes too (rule 5): TRL leaves them out, which
    shifts prompts that are padded on the left where a model has absolute positions (GPT-2)."""
    if kwargs.get("position_ids") is None and kwargs.get("attention_mask") is not None:
        kwargs["position_ids"] = positions_of(kwargs["attention_mask"])
    return args, kwargs


def no_dropout(model: nn.Module) -> None:
    """Rule 4 where dropout is no module, which TRL's own `disable_dropout` would find (OPT)."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and name.endswith(("dropout", "layerdrop")):
                setattr(module, name, 0.0)


class RLOOTrainer(_PPOConventions, trl.RLOOTrainer):
    """TRL's RLOOTrainer with our conventions."""


class GRPOTrainer(_PPOConventions, trl.GRPOTrainer):
    """TRL's GRPOTrainer with our conventions."""


def prompt_table(model: AnyModel, tokenizer: Tokenizer, train: Rows) -> Rows:
    """TRL's table of what is sampled from, by a model that is told where to stop. It has texts and
    ids only, and the number of the row: a column is of one type, which people's messages and tools
    are not."""
    model.generation_config.eos_token_id = list(stop_ids(tokenizer))  # TRL adds the eos alone
    return [
        {"prompt": prompt_text(r), "prompt_ids": row_prompt_ids(tokenizer, r), "row": i}
        for i, r in enumerate(train)
    ]


def online_trainer(
    stage: str,
    model: AnyModel,
    reference: AnyModel | None,
    tokenizer: Tokenizer,
    train: Rows,
    args: TrainerArgs,
    reward_function: RewardFunction,
    watch: SamplingWatch,
) -> Trainer:
    """TRL's trainer of RLOO or GRPO. `train`: rows with a `prompt`.

    The reference is the frozen copy that is given (TRL would load one from where the policy came
    from); for a model with adapters, and with beta=0, there is none.
    """
    args = copy.copy(args)
    args.reward_weights = None  # the reward_function has weighted and added up already
    reward_function.rows = train
    rows = prompt_table(model, tokenizer, train)
    scored = {"reward_funcs": reward_function}
    return make_trainer(
        stage, model, tokenizer, rows, [], args, [watch], lambda: reference, **scored
    )


METRIC_NAMES = {
    **{name: name for name in ("loss", "grad_norm", "learning_rate", "entropy", "stopped")},
    "reward": "score",
    "ours/reward": "reward",
    "frac_reward_zero_std": "equal_groups",
    "completions/mean_length": "response_length",
    "ours/kl": "kl",
    "ours/kl_k3": "kl_k3",
}
"""TRL's metrics and the reward function's → those of our PPO. TRL's `reward` is after penalties,
which PPO calls score; its `kl` is per token, of RLOO k1 when sampling, of GRPO k3 in every step."""


class SamplingWatch(Watch):
    """Watch of a stage that samples: of its metrics those that `counter` names are logged, under
    the names of PPO's, and its episodes."""

    plain = staticmethod(str)  # type: ignore[assignment]  # chosen by name already
    counter: Counter

    def __init__(self, meter: Meter, counter: Counter, *args: Setting) -> None:
        super().__init__(meter, *args)
        self.counter = counter

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, object] | None = None,
        **kwargs: object,
    ) -> None:
        logs = logs or {}
        if "train_loss" in logs:
            return
        names = self.counter.metric_names(args)
        ours = {names[k]: v for k, v in logs.items() if k in names}
        ours["episodes"] = self.counter.episodes * args.world_size
        super().on_log(args, state, control, ours)
        if self.bar:
            self.bar.update(0, note(ours))


def train(job: Job) -> Figures:
    """RLOO and GRPO, with the figures of PPO."""
    roles, model = job.ready.models, job.plan.model
    reward = roles.get("reward")
    before = evaluate_policy(job, roles["policy"], reward_model=reward, keep="sft")
    reward_function = RewardFunction(
        reward,
        job.tokenizer,
        job.args,
        meter=job.meter,
        on_sample=job.run.sample,
        metric_funcs=gold_metrics(job.data),
        reward_funcs=job.functions,
        reward_tokenizer=model.reward_tokenizer,
    )
    watch = SamplingWatch(job.meter, reward_function, job.run.log, job.progress, job.should_stop)
    trainer = online_trainer(
        job.plan.stage,
        roles["policy"],
        roles.get("reference"),
        job.tokenizer,
        job.ready.train,
        job.args,
        reward_function,
        watch,
    )
    figures = run_trainer(job, trainer, watch)
    reference = roles.get("reference") or model.sft
    after = evaluate_policy(job, job.whole(trainer.model), reference, reward)
    return figures | before_and_after(job, before, after, reward)
