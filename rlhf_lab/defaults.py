"""Settings that nobody gave, by the size of the model.

The lab's own (`stages.py`) were found on models of 0.4 to 2 million parameters. A larger one gets
rates and penalties of TRL's configs and of the papers (`defaults.json`), and where it trains here
a batch that fits this machine.
"""

from __future__ import annotations

from math import inf
from typing import Any

from .cost.architecture import architecture
from .cost.estimate import estimate
from .cost.hardware import Hardware, is_here
from .models.load import BUNDLED, Model
from .stages import ONLINE, STAGES, Setting, Settings, read_table

SMALL = 20e6
"""Parameters of a model that the lab's own settings still fit."""
ROOM = 0.75
"""The share of this machine's memory that a plan may take: rows may be longer than planned."""
BATCH = frozenset(
    "per_device_train_batch_size gradient_accumulation_steps steps_per_generation "
    "generation_batch_size num_mini_batches gpus".split()
)
"""Settings that make a batch: where one is given, none is chosen for the user."""


LITERATURE: dict[str, dict[str, Any]] = read_table(__file__, "defaults.json")
"""Of each stage: "whole" and "lora", learning rates as [most parameters, rate, source], from the
smallest; "besides", [setting, value, source] of what else is not the lab's own there; "small",
rates of models as small as ours that the stage's own does not suit: of adapters and of a layout."""


def defaults(
    stage: str, model: Model, hardware: Hardware | str, given: Settings
) -> tuple[dict[str, Setting], dict[str, str]]:
    """What a plan takes where `given` says nothing, and the sources of what is not the lab's own.

    A model of unknown size counts as large.
    """
    taken: dict[str, Setting] = dict(STAGES[stage].defaults)
    size = 0.0 if model.name in BUNDLED else parameters(model)
    if not STAGES[stage].trainable:
        return taken, {}
    published = LITERATURE[stage]
    trained = "lora" if given.get("lora_r") else "whole"
    if size <= SMALL:
        own = published.get("small", {})
        if not (small := own.get(given.get("layout")) or own.get(trained)):
            return taken, {}
        taken["learning_rate"] = small[0]
        return taken, {} if "learning_rate" in given else {"learning_rate": small[1]}
    rates = published[trained]
    rate, source = next((rate, why) for most, rate, why in rates if size <= (most or inf))
    found = [("learning_rate", rate, source), *published.get("besides", [])]
    if not BATCH & given.keys() and is_here(hardware):
        batch, source = _batch_that_fits(stage, model, {**taken, **given})
        found += [(name, value, source) for name, value in batch.items()]
    taken |= {name: value for name, value, _ in found}
    return taken, {name: source for name, _, source in found if name not in given}


def parameters(model: Model) -> float:
    """Parameters of a model, from its config; infinite where that is unknown."""
    config = model.config_dict()
    try:
        return float(architecture(config).parameters())
    except ValueError:
        return inf


def _batch_that_fits(stage: str, model: Model, settings: Settings) -> tuple[dict[str, int], str]:
    """The largest batch of one pass whose plan fits here, and what keeps the rows of an optimizer
    step; {} where that is the lab's own."""
    whole = int(settings["per_device_train_batch_size"])
    tried: dict[str, int] = {}
    for batch in (whole >> halved for halved in range(whole.bit_length())):
        tried = {} if batch == whole else in_passes(stage, whole, batch)
        try:
            e = estimate(stage, model.config_dict(), "here", {**settings, **tried})
        except ValueError:  # unknown to the planner: as transformers begins
            return in_passes(stage, whole, min(whole, 8)), "transformers' TrainingArguments"
        if e.needed <= ROOM * e.hardware.memory:
            return tried, f"fits this machine, {whole} rows as before"
    return tried, "the least there is: it does not fit this machine"


def in_passes(stage: str, whole: int, batch: int) -> dict[str, int]:
    """`whole` rows a step, `batch` at a time."""
    times, lab = whole // batch, STAGES[stage].defaults
    found = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": times}
    if STAGES[stage].groups:  # a generation is as large as before
        found["steps_per_generation"] = times * int(str(lab["steps_per_generation"]))
    return found if stage in ONLINE else {**found, "per_device_eval_batch_size": batch}
