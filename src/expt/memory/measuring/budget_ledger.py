"""A ledger of tensor storages with a limit: the CPU's stand-in for a full device.

It raises `torch.OutOfMemoryError`, as the CUDA allocator does, so that every path that recovers
from one also runs where there is no GPU. Unlike an allocator it learns of a tensor only when the
operator that made it returns: a result that takes the live bytes over the limit exists for that
moment and is dropped. It does not count towards `peak_bytes`, since it was refused. An operator
that also wrote in place has done so when it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from typing import Any

import torch

from expt.memory.measuring.ledger import StorageLedger
from expt.units import format_allocation


class BudgetLedger(StorageLedger):
    """Context manager; inside, tensors of more than `limit_bytes` in all raise an error.

    Raises:
        torch.OutOfMemoryError: from the operator that made a tensor too many, also through a
            backward pass; its message has the wording of CUDA's allocator.

    """

    counts_shapes = False

    def __init__(self, limit_bytes: int) -> None:
        super().__init__()
        self.limit_bytes = limit_bytes
        self.refusals = 0
        self._high_bytes: float = inf
        self._on_high: Callable[[], bool] | None = None
        self._was_above = False

    def tell_above(self, count: int, tell: Callable[[], bool]) -> None:
        """Call `tell` in the operator that takes the live bytes above `count`, until it is True."""
        self._high_bytes, self._on_high, self._was_above = count, tell, False

    def was_above(self) -> bool:
        """Return whether an operator took the live bytes above that count since this was asked."""
        was, self._was_above = self._was_above, self.allocated_bytes > self._high_bytes
        return was or self._was_above

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the operator; refuse its result if the limit does not admit it."""
        if self._forked():
            return func(*args, **(kwargs or {}))
        before, peak = self.allocated_bytes, self.peak_bytes
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if result is NotImplemented:
            return result
        if self.allocated_bytes > self.limit_bytes and self.allocated_bytes > before:
            requested = self.allocated_bytes - before
            del result
            self.peak_bytes = max(peak, min(before, self.limit_bytes))
            self.refusals += 1
            raise torch.OutOfMemoryError(self._message(requested, before))
        if self.allocated_bytes > self._high_bytes:
            self._was_above = True
            if self._on_high is not None and self._on_high():
                self._on_high = None
        return result

    def _message(self, requested: int, allocated: int) -> str:
        free = max(self.limit_bytes - allocated, 0)
        return (
            f"CPU out of memory. Tried to allocate {format_allocation(requested)}. The budget has "
            f"a total capacity of {format_allocation(self.limit_bytes)} of which "
            f"{format_allocation(free)} is free. {format_allocation(allocated)} is allocated by "
            "PyTorch"
        )
