"""What a notebook opens to look and to play: each widget with the lab's functions handed to it.

    lab.planner()                     sliders: what would it cost?
    lab.dashboard(run)                the curves of a run on disk, step by step
    lab.inspect(sft, ppo, dpo)        what the models wrote, token by token
    lab.label("stories", n=20)        you are the annotator
    lab.curves(*runs), lab.frontier(*runs), lab.sources(...), lab.stage_costs(...)
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .runs import Run

if TYPE_CHECKING:
    from .widgets.dashboard import Replay


def dashboard(run: Run | str | Path) -> Replay:
    """The dashboard of a run on disk, finished or still being written: `run` or its folder."""
    from .cost.hardware import hardware
    from .widgets.dashboard import Replay

    return Replay(run if isinstance(run, Run) else Run.load(run), hardware("here").memory)


def planner(**state: Any) -> Any:
    """The slider app: what a stage takes in memory, time and money. `state`: any setting of
    `lab.plan` to begin with, and what `planner.state` said earlier."""
    from .lab import plan
    from .widgets.planner import Planner

    return Planner(plan, **state)
