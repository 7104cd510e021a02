"""Studied figures in a real JupyterLab: drawn from data alone, in both themes, without a kernel."""

from __future__ import annotations

import json

HOSTILE = "<script>window.hit=1</script><img src=x onerror='window.hit=1'>"
CELLS = [
    f"""
import tempfile
from rlhf_lab.runs.ledger import Ledger
from rlhf_lab.runs.run import Run
from rlhf_lab.charts.cost_bars import stage_costs
from rlhf_lab.charts.curves import curves
from rlhf_lab.charts.frontier import frontier

def made(name, seed, beta):
    run = Run.create(f"{{tempfile.mkdtemp()}}/{{name}}", stage="ppo", model="tiny", seed=seed,
                     settings={{"kl_coef": beta}})
    for s in range(1, 31):
        run.log(s, reward=s / 10 + seed / 5, gold_reward=8 + s / 10 - s * s / 600 / beta,
                kl=s / (1 + 20 * beta))
    run.finish(kl=30 / (1 + 20 * beta), gold_reward=9.0, **{{"before/gold_reward": 8.0}})
    return run

runs = {{"calm": made("a", 0, 0.2), {HOSTILE!r}: made("b", 0, 0.05)}}
costs = Ledger()
for source, seconds in (("predicted", 2.0), ("measured", 4.0)):
    costs.add(stage="ppo", phase="rollout", role="policy", quantity="seconds", value=seconds,
              low=0.75 * seconds, high=1.5 * seconds, source=source)
""",
    "curves(runs)",
    "frontier(runs, root=True)",
    "stage_costs({'mine': costs})",
]
PLOTS = ".js-plotly-plot .main-svg"


def test_figures_are_drawn_read_and_kept(notebook):
    book = notebook(CELLS, height=1600).run_all()
    page = book.page
    for number in range(3):
        page.wait_for_function(
            "n => document.querySelectorAll('.js-plotly-plot .legend').length > n", arg=number
        )
    legend = page.locator(".js-plotly-plot .legendtext").all_text_contents()
    # Ours ends with an ellipsis where a name is too long; what there is is letters.
    assert legend[0] == "calm" and legend[1].startswith("<script>window.hit=1</script><img")
    assert page.evaluate("window.hit") is None
    assert page.locator(".js-plotly-plot img[src='x']").count() == 0
    book.shot("figures-light")

    bars = page.locator(".js-plotly-plot").nth(2)
    bars.scroll_into_view_if_needed()
    box = bars.locator(".barlayer .point path").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 3)
    assert "mine, predicted: 2 s (1.5 s to 3 s)" in bars.locator(".hoverlayer").text_content()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 1)
    book.wait_for(lambda: "0.50 × measured" in (bars.locator(".hoverlayer").text_content() or ""))

    book.theme("dark")
    page.wait_for_timeout(1000)
    for number in range(3):
        assert page.locator(".js-plotly-plot").nth(number).bounding_box()["height"] > 300
    book.shot("figures-dark")
    book.theme("light")

    saved = book.saved()
    outputs = [output for cell in saved.cells for output in cell.outputs]
    assert len(outputs) == 3
    kinds = {"application/vnd.plotly.v1+json", "text/plain"}
    for output in outputs:
        # The lab's extension adds a picture, which stands in where it is not installed.
        assert kinds <= set(output["data"]) <= kinds | {"image/png"}
        print({kind: len(json.dumps(data)) for kind, data in output["data"].items()})
        own = {kind: data for kind, data in output["data"].items() if kind in kinds}
        assert len(json.dumps(own)) < 12_000

    book.reopen_without_kernel()
    shown = ".jp-OutputArea .js-plotly-plot, .jp-OutputArea img.plot-img"
    book.wait_for(lambda: book.page.locator(shown).count() >= 3, 30)
    book.shot("figures-without-kernel")
    place = book.page.locator("img.plot-img").first.bounding_box()
    book.page.mouse.move(place["x"] + 200, place["y"] + 200)  # wakes it up
    book.page.wait_for_selector(PLOTS)
    assert book.page.evaluate("window.hit") is None
