"""A ledger of tensor storages: bytes allocated to tensors, on devices without an allocator to ask.

Every operator's inputs and outputs pass through a dispatch mode; a storage is added when it is
first seen and taken off when it dies. The sum is the quantity that
`torch.cuda.max_memory_allocated` reports on a GPU (without its rounding to blocks). What a
kernel allocates inside itself is invisible, and so is a tensor no operator ever touched. A process
that was forked inside counts nothing. That torch works differently while it is watched is allowed
for (`expt.memory.measuring.in_place_sums`).
"""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from expt.memory.measuring.in_place_sums import InPlaceSums

SHARDING, SHARED_OUT = "expt.memory.techniques.sharding", "DTensor"
"""The module that shares weights out among processes, imported where it does, and their class."""


class StorageLedger(TorchDispatchMode):
    """Context manager; `allocated_bytes` is live, `peak_bytes` the highest it has been inside."""

    counts_shapes = True
    """Whether tensors without bytes, on meta or fake, count as if they had them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.allocated_bytes = 0
        self.peak_bytes = 0
        self._live: dict[int, int] = {}  # bytes by storage
        self._in_place_sums = InPlaceSums()
        self._contexts: list[ExitStack] = []
        self._process = os.getpid()

    def __enter__(self) -> Self:
        """Begin to count."""
        self._process = os.getpid()
        self._contexts.append(ExitStack())
        if SHARDING in sys.modules:
            from expt.memory.measuring.sharded import watching_sharded

            self._contexts[-1].enter_context(watching_sharded(self._resized))
        found: Self = super().__enter__()  # type: ignore[no-untyped-call]
        return found

    def __exit__(self, *error: Any) -> None:
        """Count no more."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._contexts.pop().close()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the operator and enter the storages it read and made."""
        kwargs = kwargs or {}
        if self._forked():
            return func(*args, **kwargs)
        if has_shared_out(types):
            return NotImplemented  # and come back with their local parts
        self.add(args, kwargs)
        in_place = self._in_place_sums.has(func, args)
        result = func(*args, **kwargs)
        if in_place and result.nbytes == args[0].nbytes:
            self._hand_over(args[0])
        self.add(result)
        return result

    def _forked(self) -> bool:
        """Tell whether this is a copy in another process, as in a DataLoader's workers."""
        return os.getpid() != self._process

    def add(self, *trees: Any) -> None:
        """Enter every tensor in these (nested) values."""
        for value in tree_iter(trees):
            if isinstance(value, Tensor):
                self._add_storage(value)
        self.peak_bytes = max(self.peak_bytes, self.allocated_bytes)

    def reset_peak(self) -> None:
        """Begin a new peak at what is allocated now."""
        self.peak_bytes = self.allocated_bytes

    def _resized(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._live:
            count = storage.nbytes()
            self.allocated_bytes += count - self._live[storage._cdata]
            self._live[storage._cdata] = count
            self.peak_bytes = max(self.peak_bytes, self.allocated_bytes)

    def _add_storage(self, tensor: Tensor) -> None:
        tensor = local(tensor)
        if tensor.layout is not torch.strided:
            for part in dense_parts(tensor):
                self._add_storage(part)
            return
        storage = tensor.untyped_storage()
        key, count = storage._cdata, storage.nbytes()
        if key not in self._live:
            if storage.device.type == "meta" and not self.counts_shapes:
                return
            # torch keeps one Python object per storage alive as long as the storage itself.
            weakref.finalize(storage, self._remove, key).atexit = False
        self.allocated_bytes += count - self._live.get(key, 0)  # a storage may be resized
        self._live[key] = count

    def _hand_over(self, tensor: Tensor) -> None:
        """Take off a tensor that would itself have become the result, had nobody watched."""
        key = tensor.untyped_storage()._cdata
        if key not in self._live:
            return
        self.allocated_bytes -= self._live[key]
        self._live[key] = 0  # seen again, it would be entered again

    def _remove(self, key: int) -> None:
        self.allocated_bytes -= self._live.pop(key)


def has_shared_out(types: Sequence[type]) -> bool:
    """Tell whether an operator is on tensors of which this process has parts only.

    It becomes operators on the parts, which a mode sees if it declines the first.
    """
    return any(kind.__name__ == SHARED_OUT for kind in types)


def local(tensor: Tensor) -> Tensor:
    """Return what this process has of a tensor, which says it has the size of the whole."""
    if type(tensor).__name__ != SHARED_OUT:
        return tensor
    part: Tensor = tensor._local_tensor  # type: ignore[attr-defined]
    return part


def dense_parts(tensor: Tensor) -> list[Tensor]:
    """Return the strided tensors that a tensor is made of: itself, or a sparse one's parts.

    Opaque layouts have none.
    """
    tensor = local(tensor)
    if tensor.layout is torch.strided:
        return [tensor]
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if is_fake(tensor):
        return []  # compressed layouts have no parts without values
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return []
