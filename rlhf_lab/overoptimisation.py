"""A reward model that is optimised too far: its score rises on while the gold reward falls.

    found = lab.overoptimise({"192 noisy pairs": lab.Proxy(pairs=192, flipped=0.2)}, seeds=range(5))

Best-of-n and PPO along d = √KL to the SFT model, with the forms that Gao, Schulman and Hilton fit
(Scaling Laws for Reward Model Overoptimization, arXiv 2210.10760).
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import chain, product
from pathlib import Path
from random import Random
from statistics import mean, stdev
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np

from .data.load import Data, load_data
from .display import html_table, table
from .models.load import Model, load
from .models.tokenizer import same_vocabulary
from .planning import plan
from .runs.json_files import replace_file, to_json_object
from .training import train

if TYPE_CHECKING:
    from torch import Tensor

    from .charts.plotly_style import Figure
    from .data.reward_sources import RewardFunction
    from .data.schema import Example, Prompt
    from .stages import Setting, Settings

Array: TypeAlias = "np.ndarray[tuple[int, ...], np.dtype[np.float64]]"
Points: TypeAlias = tuple[list[int], list[float], list[float], list[float]]
"""n or iterations, and their KL, proxy and gold"""
WINDOW = 5
"""Iterations of PPO whose mean is a point: each has other prompts, and few of them."""
RISE, FALL, NATS = 0.3, 0.3, (1.0, 15.0)
"""Over-optimised: the gold reward rises by so many points and falls by so many while the proxy
gains, with its peak at such a KL."""
HOLDS = 0.9
"""R² below which a form does not hold."""
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t at 97.5 % for 1, 2, … degrees of freedom; the last one for more, too."""


@dataclass(frozen=True)
class Proxy:
    """What stands for the gold reward, and how PPO goes by it.

    `members` reward models start on the SFT model `model` (None: the policy) and learn for `steps`
    batches from the same `pairs`, drawn by the seed, of which a share `flipped` has chosen and
    rejected exchanged, beside the annotator's own noise. They differ by head and order; their
    scores are combined by their mean or, `worst`, the lowest. `pairs=None`: the reward model that
    comes with the model. `kl_coef`: PPO's β; `iterations`: of PPO, 0 for best-of-n alone.
    """

    model: str | None = None
    pairs: int | None = 192
    flipped: float = 0.0
    steps: int = 60
    members: int = 1
    worst: bool = False
    kl_coef: float = 0.0
    iterations: int = 28

    def __post_init__(self) -> None:
        pairs = 1 if self.pairs is None else self.pairs
        if not 0 <= self.flipped <= 1 or min(pairs, self.steps, self.members) < 1:
            raise ValueError("flipped is a share, 0 to 1; pairs, steps and members at least 1")
        if self.pairs is None and (self.members > 1 or self.flipped):
            raise ValueError("pairs=None is one reward model as it is: members=1, flipped=0")
        if self.iterations and self.iterations < WINDOW:
            raise ValueError(f"iterations={self.iterations}: a curve has 0 or at least {WINDOW}")


class Turn(NamedTuple):
    """The highest gold reward above the SFT model's, the KL there; from there to the curve's end
    what gold loses and the proxy gains."""

    rise: float
    kl: float
    fall: float
    gain: float


class Fit(NamedTuple):
    """d(α − β d) for best-of-n, d(α − β log d) for PPO."""

    alpha: float
    beta: float
    r2: float


@dataclass(frozen=True)
class Curve:
    """A proxy of one seed, optimised by a method. Points stand `at` an n, or an iteration of PPO:
    `kl` in nats per response, means of `proxy` score and `gold` reward. `start`: proxy and gold of
    the SFT model; `ranked`: share of pairs of its answers that the proxy ranks as gold does."""

    name: str
    method: str
    seed: int
    ranked: float
    start: tuple[float, float]
    at: list[int]
    kl: list[float]
    proxy: list[float]
    gold: list[float]
    seconds: float

    @property
    def gains(self) -> tuple[Array, Array, Array]:
        """KL, proxy and gold above the SFT model's; of PPO means of `WINDOW` iterations."""
        kernel = np.full(width := WINDOW if self.method == "PPO" else 1, 1 / width)
        kl, proxy, gold = (
            np.convolve(x, kernel, "valid") for x in (self.kl, self.proxy, self.gold)
        )
        return kl, proxy - self.start[0], gold - self.start[1]

    @property
    def turn(self) -> Turn:
        kl, proxy, gold = self.gains
        top = int(gold.argmax())
        return Turn(*map(float, (gold[top], kl[top], gold[top] - gold[-1], proxy[-1] - proxy[top])))

    @property
    def overoptimised(self) -> bool:
        rise, kl, fall, gain = self.turn
        return rise >= RISE and fall >= FALL and gain > 0 and NATS[0] <= kl <= NATS[1]

    @property
    def fit(self) -> Fit:
        """Of gold above the SFT model's."""
        kl, _, gold = self.gains
        return fit_form(kl, gold, self.method)


