#!/usr/bin/env bash
# module.compile() of one of torch's own modules compiles nothing, and says nothing.
#
# Version: torch 2.13.0, CPU (pytorch/pytorch#150915).
# Expected: module.compile() is torch.compile(module) in place.
# Behaviour: it compiles `_call_impl`, whose file dynamo skips, so what is compiled is the first
#   frame below it that dynamo does not skip: `forward` of a class of one's own. nn.Linear,
#   nn.Sequential and its subclasses have theirs in torch's files, which are skipped too: each call
#   is eager. torch.compile(module) of the same modules compiles them.
# Met by: who compiles parts of a model in place, so that names in checkpoints stay (a reward head,
#   an MLP in a Sequential).
# Remedy: module.forward = torch.compile(module.forward) is the same in place; or fullgraph=True,
#   which raises here.
# Seen: "in place: Linear 0, Sequential 0, subclass of Sequential 0, own class 3 of 3 calls",
#   "torch.compile(Sequential) 3", "its forward compiled 3"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/try.py" <<'P'
import warnings

import torch
from torch import nn

warnings.simplefilter("ignore")
calls = []
x = torch.randn(4, 8)


def backend(graph, inputs):
    def run(*args):
        calls.append(1)
        return graph.forward(*args)

    return run


def compiled_of_three(module):
    calls.clear()
    for _ in range(3):
        module(x)
    return len(calls)


def in_place(module):
    module.compile(backend=backend)
    return compiled_of_three(module)


class Named(nn.Sequential):
    pass


class Mine(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        return self.inner(x).relu()


def layers():
    return nn.Linear(8, 8), nn.ReLU()


seen = [in_place(m) for m in (nn.Linear(8, 8), nn.Sequential(*layers()), Named(*layers()), Mine())]
names = "Linear {}, Sequential {}, subclass of Sequential {}, own class {}"
print("in place:", names.format(*seen), "of 3 calls")
seen.append(compiled_of_three(torch.compile(nn.Sequential(*layers()), backend=backend)))
print(f"torch.compile(Sequential) {seen[-1]}")
other = nn.Sequential(*layers())
other.forward = torch.compile(other.forward, backend=backend)
seen.append(compiled_of_three(other))
print(f"its forward compiled {seen[-1]}")
assert seen == [0, 0, 0, 3, 3, 3], seen
P
"$folder/env/bin/python" "$folder/try.py"
