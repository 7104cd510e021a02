"""The bookkeeping of a trainer: averages over processes, callbacks, records.

Kept apart so that `ppo.py` reads as the algorithm.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import TrainerControl, TrainerState
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from ..tokens import prompt_text
from .rewards import call_rewards
from .rollout import Rollout
from .texts import decode


class Bookkeeping:
    """What `PPOTrainer` uses to average and to tell others."""

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
        return {"reward": self._mean(scores)} | {
            f"rewards/{name}": self._token_mean(v.nan_to_num(0.0), ~v.isnan()) for name, v in said
        }

    def _watched(self, rows: list[dict], rollout: Rollout) -> dict[str, float]:
        """Metrics that are only watched, and a few samples for the record."""
        if not self.metric_funcs and not self.on_sample:
            return {}
        with self.meter.phase("evaluation"):
            functions = list(self.metric_funcs.values())
            said = call_rewards(functions, self.tokenizer, rows, rollout.responses, rollout.mask)
            values = dict(zip(self.metric_funcs, said, strict=True))
            if self.on_sample and self.accelerator.is_main_process:
                few = rows[:4]
                texts = decode(self.tokenizer, rollout.responses[:4], rollout.mask[:4])
                figures = [{n: float(v[i]) for n, v in values.items()} for i in range(len(few))]
                shown = zip(few, texts, rollout.scores.tolist(), figures, strict=False)
                self.on_sample(self.state.global_step + 1, [
                    {"prompt": prompt_text(row["prompt"] if "prompt" in row else row["input_ids"]),
                     "response": text, "reward": score, **more}
                    for row, text, score, more in shown
                ])  # fmt: skip
            return {n: self._mean(v.to(self.accelerator.device)) for n, v in values.items()}

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
            chosen + list(callbacks or ()), self.policy, self.tokenizer, self.optimizer,
            self.scheduler,
        )  # fmt: skip
