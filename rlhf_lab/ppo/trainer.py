"""PPO for language models, in the order in which things happen.

One iteration of `PPOTrainer.train`:

    1. prompts → sample responses                                     `sample`
    2. log π, log π_ref, values, and what the rewards say of them     `score` → `Rollout`
    3. per-token rewards, advantages, returns                         `compute_advantages`
    4. a few epochs of minibatches, one optimizer step each           `update`

Four models: the **policy** is trained, the **reference** holds it near where it began, the
**reward** model scores whole responses, the **value** model predicts that score at every token.
Rules are those of the list that the README links to; the maths is `losses.py`, the model passes are
`rollout.py`. Shapes: b responses, s = p + t tokens (prompt + response).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerState, get_scheduler

from ..data.lengths import worth_a_pass
from ..data.reward_sources import RewardFunction
from ..data.tokenize import row_prompt_ids, stop_ids
from ..metering.meter import Meter
from ..stages import Setting
from . import losses
from .bookkeeping import STATISTICS, Bookkeeping
from .checkpoint import Metrics
from .compiled import compile_layers
from .config import PPOConfig, check_arguments
from .engines import make_engine
from .executor import Executor
from .layouts import Roles, make_roles
from .logprobs import AnyModel
from .losses import LossFunction, LossFunctions, StopTokens
from .make_sharding import make_sharding
from .recompute import recomputed_layers
from .rewards import Rewards
from .rollout import (
    Advantages,
    Rollout,
    Samples,
    concat_prompt_response,
    gather_rollout,
    logprobs_and_values,
    response_logprobs,
    shape_of,
    shard_rows,
    token_values,
)
from .sampling import pad_prompts, row_keys, shuffled
from .sharding import Replicated
from .texts import Row, Tokenizer

if TYPE_CHECKING:
    from peft import PeftConfig


class PPOTrainer(Bookkeeping):
    """Trains a policy against a reward model, held near a reference by a KL penalty.

    The arguments keep the names of TRL 1.12's PPOTrainer; `layouts.py` says which models a layout
    needs, and where `reward_model` may be the folder of an adapter. `train_dataset` and
    `eval_dataset` are rows with a `prompt` (text or messages) or ready-made `input_ids`.
    `reward_funcs` are called as GRPOTrainer calls them, or are reward models; all is added up
    (`rewards.py`). `reward_processing_class` is the reward model's tokenizer, where it has its own.
    `metric_funcs`, `f(prompts=…, completions=…, **columns) → list of floats`, are only logged.
    `meter` times every phase; `on_log(step, metrics)` and `on_sample(step, rows)` receive what the
    run records; `should_stop()` ends training after an iteration; `executor` runs the loops;
    `replaced`: functions that stand in for those of `losses.REPLACEABLE`, by name.
    """

    def __init__(
        self,
        args: PPOConfig,
        processing_class: Tokenizer,
        model: AnyModel,
        ref_model: AnyModel | None,
        reward_model: AnyModel | str | Path | None,
        train_dataset: Sequence[Row],
        value_model: AnyModel | None = None,
        eval_dataset: Sequence[Row] | None = None,
        reward_funcs: RewardFunction | Sequence[RewardFunction] | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        *,
        reward_processing_class: object = None,
        metric_funcs: Mapping[str, RewardFunction] | None = None,
        meter: Meter | None = None,
        on_log: Callable[[int, Metrics], None] | None = None,
        on_sample: Callable[[int, list[Row]], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
        executor: Executor | None = None,
        replaced: Mapping[str, LossFunction] | None = None,
    ):
        check_arguments(args, processing_class, train_dataset, eval_dataset)
        self.args, self.tokenizer = args, processing_class
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.metric_funcs = metric_funcs or {}
        self.meter, self.executor = meter or Meter("ppo"), executor or Executor()
        gae = {"compute_gae": self.executor.compute_gae}
        self.losses = LossFunctions({**gae, **(replaced or {})})
        self.on_log, self.on_sample, self.should_stop = on_log, on_sample, should_stop

        self.sharding = make_sharding(args)
        self.accelerator = self.sharding.accelerator
        self.executor.even = self.sharding.even
        set_seed(args.seed)  # the same on every rank: no seed differs
        self.stop_token_ids: StopTokens = args.stop_token_id
        if args.stop_token_id is None and args.stop_token == "eos":
            generation = getattr(model, "generation_config", None)
            self.stop_token_ids = stop_ids(processing_class, generation)

        self.roles = self.build_roles(model, ref_model, value_model, reward_model, peft_config)
        if args.activation_checkpointing:
            how = args.activation_checkpointing_kwargs or {}
            assert isinstance(how, dict)  # transformers has read it, where it was text
            self.roles.trained.recomputed = recomputed_layers(self.roles.trained, how)
        if args.torch_compile:
            if type(self.sharding) is not Replicated:
                raise ValueError("torch_compile does not go with sharded models: leave it out")
            played = self.roles.policy, self.roles.reference, self.roles.value, self.roles.reward
            compile_layers(*(model for model in played if model is not None))
        self.policy, self.reference = self.roles.policy, self.roles.reference
        self.value_model, self.reward_model = self.roles.value, self.roles.reward
        self.rewards = Rewards(
            self.reward_model,
            reward_funcs,
            processing_class,
            args,
            reward_processing_class,
            self.stop_token_ids,
            self.accelerator.device,
            self.executor,
        )
        self.rewards.passes = self.sharding.passes
        self.beta, self.seconds = args.kl_coef, 0.0
        self.setup_optimizer()
        self.engine = make_engine(
            args,
            self.policy,
            self.executor,
            self.stop_token_ids,
            processing_class.pad_token_id,
            self.accelerator.num_processes,
        )
        self._set_up_callbacks(callbacks)

    def build_roles(self, *models: AnyModel) -> Roles:
        """The four roles in their layout (rule 4: no dropout in any of them; rule 23: reference
        and reward model do not move). `models`: as `make_roles` takes them."""
        return make_roles(self.args.layout, *models)

    def setup_optimizer(self) -> None:
        """Make the optimizer and put what is trained into accelerate: the one place where a model
        is wrapped."""
        args, roles = self.args, self.roles
        for frozen in (roles.reference, roles.reward):
            if frozen is not None:
                self.sharding.freeze(frozen)

        def optimizer(trained: nn.Module) -> Optimizer:
            kind, kwargs = args.optimizer()
            parameters = (p for p in trained.parameters() if p.requires_grad)
            made: Optimizer = kind(parameters, weight_decay=args.weight_decay, **kwargs)
            return made

        self.model, self.optimizer = self.sharding.prepare(roles.trained, optimizer)
        self.episodes_per_iteration = args.rollout_batch_size * self.accelerator.num_processes
        self.iterations = args.iterations(len(self.train_dataset), self.episodes_per_iteration)
        # Rule 17: a rate that falls to 0, a step of the schedule an iteration.
        warmup = args.get_warmup_steps(self.iterations)
        more: Setting = args.lr_scheduler_kwargs  # transformers has read it, where it was text
        schedule = args.lr_scheduler_type, self.optimizer.optimizer, warmup, self.iterations, more
        self.scheduler = get_scheduler(*schedule)
        self.worth = worth_a_pass(roles.policy.config)
        self._watch_roles()

    # ------------------------------------------------------------------------------- the main loop

    def train(self, resume_from_checkpoint: bool | str | Path | None = None) -> TrainerState:
        """Run every iteration; returns the state with its log history.

        `resume_from_checkpoint`: True goes on from the newest checkpoint in `output_dir`, a folder
        from that one. Raises `Diverged`, one line, when training has broken.
        """
        if resume_from_checkpoint:
            self.restore(None if resume_from_checkpoint is True else resume_from_checkpoint)
        args, state = self.args, self.state
        state.max_steps = self.iterations
        state.compute_steps(args, self.iterations)
        self.control = self.callback_handler.on_train_begin(args, state, self.control)
        with self.meter.compiling(bool(args.torch_compile)):
            while state.global_step < self.iterations:
                started = time.perf_counter()
                self.control = self.callback_handler.on_step_begin(args, state, self.control)
                self.log(self.iterate(state.global_step))
                self.control = self.callback_handler.on_step_end(args, state, self.control)
                if self.control.should_evaluate:
                    self.evaluate()
                self.seconds += time.perf_counter() - started
                stop = self._stops()
                if self.control.should_save or (stop and args.save_strategy != "no"):
                    self.save_checkpoint()
                if stop:
                    break
        self.meter.close()
        self.control = self.callback_handler.on_train_end(args, state, self.control)
        return state

    def iterate(self, iteration: int) -> Metrics:
        """One iteration: a rollout and the update that learns from it. → its metrics."""
        args, state = self.args, self.state
        prompts = self.next_prompts(iteration)
        rollout, advantages, metrics = self.make_rollout(prompts, iteration, self.beta)
        metrics |= self.update(rollout, advantages, iteration)
        metrics |= {"kl_coef": self.beta, "learning_rate": float(self.scheduler.get_last_lr()[0])}
        self.scheduler.step()
        state.global_step += 1
        metrics["episodes"] = state.global_step * self.episodes_per_iteration
        state.epoch = metrics["episodes"] / len(self.train_dataset)
        if args.kl_target is not None:  # rule 18: β may adapt to a target KL
            horizon = args.kl_horizon, self.episodes_per_iteration
            self.beta = losses.adapt_kl_coef(self.beta, metrics["kl"], args.kl_target, *horizon)
        return metrics

    def next_prompts(self, iteration: int) -> Tensor:
        """Which prompts this process samples in an iteration. → (b,) places in train_dataset."""
        n = self.args.rollout_batch_size
        first = iteration * self.episodes_per_iteration + self.accelerator.process_index * n
        return shuffled(self.args.seed, len(self.train_dataset), torch.arange(first, first + n))

    def make_rollout(
        self, index: Tensor, iteration: int, beta: float
    ) -> tuple[Rollout, Advantages, Metrics]:
        """Steps 1 to 3. index: (b,) prompts of this process → rollout and advantages of all
        processes, and what to log of them."""
        rows = [self.train_dataset[int(i)] for i in index]
        with torch.no_grad(), self.accelerator.autocast():
            mine = self.score(self.sample(rows, index, iteration), rows)
            rollout = gather_rollout(self.accelerator, mine, self.tokenizer.pad_token_id)
            score_means = self._score_means(rollout.scores_raw)
            watched, samples = self._watched(rows, mine)
            with self.meter.phase("advantage"):
                advantages = self.compute_advantages(rollout, beta)
                metrics = self._rollout_metrics(rollout, advantages, beta) | score_means | watched
            self._record(samples, rollout, advantages)
        self.check_kl(metrics)
        return rollout, advantages, metrics

    # ----------------------------------------------------------------------------- 1. sample

    def sample(self, rows: Sequence[Row], index: Tensor, iteration: int) -> Samples:
        """One response per prompt from the policy. index: (b,)"""
        device, args = self.accelerator.device, self.args
        prompts = [row_prompt_ids(self.tokenizer, row) for row in rows]
        # Rule 5: prompts are padded on the left.
        prompt_ids, prompt_mask = pad_prompts(prompts, self.tokenizer.pad_token_id)
        keys = row_keys(args.seed, iteration, index, torch.zeros_like(index)).to(device)
        prompt_ids, prompt_mask = prompt_ids.to(device), prompt_mask.to(device)
        # Rule 1: at the temperature and nothing else, neither top-k nor top-p, by every engine.
        rollout = self.meter.phase("rollout", "policy", calls=self.engine.called)
        with rollout, self.sharding.sampling(self.policy) as policy:
            responses, logprobs = self.engine.sample(policy, prompt_ids, prompt_mask, keys)
        return Samples(index, prompt_ids, prompt_mask, responses, logprobs)

    # ------------------------------------------------------------------------------ 2. score

    def score(self, samples: Samples, rows: Sequence[Row]) -> Rollout:
        """Pass the responses through the four models, some rows at a time (rule 24: no logits of a
        whole rollout are ever held)."""
        args, run, responses = self.args, self.executor, samples.responses
        engine = samples.engine_logprobs
        # Rule 7: a response ends after its first stop token, for the reward model too.
        mask = losses.response_mask(responses, self.stop_token_ids)
        prompts, pad = (samples.prompt_ids, samples.prompt_mask), self.tokenizer.pad_token_id
        ids, attention = concat_prompt_response(*prompts, responses, mask, pad)
        buckets = run.length_buckets(attention, args.local_rollout_forward_batch_size)
        work = shape_of(buckets, attention[:, :-1], mask), int(attention.sum())
        self.meter.hold(ids, attention, responses, mask)
        self.meter.count("rollout", "policy", int(mask.sum()))

        # Rule 2: policy and reference are scored at the sampling temperature.
        sequences, how = (ids, attention, responses), (args.temperature, buckets, run)
        # Rule 3: before an iteration's first step the ratio is 1: by the code of the update.
        whole = self.sharding.passes
        with self.meter.phase("old_logprobs", "policy", *work), whole(self.policy):
            if args.layout == "shared":
                logprobs, values = logprobs_and_values(
                    self.policy, self.value_model, ids, attention, responses, mask, *how
                )
            else:
                logprobs = response_logprobs(self.policy, *sequences, *how)
        with self.meter.phase("reference", "reference", *work), whole(self.reference):
            ref_logprobs = response_logprobs(self.reference, *sequences, *how)
        if args.layout != "shared":
            with self.meter.phase("value", "value", *work), whole(self.value_model):
                critic = partial(token_values, self.value_model)
                values = run.map_chunks(critic, buckets, ids, attention, mask)
        chunk = args.local_rollout_forward_batch_size
        scores_raw = self.rewards.score(*sequences, mask, rows, chunk, self.meter)
        return Rollout(
            index=samples.index.to(ids.device),
            ids=ids,
            attention=attention,
            responses=responses,
            mask=mask,
            logprobs=logprobs * mask,
            ref_logprobs=ref_logprobs * mask,  # rule 10: masked alike in both models
            values=values,
            scores_raw=scores_raw,
            engine_logprobs=None if engine is None else engine * mask,
        )

    # ------------------------------------------------------------------------- 3. advantages

    def compute_advantages(self, r: Rollout, beta: float) -> Advantages:
        """Scores (b,) and KL (b, t) → per-token rewards, whitened advantages, returns: (b, t)."""
        args = self.args
        scores = self.rewards.normalise(r.scores_raw)  # rule 16: perhaps by the first rollout's
        if self.stop_token_ids is not None:  # rule 8: a response that never stops loses a penalty
            penalty, fixed = args.missing_eos_penalty, args.missing_eos_score
            stopped = r.stopped(self.stop_token_ids)
            scores = losses.missing_stop_score(scores, stopped, penalty, fixed)
        kl = losses.kl_estimate(r.logprobs, r.ref_logprobs, args.kl_estimator)
        # Rule 11: −β·KL of every token; rule 9: the score lands on the last one.
        rewards = self.losses.token_rewards(kl, scores, r.mask, beta)
        if args.whiten_rewards:  # rule 13: over the whole batch; these keep their mean
            rewards = self.losses.whiten(rewards, r.mask, shift_mean=False)
        gamma, lam = args.gamma, args.lam
        advantages, returns = self.losses.compute_gae(rewards, r.values, r.mask, gamma, lam)
        # Rule 12: returns are made before whitening.
        return Advantages(scores, rewards, self.losses.whiten(advantages, r.mask), returns)

    # ----------------------------------------------------------------------------- 4. update

    def update(self, rollout: Rollout, advantages: Advantages, iteration: int) -> Metrics:
        """`num_ppo_epochs` passes in minibatches; one optimizer step each. → mean statistics."""
        args, sums = self.args, defaultdict[str, float](float)
        self.meter.hold(*vars(rollout).values(), *vars(advantages).values())
        generator = torch.Generator().manual_seed(args.seed * 7_919 + iteration)
        batch = self.episodes_per_iteration  # the same minibatches on every number of processes
        size = batch // args.num_mini_batches
        orders = (torch.randperm(batch, generator=generator) for _ in range(args.num_ppo_epochs))

        def train(rows: Tensor) -> Metrics:
            return self.train_minibatch(rollout.rows(rows), advantages.rows(rows))

        first, steps = Metrics(), 0
        for rows in (rows for order in orders for rows in order.split(size)):
            steps += 1
            mine = shard_rows(self.accelerator, rows.to(rollout.ids.device))
            stats = self.executor.run_minibatch(train, mine)
            first = first or stats
            for name, value in stats.items():
                sums[name] += value
            if args.early_stop_kl is not None and stats["approxkl"] > args.early_stop_kl:
                break
        metrics = {name: value / steps for name, value in sums.items()}
        metrics["optimizer_steps"] = steps
        # Rule 3: before the first step π is π_old: these two show a broken trainer at once.
        metrics["first_ratio_error"] = first["max_log_ratio"]
        metrics["first_approxkl"] = first["approxkl"]
        return metrics

    def train_minibatch(self, mb: Rollout, adv: Advantages) -> Metrics:
        """One optimizer step, from this process' part of a minibatch, in passes of at most
        `per_device_train_batch_size` rows, which are of like length. → its statistics."""
        self.meter.hold(*vars(mb).values(), *vars(adv).values())
        # Rule 13: losses are token means of the whole minibatch, of all ranks and passes.
        tokens = self._sum(mb.mask.sum()).clamp(min=1)
        size = self.args.per_device_train_batch_size
        buckets = self.executor.length_buckets(mb.attention, size, self.worth)
        stats = torch.zeros(len(STATISTICS), device=mb.ids.device)
        largest = torch.zeros((), device=mb.ids.device)
        for number, rows in enumerate(buckets):
            micro, micro_adv = mb.rows(rows), adv.rows(rows)
            last = number == len(buckets) - 1
            with self.sharding.accumulate(self.model, last):
                loss, sums, log_ratio = self.compute_losses(micro, micro_adv, tokens)
                with self.meter.phase("backward", "policy", *micro.work):
                    self.sharding.backward(loss)
            stats += sums
            largest = torch.maximum(largest, log_ratio)
        metrics = dict(zip(STATISTICS, self._sum(stats).tolist(), strict=True))
        metrics["max_log_ratio"] = float(self.accelerator.gather(largest).max())
        self.check_loss(metrics)
        with self.meter.phase("optimizer", "policy"):  # rule 17: gradients are clipped
            limit = self.args.max_grad_norm or 0.0
            norm = self.sharding.step(self.model, self.optimizer, limit, self.check_norm)
        return metrics | {"grad_norm": norm}

    def compute_losses(
        self, mb: Rollout, adv: Advantages, tokens: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One pass. tokens: (), of the whole minibatch → loss (), `STATISTICS` (7,) as sums over
        `tokens`, largest |log ratio| ()."""
        args = self.args
        with self.meter.phase("forward", "policy", *mb.work), self.accelerator.autocast():
            logprobs, entropy, values = self.model(
                mb.ids, mb.attention, mb.responses, mb.mask, args.temperature
            )
            weighted = {}
            if mb.engine_logprobs is not None:  # rule 21: another engine's samples are weighted
                cap = args.vllm_importance_sampling_clip_max
                weight = losses.importance_weight(mb.logprobs, mb.engine_logprobs, cap)
                weighted = {"weight": weight}
            # Rule 14: both losses are clipped.
            pg_losses, pg_clipped = self.losses.pg_loss(
                logprobs, mb.logprobs, adv.advantages, mb.mask, args.cliprange, **weighted
            )
            vf_losses, vf_clipped = self.losses.vf_loss(
                values, mb.values, adv.returns, mb.mask, args.cliprange_value
            )
            pg_loss, vf_loss = pg_losses.sum() / tokens, vf_losses.sum() / tokens
        with torch.no_grad():  # rule 20: statistics are masked, averaged over real tokens
            logratio = (logprobs - mb.logprobs) * mb.mask
            ratio, approxkl = logratio.exp() * mb.mask, 0.5 * logratio**2
            by_token = (pg_clipped, ratio, approxkl, entropy * mb.mask, vf_clipped)
            means = [pg_loss, vf_loss, *(x.sum() / tokens for x in by_token)]
            stats = torch.stack([x.detach().float() for x in means])
        return pg_loss + args.vf_coef * vf_loss, stats, logratio.abs().max()
