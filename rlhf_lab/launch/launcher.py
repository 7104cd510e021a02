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

STRATEGIES = ("ddp",)
ERROR_PREFIX = "rlhf-lab: "
"""How an error message of ours begins; what a launcher prints after it explains nothing."""


def place(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """This process' rank and the number of processes, as torchrun and accelerate set them."""
    return int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1))


def command(
    how: str, arguments: Sequence[str], processes: int | None = None, gpus: int = 0
) -> tuple[list[str], dict[str, str]]:
    """The command line that starts `rlhf-lab ARGUMENTS` in several processes, and what it adds to
    the environment.

    how: "ddp", or a file that `accelerate config` wrote; processes: as many as there are GPUs, two
    on a CPU, or what the file says. Raises ValueError for something else, in one line.
    """
    program = ["-m", "rlhf_lab.cli", *arguments]
    accelerate = [sys.executable, "-m", "accelerate.commands.launch"]
    if how not in STRATEGIES:
        if not Path(how).is_file():
            raise ValueError(
                f"--accelerate {how}: neither {', '.join(STRATEGIES)} nor a file that "
                "`accelerate config` wrote"
            )
        count = ["--num_processes", str(processes)] if processes else []
        return [*accelerate, "--config_file", how, *count, *program], {}
    if gpus:
        if processes and processes > gpus:
            raise ValueError(
                f"--processes {processes}: there are {gpus} GPUs here, and each process needs one"
            )
        count = ["--num_processes", str(processes or gpus)]
        return [*accelerate, "--multi_gpu", *count, *program], {}
    workers = processes or 2
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    threads = max(1, (os.cpu_count() or 1) // workers)
    env = {"ACCELERATE_USE_CPU": "true"}
    if "OMP_NUM_THREADS" not in os.environ:  # else all processes would use all cores
        env["OMP_NUM_THREADS"] = str(threads)
    return [*torchrun, f"--nproc-per-node={workers}", *program], env


def launch(how: str, arguments: Sequence[str], processes: int | None = None) -> int:
    """Run `rlhf-lab ARGUMENTS` in several processes. → exit code.

    What they write to stderr is passed on up to an error message of ours.
    """
    import torch

    program, environment = command(how, arguments, processes, torch.cuda.device_count())
    failed = False
    with subprocess.Popen(
        program, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        try:
            for line in process.stderr or ():
                if not failed:
                    sys.stderr.write(line)
                failed = failed or line.startswith(ERROR_PREFIX)
        except KeyboardInterrupt:  # the processes were interrupted too: they end by themselves
            pass
        code = process.wait()
    return 2 if failed and code else min(code, 1)
