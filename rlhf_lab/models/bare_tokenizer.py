"""A tokenizer read from its files alone: importing transformers takes seconds.

What it writes is what `load_tokenizer`'s tokenizer writes. Where that is not certain, nothing is
read (`bare_tokenizer` gives None), or the tokenizer itself is asked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from .tokenizer import declared_stops, embedding_rows, load_tokenizer

if TYPE_CHECKING:
    from jinja2 import Template
    from tokenizers import Tokenizer as Backend

NAMED = frozenset(f"{n}_token" for n in "bos eos unk sep pad cls mask".split())
"""The special tokens that have a name: what a template may write beside the messages."""
SETTINGS = NAMED | {
    *("backend", "tokenizer_class", "chat_template", "extra_special_tokens", "padding_side"),
    *("model_max_length", "model_input_names", "truncation_side", "is_local", "local_files_only"),
    "clean_up_tokenization_spaces",
}
"""Of a tokenizer_config.json: those that change no token id, and those that are read here."""
CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")
"""Tokenizer classes for which transformers takes a tokenizer.json as it is."""
FAMILIES = ("gpt2", "gpt_neox", "llama", "qwen3")
"""Model types whose checkpoints transformers gives the class that they ask for."""
OTHER_THERE = frozenset({"strftime_now", "dict", "namespace", "tojson"})
"""What jinja has not, or otherwise than transformers gives it to a template."""
OTHERS = ("special_tokens_map.json", "added_tokens.json", "additional_chat_templates")
"""Files of a tokenizer that say more than its tokenizer.json does."""


class BareTokenizer:
    """What reads prompts and answers (`data/chat.py`) needs of a tokenizer, under its names."""

    def __init__(
        self, folder: Path, backend: Backend, settings: Mapping[str, Any], template: Template
    ) -> None:
        self.folder, self.backend, self.template = folder, backend, template
        self.named: dict[str, str] = {n: settings[n] for n in NAMED if settings.get(n)}
        special = [*self.named.values(), *settings.get("extra_special_tokens", ())]
        self.chat_template: str = settings["chat_template"]
        self.eos_token = self.named["eos_token"]
        self.all_special_ids = [backend.token_to_id(token) for token in special]
        self.added_tokens_decoder = backend.get_added_tokens_decoder()
        self.eos_token_id = backend.token_to_id(self.eos_token)
        bos = self.named.get("bos_token")
        self.bos_token_id = backend.token_to_id(bos) if bos else None
        declared, vocabulary = declared_stops(folder), range(embedding_rows(self))
        self.stop_token_ids = [token for token in declared if token in vocabulary]

    def __len__(self) -> int:
        return self.backend.get_vocab_size()

    def get_vocab(self) -> dict[str, int]:
        return self.backend.get_vocab()

    def convert_ids_to_tokens(self, token_id: int) -> str | None:
        return self.backend.id_to_token(token_id)

    def __call__(self, text: str, add_special_tokens: bool = True) -> SimpleNamespace:
        ids = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        return SimpleNamespace(input_ids=ids)

    @cached_property
    def whole(self) -> Any:
        """transformers' tokenizer of the same files."""
        return load_tokenizer(self.folder)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, object]],
        tokenize: bool = False,
        tools: object = None,
        add_generation_prompt: bool = False,
        **more: object,
    ) -> str:
        """The template's text of messages of plain text; of others, and where the template refuses
        them, what transformers makes of them."""
        plain = all(m.keys() == {"role", "content"} for m in messages) and not (tools or more)
        if plain and messages and all(isinstance(v, str) for m in messages for v in m.values()):
            copies = [dict(message) for message in messages]
            given = {"messages": copies, "add_generation_prompt": add_generation_prompt}
            try:
                return self.template.render(**self.named, **given, tools=None, documents=None)
            except Exception:  # a template raises what it likes
                pass
        more |= {"tools": tools, "add_generation_prompt": add_generation_prompt}
        return str(self.whole.apply_chat_template(messages, tokenize=tokenize, **more))


def bare_tokenizer(path: str | Path) -> BareTokenizer | None:
    """The tokenizer of a model's folder; None where its files are not there or not understood."""
    folder = Path(path)
    try:
        config, settings = (
            json.loads((folder / name).read_text("utf-8"))
            for name in ("config.json", "tokenizer_config.json")
        )
        if (file := folder / "chat_template.jinja").is_file():
            settings["chat_template"] = file.read_text("utf-8")
    except (OSError, ValueError):
        return None  # load_tokenizer says what is wrong
    if not (
        settings.keys() <= SETTINGS
        and settings.get("tokenizer_class") in CLASSES
        and config.get("model_type") in FAMILIES
        and "auto_map" not in config
        and not any((folder / name).exists() for name in OTHERS)
        and isinstance(settings.get("extra_special_tokens", []), list)
        and all(isinstance(settings.get(name) or "", str) for name in (*NAMED, "chat_template"))
        and settings.get("pad_token") not in (None, settings.get("eos_token"))
    ):
        return None
    template = _template(settings.get("chat_template"))
    backend = _backend(folder / "tokenizer.json", settings)
    if template is None or backend is None or not settings.get("eos_token"):
        return None
    return BareTokenizer(folder, backend, settings, template)


def _backend(file: Path, settings: Mapping[str, Any]) -> Backend | None:
    """What encodes; None where transformers would add tokens to it, or it cuts or pads."""
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_file(str(file))
    except Exception:  # tokenizers raises no other class
        return None
    added = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
    special = {settings[name] for name in NAMED if settings.get(name)}
    special |= {str(token) for token in settings.get("extra_special_tokens", ())}
    cuts = backend.truncation or backend.padding or backend.encode_special_tokens
    return None if cuts or not special <= added else backend


def _template(source: str | None) -> Template | None:
    """A chat template in an environment like transformers'; None where it uses what is not here."""
    from jinja2 import TemplateError, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    options = {"trim_blocks": True, "lstrip_blocks": True}
    environment = ImmutableSandboxedEnvironment(**options, extensions=["jinja2.ext.loopcontrols"])
    try:
        tree = environment.parse(source or "")
    except TemplateError:
        return None
    used = {str(vars(node).get("name")) for node in tree.find_all((nodes.Name, nodes.Filter))}
    return environment.from_string(source) if source and not used & OTHER_THERE else None
