"""A trained model as others take it: the hub's layout with a card, a GGUF file, a look for vLLM.

    lab.export(run, to="hub")            # a folder to upload: weights, tokenizer, README.md
    lab.export(run, to="gguf")           # one file for llama.cpp and what is built on it
    lab.export(run, to="vllm-check")     # what vLLM would say of the model; writes nothing

Nothing is sent anywhere. A folder is written whole or not at all, and into none that is in use.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..display import Display, by_surface, check_choice, escape, is_number
from ..models.hub import quiet_transformers
from ..models.load import ADAPTER_FILE, BUNDLED, Model, gives_scores, load
from ..models.names import same_sizes, short_names
from ..models.policy import run_or_model
from ..models.tokenizer import has_tokenizer
from ..runs.figures import gloss
from ..runs.json_files import JsonObject, check_empty
from ..runs.run import Run

TRL_TAGS = {"reward": "reward-trainer", "distill": "distillation"}
"""Stages whose tag in TRL's model cards is not their name."""
OF_COST = ("seconds", "tokens_per_second", "tensor_peak_bytes", "process_peak_bytes", "rows")
"""Figures of a run that say nothing of the model's quality."""


def export(
    run: Run | Model | str | Path,
    to: str = "hub",
    out: str | Path | None = None,
    *,
    adapter: bool = False,
) -> Display:
    """Write a run's model for others. `to`: hub, gguf, or vllm-check, which only looks. → what
    there is to know of it, in lines.

    `run`: a run or its folder; for gguf and vllm-check also a model, its name or folder. `out`: an
    empty or new folder [exports/NAME-TO]. `adapter`: LoRA's adapter alone, not the model that it is
    merged into. Raises ValueError or OSError, one line, before anything is written.
    """
    check_choice("to", to, ("hub", "gguf", "vllm-check"))
    if to == "vllm-check" and out is not None:
        raise ValueError(f"vllm-check writes nothing: leave {by_surface('out=', '--out')} out")
    of, model, name = _source(run, to, adapter)
    target = Path(out or f"exports/{name}-{to}")
    if to == "vllm-check":
        lines = [*vllm_facts(model)]
    else:
        check_empty(target)
        there = next(p for p in target.absolute().parents if p.exists())
        with tempfile.TemporaryDirectory(dir=there, prefix=".export-") as place:
            (draft := Path(place, "model")).mkdir()
            lines = [f"written: {target}"]
            if of and to == "hub":
                lines += _write_hub(of, model, draft, adapter)
                lines.append(f"nothing is sent; to upload it: hf upload OWNER/NAME {target}")
            else:
                from .gguf_file import write_gguf

                write_gguf(model, draft / f"{name}.gguf", name)
            if target.exists():
                target.rmdir()
            target.parent.mkdir(parents=True, exist_ok=True)
            draft.replace(target)
    return Display("\n".join(lines), f"<p>{'<br>'.join(map(escape, lines))}</p>")


def _source(of: Run | Model | str | Path, to: str, adapter: bool) -> tuple[Run | None, Path, str]:
    """→ the run, if it is one; the folder of what is exported, and a name for it."""
    if to == "vllm-check" and not isinstance(of, (Run, Model)):
        if (Path(of) / ADAPTER_FILE).is_file():
            return None, Path(of), Path(of).name
    found = run_or_model(of)
    if adapter and (to == "gguf" or not isinstance(found, Run)):
        raise ValueError("adapter is for a run, to hub or vllm-check: leave it out")
    if isinstance(found, Run):
        return found, _model(found, adapter), found.name
    folder = Path(found.paths.get("sft", found.paths["base"]))
    if to == "hub":
        other = by_surface("to='gguf'", "--to gguf")
        raise ValueError(
            f"{found.name} is a model: the hub's layout is for a run; {other} takes it"
        )
    if not folder.is_dir():
        raise ValueError(f"{found.name} is not on this machine: hf download, and give its folder")
    return None, folder, Path(found.name).resolve().name


def _model(run: Run, adapter: bool) -> Path:
    """The folder of what is exported. Raises ValueError or OSError where it is not there."""
    if run.status == "running":
        raise ValueError(f"{run.name} is still training: export it when it is done")
    if not adapter:
        return run.model_path
    folder = run.folder / "adapter"
    if not (folder / ADAPTER_FILE).is_file():
        raise ValueError(f"{run.name} has no adapter, which lora_r trains: export the model")
    base = json.loads((folder / ADAPTER_FILE).read_text())["base_model_name_or_path"]
    if base != hub_id(base):
        raise ValueError(
            f"the adapter's base is not on the hub ({base}), so nobody else could load it: "
            "export the model, which it is merged into"
        )
    return folder


# ------------------------------------------------------------------------------- the hub's layout


def _write_hub(run: Run, model: Path, out: Path, adapter: bool) -> Iterator[str]:
    """Copy the model's files, say how to sample from it, write its card. → what to know of it"""
    shutil.copytree(model, out, ignore=shutil.ignore_patterns("README.md"), dirs_exist_ok=True)
    if run.stage != "reward" and not adapter:
        _write_generation_config(out)
    if not _write_card(run, out, adapter):
        yield "no licence of the base model is known here: add `license:` to README.md"


