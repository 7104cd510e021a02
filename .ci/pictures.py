"""The diagrams at the head of the notebooks: `python .ci/pictures.py [--check]`

Boxes stand in columns and rows, arrows go from box to box. Written as notebooks/images/NAME.svg: no
background, greys that can be read on a light page and on a dark one, as in stored pictures.
With --check nothing is written: exit status 1 says that a file is out of step.
"""

from __future__ import annotations

import sys

from written_file import ROOT, write_or_check

sys.path.insert(0, str(ROOT))
from rlhf_lab.charts.colours import COLOURS_OF  # noqa: E402
from rlhf_lab.charts.frame import GREY_TEXT, svg_text, wrapped  # noqa: E402
from rlhf_lab.display import escape  # noqa: E402

WIDTH, HEIGHT, ACROSS, DOWN = 138, 48, 178, 76  # px: a box, and from box to box
# Roles as in every chart; data are grey.
COLOURS = {**COLOURS_OF["role"], "data": "#6B6B6B"}
DARK_INK = ("reference", "reward", "teacher")  # white is hard to read on these
Box = tuple[str, float, float, str]  # text, column, row, colour
DIAGRAMS: dict[str, tuple[str, list[Box], list[tuple[int, int, str]]]] = {
    "sft": (
        "SFT: demonstrations teach the base model to answer",
        [
            ("instruction + good answer", 0, 0, "data"),
            ("base model", 1.15, 0, "policy"),
            ("loss on the answer's tokens", 2.3, 0, "data"),
            ("SFT model", 3.45, 0, "policy"),
        ],
        [(0, 1, ""), (1, 2, ""), (2, 3, "AdamW")],
    ),
    "reward_model": (
        "Reward model: which of two answers is better becomes one number for each",
        [
            ("chosen answer", 0, 0, "data"),
            ("rejected answer", 0, 1, "data"),
            ("reward model", 1.15, 0.5, "reward"),
            ("−log σ(difference of the scores)", 2.3, 0.5, "data"),
        ],
        [(0, 2, ""), (1, 2, ""), (2, 3, "")],
    ),
    "ppo": (
        "PPO: the policy writes, three models judge, clipped steps follow",
        [
            ("prompts", 0, 1, "data"),
            ("policy writes", 1.05, 1, "policy"),
            ("reward model scores", 2.3, 0, "reward"),
            ("reference: KL", 2.3, 1, "reference"),
            ("value model predicts", 2.3, 2, "value"),
            ("advantages", 3.45, 1, "data"),
        ],
        [(0, 1, ""), (1, 2, ""), (1, 3, ""), (1, 4, ""), (2, 5, ""), (3, 5, ""), (4, 5, "")],
    ),
    "dpo": (
        "DPO: preferences train the policy without sampling and without a reward model",
        [
            ("chosen and rejected", 0, 0.5, "data"),
            ("policy", 1.15, 0, "policy"),
            ("reference", 1.15, 1, "reference"),
            ("−log σ(β · difference of log-ratios)", 2.4, 0.5, "data"),
        ],
        [(0, 1, ""), (0, 2, ""), (1, 3, ""), (2, 3, "")],
    ),
    "rloo_grpo": (
        "RLOO and GRPO: several answers to one prompt, each compared with the others",
        [
            ("prompt", 0, 0.5, "data"),
            ("policy writes four answers", 1.15, 0.5, "policy"),
            ("reward model scores each", 2.4, 0, "reward"),
            ("reference: KL", 2.4, 1, "reference"),
            ("compared within the group", 3.6, 0.5, "data"),
        ],
        [(0, 1, ""), (1, 2, ""), (1, 3, ""), (2, 4, ""), (3, 4, "")],
    ),
    "four_models": (
        "PPO: four models stay in memory all the time, and two of them are trained",
        [
            ("policy writes", 0, 1, "policy"),
            ("reward model scores", 1.25, 0, "reward"),
            ("reference: KL", 1.25, 1, "reference"),
            ("value model predicts", 1.25, 2, "value"),
            ("policy is trained", 2.5, 0.5, "policy"),
            ("value model is trained", 2.5, 1.5, "value"),
        ],
        [(0, 1, ""), (0, 2, ""), (0, 3, ""), (1, 4, ""), (2, 4, ""), (3, 5, "")],
    ),
    "what_scales": (
        "What is varied, and what it moves",
        [
            ("model", 0, 0, "policy"),
            ("length of a row", 0, 1, "data"),
            ("batch", 0, 2, "data"),
            ("rows of data, steps", 0, 3, "data"),
            ("memory", 1.7, 0.75, "value"),
            ("FLOPs, time, money", 1.7, 2.25, "reward"),
        ],
        [(0, 4, ""), (0, 5, ""), (1, 4, ""), (1, 5, ""), (2, 4, ""), (3, 5, "")],
    ),
    "cheaper_training": (
        "What the memory holds, and the remedies that shrink it",
        [
            ("weights", 0, 0, "policy"),
            ("gradients, optimizer states", 0, 1, "policy"),
            ("activations", 0, 2, "value"),
            ("logits", 0, 3, "value"),
            ("bfloat16, QLoRA", 1.4, 0, "data"),
            ("LoRA, 8-bit AdamW", 1.4, 1, "data"),
            ("checkpointing, accumulation", 1.4, 2, "data"),
            ("fused loss", 1.4, 3, "data"),
        ],
        [(0, 4, ""), (1, 5, ""), (2, 6, ""), (3, 7, "")],
    ),
    "what_goes_wrong": (
        "A reward model stands for the gold reward, and PPO goes by it; the curves show what is "
        "wrong; a clone with one thing changed heals it",
        [
            ("gold reward: what you want", 0, 0, "data"),
            ("reward model: what is paid", 0, 1, "reward"),
            ("PPO, one thing wrong", 1.2, 0.5, "policy"),
            ("curves beside healthy ones", 2.4, 0.5, "data"),
            ("diagnosis", 3.5, 0, "value"),
            ("clone, one thing changed", 3.5, 1, "policy"),
        ],
        [(0, 2, ""), (1, 2, ""), (2, 3, ""), (3, 4, ""), (3, 5, "")],
    ),
    "plan_your_project": (
        "Two ways from preferences to a better model, and one bill",
        [
            ("demonstrations", 0, 0, "data"),
            ("labels", 0, 1, "data"),
            ("SFT", 1, 0, "policy"),
            ("reward model", 2, 0, "reward"),
            ("PPO", 3, 0, "policy"),
            ("DPO", 2, 1, "policy"),
            ("the bill", 4, 0.5, "data"),
        ],
        [
            *((0, 2, ""), (2, 3, ""), (3, 4, ""), (4, 6, "")),
            *((1, 5, ""), (2, 5, ""), (5, 6, ""), (1, 3, "")),
        ],
    ),
    "serve_and_distil": (
        "A teacher's distributions train a smaller student; its weights are rounded; a server "
        "fills its slots with requests",
        [
            ("teacher", 0, 0, "teacher"),
            ("student", 1.2, 0, "student"),
            ("weights in fewer bits", 2.4, 0, "student"),
            ("requests", 2.4, 1, "data"),
            ("server: slots", 3.5, 0.5, "data"),
        ],
        [(0, 1, "teaches"), (1, 2, "rounded"), (2, 4, ""), (3, 4, "")],
    ),
    "many_gpus": (
        "Two processes with the same weights see other rows, and share gradients before each step",
        [
            ("half of the rows", 0, 0, "data"),
            ("the other half", 0, 2, "data"),
            ("process 0: forward, backward", 1.05, 0, "policy"),
            ("process 1: forward, backward", 1.05, 2, "policy"),
            ("mean of the gradients", 2.2, 1, "reward"),
            ("the same step", 3.35, 0, "policy"),
            ("the same step", 3.35, 2, "policy"),
        ],
        [(0, 2, ""), (1, 3, ""), (2, 4, ""), (3, 4, ""), (4, 5, ""), (4, 6, "")],
    ),
    "course": (
        "The course: train in 01 to 05, understand the cost in 06 to 08, serve in 09, "
        "see what goes wrong in 10, plan in 11, scale in 12",
        [
            ("00 start here", 0, 0.5, "data"),
            ("01 SFT", 1, 0, "policy"),
            ("02 reward model", 2, 0, "reward"),
            ("03 PPO", 3, 0, "policy"),
            ("04 DPO", 2, 1, "policy"),
            ("05 RLOO, GRPO", 4, 0, "policy"),
            ("06 four models", 1, 2, "value"),
            ("07 what scales", 2, 2, "value"),
            ("08 cheaper training", 3, 2, "value"),
            ("11 plan your project", 4, 2, "data"),
            ("12 many GPUs", 4, 3, "data"),
            ("09 serve and distil", 3, 1, "value"),
            ("10 what goes wrong", 4, 1, "policy"),
        ],
        [
            *((0, 1, ""), (1, 2, ""), (2, 3, ""), (1, 4, ""), (3, 5, ""), (3, 12, "")),
            *((0, 6, ""), (6, 7, ""), (7, 8, ""), (8, 9, ""), (8, 10, ""), (7, 11, "")),
        ],
    ),
}


