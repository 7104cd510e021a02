#!/usr/bin/env bash
# Counting the FLOPs of a compiled function once leaves it uncompiled for the rest of the process.
#
# Version: torch 2.13.0, CPU (pytorch/pytorch#190286 tells the same of a first call).
# Expected: FlopCounterMode looks on. In its block a compiled function runs as ever, or eagerly;
#   behind the block it is the compiled function again.
# Behaviour: in the block dynamo skips the frame, since a dispatch mode is active, and marks its
#   code as one to skip for good: every later call is eager, without an error, also of the same function
#   given to torch.compile anew. Any TorchDispatchMode does it, one that does nothing too.
# Met by: whoever counts a step's FLOPs and times the steps that follow.
# Remedy: count before anything is compiled, on the eager module; or torch._dynamo.reset() behind
#   the block, and compile again.
# Seen: "before: 3 of 3 calls compiled", "after an idle mode: 0 of 3", "after FlopCounterMode: 0",
#   "compiled anew: 0", "after a reset: 3", "counted before it was compiled: 3"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/try.py" <<'P'
import warnings

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

warnings.simplefilter("ignore")
calls = []
x, w = torch.randn(8, 8), torch.randn(8, 8)


def backend(graph, inputs):
    def run(*args):
        calls.append(1)
        return graph.forward(*args)

    return run


def compiled_of_three(function):
    calls.clear()
    for _ in range(3):
        function(x, w)
    return len(calls)


class Idle(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def one(x, w):
    return torch.relu(x @ w)


def two(x, w):
    return torch.tanh(x @ w)


def three(x, w):
    return torch.sigmoid(x @ w)


f, g = torch.compile(one, backend=backend), torch.compile(two, backend=backend)
seen = [compiled_of_three(f)]
print(f"before: {seen[0]} of 3 calls compiled")
with Idle():
    f(x, w)
seen.append(compiled_of_three(f))
print(f"after an idle mode: {seen[-1]} of 3")
assert compiled_of_three(g) == 3
with FlopCounterMode(display=False):
    g(x, w)
seen.append(compiled_of_three(g))
print(f"after FlopCounterMode: {seen[-1]}")
seen.append(compiled_of_three(torch.compile(two, backend=backend)))
print(f"compiled anew: {seen[-1]}")
torch._dynamo.reset()
seen.append(compiled_of_three(torch.compile(two, backend=backend)))
print(f"after a reset: {seen[-1]}")
with FlopCounterMode(display=False):
    three(x, w)
seen.append(compiled_of_three(torch.compile(three, backend=backend)))
print(f"counted before it was compiled: {seen[-1]}")
assert seen == [3, 0, 0, 0, 3, 3], seen
P
"$folder/env/bin/python" "$folder/try.py"
