"""PPO for language models, in the order in which things happen.

One iteration of `PPOTrainer.train`:

    prompts → sample responses                                     `sample`
            → score them: log π, log π_ref, reward, values         `score`
            → per-token rewards, advantages, returns               `compute_advantages`
            → a few epochs of minibatch updates                    `update`

Four models: the **policy** is trained, the **reference** holds it near where it began, the
**reward** model scores whole responses, the **value** model predicts that score at every token.
Numbers in brackets are rules of the list that the README links to; the maths is `losses.py`, the
model passes are `rollout.py`. Shapes: b responses, s = p + t tokens (prompt + response).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from transformers import Trainer, TrainerState, get_scheduler

from ..data.lengths import worth_a_pass
from ..data.tokenize import row_prompt_ids
from ..metering.meter import Meter
from ..ppo import losses
from .bookkeeping import Bookkeeping
from .config import PPOConfig
from .distributed import gather_rollout, shard_rows
from .divergence import check_kl, check_loss
from .layouts import Roles, make_roles
from .rewards import Rewards
from .rollout import (
    Rollout,
    concat_prompt_response,
    generate,
    length_buckets,
    logprobs_and_values,
    pad_prompts,
    response_logprobs,
    response_values,
    shape_of,
)
from .sampling import row_keys, shuffled

STATISTICS = (
    "policy_loss",
    "value_loss",
    "policy_clip_fraction",
    "ratio",
    "approx_kl",
    "entropy",
    "value_clip_fraction",
)
"""What `losses` returns of a pass, in its order."""


class PPOTrainer(Bookkeeping):
    """Trains a policy against a reward model, held near a reference by a KL penalty.

    The arguments keep the names of TRL 1.12's PPOTrainer; `layouts.py` says which models a layout
    needs, and where `reward_model` may be the folder of an adapter. `train_dataset` and
    `eval_dataset` are rows with a `prompt` (text or messages) or ready-made `input_ids`.
    `reward_funcs` are called as GRPOTrainer calls them, or are reward models; all is added up
    (`rewards.py`). `reward_processing_class` is the reward model's tokenizer, where it has its own.
    `metric_funcs` are functions, `f(prompts=…, completions=…, **columns) → list of floats`, that
    are only logged. `meter` times every phase; `on_log(step, metrics)` and `on_sample(step, rows)`
    receive what the run records; `should_stop()` ends training after an iteration.
    """

    def __init__(
        self,
        args: PPOConfig,
        processing_class,
        model: nn.Module,
        ref_model: nn.Module | None,
        reward_model: nn.Module | str | Path | None,
        train_dataset: Sequence[dict],
        value_model: nn.Module | None = None,
        eval_dataset: Sequence[dict] | None = None,
        reward_funcs: Callable | Sequence[Callable] | None = None,
        peft_config=None,
        callbacks: Sequence | None = None,
        *,
        reward_processing_class=None,
        metric_funcs: dict[str, Callable] | None = None,
        meter: Meter | None = None,
        on_log: Callable[[int, dict], None] | None = None,
        on_sample: Callable[[int, list[dict]], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ):
        if len(train_dataset) == 0:
            raise ValueError("train_dataset has no prompts")
        if args.eval_strategy != "no" and not eval_dataset:
            raise ValueError(f"eval_strategy={args.eval_strategy!r} needs an eval_dataset")
        if processing_class.pad_token_id in (None, processing_class.eos_token_id):
            raise ValueError("the tokenizer's pad token must exist and not be eos (rule 6)")
        self.args, self.tokenizer = args, processing_class
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.metric_funcs = metric_funcs or {}
        self.meter = meter or Meter("ppo")
        self.on_log, self.on_sample, self.should_stop = on_log, on_sample, should_stop
        self._late_score = False  # TRL's placement of the score, for the parity benchmark (9)

        precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
        self.accelerator = Accelerator(mixed_precision=precision, cpu=args.use_cpu)
        set_seed(args.seed)  # the same on every rank: no seed differs
        self.stop_token_id = args.stop_token_id
        if args.stop_token_id is None and args.stop_token == "eos":
            self.stop_token_id = processing_class.eos_token_id

        self.roles = self.build_roles(model, ref_model, value_model, reward_model, peft_config)
        self.rewards = Rewards(
            self.roles.reward,
            reward_funcs,
            processing_class,
            args,
            reward_processing_class,
            self.stop_token_id,
            self.accelerator.device,
        )
        self.beta, self.seconds = args.kl_coef, 0.0
        self.setup_optimizer()
        self._set_up_callbacks(callbacks)

    def build_roles(self, policy, reference, value, reward, peft_config) -> Roles:
        """The four roles in their layout: no dropout, value from reward, two frozen (4, 15, 23)."""
        return make_roles(self.args.layout, policy, reference, value, reward, peft_config)

    def setup_optimizer(self) -> None:
        """Make the optimizer and put what is trained into accelerate: the one place where a model
        is wrapped."""
        args, roles = self.args, self.roles
        for frozen in (roles.reference, roles.reward):
            if frozen is not None:
                frozen.to(self.accelerator.device)
        trained = [p for p in roles.trained.parameters() if p.requires_grad]
        made, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)  # `optim`, as every trainer
        optimizer = made(trained, weight_decay=args.weight_decay, **kwargs)
        self.episodes_per_iteration = args.rollout_batch_size * self.accelerator.num_processes
        episodes = args.total_episodes or args.num_train_epochs * len(self.train_dataset)
        self.iterations = max(1, -(-int(episodes) // self.episodes_per_iteration))
        if args.max_steps > 0:
            self.iterations = args.max_steps
        self.scheduler = get_scheduler(  # (17): one step an iteration, linear to 0 by default
            args.lr_scheduler_type,
            optimizer,
            args.get_warmup_steps(self.iterations),
            self.iterations,
        )
        self.worth = worth_a_pass(roles.policy.config)
        self.model, self.optimizer = self.accelerator.prepare(roles.trained, optimizer)
        self.meter.watch("reference", roles.reference)
        for judge in (roles.reward, *self.rewards.further):
            self.meter.watch("reward", judge)
        self.meter.watch("policy", roles.policy, self.optimizer)
        self.meter.watch("value", roles.value, self.optimizer)

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

    def iterate(self, iteration: int) -> dict[str, float]:
        """One iteration: a rollout and the update that learns from it. → its metrics."""
        args, state = self.args, self.state
        rollout, metrics = self.make_rollout(self.next_prompts(iteration), iteration, self.beta)
        metrics |= self.update(rollout, iteration)
        metrics |= {"kl_coef": self.beta, "learning_rate": self.scheduler.get_last_lr()[0]}
        self.scheduler.step()
        state.global_step += 1
        metrics["episodes"] = state.global_step * self.episodes_per_iteration
        state.epoch = metrics["episodes"] / len(self.train_dataset)
        if args.kl_target is not None:  # adaptive controller (18)
            self.beta = losses.adapt_kl_coef(
                self.beta,
                metrics["kl"],
                args.kl_target,
                args.kl_horizon,
                self.episodes_per_iteration,
            )
        return metrics

    def next_prompts(self, iteration: int) -> Tensor:
        """Which prompts this process samples in an iteration. → (b,) places in train_dataset."""
        n = self.args.rollout_batch_size
        first = iteration * self.episodes_per_iteration + self.accelerator.process_index * n
        return shuffled(self.args.seed, len(self.train_dataset), torch.arange(first, first + n))

    def make_rollout(self, index: Tensor, iteration: int, beta: float) -> tuple[Rollout, dict]:
        """This process' prompts → the complete rollout of all of them, and what to log of it."""
        rows = [self.train_dataset[int(i)] for i in index]
        with torch.no_grad(), self.accelerator.autocast():
            prompt_ids, prompt_mask, responses = self.sample(rows, index, iteration)
            mine = self.score(prompt_ids, prompt_mask, responses, index, rows)
            whole = gather_rollout(self.accelerator, mine, self.tokenizer.pad_token_id)
            # Before `compute_advantages` makes of the scores what is learned from.
            said = self._rewards(whole.scores)
            watched, few = self._watched(rows, mine)
            with self.meter.phase("advantage"):
                metrics = self.compute_advantages(whole, beta) | said | watched
            self._record(few, whole)
        check_kl(self, metrics)
        return whole, metrics

    # ----------------------------------------------------------------------------- 1. sample

    def sample(self, rows: list[dict], index: Tensor, iteration: int):
        """One response per prompt from the policy. → ids (b, p), mask (b, p), responses (b, t)."""
        device, args = self.accelerator.device, self.args
        prompts = [row_prompt_ids(self.tokenizer, row) for row in rows]
        prompt_ids, prompt_mask = pad_prompts(prompts, self.tokenizer.pad_token_id)  # left (5)
        keys = row_keys(args.seed, iteration, index, torch.zeros_like(index)).to(device)
        prompt_ids, prompt_mask = prompt_ids.to(device), prompt_mask.to(device)
        with self.meter.phase("rollout", "policy", calls=self.policy):
            responses = generate(  # temperature only: no top-k, no top-p (1)
                self.policy,
                prompt_ids,
                prompt_mask,
                keys,
                max_new_tokens=args.response_length,
                stop_token_id=self.stop_token_id,
                pad_token_id=self.tokenizer.pad_token_id,
                temperature=args.temperature,
            )
        return prompt_ids, prompt_mask, responses

    # ------------------------------------------------------------------------------ 2. score

    def score(self, prompt_ids, prompt_mask, responses, index, rows) -> Rollout:
        """Pass the responses through the four models, some rows at a time (24)."""
        args, chunk = self.args, self.args.local_rollout_forward_batch_size
        mask = losses.response_mask(responses, self.stop_token_id)  # truncate after the stop (7)
        ids, attention = concat_prompt_response(
            prompt_ids, prompt_mask, responses, mask, self.tokenizer.pad_token_id
        )
        said = mask  # what values are wanted of
        if self._late_score:  # one more position where padding exists
            said = torch.cat([torch.ones_like(mask[:, :1]), mask[:, :-1]], 1)
        passes = length_buckets(attention, chunk)
        pass_ = shape_of(passes, attention[:, :-1], said), int(attention.sum())
        self.meter.hold(ids, attention, responses, mask)
        self.meter.count("rollout", "policy", int(mask.sum()))

        what, how = (ids, attention, responses), (args.temperature, passes)  # both alike (2)
        with self.meter.phase("old_logprobs", "policy", *pass_):  # the update's code: ratio 1 (3)
            if args.layout == "shared":
                both = self.policy, self.value_model
                logprobs, values = logprobs_and_values(*both, *what, said, *how)
            else:
                logprobs = response_logprobs(self.policy, *what, *how)
        with self.meter.phase("reference", "reference", *pass_):
            ref_logprobs = response_logprobs(self.reference, *what, *how)
        if args.layout != "shared":
            with self.meter.phase("value", "value", *pass_):
                values = response_values(self.value_model, ids, attention, said, passes)
        scores = self.rewards.score(ids, attention, responses, mask, rows, chunk, self.meter)
        nothing = torch.zeros_like(values)
        return Rollout(
            index.to(ids.device),
            ids,
            attention,
            responses,
            mask,
            said,
            logprobs * mask,
            ref_logprobs * mask,  # the same constant beyond the end (10)
            values * said,
            scores,
            nothing,
            nothing,
        )

    def _without_stop(self, scores: Tensor, mask: Tensor, responses: Tensor) -> Tensor:
        """Rule 8: a response that never stops loses a penalty, or gets a fixed score."""
        if self.stop_token_id is None:
            return scores
        stopped = self._stopped(responses, mask)
        if self.args.missing_eos_score is not None:
            return torch.where(stopped, scores, self.args.missing_eos_score)
        return losses.missing_stop_score(scores, stopped, self.args.missing_eos_penalty)

    def _stopped(self, responses: Tensor, mask: Tensor) -> Tensor:
        """Which responses hold a stop token. → (b,) bool."""
        if self.stop_token_id is None:
            return torch.zeros(len(responses), dtype=torch.bool, device=responses.device)
        return ((responses == self.stop_token_id) & mask).any(1)

    # ------------------------------------------------------------------------------ 3. judge

    def compute_advantages(self, r: Rollout, beta: float) -> dict[str, float]:
        """Fill in advantages and returns; → metrics of the rollout."""
        args = self.args
        r.scores = self._without_stop(self.rewards.normalise(r.scores), r.mask, r.responses)  # (16)
        kl = losses.kl_estimate(r.logprobs, r.ref_logprobs, args.kl_estimator)  # (19)
        rewards = losses.token_rewards(kl, r.scores, r.mask, beta, self._late_score)  # (9, 11)
        if args.whiten_rewards:  # keeps the mean (13)
            rewards = losses.whiten(rewards, r.value_mask, shift_mean=False)
        advantages, r.returns = losses.gae(rewards, r.values, r.value_mask, args.gamma, args.lam)
        r.advantages = losses.whiten(advantages, r.mask)  # returns are older (12)
        self._last_rewards = rewards

        k1 = losses.kl_estimate(r.logprobs, r.ref_logprobs, "k1")
        k3 = losses.kl_estimate(r.logprobs, r.ref_logprobs, "k3")
        kl_response = k1.sum(1)  # masked positions are 0 in both
        means = {
            "score": r.scores,
            "kl": kl_response,
            "kl_k2": (0.5 * k1**2).sum(1),
            "kl_k3": k3.sum(1),
            "objective": r.scores - beta * kl_response,
            "sampled_entropy": -r.logprobs.sum(1),
            "response_length": r.mask.sum(1).float(),
            "stopped": self._stopped(r.responses, r.mask).float(),
        }
        explained = losses.explained_variance(r.values, r.returns, r.value_mask)
        return {n: float(x.mean()) for n, x in means.items()} | {
            "kl_per_token": float(losses.masked_mean(k1, r.mask)),
            "explained_variance": float(explained),
        }

    # ----------------------------------------------------------------------------- 4. update

    def update(self, rollout: Rollout, iteration: int) -> dict[str, float]:
        """`num_ppo_epochs` passes in minibatches; one optimizer step each. → mean statistics."""
        args, sums = self.args, defaultdict(float)
        self.meter.hold(*vars(rollout).values())
        generator = torch.Generator().manual_seed(args.seed * 7_919 + iteration)
        batch = self.episodes_per_iteration  # the same minibatches on every number of processes
        size = batch // args.num_mini_batches
        orders = (torch.randperm(batch, generator=generator) for _ in range(args.num_ppo_epochs))
        first, steps = {}, 0
        for chosen in (c for order in orders for c in order.split(size)):
            steps += 1
            mine = shard_rows(self.accelerator, chosen.to(rollout.ids.device))
            stats = self.train_minibatch(rollout.rows(mine))
            first = first or stats
            for name, value in stats.items():
                sums[name] += value
            if args.early_stop_kl is not None and stats["approx_kl"] > args.early_stop_kl:
                break
        metrics = {name: value / steps for name, value in sums.items()}
        metrics["optimizer_steps"] = steps
        # Before the first step π is π_old: these two show a broken trainer at once (3).
        metrics["first_ratio_error"] = first["max_log_ratio"]
        metrics["first_approx_kl"] = first["approx_kl"]
        return metrics

    def train_minibatch(self, mb: Rollout) -> dict[str, float]:
        """One optimizer step, from this process' part of a minibatch, in passes of at most
        `per_device_train_batch_size` rows, which are of like length (24)."""
        self.meter.hold(*vars(mb).values())
        # Token means over the whole minibatch of all ranks and passes (13).
        tokens = self._sum(mb.mask.sum()).clamp(min=1)
        value_tokens = self._sum(mb.value_mask.sum()).clamp(min=1)
        parts = mb.passes(self.args.per_device_train_batch_size, self.worth)
        stats = torch.zeros(7, device=mb.ids.device)
        largest = torch.zeros((), device=mb.ids.device)
        for number, part in enumerate(parts):
            micro = mb.rows(part)
            last = number == len(parts) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                loss, sums, log_ratio = self.losses(micro, tokens, value_tokens)
                with self.meter.phase("backward", "policy", *micro.work):
                    # DDP averages gradients over ranks; our sums are divided by global counts.
                    self.accelerator.backward(loss * self.accelerator.num_processes)
            stats += sums
            largest = torch.maximum(largest, log_ratio)
        said = dict(zip(STATISTICS, self._sum(stats).tolist(), strict=True))
        said["max_log_ratio"] = float(self.accelerator.gather(largest).max())
        with self.meter.phase("optimizer", "policy"):
            norm = torch.tensor(float("nan"))
            if self.args.max_grad_norm:
                norm = self.accelerator.clip_grad_norm_(
                    self.model.parameters(), self.args.max_grad_norm
                )
                if self.accelerator.scaler is None:  # which skips such a step by itself
                    said["grad_norm"] = float(norm)
            check_loss(self, said)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return said | {"grad_norm": float(norm)}

    def losses(self, mb: Rollout, tokens: Tensor, value_tokens: Tensor):
        """One pass. → loss, statistics (token sums over global counts), largest |log ratio|."""
        args = self.args
        with self.meter.phase("forward", "policy", *mb.work), self.accelerator.autocast():
            logprobs, entropy, values = self.model(
                mb.ids, mb.attention, mb.responses, mb.value_mask, args.temperature
            )
            policy, clipped = losses.ppo_loss(  # both losses are clipped (14)
                logprobs, mb.logprobs, mb.advantages, mb.mask, args.cliprange
            )
            value, value_clipped = losses.value_loss(
                values, mb.values, mb.returns, mb.value_mask, args.cliprange_value
            )
            policy, value = policy.sum() / tokens, value.sum() / value_tokens
        with torch.no_grad():  # every statistic is masked and averaged over real tokens (20)
            log_ratio = (logprobs - mb.logprobs) * mb.mask
            ratio, approx = log_ratio.exp() * mb.mask, 0.5 * log_ratio**2
            of_policy = [x.sum() / tokens for x in (clipped, ratio, approx, entropy * mb.mask)]
            sums = [policy, value, *of_policy, value_clipped.sum() / value_tokens]
            stats = torch.stack([x.detach().float() for x in sums])
        return policy + args.vf_coef * value, stats, log_ratio.abs().max()
