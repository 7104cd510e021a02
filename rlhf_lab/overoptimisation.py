"""A reward model that is optimised too far: its score rises on while the gold reward falls.

    found = lab.overoptimise({"192 pairs": reward_runs, "worst of 3": ("worst", *reward_runs)})
    found.figure()

Best-of-n and PPO along d = √KL to the SFT model, with the forms that Gao, Schulman and Hilton fit
(Scaling Laws for Reward Model Overoptimization, arXiv 2210.10760).
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np

from .data.load import Data, load_data
from .display import Tabled, plus_minus
from .models.load import BUNDLED, Model, load
from .models.tokenizer import same_vocabulary
from .planning import plan
from .runs.json_files import JsonObject, read_written, replace_file, to_json_object
from .runs.run import Run, notebooks_folder
from .training import train

if TYPE_CHECKING:
    from torch import Tensor

    from .charts.plotly_style import Figure
    from .data.reward_sources import RewardFunction
    from .data.schema import Example, Prompt
    from .stages import Setting, Settings

Array: TypeAlias = "np.ndarray[tuple[int, ...], np.dtype[np.float64]]"
RewardModel: TypeAlias = "Run | Model | str | Path"
Proxy: TypeAlias = "RewardModel | tuple[RewardModel, ...]"
"""A reward model, or ("mean", …) or ("worst", …) of several."""
WINDOW = 5
"""Iterations of PPO whose mean is a point: each has other prompts, and few of them."""
RISE, FALL, NATS = 0.3, 0.3, (1.0, 15.0)
"""Over-optimised: the gold reward rises by so many points and falls by so many while the proxy
gains, with its peak at such a KL."""
SEVERAL = "('mean', a, b, …) or ('worst', a, b, …) of several"
HOLDS = 0.9
"""R² below which a form does not hold."""


class Turn(NamedTuple):
    """The highest gold reward above the SFT model's, the KL there; from there to the curve's end
    what gold loses and the proxy gains."""

    rise: float
    kl: float
    fall: float
    gain: float


class Fit(NamedTuple):
    """Gold above the SFT model's: d(α − β d) for best-of-n, d(α − β log d) for PPO."""

    alpha: float
    beta: float
    r2: float


class Band(NamedTuple):
    """Over d the mean of the seeds' fits and half of its 95 % interval (Student's t; NaN for one
    seed), where all of them have points. (40,) each"""

    d: Array
    mean: Array
    half: Array


@dataclass(frozen=True)
class Curve:
    """A proxy of one seed, optimised by a method. Points stand `at` an n, or an iteration of PPO:
    `kl` in nats per response, means of `proxy` score and `gold` reward. `start`: proxy and gold of
    the SFT model; `ranked`: share of pairs of its answers that the proxy ranks as gold does; `by`:
    "mean" or "worst", then of each reward model its folder and what its weights hash to."""

    name: str
    method: str
    seed: int
    ranked: float
    start: tuple[float, float]
    seconds: float
    at: list[int]
    kl: list[float]
    proxy: list[float]
    gold: list[float]
    by: list[str] = field(default_factory=list, kw_only=True)

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
        kl, _, gold = self.gains
        return fit_form(kl, gold, self.method)


def terms(d: Array, method: str) -> Array:
    """What stands before α and β. (points,) → (points, 2)"""
    return np.stack([d, -d * (np.log(d) if method == "PPO" else d)], 1)


def fit_form(kl: Array, gain: Array, method: str) -> Fit:
    """A method's form by least squares over the points that have moved; NaN where these are too
    few. kl, gain: (points,)"""
    matrix, gain = terms(np.sqrt(kl[kl > 0]), method), gain[kl > 0]
    if len(gain) < 3:
        return Fit(np.nan, np.nan, np.nan)
    found = np.linalg.lstsq(matrix, gain, rcond=None)[0]
    left = ((gain - matrix @ found) ** 2).sum() / ((gain - gain.mean()) ** 2).sum()
    return Fit(*map(float, (*found, 1 - left)))


def t_quantile(confidence: float, degrees: int) -> float:
    """The t between whose −t and t Student's distribution has this share. With t = √d·tan θ its
    density is proportional to cosᵈ⁻¹ θ, which is summed here."""
    width = math.pi / 2 / 20_000
    heights = [math.cos((i + 0.5) * width) ** (degrees - 1) for i in range(20_000)]
    left = confidence * math.fsum(heights)
    for i, height in enumerate(heights):
        if left <= height:
            return math.sqrt(degrees) * math.tan((i + left / height) * width)
        left -= height
    return math.inf


