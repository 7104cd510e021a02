"""A bundled model's tokenizer read from its files alone: importing transformers takes seconds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from .tokenizer import declared_stops, load_tokenizer


class BareTokenizer:
    """What the readers of prompts and answers (`data/chat.py`) need of a tokenizer, by its names:
    it writes what `load_tokenizer`'s tokenizer writes."""

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