def terms(d: Array, method: str) -> Array:
    """What stands before α and β. (points,) → (points, 2)"""
    return np.stack([d, -d * (np.log(d) if method == "PPO" else d)], 1)


def fit_form(kl: Array, gain: Array, method: str) -> Fit:
    """A method's form by least squares, over the points that have moved; NaN where these are too
    few. kl, gain: (points,)"""
    matrix, gain = terms(np.sqrt(kl[kl > 0]), method), gain[kl > 0]
    if len(gain) < 3:
        return Fit(np.nan, np.nan, np.nan)
    found = np.linalg.lstsq(matrix, gain, rcond=None)[0]
    left = ((gain - matrix @ found) ** 2).sum() / ((gain - gain.mean()) ** 2).sum()
    return Fit(*map(float, (*found, 1 - left)))


@dataclass
class OverOptimisation:
    """Curves of proxies by methods and seeds; `about`: what they were made with."""

    curves: list[Curve] = field(default_factory=list)
    about: dict[str, Setting] = field(default_factory=dict)

    def groups(self, *names: str, method: str = "") -> dict[tuple[str, str], list[Curve]]:
        """The seeds' curves by proxy and method; of these names, or of this method alone."""
        found: dict[tuple[str, str], list[Curve]] = {}
        for c in self.curves:
            if c.name in (names or (c.name,)) and c.method == (method or c.method):
                found.setdefault((c.name, c.method), []).append(c)
        if not found:
            known = "; ".join(dict.fromkeys(c.name for c in self.curves))
            raise ValueError(f"no curve of {', '.join(names)} {method}: there are {known}")
        return found

    @property
    def rows(self) -> list[dict[str, str]]:
        rows = []
        for (name, method), of in self.groups().items():
            rise, kl, fall, gain = zip(*(c.turn for c in of), strict=True)
            alpha, beta, r2 = zip(*(c.fit for c in of), strict=True)
            row = {"proxy": name, "by": method, "ranks right": _spread([c.ranked for c in of])}
            row |= {"gold rises": _spread(rise), "at KL (nats)": _spread(kl)}
            row |= {"then falls": _spread(fall), "proxy gains": _spread(gain)}
            row |= {"over-optimised": f"{sum(c.overoptimised for c in of)} of {len(of)}"}
            row |= {"α": _spread(alpha), "β": _spread(beta)}
            rows.append(row | {"R²": f"{mean(r2):.2f}" + ", does not hold" * (mean(r2) < HOLDS)})
        return rows

    def __repr__(self) -> str:
        return table(self.rows)

    def _repr_html_(self) -> str:
        return html_table(self.rows)

    def figure(self, *names: str, method: str = "") -> Figure:
        """Gold and proxy over √KL, a plotly figure; of these proxies, or of this method alone."""
        from .charts.overoptimisation import overoptimisation

        groups = self.groups(*names, method=method)
        fitted = {k: of for k, of in groups.items() if np.isfinite([c.fit.r2 for c in of]).all()}
        return overoptimisation(groups, {key: band(curves) for key, curves in fitted.items()})

    def save(self, path: str | Path) -> None:
        written = {"about": self.about, "curves": list(map(asdict, self.curves))}
        replace_file(Path(path), json.dumps(to_json_object(written)) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> OverOptimisation:
        """What `save` wrote. Raises ValueError, one line, for another file."""
        try:
            read = json.loads(Path(path).read_text("utf-8"))
            curves = [Curve(**{**c, "start": tuple(c["start"])}) for c in read["curves"]]
            return cls(curves, read["about"])
        except (KeyError, TypeError, json.JSONDecodeError):
            raise ValueError(f"{path} was not written by OverOptimisation.save") from None


def _spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation over seeds."""
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


class Band(NamedTuple):
    """Over d = √KL the mean of the seeds' fits and half of its 95 % interval (Student's t; NaN for
    one seed), where all of them have points. (40,) each"""

    d: Array
    mean: Array
    half: Array


def band(curves: Sequence[Curve]) -> Band:
    """The band of the seeds' fits of gold."""
    moved = [np.sqrt(kl[kl > 0]) for kl in (c.gains[0] for c in curves)]
    d = np.linspace(max(map(min, moved)), min(map(max, moved)), 40)
    fits = np.stack([terms(d, c.method) @ c.fit[:2] for c in curves])
    if (count := len(curves)) == 1:
        return Band(d, fits[0], np.full(40, np.nan))
    t = T975[min(count - 1, len(T975)) - 1]
    return Band(d, fits.mean(0), t * fits.std(0, ddof=1) / count**0.5)


