"""The table of trainers' settings, rlhf_lab/settings.json: `python .ci/settings.py [--check]`.

Fields of every stage's config with their types, read off the installed libraries, so that a plan
can refuse a mistyped name without importing them (seconds). With --check nothing is written: exit
status 1 says that the table is out of step with the libraries that are installed.
"""

from __future__ import annotations

import json
import sys
from dataclasses import fields
from importlib.metadata import version

from written_file import ROOT, write_or_check

sys.path.insert(0, str(ROOT))
TABLE = ROOT / "rlhf_lab" / "settings.json"


def _text(type_: object) -> str:
    return type_.__name__ if isinstance(type_, type) else str(type_)


def table() -> dict[str, dict[str, str]]:
    """{"versions": …, "choices": transformers' optimizers, "common": fields of all stages, "model":
    those of TRL's ModelConfig, stage: the other ones}."""
    from transformers.training_args import OptimizerNames
    from trl import ModelConfig

    from rlhf_lab.stages import STAGES, resolve

    found = {
        name: {f.name: _text(f.type) for f in fields(resolve(spec.config)) if f.init}
        for name, spec in STAGES.items()
        if spec.config
    }
    first = next(iter(found.values()))
    common = {n: t for n, t in first.items() if all(own.get(n) == t for own in found.values())}
    rest = {
        stage: {n: t for n, t in own.items() if n not in common} for stage, own in found.items()
    }
    versions = {name: version(name) for name in ("transformers", "trl")}
    model = {f.name: _text(f.type) for f in fields(ModelConfig)}
    choices = {"optim": " | ".join(optimizer.value for optimizer in OptimizerNames)}
    both = {"versions": versions, "choices": choices}
    return {**both, "common": common, "model": model, **rest}


if __name__ == "__main__":
    sys.exit(write_or_check({TABLE: json.dumps(table(), indent=1) + "\n"}))
