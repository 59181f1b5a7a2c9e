"""`HybridFakeMode`: fake tensors for what is large, real ones for what is small and known.

An operator whose tensor inputs are all real and small runs for real, so that `grid.tolist()`, a
mask that selects rows, or the lengths of packed sequences have their values; every other operator
computes shapes only. Nothing of the caller's is written to: an operator that would write to a
tensor which was not made inside is not run, and the tensor counts as unknown from then on.

A question about a value that was computed from fake tensors gets a stated answer: `answer` (False)
for a boolean, 1 for a number, and for "which elements?" all of them. Indices that follow from
fake values (`topk`, `argmax`, …) are made up from random numbers, as those of an untrained model
would be. `questions` tells what was asked, and where.
"""

from __future__ import annotations

import sys
import sysconfig
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from expt.memory.measuring.ledger import dense_parts
from expt.memory.planning.shape_cache import ShapeCache

aten = torch.ops.aten

MAX_REAL_BYTES = 2**20
"""An operator runs for real if its tensor inputs, or its result if it has none, take no more."""
MAX_INTEGER_BYTES = 2**26
"""Batches of integers and booleans may be larger."""
MAX_SPARSE_BYTES = 2**28
"""Sparse tensors up to this size are real, since fakes do not know how many elements they have."""
LIBRARIES = (sysconfig.get_path("stdlib"), str(Path(__file__).parents[1]))
ITEM = aten._local_scalar_dense.default
INDICES: Mapping[Any, int] = {
    aten.topk.default: 1,
    aten.sort.default: 1,
    aten.sort.stable: 1,
    aten.max.dim: 1,
    aten.min.dim: 1,
    aten.argmax.default: 0,
    aten.argmin.default: 0,
    aten.argsort.default: 0,
    aten.multinomial.default: 0,
}
"""Operators that find indices, by the position of these in what is returned."""
FUSED_STEPS = "aten::_fused_"
"""How the names of fused optimizers' kernels begin."""
UNIQUE = (aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default)
QUESTIONS = frozenset(
    {ITEM, aten.equal.default, aten.nonzero.default, aten.masked_select.default,
     aten.repeat_interleave.Tensor, *UNIQUE}
)  # fmt: skip
"""Operators that depend on values: known ones are looked at whatever they take."""
SPARSE_OF_PARTS = aten._sparse_coo_tensor_with_dims_and_tensors.default
SPARSE_PRODUCTS = {
    aten.mm.default: 0, aten.addmm.default: 1, aten._sparse_addmm.default: 1,
    aten._sparse_mm.default: 0,
}  # fmt: skip
"""Products of a matrix that may be sparse, and its position; fakes know few sparse layouts."""
ANSWERED = frozenset({*QUESTIONS, SPARSE_OF_PARTS, aten.sparse_mask.default})
"""Operators that may get an answer instead of being run."""
UNSAFE_VIEWS = (aten._unsafe_view.default, aten.lift.default, aten._reshape_alias.default)
"""Views that do not say so."""
SHAPES = ShapeCache()
INDEXING = (aten.index.Tensor, aten._unsafe_index.Tensor)

VALUED = frozenset({*QUESTIONS, *INDEXING, SPARSE_OF_PARTS, aten.lift_fresh.default})
"""Operators whose results do not follow from shapes."""


