"""Gold reward against wall time, TRL's PPO and ours: the section `gold` of `ppo_vs_trl.py`.

TRL trains for the budget (90 s), ours for half of it, each with settings chosen from the same grid
by the gold reward at the end of its time, where KL is at most `KL_LIMIT`. In both the learning rate
falls to 0 linearly along the clock, so that no run is cut off in the middle of its schedule. What
the grid does not name is the lab's default (its clipping of gradients is ours alone: TRL's PPO has
none); TRL gets scoring batches of 64, its fastest. Ours runs
as we recommend where time counts: with a trunk that policy and value share (`OURS`), which TRL does
not have.

The clock stands still while a policy is saved. Saved policies are evaluated afterwards, TRL's and
ours alike: one response for each held-out prompt, the mean gold reward and KL to the SFT model
(nats per response). The target: the median over seeds of the time at which ours reaches the gold
reward that TRL has at the end (its median), at a KL no higher than TRL's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

from ppo_parity_setup import COMMON, make_world
from ppo_vs_trl_report import Options, Worker, median, show, spread, target

GRID = [
    {"learning_rate": rate, "kl_coef": 0.15, "num_ppo_epochs": 2, "lam": lam}
    for rate, lam in itertools.product((5e-4, 7e-4), (0.95, 1.0))
]
"""Four settings; two minibatches an epoch in all. Grids before this one had one epoch and four, and
a kl_coef of .05, too: neither side chose them within the KL."""
OURS = {"layout": "shared", "vf_coef": 0.01}
"""A large value loss would pull the trunk that the policy needs."""
KL_LIMIT = 3.0
"""Nats per response; further out the language begins to break."""
SHARE = 0.5
"""Of TRL's time, in which ours is to be as good."""
MARKS = 10
"""Saved policies of a curve."""
PROMPTS = 512
NEVER = 600_000
"""Iterations that no budget reaches: the clock ends a run."""


def settings_of(choice: dict) -> dict:
    """The lab's defaults, under the names that both trainers know, and one point of the grid."""
    from rlhf_lab.stages import STAGES

    lab = {k: v for k, v in STAGES["ppo"].defaults.items() if k not in ("max_steps", "report_to")}
    same = {"local_rollout_forward_batch_size": 64, "optim": "adamw_torch_fused"}
    return COMMON | lab | same | choice


def recommended() -> dict:
    """The lab's own point."""
    return {k: v for k, v in settings_of({}).items() if k in GRID[0]}


# ------------------------------------------------------------------------------------------- curves


def time_to_reach(curve: Sequence[dict], gold: float, kl: float) -> float:
    """Seconds at which a curve reaches `gold` with a KL of at most `kl`; infinity if never.

    Between two evaluated points, both within the KL, the gold reward is taken to rise along a line.
    """
    before = None
    for point in curve:
        if point["gold"] >= gold and point["kl"] <= kl:
            if before is None or before["gold"] >= gold or before["kl"] > kl:
                return point["seconds"]
            part = (gold - before["gold"]) / (point["gold"] - before["gold"])
            return before["seconds"] + part * (point["seconds"] - before["seconds"])
        before = point
    return math.inf


def best(ends: Sequence[dict], kl: float) -> int:
    """Which run has the highest gold reward at the end, of those within the KL; of none, the one
    with the least KL."""
    within = [i for i, end in enumerate(ends) if end["kl"] <= kl]
    if not within:
        return min(range(len(ends)), key=lambda i: ends[i]["kl"])
    return max(within, key=lambda i: ends[i]["gold"])


class PolicyEvaluator:
    """Gold reward and KL of saved policies, on the same prompts with the same noise."""

    def __init__(self, folder: Path, prompts: int, length: int) -> None:
        from rlhf_lab.models.tokenizer import load_tokenizer
        from rlhf_lab.models.weights import load_causal_lm
        from rlhf_lab.world import corpus

        self.prompts = [r.prompt for r in itertools.islice(corpus.requests("test", 31), prompts)]
        self.tokenizer, self.length = load_tokenizer(folder / "tokenizer"), length
        self.folder, self.load = folder, load_causal_lm
        self.reference = load_causal_lm(folder / "ref")
        self.start = {"seconds": 0.0} | self(folder / "policy")

    def __call__(self, path: str | Path) -> dict:
        from rlhf_lab.trainers.evaluate import policy_report
        from rlhf_lab.world.gold_reward import gold_reward

        figures, _ = policy_report(
            self.load(path),
            self.tokenizer,
            self.prompts,
            gold_reward=gold_reward,
            reference=self.reference,
            max_new_tokens=self.length,
        )
        return {"gold": figures["gold_reward"], "kl": figures["kl"]}

    def curve(self, saved: Sequence[dict], all_of_it: bool = True) -> list[dict]:
        """A run, evaluated: where it began, and what it saved (or the last of that)."""
        points = saved if all_of_it else saved[-1:]
        return [self.start] + [{**p, **self(p["path"])} for p in points]


# ------------------------------------------------------------------------------------------ section


