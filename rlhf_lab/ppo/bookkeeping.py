"""The bookkeeping of a trainer: averages over processes, callbacks, records, held-out prompts.

Kept apart so that `ppo.py` reads as the algorithm.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from ..data.tokenize import prompt_text
from ..metering.meter import NoMeter
from ..ppo import checkpoint
from .losses import kl_estimate
from .rewards import call_rewards
from .rollout import Rollout
from .texts import decode
from .token_record import token_record

EVALUATION = -1
"""The iteration that held-out responses count as: their noise is the same every time."""
FEW = 4
"""Samples that are recorded of a rollout."""
RECORDS = 100
"""Iterations of a run, at the least where it has so many, whose samples are kept token by token."""


def prompt_of(row: dict):
    """Text, messages or ready-made ids."""
    return row["prompt"] if "prompt" in row else row["input_ids"]


class Bookkeeping:
    """What `PPOTrainer` uses to average, to tell others, and to be there again after a crash."""

    @property
    def policy(self) -> nn.Module:
        return self.roles.policy

    @property
    def reference(self) -> nn.Module:
        return self.roles.reference

    @property
    def reward_model(self) -> nn.Module | None:
        return self.roles.reward

    @property
    def value_model(self) -> nn.Module:
        return self.roles.value

    def _sum(self, x: Tensor) -> Tensor:
        """Sum over processes."""
        return self.accelerator.reduce(x, "sum")

    def _mean(self, x: Tensor) -> float:
        """Mean of a (b,) tensor over the rows of all processes."""
        count = x.new_tensor(float(len(x)))
        total, rows = self._sum(torch.stack([x.sum(), count])).unbind()
        return float(total / rows)

    def _token_mean(self, x: Tensor, mask: Tensor) -> float:
        total, count = self._sum(torch.stack([(x * mask).sum(), mask.sum().to(x)])).unbind()
        return float(total / count.clamp(min=1))

    def _rewards(self, scores: Tensor) -> dict[str, float]:
        """What the sources of reward said before normalisation, clipping and penalties: in all,
        and each for itself over the responses that it applies to."""
        said = self.rewards.said.items()
        return {"reward": float(scores.mean())} | {
            f"rewards/{name}": self._token_mean(v.nan_to_num(0.0), ~v.isnan()) for name, v in said
        }

    def _watched(self, rows: list[dict], rollout: Rollout) -> tuple[dict[str, float], list[dict]]:
        """Metrics that are only watched; and a few samples, for the record."""
        if not self.metric_funcs and not self.on_sample:
            return {}, []
        with self.meter.phase("evaluation"):
            functions = list(self.metric_funcs.values())
            said = call_rewards(functions, self.tokenizer, rows, rollout.responses, rollout.mask)
            values = dict(zip(self.metric_funcs, said, strict=True))
            few = [
                row | {n: float(v[i]) for n, v in values.items()}
                for i, row in enumerate(self._few(rows, rollout))
            ]
            return {n: self._mean(v.to(self.accelerator.device)) for n, v in values.items()}, few

    def _few(self, rows: list[dict], rollout: Rollout) -> list[dict]:
        """The first samples as a run records them; none where nobody records."""
        if not self.on_sample or not self.accelerator.is_main_process:
            return []
        texts = decode(self.tokenizer, rollout.responses[:FEW], rollout.mask[:FEW])
        shown = zip(rows, texts, rollout.scores.tolist(), strict=False)
        return [
            {"prompt": prompt_text(prompt_of(row)), "response": text, "reward": score}
            for row, text, score in shown
        ]

    def _record(self, few: list[dict], whole: Rollout) -> None:
        """Hand on the samples of a rollout that is judged; on some `RECORDS` iterations of the run
        token by token."""
        if not few:
            return
        step = self.state.global_step + 1
        if (step - 1) % max(1, self.iterations // RECORDS) == 0:
            with self.meter.phase("evaluation"):
                few = self._by_token(few, whole, self._last_rewards[: len(few)])
        self.on_sample(step, few)

    def _by_token(self, few: list[dict], rollout: Rollout, rewards: Tensor | None = None):
        """The samples with what is known of their tokens."""
        first = rollout.rows(torch.arange(len(few), device=rollout.ids.device))
        tokens = token_record(self.tokenizer, first, rewards)
        return [{**row, "tokens": t} for row, t in zip(few, tokens, strict=True)]

    def _stops(self) -> bool:
        """Whether training ends here: on all processes, where one of them wants it."""
        asked = self.control.should_training_stop or (self.should_stop and self.should_stop())
        return bool(self._sum(torch.tensor(float(bool(asked)), device=self.accelerator.device)))

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Sample every prompt of `eval_dataset` once, always with the same noise, and log what the
        responses are worth: `eval_reward`, `eval_kl` (nats per response), …, means over prompts."""
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        mine = torch.arange(len(self.eval_dataset))[rank::ranks]
        found, meter = defaultdict(list), self.meter
        with meter.phase("evaluation"), self.accelerator.autocast():
            self.meter = NoMeter("ppo")
            try:
                for index in mine.split(self.args.rollout_batch_size):
                    for name, value in self._told(index).items():
                        found[name].append(value)
            finally:
                self.meter = meter
        metrics = {f"eval_{n}": self._mean(torch.cat(v)) for n, v in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _told(self, index: Tensor) -> dict[str, Tensor]:
        """What is known of one response to each of these held-out prompts. → (b,) each."""
        rows = [self.eval_dataset[int(i)] for i in index]
        prompt_ids, prompt_mask, responses = self.sample(rows, index, EVALUATION)
        r = self.score(prompt_ids, prompt_mask, responses, index, rows)
        functions = list(self.metric_funcs.values())
        said = call_rewards(functions, self.tokenizer, rows, r.responses, r.mask)
        few = [] if int(index[0]) else self._few(rows, r)
        if few:
            held_out = [{**row, "when": "held-out"} for row in few]
            self.on_sample(self.state.global_step, self._by_token(held_out, r))
        return {
            "reward": r.scores,
            "kl": kl_estimate(r.logprobs, r.ref_logprobs, "k1").sum(1),
            "response_length": r.mask.sum(1).float(),
            "stopped": self._stopped(r.responses, r.mask).float(),
            **{n: v.to(r.scores) for n, v in zip(self.metric_funcs, said, strict=True)},
        }

    def save_checkpoint(self) -> None:
        """Write all that decides how training goes on (`checkpoint.py`), once."""
        if self.accelerator.is_main_process:
            checkpoint.save(self)
        self.accelerator.wait_for_everyone()
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def restore(self, folder: str | Path | None = None) -> int:
        """Go to where the newest checkpoint was written (`checkpoint.restore`). → iterations."""
        return checkpoint.restore(self, folder)

    def log(self, metrics: dict[str, float]) -> None:
        """Hand one iteration's metrics to the run and to every callback, once."""
        self.state.log_history.append({"step": self.state.global_step, **metrics})
        if self.on_log and self.accelerator.is_main_process:
            self.on_log(self.state.global_step, metrics)
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, metrics)

    def _set_up_callbacks(self, callbacks) -> None:
        """transformers' callbacks: report_to (TensorBoard, W&B, …) and the user's own."""
        main = self.accelerator.is_main_process
        self.state = TrainerState(is_local_process_zero=main, is_world_process_zero=main)
        self.control = TrainerControl()
        chosen = [DefaultFlowCallback, *get_reporting_integration_callbacks(self.args.report_to)]
        self.callback_handler = CallbackHandler(
            chosen + list(callbacks or ()),
            self.policy,
            self.tokenizer,
            self.optimizer,
            self.scheduler,
        )
