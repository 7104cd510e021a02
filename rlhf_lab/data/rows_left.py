"""What data must have for a stage: rows of its kind, of which some fit. A plan and a training
refuse alike what lacks them.

Needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from typing import TYPE_CHECKING

from ..display import counted
from ..stages import STAGES, Settings

if TYPE_CHECKING:
    from ..models.load import Model
    from .load import Data


def check_rows(stage: str, data: Data) -> None:
    """Raises ValueError, one line, where there are no rows of a stage's kind."""
    spec = STAGES[stage]
    if not getattr(data, spec.rows).train:
        what = " and ".join(spec.columns) or "prompt"
        raise ValueError(f"{data.name} has nothing to {_does(stage)} on: no {what} fields")


def digest(stage: str, data: Data) -> str:
    """How many rows a stage learns from, and a hash of them: other rows have another one."""
    rows = getattr(data, STAGES[stage].rows).train
    found = sha256()
    for row in rows:
        found.update(json.dumps(row, default=str).encode())
    return f"{counted(len(rows), 'row')}, sha256 {found.hexdigest()[:12]}"


def nothing_left(
    stage: str, model: Model, data: Data, length: int, counts: Mapping[str, int]
) -> ValueError:
    """What to raise where every row was dropped: `counts` by reason, within `length` tokens."""
    from .chat import remedy

    lost = ", ".join(f"{n} {why}" for why, n in counts.items() if n)
    limit = f"{model.name} takes {model.context}, max_length may be up to that"
    return ValueError(
        f"{data.name}: no row is left to {_does(stage)} on within {length} tokens "
        f"({lost}); {next(filter(None, map(remedy, counts)), limit)}"
    )


def response_limit(settings: Settings) -> int:
    """Most tokens of a response that a training samples: to learn from, or to evaluate a policy by,
    where it has as many as the stages that sample."""
    return int(settings.get("response_length", 64))


def room_for_prompt(model: Model, settings: Settings) -> int:
    """Tokens that a prompt may have. Raises ValueError where the response leaves none."""
    response = response_limit(settings)
    room = model.context - response
    if room < 1:
        raise ValueError(
            f"response_length={response} leaves no room for a prompt: {model.name} "
            f"takes {model.context} tokens"
        )
    return room


def _does(stage: str) -> str:
    return f"{'train' if STAGES[stage].trainable else 'plan'} {stage}"
