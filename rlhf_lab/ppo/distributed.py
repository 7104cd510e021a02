"""PPO on several processes: the whole rollout on each of them, a part of every minibatch for each.

Each process samples and scores its own prompts. Then all get all of it (tokens and a few numbers
for each, which is little beside a model), so that whitening, KL, rewards and shuffling are those of
one process with the whole batch, and only gradients have to be added up.
"""

from __future__ import annotations

from dataclasses import fields

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from .rollout import Rollout


def gather_rollout(accelerator: Accelerator, mine: Rollout, pad_token_id: int) -> Rollout:
    """The rollouts of all processes as one, those of the first process first.

    Prompts are padded to the longest of any process on the left, responses on the right.
    """
    if accelerator.num_processes == 1:
        return mine
    t = mine.responses.shape[1]
    p = mine.ids.shape[1] - t
    sizes = accelerator.gather(torch.tensor([[p, t]], device=mine.ids.device)).amax(0)
    left, right = (sizes - torch.tensor([p, t], device=sizes.device)).tolist()
    sides = {"ids": left, "attention": left}
    fill = {"ids": pad_token_id, "responses": pad_token_id}
    whole = {}
    for name in (f.name for f in fields(mine)):
        x = getattr(mine, name)
        if x.dim() == 2:
            x = F.pad(x, (sides.get(name, 0), right), value=fill.get(name, 0))
        whole[name] = _gather(accelerator, x)
    return Rollout(**whole)


def _gather(accelerator: Accelerator, x: Tensor) -> Tensor:
    """Rows of all processes. Not every backend knows bool. (b, …) → (processes · b, …)."""
    if x.dtype == torch.bool:
        return _gather(accelerator, x.to(torch.uint8)).bool()
    whole: Tensor = accelerator.gather(x.contiguous())
    return whole


def shard_rows(accelerator: Accelerator, rows: Tensor) -> Tensor:
    """Of the rows of a minibatch those that this process works on: every n-th. (b,) → (b / n,)."""
    return rows[accelerator.process_index :: accelerator.num_processes]
