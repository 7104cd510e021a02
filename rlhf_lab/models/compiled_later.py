"""Imports of packages that compile functions of theirs while they are imported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from inspect import isfunction
from typing import Any
from unittest.mock import patch

Function = Callable[..., Any]


@contextmanager
def compiled_later() -> Iterator[None]:
    """While it lasts, a function that is given to `torch.compile` is compiled when it is called.

    bitsandbytes so compiles four kernels for 4 and 8 bits on a CPU as it is imported, and with that
    imports all of inductor: a quarter of what a start of PPO imports.
    """
    import torch

    compile_now: Function = torch.compile

    def compile_later(model: Function | None = None, **how: object) -> Function:
        if not isfunction(model):  # a module, or the decorator that is to come
            made: Function = compile_now(model, **how)
            return made
        compiled = cache(lambda: compile_now(model, **how))

        @wraps(model)
        def call(*args: object, **kwargs: object) -> object:
            return compiled()(*args, **kwargs)

        return call

    with patch.object(torch, "compile", compile_later):
        yield
