#!/usr/bin/env bash
# Under FSDP2 `p.grad.norm().item()` is the norm of this process's part; `p.std().item()` is the whole's.
#
# Version: torch 2.13.0 (CPU, gloo, two processes); Python 3.11.
# Expected: a DTensor stands for the whole tensor: its shape and numel() are the whole's, and what is computed of it
#   is, as in clip_grad_norm_, whose result's .item() is the whole norm.
# Behaviour: norm(), mean(), sum() and max() leave a number that each process has its part of (Partial), and .item()
#   and float() return that part, without a word. Another operation behind it (sqrt of a sum of squares) puts the
#   parts together, and std() does so by itself: of two figures in one line of a log one is the whole's and one a
#   shard's, which shrinks with more devices.
# Remedy: .full_tensor().item(), on every process.
# Seen (process 0 of 2: whole model, .item(), .full_tensor().item()): "norm of the gradient 0.4457 0.3247 0.4457, mean
#   -0.0012 -0.0002 -0.0012, max 0.1250 0.1250 0.1250, std 0.0718 0.0718 0.0718, root of squares 0.4457 0.4457 0.4457,
#   clip_grad_norm_ 0.4457 0.4457 0.4457"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/try.py" <<'P'
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import clip_grad_norm_


def trained(inputs, shard):
    """A layer with the gradient of its inputs' mean square."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 64, bias=False)
    if shard:
        fully_shard(layer, mesh=distributed.device_mesh.init_device_mesh("cpu", (2,)))
    (layer(inputs) ** 2).mean().backward()
    return layer


FIGURES = {
    "norm of the gradient": lambda p: p.grad.norm(),
    "mean": lambda p: p.mean(),
    "max": lambda p: p.abs().max(),
    "std": lambda p: p.std(),
    "root of squares": lambda p: (p.grad**2).sum().sqrt(),
    "clip_grad_norm_": lambda p: clip_grad_norm_([p], 1e9),
}

distributed.init_process_group("gloo")
rank = distributed.get_rank()
inputs = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
whole = trained(inputs, shard=False).weight
mine = trained(inputs.chunk(2)[rank], shard=True).weight
found = {}
for name, figure in FIGURES.items():
    result = figure(mine)
    found[name] = [figure(whole).item(), result.item(), result.full_tensor().item()]
if rank == 0:
    print(", ".join(f"{name} " + " ".join(f"{x:.4f}" for x in found[name]) for name in found))
for name, (right, item, full) in found.items():
    assert abs(full - right) < 1e-4 * abs(right) + 1e-6, name
    if name in ("norm of the gradient", "mean"):
        assert abs(item - right) > 0.05 * abs(right), name
    elif name != "max":  # of the two processes one has the largest
        assert abs(item - right) < 1e-4 * abs(right), name
distributed.destroy_process_group()
P
cd "$folder" && OMP_NUM_THREADS=1 env/bin/torchrun --standalone --nproc_per_node=2 try.py 2>/dev/null
