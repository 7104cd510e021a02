"""Data for the four stages: the bundled world, or a user's own file, through one door.

`load_data("stories")` is the world; `load_data("mine.json")` reads rows and guesses their fields,
aloud. Either way the result has three sets, each split into train and test:

    sft          {"prompt", "completion"}
    preferences  {"prompt", "chosen", "rejected"}
    prompts      {"prompt"}
"""

from __future__ import annotations

import csv
import gzip
import json
import random
from dataclasses import dataclass, field, replace
from pathlib import Path

from . import corpus
from .gold import Annotator, accuracy_ceiling, gold_parts, gold_reward
from .models import small_models_folder

SIZES = {"sft": 2560, "preferences": 3072, "prompts": 8192, "test": 512, "test_pairs": 1024}
"""Rows of the bundled world's training sets, of each test set, and of held-out pairs."""


@dataclass(frozen=True)
class Split:
    """Rows to train on and rows held out."""

    train: list[dict] = field(default_factory=list)
    test: list[dict] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"Split(train={len(self.train)}, test={len(self.test)})"


@dataclass(frozen=True)
class Data:
    """What the stages train on. `annotator` and `gold_reward` exist for the bundled world only."""

    name: str
    sft: Split
    preferences: Split
    prompts: Split
    annotator: Annotator | None = None
    notes: tuple[str, ...] = ()

    @property
    def has_gold(self) -> bool:
        """Whether the true reward is known."""
        return self.annotator is not None

    def gold_reward(self, prompt: str, response: str) -> float:
        """The gold reward of a response, 0 to 10 (bundled world only)."""
        self._need_gold()
        return gold_reward(prompt, response)

    def gold_parts(self, prompt: str, response: str) -> dict[str, float]:
        """Its parts, each 0 to 1 (bundled world only)."""
        self._need_gold()
        return gold_parts(prompt, response)

    def accuracy_ceiling(self, pairs: list[dict] | None = None) -> float | None:
        """Best accuracy a reward model can expect on the held-out pairs; None if unknowable."""
        if self.annotator is None:
            return None
        return accuracy_ceiling(pairs or self.preferences.test, self.annotator)

    def with_pairs(self, train: list[dict], test: list[dict]) -> Data:
        """The same data with other pairs ({"prompt", "first", "second"}), judged anew."""
        self._need_gold()
        split = Split(judge(train, self.annotator), judge(test, self.annotator))
        return replace(self, preferences=split)

    def _need_gold(self) -> None:
        if self.annotator is None:
            raise ValueError(f"{self.name} has no gold reward: only the bundled world knows it")


def judge(pairs: list[dict], annotator: Annotator) -> list[dict]:
    """Label pairs of responses as the simulated annotator does."""
    rows = (annotator.label(i, p["prompt"], p["first"], p["second"]) for i, p in enumerate(pairs))
    return list(rows)


def load_data(
    source: str | Path | Data = "stories",
    *,
    seed: int = 0,
    temperature: float = 0.6,
    length_bias: float = 0.0,
) -> Data:
    """The bundled world ("stories"), or a JSON, JSONL or CSV file with rows of text.

    `temperature` and `length_bias` belong to the world's simulated annotator. Raises ValueError
    with one line (what, where, what to do) for anything that cannot be read.
    """
    if isinstance(source, Data):
        return source
    if str(source) == "stories":
        return _stories(Annotator(temperature, length_bias, seed), seed)
    return from_rows(read_rows(Path(source)), name=Path(source).name, seed=seed)


# ------------------------------------------------------------------------------- the bundled world


def _stories(annotator: Annotator, seed: int) -> Data:
    test = SIZES["test"]
    sft = Split(
        corpus.demonstrations("train", SIZES["sft"], seed),
        corpus.demonstrations("test", test, seed),
    )
    prompts = Split(
        *(
            [{"prompt": r.prompt} for r, _ in zip(corpus.requests(split, seed), range(count))]
            for split, count in (("train", SIZES["prompts"]), ("test", test))
        )
    )
    pairs = bundled_pairs()
    train = judge(pairs["train"][: SIZES["preferences"]], annotator)
    split = Split(train, judge(pairs["test"][: SIZES["test_pairs"]], annotator))
    return Data("stories", sft, split, prompts, annotator)


