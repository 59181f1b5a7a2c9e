"""What operators return on fake tensors, remembered: most of a trace asks for the same again.

torch remembers it too, for every kind of tensor and of argument; this is for those that a training
step is made of, and takes a third of the time. Only shapes are kept, so that all traces share it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

MOST = 200_000
"""Calls that are remembered."""
CPU = torch.device("cpu")
PLAIN = frozenset(
    {int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout,
     torch.memory_format, torch.Size}
)  # fmt: skip
UNPREDICTABLE = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)
Key = tuple[Any, ...]
Shape = tuple[torch.Size, tuple[int, ...], torch.dtype, int, int | None]
"""Shape, stride, type, offset, and the position of the argument whose storage it shares."""


class ShapeCache:
    """Results of operators by the shapes of their arguments."""

    def __init__(self) -> None:
        self._known: dict[Key, tuple[type | None, tuple[Shape, ...]] | None] = {}

    def key(self, func: Any, args: Any, kwargs: Any) -> Key | None:
        """Return what a result depends on; None: more than is known of here."""
        parts: list[Any] = [func, torch.get_default_dtype()]
        if not _add(parts, args):
            return None
        if kwargs:
            parts.append(len(args))
            if not (_add(parts, kwargs) and _add(parts, kwargs.values())):
                return None
        return tuple(parts)

    def find(self, mode: FakeTensorMode, key: Key, args: Any) -> tuple[bool, Any]:
        """Return whether a result is known, and the result, made anew."""
        found = self._known.get(key)
        if found is None:
            return False, None
        kind, shapes = found
        if kind is None:
            return True, _made(mode, shapes[0], args)
        return True, kind([_made(mode, shape, args) for shape in shapes])

    def keep(self, key: Key, func: Any, args: Any, result: Any) -> None:
        """Remember a result, if it can be made from shapes alone."""
        if key in self._known or len(self._known) >= MOST:
            return
        if any(tag in UNPREDICTABLE for tag in func.tags):
            return
        kind = type(result) if type(result) in (tuple, list) else None
        results = [result] if kind is None else result
        shapes = [_shape(value, args) for value in results]
        fresh = [value for value in results if isinstance(value, Tensor)]
        shared = {value.untyped_storage()._cdata for value in fresh}
        alone = all(shape is not None and shape[4] is None for shape in shapes)
        if alone and len(shared) < len(fresh):
            return  # results that share a storage of their own
        self._known[key] = None if None in shapes else (kind, tuple(s for s in shapes if s))


def _add(parts: list[Any], values: Iterable[Any]) -> bool:
    """Add what a result depends on of some values; tell whether that is all."""
    for value in values:
        kind = type(value)
        if kind is FakeTensor:
            if value.constant is not None or value.layout is not torch.strided:
                return False
            dtype = value.dtype
            if dtype.is_complex:
                return False
            parts += (value.shape, value.stride(), dtype, value.storage_offset(), value.fake_device)
        elif kind in PLAIN:
            parts += (kind, value)
        elif kind is list or kind is tuple:
            parts += (kind, len(value))
            if not _add(parts, value):
                return False
        else:
            return False
    return True


def _shape(value: Any, args: Any) -> Shape | None:
    """Return what a result is made from; None if that is not enough."""
    if type(value) is not FakeTensor or value.layout is not torch.strided:
        return None
    if value.constant is not None or value.fake_device != CPU or value.requires_grad:
        return None
    if value.dtype.is_complex:
        return None
    storage = value.untyped_storage()
    offset = int(value.storage_offset())
    for position, argument in enumerate(args):
        if argument is value:
            return None
        if isinstance(argument, Tensor) and argument.untyped_storage()._cdata == storage._cdata:
            return value.shape, value.stride(), value.dtype, offset, position
    full = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if offset or full.untyped_storage().nbytes() != storage.nbytes():
        return None
    return value.shape, value.stride(), value.dtype, 0, None


def _made(mode: FakeTensorMode, shape: Shape, args: Any) -> FakeTensor:
    size, stride, dtype, offset, position = shape
    if position is None:
        made = torch.empty_strided(size, stride, dtype=dtype, device="meta")
    else:
        made = torch.empty(0, dtype=dtype, device="meta")
        made.set_(args[position].untyped_storage(), offset, size, stride)
    return FakeTensor(mode, made, CPU)
