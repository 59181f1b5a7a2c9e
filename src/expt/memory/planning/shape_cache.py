"""What operators return on fake tensors, remembered: most of a trace asks for the same again.

torch remembers it too, for every kind of tensor and of argument; this is for those that a training
step is made of, and takes a third of the time. Only shapes are kept, so that all traces share it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

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
UNPREDICTABLE = (
    torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output, torch.Tag.inplace_view
)  # fmt: skip
Key = tuple[Any, ...]
Shape = tuple[torch.Size, tuple[int, ...], torch.dtype, int, int | None]
"""Shape, stride, type, offset, and the position of the argument whose storage it shares."""
Known = tuple[type | None, tuple[Shape | int, ...]]
"""How several results come together, and each: what it is made from, or which argument it is."""

_ATTRIBUTES: WeakKeyDictionary[FakeTensorMode, dict[str, Any]] = WeakKeyDictionary()
"""What a fresh fake tensor of a mode has in its `__dict__`, but for the mode."""


class ShapeCache:
    """Results of operators by the shapes of their arguments."""

    def __init__(self) -> None:
        self._known: dict[Key, Known | None] = {}

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
        made = [args[s] if isinstance(s, int) else _made(mode, s, args) for s in shapes]
        if kind is None:
            return True, made[0] if made else None
        return True, kind(made)

    def keep(self, key: Key, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Remember a result, if it can be made from shapes alone."""
        if key in self._known or len(self._known) >= MOST:
            return
        if any(tag in UNPREDICTABLE for tag in func.tags):
            return
        if func._schema.is_mutable and self.key(func, args, kwargs) != key:
            return  # what was written to has another shape now
        kind = next((kind for kind in (tuple, list) if isinstance(result, kind)), None)
        results = result if kind else [] if result is None else [result]
        shapes = [_shape(value, args) for value in results]
        fresh = [v for v, s in zip(results, shapes, strict=True) if type(s) is tuple]
        shared = {value.untyped_storage()._cdata for value in fresh}
        alone = all(type(shape) is tuple and shape[4] is None for shape in shapes)
        if alone and len(shared) < len(fresh):
            return  # results that share a storage of their own
        known = tuple(shape for shape in shapes if shape is not None)
        self._known[key] = (kind, known) if len(known) == len(shapes) else None


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


def _shape(value: Any, args: Any) -> Shape | int | None:
    """Return what a result is made from, or which argument it is; None if that is not enough."""
    for position, argument in enumerate(args):
        if argument is value and type(value) is FakeTensor:
            return position
    if type(value) is not FakeTensor or value.layout is not torch.strided:
        return None
    if value.constant is not None or value.fake_device != CPU or value.requires_grad:
        return None
    if value.dtype.is_complex:
        return None
    storage = value.untyped_storage()
    offset = int(value.storage_offset())
    for position, argument in enumerate(args):
        if isinstance(argument, Tensor) and argument.untyped_storage()._cdata == storage._cdata:
            return value.shape, value.stride(), value.dtype, offset, position
    full = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if offset or full.untyped_storage().nbytes() != storage.nbytes():
        return None
    return value.shape, value.stride(), value.dtype, 0, None


def _made(mode: FakeTensorMode, shape: Shape, args: Any) -> FakeTensor:
    """Make a fake tensor, in a third of the time that its class takes.

    Its attributes are those of one that the class made for the same mode.
    """
    size, stride, dtype, offset, position = shape
    if position is None:
        made = torch.empty_strided(size, stride, dtype=dtype, device="meta")
    else:
        made = torch.empty(0, dtype=dtype, device="meta")
        made.set_(args[position].untyped_storage(), offset, size, stride)
    attributes = _ATTRIBUTES.get(mode)
    if attributes is None:
        first = FakeTensor(mode, made, CPU)
        _ATTRIBUTES[mode] = {k: v for k, v in vars(first).items() if v is not mode}
        return first
    fake: FakeTensor = Tensor._make_subclass(
        FakeTensor, made, False, dispatch_device=True, device_for_backend_keys=CPU
    )
    if mode._allow_unsafe_data_ptr_access:
        torch._C._set_warn_deprecated_on_mutable_data_ptr(fake)
    else:
        torch._C._set_throw_on_mutable_data_ptr(fake)
    vars(fake).update(attributes)
    fake.fake_mode = mode
    return fake
