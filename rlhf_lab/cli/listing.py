"""`rlhf-lab list models|hardware|stages|settings`: names; `rlhf-lab report`: a run as a page."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from ..display import format_bytes, format_number, table
from ..stages import STAGES, TRAINABLE
from .cost import Commands


def add_command(commands: Commands) -> None:
    """Add the command to the parser's."""
    what = commands.add_parser("list", help="models, devices, stages and settings by name")
    what.add_argument("what", choices=["models", "hardware", "stages", "settings"])
    what.add_argument("--stage", choices=TRAINABLE, default="ppo", help="whose settings [ppo]")
    page = commands.add_parser(
        "report",
        help="a stored run as one web page: curves, costs, what it wrote token by token",
        description="Write a stored run as one web page that needs nothing else, no Python either.",
    )
    page.add_argument("run", type=Path, help="folder of the run")
    page.add_argument("--out", type=Path, default=Path("report.html"), help="[report.html]")


def run_report(args: argparse.Namespace) -> int:
    """Write the page of a run."""
    from ..pipeline import report

    print(report(args.run, args.out))
    return 0


def run_list(args: argparse.Namespace) -> int:
    print(table(list(_rows(args.what, args.stage))))
    return 0


def _rows(what: str, stage: str) -> Iterator[dict[str, str]]:
    from ..cost.architecture import architecture
    from ..cost.hardware import CATALOGUE
    from ..models.load import ALIASES, BUNDLED, load, presets
    from ..models.packaged import PACKAGED
    from ..settings import config_fields

    if what == "hardware":
        for name, device in CATALOGUE.items():
            yield {what: name, "is": device.name, "memory": format_bytes(device.memory)}
    elif what == "stages":
        for name, spec in STAGES.items():
            made = "trained" if spec.trainable else "planned only"
            yield {"stage": name, "is": spec.title, "models": ", ".join(spec.roles), "": made}
    elif what == "models":
        kinds = dict.fromkeys(BUNDLED, "bundled")
        kinds |= {a: f"in the package {PACKAGED[of][1]}, or the hub" for a, of in ALIASES.items()}
        for name, kind in (kinds | dict.fromkeys(presets(), "weights from the hub")).items():
            size = architecture(load(name).config_dict()).parameters()
            yield {"model": name, "size": format_number(size, "parameters"), "": kind}
    else:
        for name, kind in sorted(config_fields(stage).items()):
            default = str(STAGES[stage].defaults.get(name, ""))
            yield {"setting": name, "type": kind, "the lab's default": default}