def overoptimise(
    proxies: Mapping[str, Proxy],
    policy: str | Path | Model = "tiny",
    *,
    data: Data | str | Path = "stories",
    seeds: Iterable[int] = (0,),
    prompts: int = 64,
    samples: int = 64,
    out: str | Path | None = None,
    quiet: bool = False,
    **settings: Setting,
) -> OverOptimisation:
    """Train each proxy, and optimise the SFT model by it, with an eye on the gold reward.

    Best-of-n is exact: of `samples` answers to each of so many held-out `prompts`, drawn once, it
    is the mean over all subsets of n. A run of PPO is a curve, each iteration a point; `settings`
    are those of `lab.plan("ppo", …)`. `out`: a JSON file that is written after each curve; curves
    that it has are not made again. Raises ValueError, one line, for data without a gold reward and
    for a file of another study.
    """
    from .launch.launcher import prepare_process

    model, data = load(policy), load_data(data)
    if not proxies or prompts < 1 or samples < 2:
        raise ValueError("overoptimise: proxies by name, at least 1 prompt and 2 samples")
    if not data.has_gold:
        raise ValueError(f"{data.name} has no gold reward, so nothing tells when it falls")
    if own := {"kl_coef", "max_steps", "seed"} & settings.keys():
        raise ValueError(f"{min(own)} is a curve's own: Proxy(kl_coef=…, iterations=…), seeds=…")
    study = _Study(model, data.with_held_out(prompts), samples, settings)
    found = OverOptimisation.load(out) if out and Path(out).is_file() else OverOptimisation()
    made = {"policy": model.name, "data": data.name, "prompts": prompts, "samples": samples}
    for name, proxy in proxies.items():
        study.check(proxy)
        how = to_json_object({**made, **settings, **asdict(proxy)})
        if found.about.setdefault(name, how) != how:
            raise ValueError(f"{out} has {name!r}, made otherwise: give another name, or file")
    prepare_process()
    for seed, (name, proxy) in product(seeds, proxies.items()):
        if not any((c.name, c.seed) == (name, seed) for c in found.curves):
            found.curves += study.curves(name, proxy, seed)
            if out:
                found.save(out)
            if not quiet:
                print(f"{name}, seed {seed}: {found.curves[-1].turn}", flush=True)
    return found


