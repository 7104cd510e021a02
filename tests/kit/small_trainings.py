"""Trainings of a page made small: a step of a few rows, whatever the page asks for."""

import functools
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import rlhf_lab as lab
from rlhf_lab import notebook, pipeline, studies, training
from rlhf_lab.data import load
from rlhf_lab.data.load import Data, Split

STEPS = {"max_steps": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
ROWS = 8


XRAYS: dict[str, Any] = {}
stories = functools.lru_cache(load.load_data)
"""The bundled stories take two seconds each time."""


def few_rows(data: Data | None) -> Data:
    """The first rows of each part; the bundled stories where there are none."""
    data = stories("stories") if data is None else load.load_data(data)
    parts = {
        name: Split(part.train[: 4 * ROWS], part.test[:ROWS])
        for name, part in vars(data).items()
        if isinstance(part, Split)
    }
    return replace(data, **parts)


def small_plan(plan: Any) -> Any:
    more = dict(STEPS)
    if plan.stage == "ppo":
        more |= {"num_mini_batches": 1, "response_length": 8}
    if plan.stage == "distill":
        more |= {"response_length": 8}
    if plan.stage in ("rloo", "grpo"):
        more |= {"response_length": 8, "num_generations": 2, "steps_per_generation": 1}
    return replace(plan, settings={**plan.settings, **more})


def make_small(patch: Any) -> None:
    """Let `lab.train`, `lab.train_all`, `lab.best_of_n` and the command line train a little, and
    somebody answer what `lab.label` asks: always as the data's annotator did."""
    train: Callable = training.train
    train_all: Callable = pipeline.train_all
    best_of_n: Callable = studies.best_of_n
    xray: Callable = studies.xray
    label: Callable = notebook.label
    read: Callable = load.load_data

    def small_train(what: Any, data: Any = None, **more: Any) -> Any:
        made = lab.plan(what, "tiny") if isinstance(what, str) else what
        return train(small_plan(made), few_rows(data), **{**more, "quiet": True})

    def small_train_all(model: Any, data: Any = None, **more: Any) -> Any:
        return train_all(model, few_rows(data), **{**more, "quiet": True})

    def small_best_of_n(model: Any = "tiny", data: Any = None, n: Any = (1, 2), **more: Any) -> Any:
        little = {"prompts": 4, "response_length": 8, "quiet": True}
        return best_of_n(model, few_rows(data), n=n, **{**more, **little})

    def small_xray(plan: Any) -> Any:
        if not isinstance(plan, lab.Plan):  # an estimate of `train_all`'s: no page is about that
            return SimpleNamespace(ledger=lab.Ledger())
        small = small_plan(plan)
        if repr(small) not in XRAYS:
            XRAYS[repr(small)] = xray(small)
        return XRAYS[repr(small)]

    def load_data(source: Any = "stories", **more: Any) -> Data:
        plain = not more.get("seed") and not more.get("limit")
        bundled = isinstance(source, str) and source == "stories" and plain
        return stories("stories") if bundled else read(source, **more)

    def answered(data: Any, n: int = 20, **more: Any) -> SimpleNamespace:
        label(data, n, **more)
        return SimpleNamespace(preferences=lab.load_data(data).preferences.train[:n])

    patch.setattr(load, "load_data", load_data)
    patch.setattr(training, "train", small_train)
    patch.setattr(pipeline, "train", small_train)
    patch.setattr(studies, "xray", small_xray)
    patch.setattr(notebook, "label", answered)
    patch.setattr(pipeline, "train_all", small_train_all)
    patch.setattr(studies, "best_of_n", small_best_of_n)
