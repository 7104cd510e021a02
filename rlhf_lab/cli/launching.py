"""Training in several processes from the command line: `train --accelerate`, and `launch`, which
writes the same down for a cluster.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..launch.accelerate_config import CONFIGS
from ..launch.schedulers import TARGETS
from .cost import Commands, positive

if TYPE_CHECKING:
    from ..planning import Plan

FLAGS = (
    "--config --accelerate --processes --nodes --machine-rank --main-address --hardware --to"
).split()
"""The launcher's own flags, with a value each."""


def add_command(commands: Commands) -> argparse.ArgumentParser:
    launch = commands.add_parser(
        "launch",
        help="a script that trains one stage on a cluster",
        description="Write a SLURM script or a SkyPilot task that trains one stage; start nothing.",
    )
    launch.add_argument("--to", choices=TARGETS, required=True, help="whose text it is")
    return launch


def add_arguments(train: argparse.ArgumentParser) -> None:
    how = f"on several processes: {', '.join(CONFIGS)}, auto (what fits), or accelerate's config"
    train.add_argument("--accelerate", metavar="HOW", help=how)
    many = "how many, on all hosts [one for each GPU; 2 on a CPU]"
    train.add_argument("--processes", type=positive, metavar="N", help=many)
    train.add_argument("--nodes", type=positive, metavar="N", help="hosts [1, or the file's]")
    train.add_argument("--machine-rank", metavar="N", help="number of this host [0, or the file's]")
    first = "address of the first host, and the port it listens on [29500]"
    train.add_argument("--main-address", default="", metavar="HOST[:PORT]", help=first)
    train.add_argument("--hardware", default="here", help="where it is to run, to look only [here]")
    train.add_argument("--dry-run", action="store_true", help="show what --accelerate would start")


def start(args: argparse.Namespace, planned: Plan, folder: Path) -> int:
    """Start the same command in several processes, once it was checked in this one; show what that
    would be; or write it down for a cluster."""
    from ..cost.hardware import hardware as find_hardware
    from ..launch.launcher import CONFIG_FILE, Hosts, command, launch
    from ..launch.schedulers import script
    from ..launching import launched

    elsewhere = args.command == "launch"
    if not args.accelerate:
        raise ValueError("launch needs --accelerate: say how, for example --accelerate fsdp2")
    if not (args.dry_run or elsewhere) and args.hardware != "here":
        raise ValueError(f"--hardware {args.hardware} is to look only: add --dry-run")
    dry = args.dry_run or elsewhere
    made = launched(planned, args.accelerate, args.processes, args.nodes, dry=dry)
    rank, address = args.machine_rank or made.rank, args.main_address or made.address
    if made.nodes > 1 and not (address or elsewhere):
        raise ValueError(f"--nodes {made.nodes} needs --main-address, that of the first host")
    if made.warning:
        print(f"{args.stage}: {made.warning}", file=sys.stderr)
    if not (made.config or elsewhere) and args.accelerate != "cpu":
        count = f"{made.processes} process{'es' * (made.processes != 1)}"
        gpus = "on a GPU: name it, --hardware h100 --dry-run"
        print(f"{args.stage}: there is no GPU here: {count} on the CPU ({gpus})", file=sys.stderr)
    hosts = Hosts(made.processes, made.nodes, rank, address, made.sharding)
    line = _of_a_process(args.argv) + ([] if args.out else ["--out", str(folder)])
    if elsewhere:
        if not made.config or find_hardware(planned.hardware).kind != "gpu":
            raise ValueError(f"--to {args.to} is for GPUs: say which (--hardware)")
        again = [] if args.resume or args.overwrite else ["--resume"]
        name = f"rlhf-lab-{args.stage}"
        how = name, planned.hardware_name, made.config, [*line, *again], hosts
        print(script(args.to, *how), end="")
        return 0
    if not args.dry_run:
        return launch(made.config, line, hosts, args.quiet)
    started, env = command(CONFIG_FILE if made.config else "", line, hosts)
    print(shlex.join([*(f"{k}={v}" for k, v in env.items()), *started]))
    print(f"\n# {CONFIG_FILE}\n{made.config}" if made.config else "", end="")
    return 0


def _of_a_process(argv: Sequence[str]) -> list[str]:
    """The command line of one process: without the launcher's own flags."""
    kept, words = ["train"], iter(argv[1:])
    for word in words:
        name, given, _ = word.partition("=")
        if name in FLAGS and not given:
            next(words)
        elif name not in (*FLAGS, "--dry-run"):
            kept.append(word)
    return kept