def bundled_pairs() -> dict[str, list[dict]]:
    """Pairs of responses that the bundled SFT model wrote, not judged yet, by split."""
    path = small_models_folder() / "pairs.jsonl.gz"
    if not path.is_file():  # while the checkpoints are being rebuilt there are none yet
        return {"train": [], "test": []}
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return {s: [r for r in rows if r["split"] == s] for s in ("train", "test")}


# -------------------------------------------------------------------------------- a user's own file


def read_rows(path: Path) -> list[dict]:
    """The rows of a .json (a list of objects), .jsonl or .csv file."""
    if not path.is_file():
        raise ValueError(f"no data file {path}: give a .json, .jsonl or .csv file, or 'stories'")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason}; save it as UTF-8") from None
    try:
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        elif path.suffix == ".csv":
            rows = list(csv.DictReader(text.splitlines()))
        elif path.suffix == ".json":
            rows = json.loads(text)
        else:
            raise ValueError(f"{path}: {path.suffix or 'no suffix'} is not .json, .jsonl or .csv")
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error.msg}, line {error.lineno}") from None
    if not isinstance(rows, list) or not all(isinstance(r, dict) for r in rows):
        raise ValueError(f"{path} must hold a list of objects, one per row")
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


FIELDS = {
    "prompt": ("prompt", "instruction", "question", "query"),
    "completion": ("completion", "output", "response", "answer"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
}
"""Names under which people store each field; an `input` beside it is added to the prompt."""


def from_rows(rows: list[dict], name: str = "rows", seed: int = 0, held_out: float = 0.1) -> Data:
    """Turn rows into the three sets: fields guessed aloud, drops counted, a tenth held out."""
    names = {
        f: next((n for n in known if any(r.get(n) for r in rows)), None)
        for f, known in FIELDS.items()
    }
    if names["prompt"] is None:
        have = ", ".join(sorted({k for r in rows[:100] for k in r})) or "nothing"
        raise ValueError(
            f"{name}: no prompt field among [{have}]; name it one of {', '.join(FIELDS['prompt'])}"
        )
    said = ", ".join(f"{f} = {n!r}" for f, n in names.items() if n)
    notes = [f"{name}: {len(rows)} rows, read as {said}"]
    made = [_row(r, names) for r in rows]
    kept = [r for r in made if r]
    if len(kept) < len(made):
        notes.append(f"{name}: dropped {len(made) - len(kept)} rows without text for a prompt")
    if len(kept) < 10:
        raise ValueError(f"{name}: {len(kept)} usable rows; at least 10 are needed")
    random.Random(seed).shuffle(kept)
    cut = max(1, round(len(kept) * held_out))
    splits = {"test": kept[:cut], "train": kept[cut:]}

    def select(keys: tuple[str, ...]) -> Split:
        has = {s: [r for r in part if all(r[k] for k in keys)] for s, part in splits.items()}
        return Split(**{s: [{k: r[k] for k in keys} for r in part] for s, part in has.items()})

    pairs = select(("prompt", "chosen", "rejected"))
    same = {s: [r for r in getattr(pairs, s) if r["chosen"] != r["rejected"]] for s in splits}
    identical = sum(len(getattr(pairs, s)) - len(same[s]) for s in splits)
    if identical:
        notes.append(f"{name}: dropped {identical} pairs whose chosen and rejected are identical")
    sft = select(("prompt", "completion"))
    if not sft.train:  # a preference file without answers: the preferred ones are demonstrations
        chosen = select(("prompt", "chosen"))
        sft = Split(*(
            [{"prompt": r["prompt"], "completion": r["chosen"]} for r in part]
            for part in (chosen.train, chosen.test)
        ))  # fmt: skip
    return Data(name, sft, Split(**same), select(("prompt",)), None, tuple(notes))


def _row(row: dict, names: dict[str, str | None]) -> dict | None:
    """One row with our field names, each a text, the prompt's last character a newline.

    → None for a row without a prompt.
    """

    def text(value) -> str:
        return value.strip() if isinstance(value, str) else ""

    prompt = text(row.get(names["prompt"]))
    if not prompt:
        return None
    if names["prompt"] == "instruction" and text(row.get("input")):
        prompt = f"{prompt}\n{text(row['input'])}"
    fields = {f: text(row.get(n)) if n else "" for f, n in names.items() if f != "prompt"}
    return {"prompt": prompt + "\n", **fields}
