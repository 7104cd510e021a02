"""Which rewards a run learns from: the reward model, the gold reward, functions of your own.

    lab.plan("ppo", "tiny", rewards=["model", "gold"], reward_weights=[1.0, 0.2])
    lab.train(lab.plan("ppo", "tiny"), reward_funcs=[my_function])

`rewards` names sources: "model", "gold", and "gold/<part>" for a part of the gold reward; without
it the reward model is the one. A plan without "model" has no reward model (`rule_reward`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..display import did_you_mean
from ..stages import ONLINE
from ..world.gold_reward import PARTS
from .load import Data

NAMES = ("model", "gold", *(f"gold/{part}" for part in PARTS))


def named(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that follow from `rewards`. Raises ValueError for a name that is none."""
    said = settings.get("rewards")
    if said is None:
        return {}
    names = [said] if isinstance(said, str) else list(said)
    for name in names:
        if name not in NAMES:
            hint = did_you_mean(str(name), NAMES)
            raise ValueError(f"no reward {name!r}; {hint}choose from {', '.join(NAMES)}")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"rewards={names}: name at least one, and each of them once")
    if "model" in names[1:] and settings.get("reward_weights"):
        raise ValueError(
            "reward_weights go with the sources in their order, the reward model "
            f"first: name it first, not rewards={names}"
        )
    return {"rewards": names, "rule_reward": "model" not in names}


def settled(plan: Any, functions: Callable | Sequence[Callable] | None) -> Any:
    """The plan as it is trained: without a reward model where there is none and functions are."""
    online = plan.stage in ONLINE
    if functions and not online:
        raise ValueError(
            f"{plan.stage} learns from no rewards: reward_funcs are for {', '.join(ONLINE)}"
        )
    if functions and not _judges(plan) & plan.model.paths.keys() and "rewards" not in plan.settings:
        return replace(plan, settings={**plan.settings, "rule_reward": True})
    return plan


def reward_functions(
    plan: Any, data: Data, functions: Callable | Sequence[Callable] | None = None
) -> list[Callable]:
    """The functions that a run learns from, named ones first. Raises ValueError, one line, for
    rewards that cannot be had."""
    if plan.stage not in ONLINE:
        return []
    given = [functions] if callable(functions) else list(functions or ())
    names = [n for n in plan.settings.get("rewards") or () if n != "model"]
    if names and not data.has_gold:
        raise ValueError(
            f"{data.name} has no gold reward to learn from: only the bundled world "
            "knows it; give reward_funcs"
        )
    made = [_named_function(n, data) for n in names] + given
    with_model = not plan.settings.get("rule_reward")
    if with_model and not _judges(plan) & plan.model.paths.keys():
        raise ValueError(
            f"{plan.stage.upper()} needs a reward model: train one first (rlhf-lab train reward "
            f"--model {plan.model.name}) and use model.with_stage('reward', run.model_path); or "
            "give reward_funcs, or rewards=['gold']"
        )
    if not with_model and not made:
        raise ValueError(
            f"{plan.stage.upper()} without a reward model needs a rule: give "
            "reward_funcs, or rewards=['gold']"
        )
    weights = plan.settings.get("reward_weights")
    if weights is not None and len(weights) != with_model + len(made):
        raise ValueError(
            f"reward_weights has {len(weights)} numbers for {with_model + len(made)} sources of "
            "reward: give one for each, the reward model first"
        )
    return made


def _judges(plan: Any) -> set[str]:
    """Checkpoints that can be the reward model."""
    one_base = plan.settings.get("layout") == "adapters"
    return {"reward", "reward_adapter"} if one_base else {"reward"}


def gold_metrics(data: Data) -> dict[str, Callable]:
    """The gold reward and its parts as functions that an online stage watches."""
    if not data.has_gold:
        return {}
    return {
        "gold_reward" if n == "gold" else n: _named_function(n, data) for n in NAMES if n != "model"
    }


def _named_function(name: str, data: Data) -> Callable:
    """The gold reward or a part of it, as GRPOTrainer calls a reward."""
    part = name.partition("/")[2]

    def values(prompts, completions, **_):
        pairs = zip(prompts, completions, strict=True)
        if part:
            return [data.gold_parts(p, c)[part] for p, c in pairs]
        return [data.gold_reward(p, c) for p, c in pairs]

    values.__name__ = name
    return values
