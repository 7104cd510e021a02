"""Gold reward against dollars: `python benchmarks/serving_frontier.py [--runs FOLDER] [--price .2]`

base, SFT, PPO, DPO and the best of 4 of tiny, and a student (mini, distilled from that seed's PPO
run), each in fp32, bf16, int8 and NF4, by `lab.frontier_serving`: three seeds of sampling, the
first --trained of them of training too. The runs are those of quantized.py (--runs), trained where
they are not there. The price an hour is a stated one, of a small cloud machine; what counts is the
ratio. Beside it what is predicted of a 7B model on an H100.

Writes results/serving_frontier.json and, drawn by plotly in headless Chromium,
results/serving_frontier.svg; ten to thirty minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from quantized import trained

import rlhf_lab as lab
from rlhf_lab.charts.plotly_style import Figure
from rlhf_lab.frontiers import ServingFrontier
from rlhf_lab.runs.json_files import versions

RESULTS = Path(__file__).parent / "results" / "serving_frontier.json"
SEEDS = (0, 1, 2)
PROMPTS = 64


def measure(runs: Path, price: float, trainings: int) -> ServingFrontier:
    tiny, seeds = lab.load("tiny"), range(trainings)
    ppo = [trained("ppo", seed, runs) for seed in seeds]
    teachers = [str(run.model_path) for run in ppo]
    models = {
        "base": tiny.with_stage("sft", tiny.paths["base"]),
        "SFT": tiny,
        "PPO": ppo,
        "DPO": [trained("dpo", seed, runs) for seed in seeds],
        "best of 4": (tiny, 4),
        "student": [
            trained("distill", seed, runs, "mini", teacher_model=teacher)
            for seed, teacher in zip(seeds, teachers, strict=True)
        ],
    }
    return lab.frontier_serving(models, price=price, seeds=SEEDS, prompts=PROMPTS)


def svg(figure: Figure, width: int = 980) -> str:
    """The figure as plotly draws it, with its words for who cannot see it."""
    from playwright.sync_api import sync_playwright

    page_of = figure.to_html(include_plotlyjs=True)
    how = {"format": "svg", "width": width, "height": figure.layout.height}
    with sync_playwright() as play:
        program = shutil.which("chromium") or shutil.which("google-chrome")
        browser = play.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_content(page_of)
        page.wait_for_selector(".js-plotly-plot .main-svg")
        js = "how => Plotly.toImage(document.querySelector('.js-plotly-plot'), how)"
        url = page.evaluate(js, {**how, "imageDataOnly": True})
        browser.close()
    return str(url)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=Path, help="folder of the runs [one that goes]")
    parser.add_argument("--trained", type=int, default=3, help="seeds to train with [3]")
    parser.add_argument("--price", type=float, default=0.2, help="USD an hour [0.2]")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(args.runs or Path(scratch), args.price, args.trained)
    print(found, flush=True)
    points = [p._asdict() for p in found.points]
    what = {"versions": versions(), "price": found.price, "trainings": args.trained}
    report = {
        **what,
        "points": points,
        "larger": found.larger,
        "hardware": found.hardware,
        "predicted": [p._asdict() for p in found.predicted],
    }
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    RESULTS.with_suffix(".svg").write_text(svg(found.figure()) + "\n")


if __name__ == "__main__":
    main()