def band(curves: Sequence[Curve]) -> Band | None:
    """The band of the seeds' fits; None where one has too few points."""
    if not np.isfinite([c.fit.r2 for c in curves]).all():
        return None
    moved = [np.sqrt(kl[kl > 0]) for kl in (c.gains[0] for c in curves)]
    d, count = np.linspace(max(map(min, moved)), min(map(max, moved)), 40), len(curves)
    fits = np.stack([terms(d, c.method) @ c.fit[:2] for c in curves])
    if count == 1:
        return Band(d, fits[0], np.full(40, np.nan))
    t = round(t_quantile(0.95, count - 1), 3)  # as tables have it
    return Band(d, fits.mean(0), t * fits.std(0, ddof=1) / count**0.5)


@dataclass(repr=False)
class OverOptimisation(Tabled):
    """Curves of proxies by methods and seeds; `about`: of each name what they were made with."""

    curves: list[Curve] = field(default_factory=list)
    about: dict[str, Setting] = field(default_factory=dict)

    def groups(self, *names: str, method: str = "") -> dict[tuple[str, str], list[Curve]]:
        """The seeds' curves by proxy and method; of these names, or of this method alone."""
        found: dict[tuple[str, str], list[Curve]] = {}
        for c in self.curves:
            if c.name in (names or (c.name,)) and c.method.lower() == (method or c.method).lower():
                found.setdefault((c.name, c.method), []).append(c)
        gone = [name for name in names if name not in {of for of, _ in found}]
        if gone or not found:
            known = "; ".join(dict.fromkeys(c.name for c in self.curves)) or "none"
            by = " or ".join(dict.fromkeys(c.method for c in self.curves))
            what = f" of {', '.join(gone)}" * bool(gone) + f" by {method!r}" * bool(method)
            raise ValueError(f"no curve{what}: there are {known}, by {by or 'no method'}")
        return found

    @property
    def rows(self) -> list[dict[str, str]]:
        rows = []
        for (name, method), of in self.groups().items():
            rise, kl, fall, gain = zip(*(c.turn for c in of), strict=True)
            alpha, beta, r2 = zip(*(c.fit for c in of), strict=True)
            row = {"proxy": name, "by": method, "ranks right": plus_minus([c.ranked for c in of])}
            row |= {"gold rises": plus_minus(rise), "at KL (nats)": plus_minus(kl)}
            row |= {"then falls": plus_minus(fall), "proxy gains": plus_minus(gain)}
            row |= {"over-optimised": f"{sum(c.overoptimised for c in of)} of {len(of)}"}
            row |= {"α": plus_minus(alpha), "β": plus_minus(beta)}
            fails = ", does not hold" * (float(np.mean(r2)) < HOLDS)
            rows.append(row | {"R²": f"{plus_minus(r2)}{fails}"})
        return rows

    def figure(self, *names: str, method: str = "") -> Figure:
        """Gold and proxy over √KL, a plotly figure; of these proxies, or of this method alone."""
        from .charts.studies import overoptimisation

        groups = self.groups(*names, method=method)
        return overoptimisation(groups, {key: band(curves) for key, curves in groups.items()})

    def save(self, path: str | Path) -> None:
        written = {"about": self.about, "curves": list(map(asdict, self.curves))}
        replace_file(Path(path), json.dumps(to_json_object(written)) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> OverOptimisation:
        """What `save` wrote. Raises ValueError, one line, for another file."""

        def make(read: JsonObject) -> OverOptimisation:
            curves = [Curve(**{**c, "start": tuple(c["start"])}) for c in read["curves"]]
            return cls(curves, read["about"])

        return read_written(path, make, "OverOptimisation.save")

    @classmethod
    def stored(cls) -> OverOptimisation:
        """The study that comes with the course (`benchmarks/overoptimisation.py`)."""
        return cls.load(notebooks_folder() / "course_runs" / "overoptimisation.json")


def overoptimise(
    proxies: Mapping[str, Proxy | list[Proxy]],
    policy: str | Path | Model = "tiny",
    *,
    data: Data | str | Path = "stories",
    kl_coef: float = 0.0,
    iterations: int = 32,
    prompts: int = 64,
    samples: int = 64,
    out: str | Path | None = None,
    quiet: bool = False,
    **settings: Setting,
) -> OverOptimisation:
    """Optimise the SFT model by reward models, with an eye on the gold reward.

    `proxies`: reward models by name, or a list of them, one a seed; ("mean", a, b, …) and ("worst",
    a, b, …) are ensembles. Best-of-n is exact: of `samples` answers to each of so many held-out
    `prompts`, drawn once, it is the mean over all subsets of n. A run of PPO is a curve, each of
    its `iterations` a point (0: best-of-n alone), with the penalty `kl_coef` and `settings`, those
    of `lab.plan("ppo", …)`. `out`: a JSON file that is written after each seed; seeds that it has
    are not run again. Raises ValueError, one line, for what is no reward model of the policy's
    tokens, for data without a gold reward, and for a file with a name that was made otherwise, or
    of reward models with other weights.
    """
    from .launch.launcher import prepare_process

    if not proxies:
        raise ValueError("no proxies: give reward models by name, {'mine': run}")
    for what, value, least in (("prompts", prompts, 1), ("samples", samples, 2)):
        if value < least:
            raise ValueError(f"{what} must be at least {least}, not {value}")
    if iterations < WINDOW and iterations != 0:
        rule = f"iterations must be 0 (best of n alone) or at least {WINDOW}"
        raise ValueError(f"{rule}, not {iterations}")
    lists: dict[str, list[Proxy]] = {
        name: given if isinstance(given, list) else [given] for name, given in proxies.items()
    }
    for name, of_name in lists.items():
        if not of_name or any(isinstance(one, tuple) and not one[1:] for one in of_name):
            raise ValueError(f"{name} has no reward model: give one, or {SEVERAL}")
    if taken := {"seed", "max_steps"} & settings.keys():
        raise ValueError(f"{min(taken)}: seeds are places in a list, max_steps is iterations=…")
    of_ppo = {"save_strategy": "no", **settings, "kl_coef": kl_coef, "max_steps": iterations}
    model = load(policy)
    length = int(plan("ppo", model, **of_ppo).settings["response_length"])
    members = {name: [_members(one, model) for one in of] for name, of in lists.items()}
    if not (data := load_data(data)).has_gold:
        raise ValueError(f"{data.name} has no gold reward, so nothing tells when it falls")
    study = _Study(model, data.with_held_out(prompts), samples, of_ppo, length)
    found = OverOptimisation.load(out) if out and Path(out).is_file() else OverOptimisation()
    how = to_json_object({"policy": model.name, "data": data.name, "prompts": prompts})
    how |= to_json_object({"samples": samples, **of_ppo})
    for name in proxies:
        if found.about.setdefault(name, how) != how:
            raise ValueError(f"{out} has {name!r}, made otherwise: give another name, or file")
    for c in found.curves:  # a file from before has no `by`
        if c.seed < len(of := members.get(c.name, [])) and c.by and c.by[::2] != of[c.seed][2][::2]:
            wrong = f"{c.name!r}, seed {c.seed}, of other reward models ({', '.join(c.by[1::2])})"
            raise ValueError(f"{out} has {wrong}: give another name, or file")
    prepare_process()
    for seed, row in enumerate(zip_longest(*members.values())):
        for name, given in zip(members, row, strict=True):
            if given and not any((c.name, c.seed) == (name, seed) for c in found.curves):
                found.curves += study.curves(name, seed, *given)
                if out:
                    found.save(out)
                if not quiet:
                    print(f"{name}, seed {seed}: {found.curves[-1].turn}", flush=True)
    return found


def _members(proxy: Proxy, policy: Model) -> tuple[list[str], bool, list[str]]:
    """Folders of reward models, whether the worst of them counts, and `Curve.by`."""
    how, given = (proxy[0], proxy[1:]) if isinstance(proxy, tuple) else ("mean", (proxy,))
    if how not in ("mean", "worst") or not given:
        raise ValueError(f"a tuple is {SEVERAL} reward models")
    folders, by = [], [str(how)]
    for one in given:
        of = load(one.folder if isinstance(one, Run) else one)
        if "reward" not in of.paths:
            raise ValueError(f"{of.name} is no reward model: give one, or the run that trained it")
        if not same_vocabulary(of.tokenizer, policy.tokenizer):
            raise ValueError(f"{of.name} reads other tokens than {policy.name} writes")
        folders.append(of.paths["reward"])
        # A bundled model by its name: where it lies is this machine's.
        by += of.name if of.name in BUNDLED else folders[-1], _fingerprint(folders[-1])
    return folders, how == "worst", by


def _fingerprint(folder: str) -> str:
    """What a model's weights hash to; its name where they are on the hub."""
    made = hashlib.sha256()
    kinds = "*.safetensors", "pytorch_model*.bin"
    files = [path for kind in kinds for path in sorted(Path(folder).glob(kind))]
    for path in files:
        with path.open("rb") as weights:
            made.update(hashlib.file_digest(weights, "sha256").digest())
    return made.hexdigest()[:16] if files else folder


class _Study:
    """What the curves of a study share: the SFT model, and answers that it wrote."""

    def __init__(
        self, model: Model, data: Data, samples: int, settings: Settings, length: int
    ) -> None:
        self.model, self.data, self.samples = model, data, samples
        self.settings, self.length = settings, length

    @cached_property
    def answers(self) -> tuple[list[Example], list[list[int]], Tensor]:
        """Held-out prompts, ids of answers to them, and their gold reward (prompts, samples)."""
        import torch

        from .ppo.texts import sample_ids
        from .trainers.evaluate import held_out_prompts

        sft, tokenizer = self.model.sft, self.model.tokenizer
        rows = held_out_prompts(self.model, self.data, len(self.data.prompts.test), self.length)
        how = partial(sample_ids, samples=self.samples, max_new_tokens=self.length, seed=99)
        drawn = how(sft, tokenizer, rows)
        asked, ids = [row for row in rows for _ in drawn[0]], list(chain(*drawn))
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        gold = [self.data.gold_reward(r["prompt"], t) for r, t in zip(asked, texts, strict=True)]
        return asked, ids, torch.tensor(gold, dtype=torch.float64).view(len(rows), -1)

    def curves(
        self, name: str, seed: int, folders: list[str], worst: bool, by: list[str]
    ) -> Iterator[Curve]:
        """Best-of-n's, and PPO's where it has iterations."""
        import torch

        from .ppo.losses import kl_bound
        from .trainers.best_of_n import expected_best

        (asked, ids, gold), began = self.answers, time.perf_counter()
        score = ensemble(folders, self.model, worst)
        scores = torch.tensor(score(asked, ids), dtype=torch.float64).view_as(gold)
        gap, gold_gap = (x[:, :, None] - x[:, None] for x in (scores, gold))
        ranked = float(((gap > 0) == (gold_gap > 0))[gold_gap != 0].double().mean())
        start = float(scores.mean()), float(gold.mean())
        n = [2**k for k in range(self.samples.bit_length())]
        best = [[float(expected_best(scores, x, k).mean()) for k in n] for x in (scores, gold)]
        same, points = (seed, ranked, start), [[kl_bound(k) for k in n], *best]
        yield Curve(name, "best of n", *same, time.perf_counter() - began, n, *points, by=by)
        if self.settings["max_steps"]:
            began, points = time.perf_counter(), self.ppo(seed, folders, score)
            at = list(range(1, len(points[0]) + 1))
            yield Curve(name, "PPO", *same, time.perf_counter() - began, at, *points, by=by)

    def ppo(self, seed: int, folders: list[str], score: RewardFunction) -> list[list[float]]:
        """A run by one reward model, or by the function of several. → its KL, proxy and gold by
        iteration."""
        alone = {"reward": folders[0]} if len(folders) == 1 else {}
        paths = {k: v for k, v in self.model.paths.items() if k != "reward"} | alone
        model = Model(self.model.name, paths, self.model.trust_remote_code)
        asked = plan("ppo", model, **self.settings, seed=seed)
        data, by = self.data.with_held_out(8), None if alone else score
        with tempfile.TemporaryDirectory() as folder:
            run = train(asked, data, reward_funcs=by, out=folder, quiet=True)
            lines = [line for line in run.metrics if "kl" in line]
            return [[x[k] for x in lines] for k in ("kl", "reward", "gold_reward")]


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
