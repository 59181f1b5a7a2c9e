"""What a mode that counts storages has to know of FSDP2, which no operator tells.

It empties and fills storages in place, and tries out shapes on tensors without values. Imported
only where FSDP is in use.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import _disable_current_modes

SHAPES = "_propagate_tensor_meta_non_cached"


def sent(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Do an operator that sends on fake tensors; return what it was given to write to.

    It would return others, of storages of their own. And torch draws a number for it from Python's
    generator, as if the model had.
    """
    state = random.getstate()
    result = func(*args, **kwargs)
    random.setstate(state)
    if func.name() == "fsdp::all_gather_copy_in":
        _, output, _, count, rank = args
        return output.narrow(0, count * rank, count), output
    return (args[0], *result[1:]) if isinstance(result, tuple) else result


@contextmanager
def watching_sharded(tell: Callable[[torch.UntypedStorage], object]) -> Iterator[None]:
    """Tell of every storage that changes its size inside.

    What a `DTensor` tries out without values, to know the shape of a result, is hidden from modes.
    """
    resize: Any = torch.UntypedStorage.resize_
    shapes: Any = getattr(ShardingPropagator, SHAPES)

    def resize_and_tell(storage: torch.UntypedStorage, size: int) -> Any:
        found = resize(storage, size)
        tell(storage)
        return found

    def shapes_unseen(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return shapes(*args, **kwargs)

    torch.UntypedStorage.resize_ = resize_and_tell  # type: ignore[method-assign, assignment]
    setattr(ShardingPropagator, SHAPES, shapes_unseen)
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]
        setattr(ShardingPropagator, SHAPES, shapes)
