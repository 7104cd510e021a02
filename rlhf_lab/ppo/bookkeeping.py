"""The bookkeeping of a trainer: averages over processes, callbacks, records, held-out prompts, and
when PPO breaks: seen before it is learned from, reported in one line with the likely causes.

Kept apart so that `trainer.py` reads as the algorithm.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from ..data.tokenize import prompt_of, prompt_text
from ..launch.processes import any_process
from ..metering.meter import NoMeter
from . import checkpoint, losses
from .checkpoint import Metrics, TrainingParts
from .rewards import call_reward
from .rollout import Advantages, Rollout, Samples
from .texts import Row, decode, token_record

STATISTICS = ("pg_loss", "vf_loss", "clipfrac", "ratio", "approxkl", "entropy", "vf_clipfrac")
"""What is logged of an update: figures of `PPOTrainer.compute_losses`, in its order."""
EVALUATION = -1
"""The iteration that held-out responses count as: their noise is the same every time."""
SAMPLES = 4
"""Responses that are recorded of a rollout, its first."""
TOKEN_RECORDS = 100
"""Iterations of a run, at the least where it has so many, whose samples are recorded token by
token."""
FAR = 0.1
"""A token is far from the engine that sampled it where |log π − log π_engine| is larger, nats."""
LARGE_SCORE = 10
"""A mean score beyond this may be why: rewards of about 1 are what the settings are made for."""


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's, 0 where one of them is constant. (b,), (b,) → ()"""
    return torch.cosine_similarity(a - a.mean(), b.to(a) - b.to(a).mean(), 0)


class Diverged(ValueError):
    """Training cannot go on: a loss is no number, or the policy has left the reference far behind.
    The step that showed it was not made; under ZeRO, where a gradient shows it, not saved."""


