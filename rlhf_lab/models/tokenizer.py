"""A tokenizer made ready for training: eos, a pad token of its own, a chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from .hub import fetch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""How a conversation is written for a model that comes without a template of its own."""


def load_tokenizer(path: str | Path, trust_remote_code: bool = False) -> Tokenizer:
    """A tokenizer with eos, a pad token that is not eos (rule 6), and a chat template. Its
    `stop_token_ids` are those of the generation config beside it."""
    from transformers import AutoTokenizer

    settings: dict[str, object] = {"trust_remote_code": trust_remote_code}
    tokenizer: Tokenizer = fetch(AutoTokenizer.from_pretrained, path, "tokenizer", **settings)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer in {path} has no eos token, so no response would ever end: set "
            "eos_token in its tokenizer_config.json"
        )
    if "MistralCommon" in type(tokenizer).__name__:  # writes no template, and takes no pad token
        settings["mistral_format"] = False
        tokenizer = fetch(AutoTokenizer.from_pretrained, path, "tokenizer", **settings)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        give_pad_token(tokenizer)
    if not tokenizer.chat_template:
        tokenizer.chat_template = plain_template(tokenizer)
    known = range(embedding_rows(tokenizer))
    tokenizer.stop_token_ids = [i for i in declared_stops(path) if i in known]
    return tokenizer


def plain_template(tokenizer: Tokenizer) -> str:
    """CHAT_TEMPLATE, which begins with bos where the tokenizer's texts do."""
    plain, text = (tokenizer("a", add_special_tokens=x).input_ids for x in (False, True))
    begins = len(text) > len(plain) and text[0] == tokenizer.bos_token_id
    return "{{ bos_token }}" * begins + CHAT_TEMPLATE


def declared_stops(path: str | Path) -> list[int]:
    """The tokens at which the checkpoint's generation config ends a text, where it has one. A
    single one in a file derived from config.json may be the default of a class. Raises ValueError,
    one line, for a file that cannot be read."""
    file = Path(path) / (name := "generation_config.json")
    if not Path(path).is_dir():
        from transformers.utils.hub import cached_file

        try:
            file = Path(str(fetch(cached_file, path, "generation config", filename=name)))
        except (OSError, ValueError):  # it has none
            return []
    if not file.is_file():
        return []
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}; mend it or delete it") from None
    declared = found.get("eos_token_id")
    if isinstance(declared, int):
        declared = [] if found.get("_from_model_config") else [declared]
    return list(declared or [])


def has_tokenizer(path: str | Path) -> bool:
    """Whether a checkpoint brings a tokenizer; on the hub they do."""
    names = ("tokenizer*.json", "tokenizer.model", "vocab.*", "*.spm", "spiece.model")
    return not Path(path).is_dir() or any(any(Path(path).glob(name)) for name in names)


def same_files(path: str | Path, other: str | Path) -> bool:
    """Whether two folders hold the same tokenizer.json, in which a vocabulary is whole."""
    files = [Path(folder) / "tokenizer.json" for folder in (path, other)]
    return all(f.is_file() for f in files) and files[0].read_bytes() == files[1].read_bytes()


def embedding_rows(tokenizer: Tokenizer) -> int:
    """Embeddings that a model needs for every id of the tokenizer, which may leave ids out."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values(), default=0) + 1)


def same_vocabulary(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether two tokenizers mean the same by a token id."""
    return one is other or one.get_vocab() == other.get_vocab()


def give_pad_token(tokenizer: Tokenizer, *ends: int) -> None:
    """Set a pad token that no text uses, nor any of `ends`, without growing the vocabulary when one
    is free.

    What families have: Llama 2 and Mistral `<unk>` (they write every character in bytes), Llama 3
    `<|finetune_right_pad_id|>`, Qwen and Gemma a pad token of their own. GPT-2 has nothing to
    spare and grows by one token.
    """
    vocabulary = tokenizer.get_vocab()
    written = set(tokenizer("\u2603 \U0001f9ff ? \x07", add_special_tokens=False).input_ids)
    reserved = ("<|pad|>", "<pad>", "[PAD]", "<|endoftext|>", "<|finetune_right_pad_id|>", "<unk>")
    for token in (*reserved, tokenizer.unk_token):
        taken = written | {tokenizer.eos_token_id, tokenizer.bos_token_id, *ends}
        if token in vocabulary and vocabulary[token] not in taken:
            tokenizer.pad_token = token
            return
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})


class BareTokenizer:
    """What the readers of prompts and answers (`data/chat.py`) need of a bundled model's tokenizer,
    by its names, read from its files alone, since importing transformers takes seconds: it writes
    what `load_tokenizer`'s tokenizer writes."""

    bos_token_id = None

    def __init__(self, folder: Path) -> None:
        from jinja2.sandbox import ImmutableSandboxedEnvironment
        from tokenizers import Tokenizer

        settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
        self.chat_template = (folder / "chat_template.jinja").read_text("utf-8")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        self.template = environment.from_string(self.chat_template)
        self.folder = folder
        self.backend: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.eos_token: str = settings["eos_token"]
        special = self.eos_token, settings["pad_token"], *settings["extra_special_tokens"]
        self.eos_token_id, *more = map(self.backend.token_to_id, special)
        self.all_special_ids = [self.eos_token_id, *more]
        self.added_tokens_decoder = self.backend.get_added_tokens_decoder()
        self.stop_token_ids = declared_stops(folder)

    def convert_ids_to_tokens(self, token_id: int) -> str | None:
        token: str | None = self.backend.id_to_token(token_id)
        return token

    def __call__(self, text: str, add_special_tokens: bool = True) -> SimpleNamespace:
        ids = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        return SimpleNamespace(input_ids=ids)

    @cached_property
    def whole(self) -> Any:
        """transformers' tokenizer of the same files."""
        return load_tokenizer(self.folder)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, object]], tools: object = None, **how: object
    ) -> str:
        """The text that the template makes of messages of plain text; of others, what transformers
        makes of them."""
        plain = all(isinstance(v, str) for m in messages for v in m.values())
        if tools or not plain or not how.keys() <= {"tokenize", "add_generation_prompt"}:
            return str(self.whole.apply_chat_template(messages, tools=tools, **how))
        return self.template.render(messages=messages, **how)
