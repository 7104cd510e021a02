"""A launch as text for who has a cluster: a SLURM script, a SkyPilot task. Nothing is started."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Sequence

from .launcher import CONFIG_FILE, Hosts, command

TARGETS = ("slurm", "skypilot")
SLURM = """#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={each}
#SBATCH --output=%x-%j.log
#SBATCH --requeue
set -e
export HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
{write}srun bash -c {line}
"""
SKYPILOT = """name: {name}
num_nodes: {nodes}
resources:
  accelerators: {gpus}
setup: pip install {needs}
run: |
  HEAD=$(echo "$SKYPILOT_NODE_IPS" | head -n 1)
{run}"""


def script(
    to: str, name: str, accelerator: str, config: str, arguments: Sequence[str], hosts: Hosts
) -> str:
    """The text. `accelerator`: the GPU's name in the catalogue; `config`: accelerate's YAML.

    A job that is started again goes on: `arguments` hold `--resume`, which begins where nothing is.
    """
    rank = {"slurm": "$SLURM_NODEID", "skypilot": "$SKYPILOT_NODE_RANK"}[to]
    placed = Hosts(hosts.processes, hosts.nodes, rank, "$HEAD")
    line, _ = command(CONFIG_FILE, arguments, placed)
    # Variables are the shell's on each host; all else is quoted. Its Python is that of the cluster.
    words = [w if w in (rank, "$HEAD") else shlex.quote(w) for w in ["python", *line[1:]]]
    each = hosts.processes // hosts.nodes
    write = f"cat > {CONFIG_FILE} <<'END'\n{config}END\n"
    if to == "slurm":
        return SLURM.format(
            name=name, nodes=hosts.nodes, each=each, write=write, line=shlex.quote(" ".join(words))
        )
    needs = "rlhf-lab deepspeed" if "DEEPSPEED" in config else "rlhf-lab"
    run = textwrap.indent(f"{write}{' '.join(words)}\n", "  ")
    return SKYPILOT.format(
        name=name, nodes=hosts.nodes, gpus=f"{accelerator.upper()}:{each}", needs=needs, run=run
    )