def gold(options: Options) -> dict:
    """Choose settings on the grid, run them with more seeds, evaluate all of it, draw."""
    import torch

    torch.set_num_threads(options.threads)
    folder = options.scratch / "gold"
    folder.mkdir()
    make_world(folder, str(options.model), 512 if options.quick else 8192)
    grid = [recommended()] if options.quick else GRID
    evaluator = PolicyEvaluator(
        folder, 64 if options.quick else PROMPTS, settings_of({})["response_length"]
    )
    budgets = {"TRL": options.budget, "ours": SHARE * options.budget}
    with Worker("TRL", options) as trl, Worker("ours", options, malloc=True) as ours:
        workers = {"TRL": trl, "ours": ours}
        tried = {side: [] for side in workers}
        for choice in grid:
            for side, worker in workers.items():  # in turn
                saved = _race(worker, folder, choice, budgets[side], 0)
                tried[side].append(
                    {
                        "choice": choice,
                        "saved": saved,
                        "end": evaluator.curve(saved, all_of_it=False)[-1],
                    }
                )
        selected = {s: t[best([r["end"] for r in t], KL_LIMIT)] for s, t in tried.items()}
        curves = {side: [evaluator.curve(selected[side]["saved"])] for side in workers}
        for repeat in range(1, options.repeats):
            for side, worker in workers.items():
                choice = selected[side]["choice"]
                saved = _race(worker, folder, choice, budgets[side], repeat)
                curves[side].append(evaluator.curve(saved))
    return _report(options, budgets, tried, selected, curves)


def _race(worker: Worker, folder: Path, choice: dict, seconds: float, repeat: int) -> list[dict]:
    """One run of `seconds`; → what it saved."""
    settings = (
        settings_of(choice)
        | (OURS if worker.side == "ours" else {})
        | {
            "seed": 1000 * (repeat + 1),
            "total_episodes": NEVER * COMMON["per_device_train_batch_size"],
        }
    )
    name = "_".join(str(v) for v in choice.values())
    out = folder / "saved" / worker.side / name / str(repeat)
    marks = [seconds * i / MARKS for i in range(1, MARKS)]
    found = worker.ask(
        "race",
        folder=str(folder),
        dtype="float32",
        inject=False,
        settings=settings,
        seconds=seconds,
        marks=marks,
        out=str(out),
        late_score=False,
    )
    return found["saved"]


def _report(options: Options, budgets: dict, tried: dict, selected: dict, curves: dict) -> dict:
    """Tables, targets and the picture."""
    rows = [
        {
            "side": side,
            **run["choice"],
            "gold": f"{run['end']['gold']:.3f}",
            "KL": f"{run['end']['kl']:.2f}",
            "iterations": run["end"]["iterations"],
            "selected": "yes" if run is selected[side] else "",
        }
        for side, runs in tried.items()
        for run in runs
    ]
    show(
        f"the grid: {budgets['TRL']:g} s of TRL, {budgets['ours']:g} s of ours, "
        f"KL at most {KL_LIMIT:g}",
        rows,
    )
    ends = {side: [c[-1] for c in found] for side, found in curves.items()}
    show(
        "selected settings, all seeds",
        [
            {
                "side": s,
                "seconds": f"{budgets[s]:g}",
                "gold": spread([e["gold"] for e in found]),
                "KL": spread([e["kl"] for e in found]),
                "iterations": spread([e["iterations"] for e in found]),
            }
            for s, found in ends.items()
        ],
    )
    level, kl = (median([e[k] for e in ends["TRL"]]) for k in ("gold", "kl"))
    times = {
        f"KL at most {name}": [time_to_reach(c, level, limit) for c in curves["ours"]]
        for name, limit in (("TRL's", kl), ("the limit", KL_LIMIT))
    }
    show(
        f"seconds until ours has TRL's gold reward ({level:.3f}, KL {kl:.2f})",
        [{"": name, "seconds": spread(found)} for name, found in times.items()],
    )
    share = median(times["KL at most TRL's"]) / budgets["TRL"]
    targets = [
        target(
            "time of ours / TRL's, to TRL's gold reward at no more than its KL",
            share,
            SHARE,
            at_least=False,
        ),
        target(
            "KL of ours at the end, nats",
            median([e["kl"] for e in ends["ours"]]),
            KL_LIMIT,
            at_least=False,
        ),
    ]
    file = options.scratch / "gold.svg"
    file.write_text(_picture(curves, level))
    return {
        "budget_s": budgets,
        "kl_limit": KL_LIMIT,
        "recommended": recommended(),
        "settings": {s: settings_of(r["choice"]) for s, r in selected.items()},
        "ours_too": OURS,
        "grid": {
            s: [{"choice": r["choice"], **_bare([r["end"]])[0]} for r in runs]
            for s, runs in tried.items()
        },
        "curves": {s: [_bare(c) for c in found] for s, found in curves.items()},
        "trl_gold": level,
        "trl_kl": kl,
        "seconds_to_trl_gold": {
            n: [t if math.isfinite(t) else None for t in found] for n, found in times.items()
        },
        "targets": targets,
        "picture": file,
    }


def _bare(curve: Sequence[dict]) -> list[dict]:
    """Without the paths of what was saved."""
    return [{k: v for k, v in p.items() if k != "path"} for p in curve]


def _picture(curves: dict[str, list[list[dict]]], level: float) -> str:
    """Medians over the seeds at each mark, and their range."""
    from rlhf_lab.charts.chart import line_chart

    series, bands = {}, {}
    for side, found in curves.items():
        name = "TRL 1.12.0" if side == "TRL" else "rlhf_lab"
        marks = list(zip(*found, strict=False))  # the same mark of every seed
        xs = [median([p["seconds"] for p in points]) for points in marks]
        golds = [[p["gold"] for p in points] for points in marks]
        series[name] = xs, [median(g) for g in golds]
        bands[name] = xs, [min(g) for g in golds], [max(g) for g in golds]
    return str(
        line_chart(
            series,
            band=bands,
            title="Gold reward against training time (median and range of seeds)",
            x_label="seconds of training, two CPU cores",
            y_label="gold reward (0 to 10)",
            references=[(level, "TRL's at the end")],
            width=640,
            height=360,
        )
    )
