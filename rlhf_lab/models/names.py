"""Names of models: presets by hub id, other ids of the same sizes, short names, and near ones."""

from __future__ import annotations

import difflib
import re
from functools import cache

from ..stages import read_table
from .packaged import PACKAGED, SMOLLM2

BUNDLED = ("mini", "tiny", "small")
ALIASES = {"smollm2-135m": SMOLLM2}
"""Short names that mean the model that answers, wherever it comes from: hub or package
(`packaged.py`). The pretrained one has its whole id, HuggingFaceTB/SmolLM2-135M."""


@cache
def presets() -> dict[str, dict[str, object]]:
    """Configs of well-known models by hub id, as dicts: enough to plan without a connection. They
    hold what the model's config.json on the hub says of its sizes."""
    return {hub_id: config for hub_id, (config, _) in _read_presets().items()}


@cache
def same_sizes() -> dict[str, str]:
    """Hub id → the preset of these sizes: itself, or the model it was trained from."""
    return {name: of for of, (_, names) in _read_presets().items() for name in (of, *names)}


@cache
def _read_presets() -> dict[str, tuple[dict[str, object], list[str]]]:
    """Hub id → its config, and the ids of other models of the same sizes (`names`)."""
    entries: dict[str, dict[str, object]] = read_table(__file__, "presets.json")
    names: dict[str, list[str]] = {k: v.pop("names", []) for k, v in entries.items()}  # type: ignore[misc]
    return {hub_id: (config, names[hub_id]) for hub_id, config in entries.items()}


@cache
def short_names() -> dict[str, str]:
    """What a model may be called for short → its hub id: without its owner, in any case, and
    without what says that it is one of transformers' or the pretrained one."""
    found: dict[str, str] = {}
    for hub_id in (*same_sizes(), *PACKAGED):
        name = hub_id.split("/")[1].lower()
        found.setdefault(name, hub_id)
        found.setdefault(re.sub(r"^meta-|-hf$|-pt$|-v0\.1$|-base(-\d+)?$", "", name), hub_id)
    return found | ALIASES


def nearest(name: str) -> str:
    """`did you mean Qwen/Qwen3-8B or …? `: up to three known names, or nothing."""
    known = {name: name for name in BUNDLED} | short_names()
    asked = name.lower().rpartition("/")[2]
    close = difflib.get_close_matches(asked, known, n=3, cutoff=0.6)
    close += [n for n in known if asked and n.startswith(asked)]
    ids = list(dict.fromkeys(known[n] for n in close))[:3]
    return f"did you mean {' or '.join(ids)}? " if ids else ""
