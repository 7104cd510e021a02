"""Something else in the place of an attribute or a function, for as long as a block lasts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

T = TypeVar("T")

_ABSENT = object()


@contextmanager
def patched(owner: object, name: str, new: object) -> Iterator[object]:
    """`owner.name` is `new` while this lasts; → what it was."""
    old = vars(owner).get(name, _ABSENT)
    setattr(owner, name, new)
    try:
        yield old
    finally:
        if old is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, old)


@contextmanager
def fused_head_within(block: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """TRL's fused head, forward and backward, runs within a block of its own. Nothing happens
    where TRL was not imported: then nobody calls it."""
    module = sys.modules.get("trl.kernels.chunked_logprob")
    if module is None:
        yield
        return
    head = module.ChunkedLogProbFunction

    def within(function: Callable[..., T]) -> staticmethod[..., T]:
        def call(*args: object, **kwargs: object) -> T:
            with block():
                return function(*args, **kwargs)

        return staticmethod(call)

    with (
        patched(head, "forward", within(head.forward)),
        patched(head, "backward", within(head.backward)),
    ):
        yield