def _write_generation_config(folder: Path) -> None:
    """Sampling as the model was trained and evaluated: at temperature 1 from all tokens. Without
    `do_sample` transformers' server is greedy, without `top_k` transformers samples from 50."""
    from transformers import GenerationConfig

    with quiet_transformers():
        config = GenerationConfig.from_pretrained(str(folder))
        config.update(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
        config._from_model_config = False  # else readers take its ends for a class' default
        config.save_pretrained(str(folder))


def hub_id(name: object) -> str | None:
    """The hub's id of what a run calls its model or data: one that the lab knows, or that is in the
    hub's cache. None for a bundled name, and for a path, which may look like one: a card must not
    link to what is somebody else's."""
    from huggingface_hub import constants

    found = short_names().get(str(name).lower(), str(name))
    kinds = (f"{kind}--{found.replace('/', '--')}" for kind in ("models", "datasets"))
    cached = any(Path(constants.HF_HUB_CACHE, kind).is_dir() for kind in kinds)
    return found if found in same_sizes() or cached else None


def _licence(model: str) -> JsonObject:
    """The fields of a licence in the card of the base model, where that is here."""
    from huggingface_hub import ModelCard, try_to_load_from_cache

    folder = load(model).paths["base"] if model in BUNDLED else model
    base = hub_id(model)
    file = try_to_load_from_cache(base, "README.md") if base else Path(folder, "README.md")
    if not isinstance(file, (str, Path)) or not Path(file).is_file():
        return {}
    known = ModelCard.load(file, ignore_metadata_errors=True).data.to_dict()
    return {field: value for field, value in known.items() if field.startswith("license")}


def _write_card(run: Run, out: Path, adapter: bool) -> bool:
    """README.md with the metadata that the hub, and readers of TRL's cards, look for. → whether it
    names a licence"""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    model, data = str(run.config["model"]), str(run.config.get("data"))
    base, dataset, licence = hub_id(model), hub_id(data), _licence(model)
    read = dataset or Path(data).name  # no folders of this machine
    task = "text-classification" if run.stage == "reward" else "text-generation"
    summary = run.summary if run.status == "finished" else {}
    figures = {n: v for n, v in summary.items() if is_number(v) and n not in OF_COST}
    where: JsonObject = {"task_type": task, "dataset_type": read, "dataset_name": read}
    results = [
        EvalResult(metric_type=name, metric_value=value, dataset_split="test", **where)
        for name, value in figures.items()
        if not name.startswith("before/")
    ]
    about = ModelCardData(
        **licence,
        base_model=base,
        datasets=[dataset] if dataset else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag=task,
        tags=["trl", TRL_TAGS.get(run.stage, run.stage), "rlhf", "rlhf_lab"],
        model_name=run.name,
        eval_results=results,
    )
    words: JsonObject = {"base": base or f"{Path(model).name} (not on the hub)", "data": read}
    words["settings"] = {
        name: Path(value).name if Path(str(value)).is_absolute() else value
        for name, value in run.config["settings"].items()
    }
    template = str(Path(__file__).with_name("card.md"))
    card = ModelCard.from_template(about, template, run=run, figures=figures, gloss=gloss, **words)
    card.save(out / "README.md")
    return bool(licence)


# ------------------------------------------------------------------------------------------- vLLM

CPU_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Widths of a head that its attention on a CPU takes (vllm/v1/attention/backends/cpu_attn.py)."""


def vllm_facts(model: Path) -> Iterator[str]:
    """What vLLM 0.32 refuses of a folder, or takes otherwise than meant: tried with it, the
    rank of adapters read in its source."""
    if (model / ADAPTER_FILE).is_file():
        rank = json.loads((model / ADAPTER_FILE).read_text())["r"]
        yield f"an adapter: vllm serve BASE --enable-lora --max-lora-rank {rank} (16 by default)"
        return
    config = json.loads((model / "config.json").read_text())
    if kept := config.get("quantization_config"):
        how = kept["quant_method"]
        yield f"weights in fewer bits ({how}): not tried here; see the formats that vLLM lists"
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    hidden, heads = hidden or config.get("n_embd"), heads or config.get("n_head")
    width = config.get("head_dim") or (hidden // heads if hidden and heads else None)
    if width is None:
        yield f"not known of {config.get('model_type')}: how wide its heads are"
    elif width not in CPU_HEADS:
        taken = ", ".join(map(str, CPU_HEADS))
        yield f"refused on a CPU: heads are {width} wide, and it takes {taken}"
    if not has_tokenizer(model):
        yield "refused: the folder has no tokenizer (--skip-tokenizer-init takes token ids)"
    if config.get("dtype") == "float32" and not kept:
        yield "fp32 weights are run in 16 bits: --dtype float32 keeps them"
    if context := config.get("max_position_embeddings"):
        yield f"at most {context} tokens of prompt and answer: it refuses --max-model-len above"
    if gives_scores(config):
        yield "scores: --runner pooling; without score_offset of config.json, add it"
