"""Which rewards a run learns from: the reward model, the gold reward, functions of your own.

    lab.plan("ppo", "tiny", rewards=["model", "gold"], reward_weights=[1.0, 0.2])
    lab.train(lab.plan("ppo", "tiny"), reward_funcs=[my_function])

`rewards` names sources: "model", "gold", and "gold/<part>" for a part of the gold reward; without
it the reward model is the one. A plan without "model" has no reward model (`rule_reward`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

from ..display import by_surface, check_choice, counted
from ..stages import REWARDED
from ..world.gold_reward import GOLD_PARTS
from .load import Data

if TYPE_CHECKING:
    from ..planning import Plan

REWARDS = ("model", "gold", *(f"gold/{part}" for part in GOLD_PARTS))
"""Names that the setting `rewards` may hold."""
RewardFunction: TypeAlias = Callable[..., Sequence[float | None]]
"""`f(prompts=…, completions=…, **columns)` → a number for each completion, as TRL calls one."""


def reward_settings(settings: Mapping[str, object]) -> dict[str, object]:
    """The settings that follow from `rewards`. Raises ValueError for a name that is none."""
    names = _reward_names(settings)
    if "rewards" not in settings or settings["rewards"] is None:
        return {}
    for name in names:
        check_choice("reward", name, REWARDS)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"rewards={names}: name at least one, and each of them once")
    if "model" in names[1:] and settings.get("reward_weights"):
        raise ValueError(
            "reward_weights go with the sources in their order, the reward model "
            f"first: name it first, not rewards={names}"
        )
    return {"rewards": names, "rule_reward": "model" not in names}


def _reward_names(settings: Mapping[str, object]) -> list[str]:
    names = settings.get("rewards")
    if isinstance(names, str):
        return [names]
    return [str(name) for name in names] if isinstance(names, Iterable) else []


def with_rewards(plan: Plan, functions: RewardFunction | Sequence[RewardFunction] | None) -> Plan:
    """The plan with what follows from the functions that it is trained with: no reward model where
    there is none and functions are."""
    if functions and plan.stage not in REWARDED:
        raise ValueError(
            f"{plan.stage} learns from no rewards: reward_funcs are for {', '.join(REWARDED)}"
        )
    if not functions or _has_reward_model(plan) or "rewards" in plan.settings:
        return plan
    return replace(plan, settings={**plan.settings, "rule_reward": True})


def functions_of(
    given: RewardFunction | Sequence[RewardFunction] | None,
) -> list[RewardFunction]:
    """`reward_funcs`, one or several, as a list."""
    return [given] if callable(given) else list(given or ())


def check_rewards(plan: Plan, functions: RewardFunction | Sequence[RewardFunction] | None) -> None:
    """Raises ValueError, one line, where a plan has no rewards to learn from, whatever the data."""
    if plan.stage not in REWARDED:
        return
    title, name = plan.stage.upper(), plan.model.name
    given = len(functions_of(functions))
    with_model = not plan.settings.get("rule_reward")
    count = with_model + given + len([n for n in _reward_names(plan.settings) if n != "model"])
    rule = by_surface("give reward_funcs, or rewards=['gold']", "give --reward gold")
    if with_model and not _has_reward_model(plan):
        use = by_surface("use model.with_stage('reward', FOLDER)", "give --reward-model FOLDER")
        raise ValueError(
            f"{title} needs a reward model: train one first (rlhf-lab train reward --model {name}) "
            f"and {use}, the model folder of its run; or {rule}"
        )
    if not count:
        raise ValueError(f"{title} without a reward model needs a rule: {rule}")
    weights = plan.settings.get("reward_weights")
    if isinstance(weights, Sequence) and len(weights) != count:
        raise ValueError(
            f"reward_weights has {counted(len(weights), 'number')} for "
            f"{counted(count, 'source')} of reward: give one for each, the reward model first"
        )


def reward_functions(
    plan: Plan, data: Data, functions: RewardFunction | Sequence[RewardFunction] | None = None
) -> list[RewardFunction]:
    """The functions that a run learns from, named ones first. Raises ValueError, one line, for
    rewards that cannot be had."""
    if plan.stage not in REWARDED:
        return []
    check_rewards(plan, functions)
    names = [n for n in _reward_names(plan.settings) if n != "model"]
    if names and not data.has_gold:
        instead = by_surface("give reward_funcs", "leave --reward out, and give --reward-model")
        raise ValueError(
            f"{data.name} has no gold reward to learn from: only the bundled world knows it; "
            f"{instead}"
        )
    return [_gold_function(n, data) for n in names] + functions_of(functions)


def _has_reward_model(plan: Plan) -> bool:
    """Whether a checkpoint can be the reward model; a reward adapter, where the base is shared."""
    shared_base = plan.settings.get("layout") == "adapters"
    names = ("reward", "reward_adapter") if shared_base else ("reward",)
    return any(name in plan.model.paths for name in names)


def gold_metrics(data: Data) -> dict[str, RewardFunction]:
    """The gold reward and its parts as functions that an online stage watches."""
    if not data.has_gold:
        return {}
    return {
        "gold_reward" if n == "gold" else n: _gold_function(n, data)
        for n in REWARDS
        if n != "model"
    }


def _gold_function(name: str, data: Data) -> RewardFunction:
    """The gold reward or a part of it, as GRPOTrainer calls a reward."""
    part = name.partition("/")[2]

    def values(
        prompts: Sequence[str], completions: Sequence[str], **_: object
    ) -> list[float | None]:
        pairs = zip(prompts, completions, strict=True)
        if part:
            return [data.gold_parts(p, c)[part] for p, c in pairs]
        return [data.gold_reward(p, c) for p, c in pairs]

    values.__name__ = name
    return values
