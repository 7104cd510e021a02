"""Real tokenizers out of mistral-common's package (Apache-2.0), which need no library of their own:
a SentencePiece model is read here, field by field."""

from __future__ import annotations

import importlib.util
import json
import struct
from pathlib import Path

import pytest

SENTENCEPIECE = "tokenizer.model.v1"
TEKKEN = "tekken_240911.json"
TEKKEN_SIZE = 12_000  # of 131,072 tokens, so that reading its merges takes no seconds


def data_file(name: str) -> Path:
    found = importlib.util.find_spec("mistral_common")
    if found is None or not found.submodule_search_locations:
        pytest.skip("mistral-common, whose tokenizer files these tests read, is not installed")
    return Path(found.submodule_search_locations[0]) / "data" / name


def fields(message: bytes):
    """The fields of a protobuf message: (number, value), value bytes or a number."""

    def varint(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            byte, at = message[at], at + 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value, at

    at = 0
    while at < len(message):
        key, at = varint(at)
        kind = key & 7
        if kind == 0:
            value, at = varint(at)
        else:
            size, at = varint(at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
            value, at = message[at : at + size], at + size
        yield key >> 3, value


def pieces(file: Path) -> list[tuple[str, float, int]]:
    """Piece, score and type (1 normal, 2 unknown, 3 control, 6 byte) of a SentencePiece model."""
    found = []
    for number, piece in fields(file.read_bytes()):
        if number == 1:
            parts = dict(fields(piece))
            score = struct.unpack("<f", parts[2])[0] if 2 in parts else 0.0
            found.append((parts[1].decode(), score, parts.get(3, 1)))
    return found


def sentencepiece(legacy: bool):
    """Llama's and Mistral's first tokenizer: a text gets a space before it; `legacy` puts one
    behind every special token too."""
    from transformers import LlamaTokenizer

    vocabulary = {piece: i for i, (piece, *_) in enumerate(pieces(data_file(SENTENCEPIECE)))}
    merges = []  # in the order of what they make: SentencePiece's ids are sorted by score
    for piece, i in vocabulary.items():
        for cut in range(1, len(piece)):
            if piece[:cut] in vocabulary and piece[cut:] in vocabulary:
                merges.append((i, vocabulary[piece[:cut]], piece[:cut], piece[cut:]))
    merges = [(left, right) for *_, left, right in sorted(merges)]
    return LlamaTokenizer(vocab=vocabulary, merges=merges, legacy=legacy, add_bos_token=True)


def tekken_file(folder: Path) -> Path:
    """The first tokens of Mistral's byte-level tokenizer, with its special tokens written out."""
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    raw = json.loads(data_file(TEKKEN).read_text())
    raw["config"]["default_vocab_size"] = TEKKEN_SIZE
    special = list(Tekkenizer.DEPRECATED_SPECIAL_TOKENS)
    for token in special:
        token["token_str"] = str(getattr(token["token_str"], "value", token["token_str"]))
    raw["special_tokens"] = raw.get("special_tokens") or special
    file = folder / "tekken.json"
    file.write_text(json.dumps(raw))
    return file


def tekken(folder: Path):
    """It as transformers' tokenizer, by transformers' own converter."""
    from transformers import PreTrainedTokenizerFast

    try:
        from transformers.integrations.mistral.tokenizer import MistralConverter
    except ImportError:
        pytest.skip("this transformers has no converter for tekken files")
    made = MistralConverter(str(tekken_file(folder))).converted()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
