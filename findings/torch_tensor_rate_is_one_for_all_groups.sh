#!/usr/bin/env bash
# An optimizer whose learning rate is a tensor has one rate for all groups: the last group's schedule sets it.
#
# Version: torch 2.13.0 (CPU); Python 3.11.
# Expected: AdamW([{"params": body}, {"params": head}], lr=torch.tensor(1e-3)) with LambdaLR(optimizer, [f, g]) is the
#   optimizer that lr=1e-3 gives: group 1 at 1e-3 * f, group 2 at 1e-3 * g. A tensor is what one is told to give where
#   optimizer.step is compiled, so that a schedule does not compile it anew.
# Behaviour: a group without a rate of its own is given the default, not a copy of it: all groups hold one tensor.
#   Schedulers fill a rate that is a tensor in place, group after group, so that the last one's value stands in all.
#   A body that was to be frozen for the warm-up (f = 0) moves at the head's rate. Nothing is said;
#   get_last_lr() shows the one rate.
# Remedy: a tensor for each group: {"params": body, "lr": torch.tensor(1e-3)}.
# Seen: "rates of body and head, 0 and 1e-3: 0.0e+00 1.0e-03 from a number, 1.0e-03 1.0e-03 from a tensor, 0.0e+00
#   1.0e-03 from a tensor each; the body moves by 0.000, 0.003, 0.000 in 3 steps; the default rate is one object: True"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/try.py" <<'P'
import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR


def rates_and_move(default, own=None):
    body, head = (torch.nn.Parameter(torch.ones(())) for _ in range(2))
    groups = [{"params": [p], **({} if own is None else {"lr": own()})} for p in (body, head)]
    optimizer = AdamW(groups, lr=default, weight_decay=0.0)
    schedule = LambdaLR(optimizer, [lambda step: 0.0, lambda step: 1.0])
    for _ in range(3):
        (body + head).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    return rates, abs(float(body) - 1), optimizer


number = rates_and_move(1e-3)
tensor = rates_and_move(torch.tensor(1e-3))
each = rates_and_move(torch.tensor(1e-3), own=lambda: torch.tensor(1e-3))
shown = ["{:.1e} {:.1e}".format(*rates) for rates, *_ in (number, tensor, each)]
groups = tensor[2].param_groups
print(f"rates of body and head, 0 and 1e-3: {shown[0]} from a number, {shown[1]} from a tensor, {shown[2]} from a tensor "
      f"each; the body moves by {number[1]:.3f}, {tensor[1]:.3f}, {each[1]:.3f} in 3 steps; the default rate is one "
      f"object: {groups[0]['lr'] is groups[1]['lr']}")
assert number[0][0] == each[0][0] == 0.0 and number[1] == each[1] == 0.0
assert groups[0]["lr"] is groups[1]["lr"] and tensor[0][0] == tensor[0][1] > 0 and tensor[1] > 2e-3
P
"$folder/env/bin/python" "$folder/try.py" 2>/dev/null
