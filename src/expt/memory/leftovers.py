"""Fake tensors that a traced model left in somebody's cache, where a training would find them.

A model may keep what it once computed: a positional table behind `functools.lru_cache`, a mask
in a module-level dictionary. Traced, it keeps a tensor without values.
"""

from __future__ import annotations

import functools
import gc

from torch._subclasses.fake_tensor import FakeTensor

LIBRARIES = ("torch.", "functools", "typing", "sympy")
"""Where caches hold no tensors of a model."""


def clear_leftovers() -> int:
    """Empty function caches if fake tensors are still held; return how many are held after."""
    gc.collect()
    if not _held():
        return 0
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
