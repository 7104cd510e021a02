"""The page that says how right the plans are: what the benchmarks found last, as tables and a
picture. Part of `generate.py`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
HALVES = {"open": "may be looked at", "locked": "never looked at while the planner was made"}
WIDTH, LEFT, ROW, MOST = 640, 150, 26, 4.0
"""Pixels of the picture, of its labels and of one row; the largest ratio it shows."""

HEAD = """# How right are the plans?

`benchmarks/published_plans.py` plans what other people measured and published, each figure with
its source (`benchmarks/published_figures.json`), and divides the plan by what they measured. Which
half a figure is in follows from its source and configuration by a checksum, and was fixed before
any fit. Listed are figures whose source says all that a plan asks; *inside* are those in the band
that the plan itself states, and ± is half its width.

Figures of gpt-fast, torchao and TensorRT-LLM are on the list of `benchmarks/serving.py` too, half
of which set the constants of engines: of those the locked half is not wholly unseen.
"""
MISSES = """
## The larger misses

Memory by more than 15 %, rates and step times by more than 30 %, hours by more than 35 %. What is
said of a figure was found in the half that may be looked at; of a locked one it is what was found
at others of its source, and nothing where there are none.
"""


def accuracy_page() -> tuple[str, str]:
    """→ the page, and its picture as SVG."""
    found = json.loads((RESULTS / "published_plans.json").read_text(encoding="utf-8"))
    heads = ("", "half", "figures", "median of plan ÷ measured", "error, median", "error, 90 %")
    lines = [HEAD, f"| {' | '.join(heads)} | inside | ± |"]
    lines += ["| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for row in found["summary"]:
        if row["what"] == "expressed" and row["n"]:
            lines.append(
                f"| {row['kind']} | {HALVES[row['half']]} | {row['n']} | {row['median']:.3f} | "
                f"{row['error']:.1%} | {row['error90']:.1%} | {row['inside']:.0%} | "
                f"{row['width']:.0%} |"
            )
    gaps = sum(row["n"] for row in found["summary"] if row["what"] == "with gaps")
    left = sum(row["n"] for row in found["summary"] if row["what"] == "not planned")
    lines += ["", "![Plan divided by measured, one mark a figure](accuracy.svg)", ""]
    lines += [
        f"{gaps} further figures leave something out that a plan asks, and {left} cannot be "
        "planned (pipeline parallelism, other hardware, sizes alone); all are in "
        "`benchmarks/results/published_plans.json`.",
        "",
        "On one device a plan is compared with the x-ray, which runs the real trainer on tensors "
        "without data: `benchmarks/cost_accuracy.py`, `benchmarks/results/cost_accuracy.json`. "
        "Sharded plans are compared with DeepSpeed and FSDP2 on a CPU: `benchmarks/sharded.py`.",
        "",
    ]
    lines += [MISSES, "| figure | half | plan ÷ measured | why |", "| --- | --- | ---: | --- |"]
    order = [*HALVES]
    for f in sorted(found["figures"], key=lambda f: (order.index(f["half"]), f["id"])):
        if "why" in f:
            lines.append(f"| `{f['id']}` | {f['half']} | {f['ratio']:.2f} | {f['why']} |")
    return "\n".join([*lines, ""]), _picture(found["figures"])


def _picture(figures: list[dict]) -> str:
    """A strip of marks for each kind and half, on a logarithmic axis."""
    rows = [(kind, half) for kind in ("memory", "throughput", "hours") for half in HALVES]
    height = ROW * (len(rows) + 2)

    def x(ratio: float) -> float:
        share = math.log(min(MOST, max(1 / MOST, ratio))) / math.log(MOST)
        return LEFT + (WIDTH - LEFT - 20) * (share + 1) / 2

    marks = []
    for ratio in (0.25, 0.5, 0.8, 1.0, 1.25, 2.0, 4.0):
        dash = "" if ratio == 1 else ' stroke-dasharray="2 4"'
        marks.append(
            f'<line x1="{x(ratio):.1f}" x2="{x(ratio):.1f}" y1="{ROW}" y2="{height - ROW}" '
            f'stroke="#888"{dash}/><text x="{x(ratio):.1f}" y="{height - 8}" fill="#777" '
            f'font-size="12" text-anchor="middle">{ratio:g}</text>'
        )
    for number, (kind, half) in enumerate(rows):
        y = ROW * (number + 1.5)
        marks.append(
            f'<text x="8" y="{y + 4:.1f}" fill="#777" font-size="12">{kind}, {half}</text>'
        )
        for f in figures:
            if (f["kind"], f["half"]) == (kind, half) and not f["gaps"]:
                colour = "#0072B2" if f["inside"] else "#D55E00"
                marks.append(
                    f'<circle cx="{x(f["ratio"]):.1f}" cy="{y:.1f}" r="4" fill="{colour}" '
                    f'fill-opacity="0.55"><title>{f["id"]}: {f["ratio"]:.2f}</title></circle>'
                )
    label = "plan divided by measured; blue: inside the stated band, orange: outside"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{label}" font-family="sans-serif"><text x="8" y="16" fill="#777" '
        f'font-size="12">{label}</text>{"".join(marks)}</svg>\n'
    )
