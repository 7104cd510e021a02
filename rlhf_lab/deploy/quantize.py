"""A model in fewer bits: what it takes on disk, how fast it writes, what the rounding cost.

    small = lab.quantize(run, "int8")              # a Model like lab.load's; shows its figures
    lab.generate(small, "A sad story about a fox.")
    lab.quantize(run, "nf4", out="runs/ppo-nf4")   # as transformers saves it; lab.load reads it

int8 and int4 are torchao's, NF4 (Dettmers et al., 2305.14314) is bitsandbytes'.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev
from typing import TYPE_CHECKING

from ..cost.architecture import architecture
from ..cost.quantization import file_bytes, format_of
from ..data.load import Data, load_data
from ..display import Tabled, by_surface, check_choice, format_number
from ..models.load import ADAPTER_FILE, Model, load
from ..models.policy import run_or_model
from ..models.weights import in_4bit, load_causal_lm, load_reward_model
from ..runs.json_files import check_empty
from ..runs.run import Run
from ..stages import STAGES, Setting

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

    from ..data.schema import Example

FORMATS = ("fp32", "bf16", "int8", "int8-dynamic", "nf4", "int4")
"""As it is, to compare with; 16 bits; 8 bits and a scale for each output; inputs in 8 bits too,
scaled token by token; 4 bits and a scale for each 64; 4 bits, a scale and a zero for each 64, on
GPUs."""
GROUP = 64
"""weights that share a scale in int4"""
TITLES = {
    "bytes": "file (whole: fp32)",
    "planned_bytes": "file as planned",
    "tokens_per_second": "tokens/s here",
    "perplexity": "perplexity, held out",
    "gold_reward": "gold reward",
    "gold_change": "its change",
    "kl_per_token": "KL to whole, nats/token",
    "kl_of_adapter": "KL, adapter on rounded base",
    "accuracy": "pairs right",
    "pair_agreement": "pairs ordered alike",
    "rank_correlation": "Spearman's ρ of scores",
}
"""Figures of a rounded model, as its table names them."""
_TEMPORARY: list[tempfile.TemporaryDirectory[str]] = []
"""Folders of models that nobody gave one, until the process ends."""


class Quantised(Tabled, Model):
    """A model in fewer bits, saved: a handle as `lab.load` gives one, on `folder`.

    `dense`: matrices that the library left as they were, by reason. `figures`, those of the whole
    model as `before/NAME`: `bytes` of the safetensors file (before: of fp32 weights) and
    `planned_bytes`, where the planner knows the model; `perplexity` of held-out completions;
    `gold_reward` of responses to the same prompts with the same noise (`gold_change_error`: the
    standard error of its mean change); `kl_per_token`: KL(rounded‖whole) in nats on own samples;
    `kl_of_adapter`: the same of a run's LoRA adapter on its base in NF4, where `kl_per_token` is
    of the two merged and then rounded; `tokens_per_second` sampled here. Of reward models on
    held-out pairs: `accuracy`, `pair_agreement`, the share that both order alike, and Spearman's
    `rank_correlation` of the scores of all responses.
    """

    def __init__(
        self, of: Model, scores: bool, folder: Path, to: str, dense: Mapping[str, Sequence[str]]
    ) -> None:
        stages = ("reward",) if scores else ("base", "sft")
        paths = {**of.paths, **dict.fromkeys(stages, str(folder))}
        super().__init__(of.name, paths, of.trust_remote_code)
        self.folder, self.to, self.dense = folder, to, dense
        self.figures: dict[str, float] = {}
        self.evaluated = ""

    @property
    def rows(self) -> list[dict[str, str]]:
        def cell(name: str) -> str:
            if name not in self.figures:
                return ""
            error = self.figures.get(f"{name}_error")
            text = format_number(self.figures[name], "B" if name.endswith("bytes") else None)
            return text if error is None else f"{text} ± {error:.2g}"

        return [
            {"": title, "whole": cell(f"before/{name}"), self.to: cell(name)}
            for name, title in TITLES.items()
            if name in self.figures
        ]

    @property
    def notes(self) -> list[str]:
        """What was left as it was, and where the model is."""
        left = "; ".join(f"{', '.join(names)} ({why})" for why, names in self.dense.items())
        gone = any(str(self.folder) == kept.name for kept in _TEMPORARY)
        keep = by_surface("kept until Python ends, or give out=", "not kept: give --out")
        where = keep if gone else str(self.folder)
        saved = f"rounded and saved in {self.figures['seconds']:.1f} s: {where}"
        notes = {"left as it was": left, "evaluated on": self.evaluated}
        return [*(f"{what}: {text}" for what, text in notes.items() if text), saved]


def quantize(
    of: Run | Model | str | Path,
    to: str = "int8",
    *,
    stage: str = "",
    out: str | Path | None = None,
    data: Data | str | Path | None = "stories",
    prompts: int = 128,
    response_length: int = 64,
    seed: int = 1234,
) -> Quantised:
    """Round a model's weights, save it, and say what that cost; → a handle on it.

    `of`: a run, its folder, or a model, of which the `stage` is taken ("base", "sft", "reward";
    default: sft, of the folder of a reward model that one). `to`: one of `FORMATS`. `out`: an empty
    or new folder [one that goes when Python ends]. `data`: what it is evaluated on, None for
    nothing; `prompts`: so many held-out prompts, completions and pairs. Raises ValueError, one
    line, for what cannot be, before anything is written.
    """
    check_choice("to", to, FORMATS)
    if prompts < 1:
        raise ValueError(f"quantize: prompts={prompts}: 1 or more, or data=None for no evaluation")
    if out is not None:
        check_empty(Path(out))
    model, path, scores, run = _source(of, stage)

    from ..launch.launcher import prepare_process
    from ..trainers.evaluate import held_out_prompts, kl_per_token, policy_report
    from ..trainers.job import save_model

    rounded, rows = _rounding(to), None if data is None else load_data(data)
    kept: Sequence[Example] = []
    if rows is not None and scores:
        kept = rows.preferences.test[:prompts]
    elif rows is not None:
        kept = held_out_prompts(model, rows, prompts, response_length)
    if out is None:
        _TEMPORARY.append(tempfile.TemporaryDirectory(prefix="rlhf-lab-"))
    folder = Path(out or _TEMPORARY[-1].name)
    prepare_process()
    tokenizer = model.reward_tokenizer if scores else model.tokenizer
    from_disk = load_reward_model if scores else load_causal_lm
    from_file = partial(from_disk, path, tokenizer, model.trust_remote_code)
    whole = from_file(device_map={"": _device()})
    start = time.perf_counter()
    small = rounded(from_file)
    dense = {} if to in ("fp32", "bf16") else _dense(small, to)
    save_model(small, tokenizer, folder)
    made = Quantised(model, scores, folder, to, dense)
    made.figures |= {
        "seconds": time.perf_counter() - start,
        "bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "before/bytes": sum(p.numel() * p.element_size() for p in whole.parameters()),
    }
    config = made.config_dict("reward" if scores else "sft")
    itemsize = small.get_input_embeddings().get_parameter("weight").element_size()
    with suppress(ValueError):  # a model that the planner does not know
        planned = architecture(config), format_of(config), itemsize, "score" if scores else "lm"
        made.figures["planned_bytes"] = file_bytes(*planned)
    models = {"before/": whole, "": small}
    made.evaluated = f"{len(kept):,} held-out {'pairs' if scores else 'prompts'}" if kept else ""
    if rows is not None and scores:
        made.figures |= _reward_figures(models, tokenizer, kept)
    elif rows is not None:
        how: dict[str, Setting] = {"max_new_tokens": response_length, "seed": seed}
        made.figures |= _policy_figures(models, tokenizer, rows, kept, **how)
        if run and to == "nf4" and (run.folder / "adapter" / ADAPTER_FILE).is_file():
            from peft import PeftModel

            base = load(str(run.config["model"])).in_4bit(STAGES[run.stage].starts_from)
            apart: Setting = PeftModel.from_pretrained(base, run.folder / "adapter").eval()
            _, answers = policy_report(apart, tokenizer, kept, reference=whole, **how)
            made.figures["kl_of_adapter"] = kl_per_token(answers)
    return made


def _source(of: Run | Model | str | Path, stage: str) -> tuple[Model, str, bool, Run | None]:
    """→ a handle, the folder of what is to be rounded, whether that is a reward model, the run.
    Raises ValueError for a stage that a model has not, and for weights that are rounded already."""
    run, model = None, run_or_model(of)
    if isinstance(model, Run):
        if stage:
            raise ValueError(f"quantize: {model.name} is a run: leave stage={stage!r} out")
        run, stage = model, "reward" if STAGES[model.stage].roles[0] == "reward" else "sft"
        model = load(str(run.config["model"])).with_stage(stage, run.model_path)
    else:
        alone = model.paths.get("reward") == model.paths["base"]
        stage = stage or ("reward" if alone else "sft")
    if stage not in {"base", "sft", "reward"} - ({"reward"} - model.paths.keys()):
        raise ValueError(f"quantize: no {stage!r} of {model.name}: it has {', '.join(model.paths)}")
    config = model.config_dict(stage)
    if config.get("quantization_config"):
        raise ValueError(f"{model.name} is in {format_of(config)} already: round the whole model")
    return model, model.paths.get(stage, model.paths["base"]), stage == "reward", run


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _rounding(to: str) -> Callable[[Callable[..., PreTrainedModel]], PreTrainedModel]:
    """What makes the rounded model of `load(**settings of from_pretrained)`. Raises ValueError, one
    line, where a package or a GPU is missing."""
    import torch

    where: dict[str, object] = {"device_map": {"": _device()}}
    if to == "nf4":
        return in_4bit
    if to in ("fp32", "bf16"):
        dtype = torch.bfloat16 if to == "bf16" else torch.float32
        return lambda load: load(dtype=dtype, **where)
    if to == "int4" and not torch.cuda.is_available():
        raise ValueError("int4 needs a GPU: torchao has no int4 kernel for CPUs; nf4 runs on them")
    try:
        from torchao import quantization as ao
    except ImportError:
        raise ValueError(f"{to} needs torchao: pip install 'rlhf-lab[quantize]'") from None
    from transformers import TorchAoConfig

    if to == "int4":
        form = ao.Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d")
        where["dtype"] = torch.bfloat16
    else:
        dynamic = to == "int8-dynamic"
        kind = ao.Int8DynamicActivationInt8WeightConfig if dynamic else ao.Int8WeightOnlyConfig
        form = kind(set_inductor_config=False)  # a setting of the whole process
    return lambda load: load(quantization_config=TorchAoConfig(form), **where)


def _dense(model: PreTrainedModel, to: str) -> dict[str, list[str]]:
    """Names of the matrices that a library left as they were, by reason. Raises ValueError where it
    left all of them."""
    from torch import nn

    kept: dict[str, list[str]] = {}
    seen: dict[int, str] = {}
    found = 0
    for name, module in model.named_modules():
        for leaf, weight in module.named_parameters(recurse=False):
            if hasattr(weight, "qdata") or not weight.is_floating_point():
                found += 1
            elif weight.dim() > 1:
                first = seen.setdefault(weight.data_ptr(), name)
                width = getattr(module, "in_features", 0)
                why = "left by transformers: a head" if "." not in name else "left by the library"
                if first != name:
                    why = f"is {first}"
                elif isinstance(module, nn.Embedding):
                    why = "an embedding: looked up, not multiplied"
                elif not isinstance(module, nn.Linear):
                    why = f"{type(module).__name__}: only nn.Linear is rounded"
                elif to == "int4" and width % GROUP:
                    why = f"{width} wide, no multiple of the groups of {GROUP}"
                kept.setdefault(why, []).append(name if leaf == "weight" else f"{name}.{leaf}")
    if not found:
        why, names = max(kept.items(), key=lambda item: len(item[1]))
        raise ValueError(f"{to} reaches no matrix of this model: {names[0]}, …: {why}")
    return {w: n if len(n) < 4 else [*n[:2], f"… {len(n)} in all"] for w, n in kept.items()}


# ------------------------------------------------------------------------------ what it has cost


def _policy_figures(
    models: Mapping[str, PreTrainedModel],
    tokenizer: Tokenizer,
    data: Data,
    prompts: Sequence[Example],
    **how: Setting,
) -> dict[str, float]:
    """`models`: "before/" and "", before and after. Rates are medians of three runs in turn."""
    from ..ppo.texts import sample_ids
    from ..trainers.evaluate import kl_per_token, perplexity, policy_report

    def rate(model: PreTrainedModel) -> float:
        start = time.perf_counter()
        ids = sample_ids(model, tokenizer, prompts[:32], **how)
        return sum(len(answer) for (answer,) in ids) / (time.perf_counter() - start)

    turns = [[rate(model) for model in models.values()] for _ in range(4)][1:]  # one to warm up
    rates = dict(zip(models, map(median, zip(*turns, strict=True)), strict=True))
    gold, rows = data.gold_reward if data.has_gold else None, data.sft.test[: len(prompts)]
    figures, golds = {f"{n}tokens_per_second": rate for n, rate in rates.items()}, []
    for name, model in models.items():
        common = {"gold_reward": gold, "reference": models["before/"], **how}
        _, answers = policy_report(model, tokenizer, prompts, **common)
        golds.append(answers.figures.get("gold_reward", []))
        if gold:
            figures[f"{name}gold_reward"] = mean(golds[-1])
        if rows:
            figures[f"{name}perplexity"] = perplexity(model, tokenizer, rows)
    figures["kl_per_token"] = kl_per_token(answers)
    if change := [after - before for before, after in zip(*golds, strict=True)]:
        figures["gold_change"] = mean(change)
        figures["gold_change_error"] = stdev(change) / math.sqrt(len(change))
    return figures


def _reward_figures(
    models: Mapping[str, PreTrainedModel], tokenizer: Tokenizer, pairs: Sequence[Example]
) -> dict[str, float]:
    import pandas as pd

    from ..trainers.evaluate import pair_scores

    if not pairs:
        return {}
    scores = [pair_scores(m, tokenizer, pairs) for m in models.values()]
    right = [x[:, 0] > x[:, 1] for x in scores]
    # Spearman (1904): Pearson's correlation of the ranks, equal scores sharing the mean one.
    old, new = (pd.Series(x.flatten().numpy()).rank() for x in scores)
    return {
        **{f"{n}accuracy": float(x.float().mean()) for n, x in zip(models, right, strict=True)},
        "pair_agreement": float((right[0] == right[1]).float().mean()),
        "rank_correlation": float(old.corr(new)),
    }