class StorageSet:
    """A set of storages that drops those that have died."""

    def __init__(self) -> None:
        self._keys: set[int] = set()

    def __contains__(self, tensor: Tensor) -> bool:
        if not self._keys or tensor.layout is not torch.strided:
            return False
        return tensor.untyped_storage()._cdata in self._keys

    def add(self, tensor: Tensor) -> None:
        """Add a tensor's storage."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._keys:
            self._keys.add(storage._cdata)
            weakref.finalize(storage, self._keys.discard, storage._cdata).atexit = False


class HybridFakeMode(FakeTensorMode):
    """Runs what is small and known for real and fakes the rest; `building` fakes everything."""

    of_a_plan = True
    """Tells its tensors from those that torch makes to compile, or a user for another end."""

    def __init__(self, answer: bool = False) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.building = False
        self.in_batch = False  # while a batch is made, its integers may be larger
        self.answer = answer
        self.reads = 0  # values that were looked at
        self.questions: set[tuple[str, str]] = set()  # what was asked, and where
        self._stand_ins: dict[Any, Tensor] = {}
        self._here: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._own = StorageSet()
        self._unknown = StorageSet()
        self._made_up = StorageSet()

    @property
    def steered(self) -> bool:
        """Tell whether an answer may have decided which way the code went."""
        return any(asked != "a number" for asked, _ in self.questions)

    @contextmanager
    def faking(self) -> Iterator[None]:
        """Enter the mode and fake everything, whatever its size."""
        building, self.building = self.building, True
        try:
            with self:
                yield
        finally:
            self.building = building

    def forget(self) -> None:
        """Let go of the tensors that the mode holds itself."""
        self._stand_ins.clear()
        self._here.clear()

    def here(self, tensor: Tensor) -> Tensor:
        """Return a tensor; of one that lies on a card already a fake on the CPU, always the same.

        Integers, which code may ask for (lengths, a grid), keep their values.
        """
        if tensor.layout is not torch.strided or not _is_foreign(tensor):
            return tensor
        if tensor not in self._here:
            floats = tensor.is_floating_point() or tensor.is_complex()
            if floats or tensor.is_meta or tensor.nbytes > MAX_INTEGER_BYTES:
                with self.faking():
                    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            else:
                with _disable_current_modes():
                    made = tensor.detach().cpu()
            self._here[tensor] = made.requires_grad_(tensor.requires_grad)
        found: Tensor = self._here[tensor]
        return found

    def own(self, tensors: Iterable[Tensor]) -> None:
        """Allow real tensors to be written to."""
        for tensor in tensors:
            if tensor.layout is torch.strided and not isinstance(tensor, FakeTensor):
                self._own.add(tensor)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled while a step is traced

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        """Do what the class above does, without its look for a compiler and its log."""
        return self.dispatch(func, types, args, kwargs)

    def dispatch(
        self,
        func: Any,
        types: Sequence[type],
        args: Any = (),
        kwargs: Any = None,
    ) -> Any:
        """Run an operator for real, answer it, or compute its shapes."""
        kwargs = kwargs or {}
        if self.building:
            return super().dispatch(func, types, args, kwargs)
        if not any(issubclass(kind, FakeTensor) for kind in types):
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            if self._known(func, args, kwargs, tensors):
                return self._real(func, args, kwargs, tensors)
        if func in ANSWERED:
            answered = self._answered(func, args, kwargs)
            if answered is not NotImplemented:
                return answered
        if func in SPARSE_PRODUCTS and args[SPARSE_PRODUCTS[func]].layout is not torch.strided:
            left, right = args[SPARSE_PRODUCTS[func] :][:2]
            if right.layout is torch.strided and not isinstance(left, FakeTensor):
                return self._empty((left.shape[0], right.shape[1]), right.dtype)
        if func in INDEXING:
            args = (args[0], self._without_masks(args[1]), *args[2:])
        written = _written(func)
        given = args, kwargs
        if _holds_real(args) and (written or not _aliases(func) or _holds_foreign(args)):
            if written:
                self._stand_ins.clear()  # one that was written to may have another shape
            args, kwargs = tree_map_only(Tensor, self._stand_in, given)
            types = (FakeTensor,)
        result = self._faked(func, types, args, kwargs)
        if func in INDICES:
            return self._with_indices(func, args, kwargs, result)
        return self._kept(func, *given, result) if written else result

    def _faked(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """Compute shapes; what this makes on the way is fake too.

        Some operators have kernels for fp32 and shapes for bf16 only (`_grouped_mm`): these are
        asked again for bf16. Fused optimizers only write into what they are given, and one without
        shapes of its own (`_fused_sgd_`) would run on real tensors as large as the model.
        """
        if func._schema.name.startswith(FUSED_STEPS) and not func._schema.returns:
            return None
        key = SHAPES.key(func, args, kwargs) if _follows_from_shapes(func, kwargs) else None
        if key is not None:
            known, result = SHAPES.find(self, key, args)
            if known:
                return result
        self.building = True
        try:
            result = super().dispatch(func, types, args, kwargs)
            if key is not None:
                SHAPES.keep(key, func, args, kwargs, result)
            return result
        except RuntimeError as error:
            if _aliases(func) or "BF16" not in str(error).upper().replace("BFLOAT", "BF"):
                raise
            to_half = _other_type(torch.float32, torch.bfloat16)
            to_full = _other_type(torch.bfloat16, torch.float32)
            with self:
                halves = tree_map_only(Tensor, to_half, (args, kwargs))
                return tree_map_only(Tensor, to_full, super().dispatch(func, types, *halves))
        finally:
            self.building = False

    def _stand_in(self, tensor: Tensor) -> Tensor:
        """Return a fake tensor like a real one: torch remembers what follows from fakes.

        One that lies on a card already stands on the CPU, as all that is planned does.
        """
        if isinstance(tensor, FakeTensor) or tensor.layout is not torch.strided:
            return tensor
        if tensor.is_conj() or tensor.is_neg():
            return tensor
        key = (tensor.shape, tensor.stride(), tensor.dtype)
        if key not in self._stand_ins:
            with self.faking():
                self._stand_ins[key] = torch.empty_strided(key[0], key[1], dtype=key[2])
        return self._stand_ins[key]

    def _known(self, func: Any, args: Any, kwargs: Any, tensors: Sequence[Tensor]) -> bool:
        """Tell whether an operator without fake inputs is to be run for real."""
        if not tensors:
            return self._small_factory(func, args, kwargs)
        total = 0
        for tensor in tensors:
            if tensor.device.type != "cpu" or isinstance(tensor, FakeTensor):
                return False
            if tensor.layout is not torch.strided:
                if sum(part.nbytes for part in dense_parts(tensor)) > MAX_SPARSE_BYTES:
                    return False
                continue  # sparse ones are real whatever they take, and so is what follows
            if tensor in self._unknown:
                return False
            total += tensor.numel() * tensor.element_size()
        limit = MAX_REAL_BYTES
        if self.in_batch and not any(t.is_floating_point() for t in tensors):
            limit = MAX_INTEGER_BYTES
        if total > limit and func not in QUESTIONS:
            return False
        targets = _targets(func, args, kwargs)
        return all(target in self._own for target in targets)

    def _small_factory(self, func: Any, args: Any, kwargs: Any) -> bool:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type != "cpu":
            return False
        shapes = tree_leaves(self._faked(func, (), args, kwargs))
        found = [shape for shape in shapes if isinstance(shape, Tensor)]
        total = sum(shape.numel() * shape.element_size() for shape in found)
        integers = self.in_batch and not any(shape.is_floating_point() for shape in found)
        return bool(found) and total <= (MAX_INTEGER_BYTES if integers else MAX_REAL_BYTES)

    def _real(self, func: Any, args: Any, kwargs: Any, tensors: Sequence[Tensor]) -> Any:
        self.reads += func is ITEM
        made_up = any(tensor in self._made_up for tensor in tensors)
        if made_up:
            self._note_about(func, tensors)
        result = func(*args, **kwargs)
        strided = [tensor for tensor in tensors if tensor.layout is torch.strided]
        before = {tensor.untyped_storage()._cdata for tensor in strided}
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.layout is torch.strided:
                if value.untyped_storage()._cdata not in before:
                    self._own.add(value)
                    if func in (aten.empty.memory_format, aten.empty_strided.default):
                        value.zero_()  # not whatever lay there before
                if made_up:
                    self._made_up.add(value)
        return result

    def _note_about(self, func: Any, tensors: Sequence[Tensor]) -> None:
        """Note a question that an operator asks of values that were made up."""
        masked = func in INDEXING and any(tensor.dtype is torch.bool for tensor in tensors[1:])
        if func is ITEM:
            self._note(_kind(tensors[0]))
        elif masked or func in (aten.nonzero.default, aten.masked_select.default, *UNIQUE):
            self._note("which elements")

    def _note(self, asked: str) -> None:
        self.questions.add((asked, users_line()))

    def _answered(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Answer a question about values there are none of; else return `NotImplemented`."""
        if func is ITEM:
            tensor = args[0]
            if getattr(tensor, "constant", None) is not None:
                return NotImplemented
            self._note(_kind(tensor))
            if tensor.dtype is torch.bool:
                return self.answer
            return 1.0 if tensor.is_floating_point() else 1
        if func is aten.equal.default:
            self._note("a boolean")
            return self.answer
        if func is aten.nonzero.default:
            self._note("which elements")
            return self._everywhere(args[0])
        if func is aten.masked_select.default:
            shape, mask = torch.broadcast_shapes(args[0].shape, args[1].shape), args[1]
            if not isinstance(mask, FakeTensor) and mask not in self._unknown:
                return self._empty((int(mask.expand(shape).sum()),), args[0].dtype)
            self._note("which elements")
            return self._empty((shape.numel(),), args[0].dtype)
        if func is SPARSE_OF_PARTS:
            return self._sparse(func, args, kwargs)
        if func is aten.sparse_mask.default and not isinstance(args[1], FakeTensor):
            zeros = torch.zeros_like(args[1]._values(), dtype=args[0].dtype)
            return torch.sparse_coo_tensor(
                args[1]._indices(), zeros, args[1].shape,
                is_coalesced=args[1].is_coalesced(), check_invariants=False,
            )  # fmt: skip
        if func in UNIQUE:
            self._note("which elements")
            return self._all_unique(func, args, kwargs)
        if func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
            self._note("a count")
            return self._empty((args[0].numel(),), args[0].dtype)
        return NotImplemented

    def _sparse(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Make a sparse tensor for real, of zeros: fakes do not know how many elements it has."""
        sparse_dim, dense_dim, size, indices, values, *rest = args
        if values.numel() * values.element_size() > MAX_SPARSE_BYTES:
            return NotImplemented
        if isinstance(indices, FakeTensor):
            rows = torch.arange(indices.shape[1]) % max(min(size[:sparse_dim], default=1), 1)
            indices = rows.expand(indices.shape).contiguous()
        if isinstance(values, FakeTensor):
            values = torch.zeros(values.shape, dtype=values.dtype)
        return func(sparse_dim, dense_dim, size, indices, values, *rest, **kwargs)

    def _all_unique(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensor = args[0]
        dim = None if func is aten._unique2.default else (*args[1:2], kwargs.get("dim"))[0]
        if func is aten.unique_consecutive.default:
            dim = kwargs.get("dim", args[3] if len(args) > 3 else None)
        rows = tensor.numel() if dim is None else tensor.shape[dim]
        values = self._empty((rows,) if dim is None else tensor.shape, tensor.dtype)
        inverse = self._empty(tensor.shape if dim is None else (rows,), torch.int64)
        return values, inverse, self._empty((rows,), torch.int64)

    def _everywhere(self, mask: Tensor) -> Tensor:
        """Return `nonzero` of a mask that is true everywhere."""
        if mask.numel() * max(mask.dim(), 1) * 8 > MAX_REAL_BYTES:
            return self._empty((mask.numel(), mask.dim()), torch.int64)
        found = torch.ones(mask.shape, dtype=torch.bool).nonzero()
        self._own.add(found)
        self._made_up.add(found)
        return found

    def _without_masks(self, indices: Any) -> list[Tensor | None]:
        """Put indices in the place of boolean masks, so that the result's shape is known."""
        found: list[Tensor | None] = []
        for index in indices:
            if index is None or index.dtype not in (torch.bool, torch.uint8):
                found.append(index)
                continue
            if isinstance(index, FakeTensor) or index in self._unknown:
                self._note("which elements")
                count, dims = index.numel(), max(index.dim(), 1)
                found += [self._empty((count,), torch.int64) for _ in range(dims)]
            else:
                found += index.nonzero().unbind(1)
        return found

    def _with_indices(self, func: Any, args: Any, kwargs: Any, result: Any) -> Any:
        """Give an operator that finds indices some that are valid, if they are few."""
        at = INDICES[func]
        found = result if isinstance(result, Tensor) else result[at]
        source = args[0]
        if max(found.numel() * 8, source.numel() * 4) > MAX_REAL_BYTES:
            return result
        generator = torch.Generator().manual_seed(source.numel())
        numbers = torch.rand(source.shape, generator=generator)
        real = func(numbers, *args[1:], **kwargs)
        indices = real if isinstance(real, Tensor) else real[at]
        self._own.add(indices)
        self._made_up.add(indices)
        if isinstance(result, Tensor):
            return indices
        return type(result)([*result[:at], indices, *result[at + 1 :]])

    def _kept(self, func: Any, args: Any, kwargs: Any, result: Any) -> Any:
        """Keep a real tensor that was to be written to, whose values are unknown from now on."""
        real = {
            alias: target
            for alias, target in _aliased(func, args, kwargs)
            if not isinstance(target, FakeTensor)
        }
        for target in real.values():
            self._unknown.add(target)
        if not real:
            return result
        names = [_alias(returned) for returned in func._schema.returns]
        if isinstance(result, Tensor) and len(names) == 1:
            return real.get(names[0], result)
        if isinstance(result, tuple) and len(result) == len(names):
            return tuple(real.get(n, value) for n, value in zip(names, result, strict=True))
        return result

    def _empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        with self.faking():
            return torch.empty(tuple(shape), dtype=dtype)


def _kind(tensor: Tensor) -> str:
    if tensor.dtype is torch.bool:
        return "a boolean"
    return "a number" if tensor.is_floating_point() or tensor.is_complex() else "a count"


@cache
def _written(func: Any) -> tuple[tuple[int, str, str], ...]:
    """Return position, name and alias of the arguments that an operator writes to."""
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.is_mutable:
        return ()
    return tuple(
        (position, argument.name, _alias(argument))
        for position, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def _follows_from_shapes(func: Any, kwargs: Mapping[str, Any]) -> bool:
    """Tell whether a result may be remembered: of what is written to, only aten's is known."""
    if func in VALUED:
        return False
    written = _written(func)
    if not written:
        return True
    return func.namespace == "aten" and not any(name in kwargs for _, name, _ in written)


def _other_type(one: torch.dtype, other: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Return a function that gives tensors of one type another, shape and stride kept."""

    def change(tensor: Tensor) -> Tensor:
        if tensor.dtype is not one:
            return tensor
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=other)

    return change


def _holds_real(args: Iterable[object]) -> bool:
    for value in args:
        if isinstance(value, list | tuple):
            if _holds_real(value):
                return True
        elif isinstance(value, Tensor) and not isinstance(value, FakeTensor):
            return True
    return False


def _holds_foreign(args: Any) -> bool:
    return any(isinstance(value, Tensor) and _is_foreign(value) for value in tree_leaves(args))


def _is_foreign(tensor: Tensor) -> bool:
    """Tell whether a real tensor lies elsewhere than on the CPU, where everything is planned."""
    return tensor.device.type != "cpu" and not isinstance(tensor, FakeTensor)


@cache
def _aliases(func: Any) -> bool:
    """Tell whether an operator writes to an operand, or may return it or a view of it."""
    schema = getattr(func, "_schema", None)
    return (
        schema is None
        or func in UNSAFE_VIEWS
        or any(part.alias_info is not None for part in (*schema.arguments, *schema.returns))
    )


def _alias(argument: Any) -> str:
    info = argument.alias_info
    return "" if info is None else ",".join(sorted(info.before_set))


def _aliased(func: Any, args: Any, kwargs: Any) -> list[tuple[str, Tensor]]:
    found = []
    for position, name, alias in _written(func):
        value = args[position] if position < len(args) else kwargs.get(name)
        found += [(alias, leaf) for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return found


def _targets(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    return [target for _, target in _aliased(func, args, kwargs)]


def users_line() -> str:
    """Return "file:line" of the innermost caller that is no library's, "" if there is none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and is_library(frame.f_code.co_filename):
        frame = frame.f_back
    return "" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


@cache
def is_library(filename: str) -> bool:
    """Tell whether a file is Python's, an installed package's, or part of `expt.memory`."""
    return filename.startswith(LIBRARIES) or "<" in filename or "-packages" in filename
