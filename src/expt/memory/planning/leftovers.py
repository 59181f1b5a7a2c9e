"""Fake tensors that a traced model left in somebody's cache, where a training would find them.

A model may keep what it once computed: a positional table behind `functools.lru_cache`, a mask
in a module-level dictionary. Traced, it keeps a tensor without values.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterator
from contextlib import contextmanager

from torch._subclasses.fake_tensor import FakeTensor

LIBRARIES = ("torch.", "functools", "typing", "sympy")
"""Where caches hold no tensors of a model."""


@contextmanager
def older_objects_aside() -> Iterator[None]:
    """Keep Python's collector to what is made inside, since all the rest takes it long to look at.

    Does nothing where something else has set objects aside.
    """
    ours = gc.get_freeze_count() == 0
    if ours:
        gc.freeze()
    try:
        yield
    finally:
        if ours:
            gc.unfreeze()


def any_left() -> bool:
    """Tell whether fake tensors are still held; quick inside `older_objects_aside`."""
    gc.collect()
    return _held() > 0


def clear_leftovers() -> int:
    """Empty function caches and return how many fake tensors are held after it."""
    for found in gc.get_objects():
        # By type: asking an object for its class may run code of its own.
        if type(found) is functools._lru_cache_wrapper:
            module = str(getattr(found, "__module__", ""))
            if not module.startswith(LIBRARIES):
                found.cache_clear()
    gc.collect()
    return _held()


def _held() -> int:
    return sum(type(found) is FakeTensor for found in gc.get_objects())