class _Study:
    """What the curves of a study share: the SFT model's answers, and the reward models."""

    def __init__(self, model: Model, data: Data, samples: int, settings: Settings) -> None:
        self.model, self.data, self.samples, self.settings = model, data, samples, settings
        self.length = int(plan("ppo", model, **settings).settings["response_length"])
        self.folder, self.trained = tempfile.TemporaryDirectory(), dict[object, str]()

    def check(self, proxy: Proxy) -> None:
        """Raises ValueError for reward models that cannot be had, or that read other tokens."""
        of, most = load(proxy.model or self.model), len(self.data.preferences.train)
        if not same_vocabulary(of.tokenizer, self.model.tokenizer):
            raise ValueError(f"{of.name} reads other tokens than {self.model.name} writes")
        if proxy.pairs is None and "reward" not in of.paths:
            raise ValueError(f"{of.name} comes without a reward model: give pairs to train one on")
        if (proxy.pairs or 0) > most:
            raise ValueError(f"pairs={proxy.pairs}: {self.data.name} has {most} to train on")

    @cached_property
    def answers(self) -> tuple[list[Example], list[list[int]], Tensor]:
        """Held-out prompts, ids of answers to them, and their gold reward (prompts, samples)."""
        import torch

        from .ppo.texts import sample_ids
        from .trainers.evaluate import held_out_prompts

        sft, tokenizer = self.model.sft, self.model.tokenizer
        rows = held_out_prompts(self.model, self.data, len(self.data.prompts.test), self.length)
        drawn = sample_ids(
            sft, tokenizer, rows, samples=self.samples, max_new_tokens=self.length, seed=99
        )
        asked, ids = [row for row in rows for _ in drawn[0]], list(chain(*drawn))
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        gold = [self.data.gold_reward(r["prompt"], t) for r, t in zip(asked, texts, strict=True)]
        return asked, ids, torch.tensor(gold, dtype=torch.float64).view(len(rows), -1)

    def curves(self, name: str, proxy: Proxy, seed: int) -> Iterator[Curve]:
        """Best-of-n's, and PPO's where it has iterations."""
        import torch

        from .ppo.losses import kl_bound
        from .trainers.best_of_n import expected_best

        began, (asked, ids, gold) = time.perf_counter(), self.answers
        folders = self.reward_models(proxy, seed)
        score = ensemble(folders, self.model, proxy.worst)
        scores = torch.tensor(score(asked, ids), dtype=torch.float64).view_as(gold)
        gap, gold_gap = (x[:, :, None] - x[:, None] for x in (scores, gold))
        ranked = ((gap > 0) == (gold_gap > 0))[gold_gap != 0].double().mean()
        start = float(scores.mean()), float(gold.mean())
        n = [2**k for k in range(self.samples.bit_length())]
        by, best = ([float(expected_best(scores, x, k).mean()) for k in n] for x in (scores, gold))
        points: Points = n, [kl_bound(k) for k in n], by, best
        seconds = round(time.perf_counter() - began, 1)
        yield Curve(name, "best of n", seed, float(ranked), start, *points, seconds)
        if proxy.iterations:
            points = self.ppo(proxy, seed, folders, score)
            seconds = round(time.perf_counter() - began - seconds, 1)
            yield Curve(name, "PPO", seed, float(ranked), start, *points, seconds)

    def reward_models(self, proxy: Proxy, seed: int) -> list[str]:
        """Folders of the proxy's members; those that are not there yet are trained."""
        of = load(proxy.model or self.model)
        if proxy.pairs is None:
            return [of.paths["reward"]]
        rng = Random(f"pairs:{seed}")
        rows = rng.sample(self.data.preferences.train, proxy.pairs)
        turned = {"chosen": "rejected", "rejected": "chosen"}
        rows = [
            {turned.get(k, k): v for k, v in row.items()} if rng.random() < proxy.flipped else row
            for row in rows
        ]
        data, folders = self.data.with_preferences(rows).with_held_out(8), []
        for member in range(proxy.members):
            learned = proxy.model, proxy.pairs, proxy.flipped, proxy.steps, seed, member
            if learned not in self.trained:
                folder = Path(self.folder.name) / f"reward-{len(self.trained)}"
                how = plan("reward", of, max_steps=proxy.steps, seed=1000 * member + seed)
                run = train(how, data, out=folder, quiet=True)
                self.trained[learned] = str(run.model_path)
            folders.append(self.trained[learned])
        return folders

    def ppo(self, proxy: Proxy, seed: int, folders: Sequence[str], score: RewardFunction) -> Points:
        """A run by one reward model, or by the function of several."""
        alone = {"reward": folders[0]} if len(folders) == 1 else {}
        paths = {k: v for k, v in self.model.paths.items() if k != "reward"} | alone
        model = Model(self.model.name, paths, self.model.trust_remote_code)
        own = {"kl_coef": proxy.kl_coef, "max_steps": proxy.iterations, "seed": seed}
        how = {"save_strategy": "no", **self.settings, **own}
        with tempfile.TemporaryDirectory() as folder:
            data, by = self.data.with_held_out(8), None if alone else score
            run = train(plan("ppo", model, **how), data, reward_funcs=by, out=folder, quiet=True)
            lines = [line for line in run.metrics if "kl" in line]
            kl, proxies, gold = ([x[k] for x in lines] for k in ("kl", "reward", "gold_reward"))
            return [int(x["step"]) for x in lines], kl, proxies, gold


def ensemble(folders: Sequence[str], policy: Model, worst: bool = False) -> RewardFunction:
    """A reward function: the mean of several reward models' scores, or the worst of them (Coste et
    al., 2310.02743)."""
    import torch

    from .models.weights import load_reward_model
    from .ppo.texts import score_texts

    models = [load_reward_model(folder, policy.tokenizer) for folder in folders]

    def score(
        prompts: Sequence[Prompt | Example], completion_ids: Sequence[list[int]], **_: object
    ) -> list[float]:
        of_each = (score_texts(m, policy.tokenizer, prompts, completion_ids) for m in models)
        scores = torch.stack(list(of_each)).double()
        combined: list[float] = (scores.amin(0) if worst else scores.mean(0)).tolist()
        return combined

    return score
