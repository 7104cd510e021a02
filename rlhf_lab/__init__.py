"""rlhf_lab: what RLHF does and what it costs, on a model small enough to train in front of you.

    import rlhf_lab as lab
    run = lab.train("sft")

Names load when they are used: importing the package loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "models.load": ("load",),
    "data.load": ("load_data",),
    "runs.run": ("Run",),
    "runs.ledger": ("Ledger",),
    "runs.health": ("health",),
    "ppo.trainer": ("PPOTrainer",),
    "ppo.config": ("PPOConfig",),
    "planning": ("plan", "Plan"),
    "training": ("train",),
    "cloning": ("clone",),
    "studies": ("best_of_n", "xray", "sweep"),
    "budget": ("project",),
    "frontiers": ("frontier_serving",),
    "equal_cost": ("equal_budget", "EqualBudget"),
    "overoptimisation": ("overoptimise", "OverOptimisation"),
    "deploy.quantize": ("quantize",),
    "deploy.load": ("bench",),
    "metering.calibrate": ("calibrate",),
    "deploy.export": ("export",),
    "metering.callback": ("MeterCallback",),
    "metering.health_callback": ("HealthCallback",),
    "cost.hardware": ("hardware",),
    "charts.comparison": ("compare",),
    "exercises": ("exercises", "check", "solution"),
    "zoo": ("specimens",),
    "pipeline": (
        "train_all",
        "stage_table",
        "cost_table",
        "stage_shares",
        "describe_data",
        "report",
        "stories",
        "show_stories",
    ),
    "notebook": (
        *("planner", "dashboard", "inspect", "label", "guess", "generate", "chat", "batch"),
        "continuous_batching",
    ),
    "deploy.serve": ("serve",),
    "charts.curves": ("curves",),
    "charts.frontier": ("frontier",),
    "charts.cost_bars": ("stage_costs",),
    "charts.memory": ("peaks",),
}
"""Public names by the module that they live in."""
_HOMES = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = sorted(_HOMES)

# peft imports bitsandbytes wherever it is, which then warns of a kernel that nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
logging.getLogger("torchao").setLevel(logging.ERROR)
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from .arguments import checked

        found = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
        return found if isinstance(found, type) else checked(found)
    raise AttributeError(f"module 'rlhf_lab' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
