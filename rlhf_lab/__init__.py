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
    "load": "models",
    "load_data": "data",
    "Run": "runs",
    "Ledger": "ledger",
    "plan": "lab",
    "train": "lab",
    "Plan": "lab",
    "best_of_n": "baseline",
    "xray": "budget",
    "compare": "budget",
    "sweep": "budget",
    "project": "budget",
    "hardware": "budget",
    "calibrate": "budget",
    "train_all": "course",
    "stage_table": "course",
    "cost_table": "course",
    "stage_shares": "course",
    "describe_data": "course",
    "report": "course",
    "stories": "course",
    "show_stories": "course",
    "planner": "studio",
    "dashboard": "studio",
    "inspect": "studio",
    "label": "studio",
    "curves": "widgets.figures",
    "frontier": "widgets.figures",
    "stage_costs": "widgets.bars",
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
