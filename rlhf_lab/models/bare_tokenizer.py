"""A tokenizer read from its files alone: importing transformers takes seconds.

What it writes is what `load_tokenizer`'s tokenizer writes. Where that is not certain, nothing is
read (`bare_tokenizer` gives None), or the tokenizer itself is asked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from .tokenizer import declared_stops, load_tokenizer

if TYPE_CHECKING:
    from jinja2 import Template

NAMED = frozenset(f"{n}_token" for n in "bos eos unk sep pad cls mask".split())
"""The special tokens that have a name."""
SETTINGS = NAMED | frozenset(
    "backend tokenizer_class chat_template extra_special_tokens padding_side model_max_length "
    "model_input_names truncation_side is_local local_files_only "
    "clean_up_tokenization_spaces".split()
)
"""Of a tokenizer_config.json: what changes no token id, and what is read here."""
CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")
FAMILIES = ("gpt2", "gpt_neox", "llama", "qwen3")
"""Classes of tokenizers for which transformers takes a tokenizer.json as it is, and types of models
for which it takes the class that is asked for."""
MORE_FILES = ("special_tokens_map.json", "added_tokens.json", "additional_chat_templates")
OTHER_THERE = frozenset({"strftime_now", "dict", "namespace", "tojson"})
"""What jinja has not, or otherwise than transformers gives it to a template."""


class BareTokenizer:
    """What the readers of prompts and answers (`data/chat.py`) need of a tokenizer, by its names.
    `backend`: of the tokenizers library; `settings`: of the tokenizer_config.json."""

    def __init__(
        self, folder: Path, backend: Any, settings: Mapping[str, Any], template: Template
    ) -> None:
        self.folder, self.backend, self.template = folder, backend, template
        self.named = {name: settings[name] for name in NAMED if settings.get(name)}
        self.chat_template, self.eos_token = settings["chat_template"], settings["eos_token"]
        special = [*self.named.values(), *settings.get("extra_special_tokens", ())]
        self.all_special_ids = [backend.token_to_id(token) for token in special]
        self.added_tokens_decoder = backend.get_added_tokens_decoder()
        self.eos_token_id = backend.token_to_id(self.eos_token)
        self.bos_token_id = backend.token_to_id(self.named.get("bos_token", ""))
        declared, last = declared_stops(folder), max(backend.get_vocab().values())
        self.stop_token_ids = [token for token in declared if 0 <= token <= last]

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
        """The text that the template makes of messages of plain text; of others, and where it
        refuses them, what transformers makes of them."""
        plain = not tools and how.keys() <= {"tokenize", "add_generation_prompt"}
        given = {"add_generation_prompt": False, **self.named, **how, "tools": None}
        if plain and all(
            m.keys() == {"role", "content"} and all(isinstance(v, str) for v in m.values())
            for m in messages
        ):
            with suppress(Exception):  # a template raises what it likes; transformers tells it
                return self.template.render(given, messages=messages, documents=None)
        return str(self.whole.apply_chat_template(messages, tools=tools, **how))


def bare_tokenizer(path: str | Path) -> BareTokenizer | None:
    """The tokenizer of a model's folder; None where its files are not there or not understood."""
    from jinja2 import nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from tokenizers import Tokenizer

    folder, how = Path(path), {"trim_blocks": True, "lstrip_blocks": True}
    environment = ImmutableSandboxedEnvironment(**how, extensions=["jinja2.ext.loopcontrols"])
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
        if (file := folder / "chat_template.jinja").is_file():
            settings["chat_template"] = file.read_text("utf-8")
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tree = environment.parse(settings["chat_template"])
        special = {settings[name] for name in NAMED if settings.get(name)}
        special |= set(settings.get("extra_special_tokens", ()))
    except Exception:  # each of the parsers has its own; load_tokenizer says what is wrong
        return None
    used = {str(vars(node).get("name")) for node in tree.find_all((nodes.Name, nodes.Filter))}
    added = backend.get_added_tokens_decoder().values()
    understood = (
        settings.keys() <= SETTINGS
        and settings.get("tokenizer_class") in CLASSES
        and config.get("model_type") in FAMILIES
        and "auto_map" not in config
        and not any((folder / name).exists() for name in MORE_FILES)
        and settings.get("eos_token")
        and settings.get("pad_token") not in (None, settings["eos_token"])
        and special <= {token.content for token in added if token.special}
        and not (backend.truncation or backend.padding or backend.encode_special_tokens)
        and not used & OTHER_THERE
    )
    if not understood:
        return None
    return BareTokenizer(folder, backend, settings, environment.from_string(tree))
