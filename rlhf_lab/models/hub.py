"""What is fetched by transformers, from a folder, the hub's cache or the hub."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from ..display import by_surface, first_line
from .names import nearest, same_sizes
from .packaged import PACKAGED, REMEDY, local_folder

Loaded = TypeVar("Loaded")


def hub_reachable(seconds: float = 3.0) -> bool:
    """Whether the hub answers, unless HF_HUB_OFFLINE says not to ask."""
    from huggingface_hub import constants

    address = urlsplit(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE or not address.hostname:
        return False
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname, port), seconds).close()
    except OSError:
        return False
    return True


@contextmanager
def quiet_transformers(bars: bool = True) -> Iterator[None]:
    """transformers logs nothing below an error while this lasts, and without `bars` shows none."""
    from transformers.utils import logging as theirs

    verbosity, shown = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity(logging.ERROR)
    if not bars:
        theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(verbosity)
        if shown and not bars:
            theirs.enable_progress_bar()


def find_config(path: str) -> Path | None:
    """A model's config.json, in a folder or in the hub's cache; None where transformers has to ask
    the hub. Raises ValueError at once, with near names, where there is nobody to ask."""
    if (file := Path(path) / "config.json").is_file():
        return file
    if Path(path).is_dir():
        return None
    from huggingface_hub import constants  # the rest of it takes a second to import

    cached = Path(constants.HF_HUB_CACHE, f"models--{path.replace('/', '--')}")
    if (main := cached / "refs" / "main").is_file():
        file = cached / "snapshots" / main.read_text().strip() / file.name
    if file.is_file():
        return file
    if not hub_reachable():
        raise ValueError(_nowhere("model", path, nearest(path)))
    return None


def _nowhere(what: str, path: str, hint: str = "") -> str:
    """What to say of a model that is neither here nor to be had."""
    return (
        f"no {what} {path!r}: {hint}neither a folder here nor in the hub's cache, and the hub "
        "cannot be reached; download the model elsewhere and give its folder"
        f"{f', {REMEDY}' * (path in PACKAGED)}"
    )


def fetch(
    from_pretrained: Callable[..., Loaded], path: str | Path, what: str, **settings: object
) -> Loaded:
    """`from_pretrained(path, **settings)`; whatever goes wrong becomes a ValueError of one line
    that says what to do. `what` is the word for it: "model", "config", "tokenizer"."""
    asked = str(path)
    with quiet_transformers():
        path = local_folder(asked) or path
    offline = not Path(path).is_dir() and not hub_reachable()
    try:
        with quiet_transformers(bars=not offline and not Path(path).is_dir()):  # it may download
            return from_pretrained(str(path), local_files_only=offline, **settings)
    except Exception as error:  # damaged files raise whatever their parsers raise
        if offline:
            raise ValueError(_nowhere(what, asked)) from None
        hint = "" if Path(path).is_dir() or asked in same_sizes() else nearest(asked)
        raise ValueError(
            f"cannot load a {what} from {path}: {hint}{_reason(path, error)}"
        ) from None


POINTER = b"version https://git-lfs"
"""What a file begins with that Git LFS has not fetched."""


def pointer(path: Path) -> str:
    """What to do about a file that Git LFS has not fetched; "" for any other."""
    try:
        with path.open("rb") as start:
            found = start.read(len(POINTER)) == POINTER
    except OSError:  # who reads it next says why it cannot be read
        return ""
    return f"{path.name} is a pointer of Git LFS, not the file: run git lfs pull" * found


def _reason(path: str | Path, error: Exception) -> str:
    """The first line of an error, or a better word where we know one."""
    folder = Path(path)
    if "trust_remote_code" in str(error) or "custom code" in str(error):
        how = by_surface("load it with trust_remote_code=True", "give --trust-remote-code")
        return f"it brings Python code of its own; if you trust its makers, {how}"
    pickled = [*folder.glob("*.bin"), *folder.glob("*.pt*")] if folder.is_dir() else []
    if pickled and not list(folder.glob("*.safetensors")):
        return "its weights are pickled (.bin), which can run code; convert them to safetensors"
    files = [*folder.glob("*.safetensors"), *folder.glob("tokenizer*")]
    if what := next(filter(None, map(pointer, files)), ""):
        return what
    if "backend tokenizer" in str(error) and folder.is_dir():
        return "no tokenizer in it: put tokenizer.json (or tokenizer.model) beside its weights"
    return first_line(error)