def box_svg(box: Box) -> list[str]:
    text, column, row, kind = box
    ink = "#111" if kind in DARK_INK else "#fff"
    x, y = 8 + column * ACROSS, 8 + row * DOWN
    lines = wrapped(text, 12.5, WIDTH - 8)
    top = y + HEIGHT / 2 + 4.5 - 8 * (len(lines) - 1)
    return [
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{WIDTH}" height="{HEIGHT}" rx="8" '
        f'style="fill:{COLOURS[kind]}"/>',
        *(
            svg_text(x + WIDTH / 2, top + 16 * i, line, size=12.5, fill=ink, anchor="middle")
            for i, line in enumerate(lines)
        ),
    ]


def arrow_svg(start: Box, end: Box, label: str) -> list[str]:
    """From the side of a box that faces the other one."""
    (_, c1, r1, _), (_, c2, r2, _) = start, end
    x1, x2 = 8 + c1 * ACROSS + WIDTH, 8 + c2 * ACROSS - 3
    y1, y2 = (8 + r * DOWN + HEIGHT / 2 for r in (r1, r2))
    line = (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke-width="1.8" '
        f'marker-end="url(#to)" style="stroke:{GREY_TEXT}"/>'
    )
    words = svg_text((x1 + x2) / 2, (y1 + y2) / 2 - 6, label, fill=GREY_TEXT, anchor="middle")
    return [line, words] if label else [line]


def diagram(name: str) -> str:
    title, boxes, arrows = DIAGRAMS[name]
    width = 16 + max(b[1] for b in boxes) * ACROSS + WIDTH
    height = 16 + max(b[2] for b in boxes) * DOWN + HEIGHT
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{escape(title)}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        'font-family="Helvetica,Arial,sans-serif">'
    )
    tip = (
        '<defs><marker id="to" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        f'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="{GREY_TEXT}"/></marker>'
        "</defs>"
    )
    shapes = [s for b in boxes for s in box_svg(b)]
    lines = [s for i, j, label in arrows for s in arrow_svg(boxes[i], boxes[j], label)]
    return "\n".join([head, tip, *lines, *shapes, "</svg>", ""])


if __name__ == "__main__":
    folder = ROOT / "notebooks" / "images"
    sys.exit(write_or_check({folder / f"{name}.svg": diagram(name) for name in DIAGRAMS}))
