"""The trainings that are compared at equal cost: SFT and the reward model once a seed, then
the last stage of each way, with what had been spent at each point."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from .data.load import Data, Split
from .data.tokenize import prompt_of
from .metering import meter
from .models.load import Model
from .planning import plan as make_plan
from .runs.run import WHOLE, Run
from .studies import planned_flops
from .training import train

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .data.schema import Example
    from .stages import Settings
    from .trainers.best_of_n import Drawn

Cost: TypeAlias = tuple[float, float, float]
"""Seconds, FLOPs, labels."""
BEST_OF = (2, 4, 8, 16)
REJECTION = {"prompts": 256, "num_generations": 4}
FROM_SFT = ("dpo", "kto")
"""Last stages that need no reward model."""
LENGTH = 64
"""Most tokens of a response."""


class Point(NamedTuple):
    """A policy on its way: what had been spent on it, labels among it, and what it is worth; KL in
    nats per response to that seed's SFT model, length in words."""

    seconds: float
    flops: float
    labels: float
    gold_reward: float
    kl: float
    length: float


@dataclass
class Seed:
    """The trainings of one seed: SFT and the reward model once, for all ways."""

    model: Model
    data: Data
    seed: int
    folder: Path
    each: Mapping[str, Settings]
    budget: float
    points: int
    answers: int
    prompts: Sequence[Example] = ()
    planned: dict[str, float] = field(default_factory=dict)
    """seconds of SFT and of the reward model, as planned"""

    @cached_property
    def start(self) -> Point:
        """The SFT model, which `model` has from then on."""
        ((cost, policy),) = self.train("sft", self.model, self.data, last=False)
        self.model = self.model.with_stage("sft", self.folder / "sft" / "model")
        return self.judge(policy(), cost)

    @cached_property
    def scored(self) -> Point:
        """The SFT model once there is a reward model too."""
        start = self.start
        ((cost, _),) = self.train("reward", self.model, self.data, last=False)
        self.model = self.model.with_stage("reward", self.folder / "reward" / "model")
        return _after(start, cost)

    def points_of(self, last: str) -> list[Point]:
        """The SFT model, the same when what the last stage needs is there, and the last stage's."""
        found = [self.start] if last in FROM_SFT else [self.start, self.scored]
        if last == "best of n":
            return [*found, *self.best_of_n(found[-1])]
        data, model = self.data, self.model
        if last == "rejection":
            rows, cost = self.resampled()
            found.append(_after(found[-1], cost))
            data = replace(data, sft=Split(rows, data.sft.test))
            model = model.with_stage("base", model.paths["sft"])
        trained = self.train(last, model, data)
        return [*found, *(self.judge(policy(), cost, found[-1]) for cost, policy in trained)]

    def train(
        self, name: str, model: Model, data: Data, last: bool = True
    ) -> list[tuple[Cost, Callable[[], PreTrainedModel]]]:
        """Train a stage; → what it had cost at each point, and the policy."""
        stage, given = {"rejection": "sft"}.get(name, name), dict(self.each.get(name, {}))
        if name == "rejection":
            given = {k: v for k, v in given.items() if k not in REJECTION}
        plan = make_plan(stage, model, data=data, seed=self.seed, **given)
        e, s, count = plan.estimate, plan.settings, self.points if last else 1
        # What this way needed, whatever other ways have trained by now.
        before = sum(t for k, t in self.planned.items() if k == "sft" or name not in FROM_SFT)
        fill = int((self.budget - before) / e.step_seconds) if last else e.steps
        unit = s.get("steps_per_generation", 1) * s.get("num_iterations", 1)
        steps = given.get("max_steps") or fill or 1
        every = max(1, int(steps) // count // unit) * unit
        if not last:
            self.planned[name] = every * e.step_seconds
        given |= {"max_steps": every * count, "save_steps": every, "save_total_limit": None}
        plan = make_plan(stage, model, seed=self.seed, **given)
        run = train(plan, data.with_held_out(1), out=self.folder / name, quiet=True, overwrite=True)
        batch = s["per_device_train_batch_size"] * s.get("gradient_accumulation_steps", 1)
        per_row = {"reward": 1.0, "dpo": 1.0, "kto": 0.5}.get(stage, 0.0)  # KTO: two rows a pair
        return [
            (
                cost_at(run, step, per_row * min(step * batch, int(run.summary["rows"]))),
                partial(policy_at, model, run, step),
            )
            for step in range(every, every * count + 1, every)
        ]

    def judge(self, policy: PreTrainedModel, cost: Cost, before: Point | None = None) -> Point:
        from .trainers.evaluate import policy_report

        f, _ = policy_report(
            policy,
            self.model.tokenizer,
            self.prompts,
            gold_reward=self.data.gold_reward,
            reference=self.model.sft,
            max_new_tokens=LENGTH,
        )
        worth = f["gold_reward"], f["kl"], f["length"]
        return _after(before or Point(0, 0, 0, 0, 0, 0), cost, *worth)

    def draw(self, prompts: Sequence[Example], n: int) -> tuple[Drawn, float, float]:
        """→ n scored responses to each prompt; seconds and FLOPs (planned) of one response."""
        from .trainers.best_of_n import draw

        model = self.model
        models = model.sft, model.tokenizer, model.reward
        start = meter._now()
        drawn = draw(*models, prompts, n, max_new_tokens=LENGTH, seed=self.seed)
        seconds = (meter._now() - start) / drawn.tokens.numel()
        flops = planned_flops(model, self.data, LENGTH, float(drawn.tokens.double().mean()))
        return drawn, seconds, sum(flops or ())

    def best_of_n(self, before: Point) -> list[Point]:
        """So many answers written with the best of n."""
        from .ppo.losses import kl_bound
        from .trainers.best_of_n import expected_best

        drawn, seconds, flops = self.draw(self.prompts, BEST_OF[-1])
        pairs = list(zip([str(prompt_of(row)) for row in self.prompts], drawn.texts))
        golds = [[self.data.gold_reward(p, text) for text in texts] for p, texts in pairs]
        words = [[float(len(text.split())) for text in texts] for _, texts in pairs]
        found = []
        for n in BEST_OF:
            gold, length = (
                float(expected_best(drawn.scores, drawn.scores.new_tensor(x), n).mean())
                for x in (golds, words)
            )
            cost = (n * self.answers * seconds, n * self.answers * flops, 0.0)
            found.append(_after(before, cost, gold, kl_bound(n), length))
        return found

    def resampled(self) -> tuple[list[Example], Cost]:
        """→ the best answer to each of some prompts, as rows of SFT, and what they cost."""
        count, n = ({**REJECTION, **self.each.get("rejection", {})}[k] for k in REJECTION)
        prompts = self.data.prompts.train[:count]
        drawn, seconds, flops = self.draw(prompts, n)
        best = drawn.scores.argmax(1).tolist()
        rows = [
            {"prompt": row["prompt"], "completion": texts[i]}
            for row, texts, i in zip(prompts, drawn.texts, best, strict=True)
        ]
        return rows, (count * n * seconds, count * n * flops, 0.0)


def seconds_before(
    model: Model, data: Data, each: Mapping[str, Settings], last: Collection[str]
) -> float:
    """What SFT, and the reward model where a last stage needs one, are planned to take."""
    stages = ["sft"] if set(last) <= set(FROM_SFT) else ["sft", "reward"]
    plans = (make_plan(s, model, data=data, **each.get(s, {})).estimate for s in stages)
    return sum((e.steps or 0) * e.step_seconds for e in plans)


def _after(point: Point, cost: Cost, *worth: float) -> Point:
    """When more has been spent: the same policy, or one that is worth something else."""
    return Point(*(a + b for a, b in zip(point, cost)), *(worth or point[3:]))


def cost_at(run: Run, step: int, labels: float) -> Cost:
    """What had been measured when a checkpoint was written, or at the end."""
    import torch

    ledger = run.ledger.filter(source="measured")
    if step < run.last_step:
        rest = torch.load(run.folder / f"trainer/checkpoint-{step}" / WHOLE, weights_only=True)
        measured = meter.Meter(run.stage)
        measured.load_state_dict(rest["meter"])
        ledger = measured.ledger()
    spent = ledger.training()
    return spent.total(quantity="seconds"), spent.total(quantity="flops"), labels


def policy_at(model: Model, run: Run, step: int) -> PreTrainedModel:
    """The policy of a run's checkpoint, or at its end."""
    from safetensors.torch import load_file

    folder = run.folder / f"trainer/checkpoint-{step}"
    if step == run.last_step or run.stage != "ppo":
        return model.with_stage("sft", run.model_path if step == run.last_step else folder).sft
    policy, weights = model.sft, load_file(folder / "trained.safetensors")
    mine = {k.removeprefix("policy."): w for k, w in weights.items() if k.startswith("policy.")}
    if wrong := policy.load_state_dict(mine, strict=False).unexpected_keys:
        raise ValueError(f"whole models are compared, not adapters: {wrong[0]}")
    return policy
