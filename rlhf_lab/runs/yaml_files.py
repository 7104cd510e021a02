"""Files of names and values that people write: YAML, or JSON.

PyYAML alone keeps the last of two values of one name, and takes 1e-5 for a word.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

import yaml

from .json_files import JsonObject, unread


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """YAML 1.1 in which no name is said twice, and numbers are written as in YAML 1.2 and JSON."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and lines.setdefault(key.value, line) != line:
                raise _twice(f"lines {lines[key.value]} and {line}", key.value)
        found: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return found


EXPONENT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+.0123456789"))


def _twice(where: str, name: str) -> ValueError:
    return ValueError(f"{where} both say {name}: leave one of them out")


def _once(pairs: Iterable[tuple[str, object]]) -> JsonObject:
    """An object of a JSON file."""
    found: JsonObject = {}
    for name, value in pairs:
        if name in found:
            raise _twice("two lines", name)
        found[name] = value
    return found


def read_names(path: str | Path) -> JsonObject:
    """What a YAML or JSON file (`.json`) says, by name. Raises ValueError, one line that begins
    with the file's name, for one that cannot be read, is empty, says a name twice, or has none."""
    path = Path(path).expanduser()
    try:
        text = path.read_text("utf-8")
        if not text.strip():
            raise ValueError("it is empty")
        if path.suffix.lower() == ".json":
            found = json.loads(text, object_pairs_hook=_once)
        else:
            found = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{path}{line} is not YAML: {error.problem}") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(unread(path, error)) from None
    if not isinstance(found, dict):
        what = "nothing" if found is None else f"no names with values, but {found!r:.40}"
        raise ValueError(f"{path} holds {what}: write lines like NAME: VALUE")
    return {str(name): value for name, value in found.items()}