class Bookkeeping(TrainingParts, ABC):
    """What `PPOTrainer` uses to average, to tell others, and to be there again after a crash."""

    @abstractmethod
    def sample(self, rows: Sequence[Row], index: Tensor, iteration: int) -> Samples:
        """One response per prompt from the policy. index: (b,)"""

    @abstractmethod
    def score(self, samples: Samples, rows: Sequence[Row]) -> Rollout:
        """Pass the responses through the four models."""

    def _watch_roles(self) -> None:
        """Tell the meter whose parameters are whose."""
        self.meter.watch("reference", self.reference)
        for reward_model in (self.reward_model, *self.rewards.further):
            self.meter.watch("reward", reward_model)
        self.meter.watch("policy", self.policy, self.optimizer)
        self.meter.watch("value", self.value_model, self.optimizer)
        self.meter.watch_shards(self.sharding)

    def _sum(self, x: Tensor) -> Tensor:
        """Sum over processes. (…) → (…)."""
        total: Tensor = self.accelerator.reduce(x, "sum")
        return total

    def _mean(self, x: Tensor, mask: Tensor | None = None) -> float:
        """Mean over all processes, at the True positions of a mask. x, mask: (b, …)."""
        mask = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
        total, count = self._sum(torch.stack([(x * mask).sum(), mask.sum().to(x)])).unbind()
        return float(total / count.clamp(min=1))

    def _score_means(self, scores_raw: Tensor) -> Metrics:
        """Means of what the sources of reward gave before normalisation, clipping and penalties:
        in all, and each for itself over the responses that it applies to. scores_raw: (b,)."""
        return {"reward": float(scores_raw.mean())} | {
            f"rewards/{name}": self._mean(x.nan_to_num(0.0), ~x.isnan())
            for name, x in self.rewards.by_source.items()
        }

    def _rollout_metrics(self, r: Rollout, adv: Advantages, beta: float) -> Metrics:
        """What is logged of a rollout: means over its responses; rule 19: k1, k2 and k3 estimate
        KL(π‖π_ref); rule 20: masked, and averaged over what was really processed."""
        k1 = losses.kl_estimate(r.logprobs, r.ref_logprobs, "k1")
        k3 = losses.kl_estimate(r.logprobs, r.ref_logprobs, "k3")
        kl_response = k1.sum(1)  # masked positions are 0 in both
        means = {
            "score": adv.scores,
            "kl": kl_response,
            "kl_k2": (0.5 * k1**2).sum(1),
            "kl_k3": k3.sum(1),
            "objective": adv.scores - beta * kl_response,
            "sampled_entropy": -r.logprobs.sum(1),
            "response_length": r.mask.sum(1).float(),
            "stopped": r.stopped(self.stop_token_ids).float(),
        }
        if not self.args.whiten_rewards:  # which puts rewards in another unit
            paid = (adv.rewards * r.mask).sum(1)  # what GAE learns from: 0 off, but for rounding
            means["objective_error"] = (paid - means["objective"]).abs()
        explained = losses.explained_variance(r.values, adv.returns, r.mask)
        return {n: float(x.mean()) for n, x in means.items()} | {
            "kl_per_token": float(losses.masked_mean(k1, r.mask)),
            "explained_variance": float(explained),
            "reward_length_corr": float(correlation(r.scores_raw, r.mask.sum(1))),
            **self._engine_metrics(r),
        }

    def _engine_metrics(self, r: Rollout) -> Metrics:
        """How far the engine that sampled is from the trainer, before any weight is capped (rule
        21); nothing where our own loop samples."""
        if r.engine_logprobs is None:
            return {}
        log_ratio = (r.logprobs - r.engine_logprobs)[r.mask]
        cap = math.log(self.args.vllm_importance_sampling_clip_max)
        return {
            "engine_log_ratio": float(log_ratio.abs().median()),
            "engine_far_tokens": float((log_ratio.abs() > FAR).float().mean()),
            "engine_capped_tokens": float((log_ratio > cap).float().mean()),
        }

    def _watched(self, rows: Sequence[Row], r: Rollout) -> tuple[Metrics, list[Row]]:
        """Metrics that are only watched; and the first samples, for the record."""
        if not self.metric_funcs and not self.on_sample:
            return {}, []
        with self.meter.phase("evaluation"):
            values = self._watched_values(rows, r)
            samples = [
                sample | {n: float(v[i]) for n, v in values.items()}
                for i, sample in enumerate(self._samples(rows, r))
            ]
            if "gold_reward" in values:
                values["reward_gold_corr"] = correlation(r.scores_raw, values["gold_reward"])[None]
            means = {n: self._mean(v.to(self.accelerator.device)) for n, v in values.items()}
            return means, samples

    def _watched_values(self, rows: Sequence[Row], r: Rollout) -> dict[str, Tensor]:
        """What `metric_funcs` give for each response. → (b,) each."""
        if not self.metric_funcs:
            return {}
        ids = [row[m].tolist() for row, m in zip(r.responses, r.mask, strict=True)]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return {name: call_reward(f, rows, texts, ids) for name, f in self.metric_funcs.items()}

    def _samples(self, rows: Sequence[Row], r: Rollout) -> list[Row]:
        """The first samples as a run records them; none where nobody records."""
        if not self.on_sample or not self.accelerator.is_main_process:
            return []
        texts = decode(self.tokenizer, r.responses[:SAMPLES], r.mask[:SAMPLES])
        recorded = zip(rows, texts, r.scores_raw.tolist(), strict=False)
        return [
            {"prompt": prompt_text(prompt_of(row)), "response": text, "reward": score}
            for row, text, score in recorded
        ]

    def _record(self, samples: list[Row], r: Rollout, adv: Advantages) -> None:
        """Hand on the samples of a rollout; on some `TOKEN_RECORDS` iterations of the run token by
        token."""
        if not samples or not self.on_sample:
            return
        step = self.state.global_step + 1
        if (step - 1) % max(1, self.iterations // TOKEN_RECORDS) == 0:
            with self.meter.phase("evaluation"):
                samples = self._by_token(samples, r, adv)
        self.on_sample(step, samples)

    def _by_token(self, samples: list[Row], r: Rollout, adv: Advantages | None = None) -> list[Row]:
        """The samples with the figures of their tokens (`texts.TokenRecord`)."""
        first = torch.arange(len(samples), device=r.ids.device)
        tokens = token_record(self.tokenizer, r.rows(first), adv and adv.rows(first))
        return [{**row, "tokens": t} for row, t in zip(samples, tokens, strict=True)]

    def _stops(self) -> bool:
        """Whether training ends here: on all processes, where one of them wants it."""
        stop = self.control.should_training_stop or (self.should_stop and self.should_stop())
        return any_process(bool(stop))

    @torch.no_grad()
    def evaluate(self) -> Metrics:
        """Sample every prompt of `eval_dataset` once, always with the same noise, and log what the
        responses are worth: `eval_reward`, `eval_kl` (nats per response), …, means over prompts."""
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        mine = places = torch.arange(len(self.eval_dataset or ()))[rank::ranks]
        if self.sharding.even:  # who has one less takes its last one, or the first, once more
            most = -(-len(self.eval_dataset or ()) // ranks)
            more = mine[-1:] if len(mine) else torch.zeros(1, dtype=mine.dtype)
            places = torch.cat([mine, more])[:most]
        figures, meter = defaultdict[str, list[Tensor]](list), self.meter
        with meter.phase("evaluation"), self.accelerator.autocast():
            self.meter = NoMeter("ppo")
            try:
                for index in places.split(self.args.rollout_batch_size):
                    for name, value in self._evaluate_rows(index).items():
                        figures[name].append(value)
            finally:
                self.meter = meter
        values = {n: torch.cat(v)[: len(mine)] for n, v in figures.items()}
        metrics = {f"eval_{n}": self._mean(v) for n, v in values.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _evaluate_rows(self, index: Tensor) -> dict[str, Tensor]:
        """Figures of one response to each of these held-out prompts. index: (b,) → (b,) each."""
        assert self.eval_dataset is not None
        rows = [self.eval_dataset[int(i)] for i in index]
        r = self.score(self.sample(rows, index, EVALUATION), rows)
        watched = self._watched_values(rows, r)
        samples = [] if int(index[0]) else self._samples(rows, r)
        if samples and self.on_sample:
            values = {name: v.tolist() for name, v in watched.items()}  # the gold reward
            held_out: list[Row] = [
                {**row, **{name: v[i] for name, v in values.items()}, "when": "held-out"}
                for i, row in enumerate(samples)
            ]
            self.on_sample(self.state.global_step, self._by_token(held_out, r))
        return {
            "reward": r.scores_raw,
            "kl": losses.kl_estimate(r.logprobs, r.ref_logprobs, "k1").sum(1),
            "response_length": r.mask.sum(1).float(),
            "stopped": r.stopped(self.stop_token_ids).float(),
            **{n: v.to(r.scores_raw) for n, v in watched.items()},
        }

    def check_loss(self, figures: Metrics) -> None:
        """Before an optimizer step: raises `Diverged` where a figure of the loss is not finite."""
        wrong = [f"{name}={value}" for name, value in figures.items() if not math.isfinite(value)]
        if wrong:
            last = self.state.log_history[-1] if self.state.log_history else {}
            raise self._diverged(f"{', '.join(wrong)} in the update", last)

    def check_norm(self, norm: float) -> None:
        """The same of the norm of a step's gradients, which DeepSpeed tells after the step."""
        self.check_loss({"grad_norm": norm})

    def check_kl(self, metrics: Metrics) -> None:
        """After a rollout: raises `Diverged` where KL(policy‖reference) per token is above
        `max_kl_per_token` or is no number.

        The weights that made this rollout are then broken, and so is the checkpoint that holds
        them: it is deleted.
        """
        limit, kl = self.args.max_kl_per_token, metrics["kl_per_token"]
        if kl <= (math.inf if limit is None else limit):  # not so for NaN
            return
        if self.accelerator.is_main_process:
            checkpoint.discard(self.args.output_dir, self.state.global_step)
        self.accelerator.wait_for_everyone()
        far = f"a KL of {kl:.3g} nats per token from the reference (max_kl_per_token={limit})"
        raise self._diverged(far, metrics)

    def _diverged(self, problem: str, last: Mapping[str, float]) -> Diverged:
        """One line: the problem, what may be why, what is left. `last`: metrics of an iteration."""
        args, score = self.args, last.get("score", 0)
        causes = {
            f"learning_rate={args.learning_rate:g} is too high": True,
            f"kl_coef={self.beta:.3g} is too low": True,
            f"scores are too large (mean {score:.3g}: normalize_scores, score_clip)": (
                abs(score) > LARGE_SCORE
            ),
            "gradients are not clipped (max_grad_norm)": not args.max_grad_norm,
            "fp16 overflows (bf16 does not)": self.accelerator.mixed_precision == "fp16",
        }
        saved = checkpoint.newest_first(args.output_dir) if args.save_strategy != "no" else []
        good = f"the last good checkpoint is {saved[0]}" if saved else "there is no checkpoint"
        return Diverged(
            f"PPO diverged in iteration {self.state.global_step + 1}: {problem}; likely causes: "
            f"{', '.join(cause for cause, here in causes.items() if here)}; {good}"
        )

    def save_checkpoint(self) -> None:
        """Write all that decides how training goes on (`checkpoint.py`), once."""
        checkpoint.save(self)
        self.accelerator.wait_for_everyone()
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def restore(self, folder: str | Path | None = None) -> int:
        """Go to where the newest checkpoint was written (`checkpoint.restore`). → iterations."""
        return checkpoint.restore(self, folder)

    def log(self, metrics: Metrics) -> None:
        """Hand one iteration's metrics to the run and to every callback, once."""
        self.state.log_history.append({"step": self.state.global_step, **metrics})
        if self.on_log and self.accelerator.is_main_process:
            self.on_log(self.state.global_step, metrics)
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, metrics)

    def _set_up_callbacks(self, callbacks: Sequence[TrainerCallback] | None) -> None:
        """transformers' callbacks: report_to (TensorBoard, W&B, …) and the user's own."""
        main = self.accelerator.is_main_process
        self.state = TrainerState(is_local_process_zero=main, is_world_process_zero=main)
        self.control = TrainerControl()
        usual = [DefaultFlowCallback, *get_reporting_integration_callbacks(self.args.report_to)]
        self.callback_handler = CallbackHandler(
            usual + list(callbacks or ()),
            self.policy,
            self.tokenizer,
            self.optimizer,
            self.scheduler,
        )
