"""Start a command of ours in several processes, through accelerate.

On GPUs that is `accelerate launch`. On CPUs accelerate's launcher starts plain copies, so there it
is torchrun with `ACCELERATE_USE_CPU`: the processes find each other through gloo.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

KINDS = ("ddp",)
MINE = "rlhf-lab: "
"""How a complaint of ours begins; what a launcher says after it explains nothing."""


def place(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """This process' rank and the number of processes, as torchrun and accelerate say them."""
    return int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1))


def command(
    how: str, arguments: Sequence[str], processes: int | None = None, gpus: int = 0
) -> tuple[list[str], dict[str, str]]:
    """The command line that starts `rlhf-lab ARGUMENTS` in several processes, and what it adds to
    the environment.

    how: "ddp", or a file that `accelerate config` wrote; processes: as many as there are GPUs, two
    on a CPU, or what the file says. Raises ValueError for something else, in one line.
    """
    ours = ["-m", "rlhf_lab.cli", *arguments]
    if how not in KINDS:
        if not Path(how).is_file():
            raise ValueError(
                f"--accelerate {how}: neither {', '.join(KINDS)} nor a file that "
                "`accelerate config` wrote"
            )
        many = ["--num_processes", str(processes)] if processes else []
        return [*_accelerate(), "--config_file", how, *many, *ours], {}
    if gpus:
        if processes and processes > gpus:
            raise ValueError(
                f"--processes {processes}: there are {gpus} GPUs here, and each process needs one"
            )
        many = str(processes or gpus)
        return [*_accelerate(), "--multi_gpu", "--num_processes", many, *ours], {}
    count = processes or 2
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    threads = max(1, (os.cpu_count() or 1) // count)
    env = {"ACCELERATE_USE_CPU": "true"}
    if "OMP_NUM_THREADS" not in os.environ:  # else all processes would use all cores
        env["OMP_NUM_THREADS"] = str(threads)
    return [*torchrun, f"--nproc-per-node={count}", *ours], env


def _accelerate() -> list[str]:
    return [sys.executable, "-m", "accelerate.commands.launch"]


def launch(how: str, arguments: Sequence[str], processes: int | None = None) -> int:
    """Run `rlhf-lab ARGUMENTS` in several processes. → exit code.

    What they write to stderr is passed on up to a complaint of ours.
    """
    import torch

    line, more = command(how, arguments, processes, torch.cuda.device_count())
    complained = False
    with subprocess.Popen(
        line, env={**os.environ, **more}, stderr=subprocess.PIPE, text=True, bufsize=1
    ) as started:
        try:
            for said in started.stderr:
                if not complained:
                    sys.stderr.write(said)
                complained = complained or said.startswith(MINE)
        except KeyboardInterrupt:  # the processes were interrupted too: they end by themselves
            pass
        code = started.wait()
    return 2 if complained and code else min(code, 1)
