"""The one table of colours: what a role, a phase or a component looks like in every chart.

A chart's colours mean one of the three, which its legend says. A phase that is one model's own pass
has its role's; else no two kinds share one: charts stand beside each other. Roles and most phases:
Okabe and Ito's palette; components: after Tol's "muted" scheme.
"""

from __future__ import annotations

from collections.abc import Mapping

NEUTRAL = "#9A9A9A"
"""What belongs to none: "all", "other"."""

_ROLES = {"policy": "#0072B2", "reference": "#E69F00", "reward": "#CC79A7", "value": "#009E73"}
# No stage has both: the language model that learns, and the frozen one that it is compared with.
_ROLES |= {"student": _ROLES["policy"], "teacher": _ROLES["reference"], "draft": _ROLES["value"]}
COLOURS_OF: Mapping[str, Mapping[str, str]] = {
    "role": _ROLES,
    "phase": {
        **{"rollout": "#56B4E9", "decode": "#56B4E9", "forward": "#F0E442", "prefill": "#F0E442"},
        **{"backward": "#D55E00", "optimizer": "#7F7F7F", "advantage": "#A6761D"},
        **{"old_logprobs": "#7570B3", "scoring": "#8F5575"},  # scoring: all that come before it
        **{"reference": _ROLES["reference"], "value": _ROLES["value"], "score": _ROLES["reward"]},
        **{"teacher": _ROLES["teacher"]},
        **dict.fromkeys(("sampling", "evaluation", "compile"), "#4D4D4D"),
    },
    "component": {
        **{"parameters": "#5B4FBF", "gradients": "#AA4499", "optimizer": "#DDCC77"},
        **{"activations": "#88CCEE", "logits": "#117733", "kv_cache": "#882255"},
        **{"communication": "#CC6677", "workspace": "#B5B5B5"},
    },
}


def part_colour(kind: str, part: str) -> str:
    """The colour of a role, a phase or a component (`kind`), under its name or in words."""
    return COLOURS_OF[kind].get(part.replace(" ", "_"), NEUTRAL)
