"""rlhf_lab: what RLHF does and what it costs, on a model small enough to train in front of you.

    import rlhf_lab as lab
    run = lab.train("sft")

Names load when they are used: importing the package loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
import logging

__version__ = "0.1.0"

_HOMES = {
    "load": "models.load",
    "load_data": "data.load",
    "Run": "runs.run",
    "Ledger": "runs.ledger",
    "PPOTrainer": "ppo.trainer",
    "PPOConfig": "ppo.config",
    "plan": "planning",
    "train": "training",
    "Plan": "planning",
    "best_of_n": "studies",
    "xray": "studies",
    "compare": "charts.comparison",
    "sweep": "studies",
    "project": "studies",
    "hardware": "studies",
    "calibrate": "studies",
    "train_all": "pipeline",
    "stage_table": "pipeline",
    "cost_table": "pipeline",
    "stage_shares": "pipeline",
    "describe_data": "pipeline",
    "report": "pipeline",
    "stories": "pipeline",
    "show_stories": "pipeline",
    "planner": "notebook",
    "dashboard": "notebook",
    "inspect": "notebook",
    "label": "notebook",
    "curves": "charts.curves",
    "frontier": "charts.frontier",
    "stage_costs": "charts.cost_bars",
}
__all__ = sorted(_HOMES)

# peft imports bitsandbytes wherever it is, which then warns of a kernel that nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module 'rlhf_lab' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
