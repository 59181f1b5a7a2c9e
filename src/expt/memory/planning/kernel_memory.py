"""What CPU kernels hold inside, asked of the kernels: run for real where it may decide the peak.

Which algorithm a kernel takes depends on shapes, strides, threads and build, and with it what it
allocates: a convolution of oneDNN copies into blocked layouts, another unfolds its input. So the
operators at the highest points of a trace are run on zeros of the same shapes, and their
allocations read from torch's profiler. Where that would take too long, convolutions are asked with
two and three samples, and others keep the formula of `cpu_scratch`, or nothing.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from expt.memory.measuring.allocations import Allocations, can_be_watched
from expt.memory.measuring.ledger import dense_parts

aten = torch.ops.aten

MAX_SECONDS = 20.0
"""No further kernel is begun after this, on a machine that is far slower than it should be."""
MAX_WORK = 6e10
"""No further kernel is begun after so many multiplications in all: a second or two of a core.

Counted, not timed, so that a plan does not depend on what else a machine of usual speed does.
"""
MAX_CALLS = 40
MAX_BYTES = 2**28
"""Operands of a kernel that is run take no more."""
MAX_OPERATIONS = 1e10
"""Multiplications of a kernel that is run, roughly: less than half a second on one core."""
SLOW = ("linalg", "svd", "eig", "cholesky", "lu_", "qr", "solve", "inverse")
"""In the names of kernels that take the cube of a matrix's width, and many times that."""
FEW = (2, 3)
"""Samples that a large convolution is asked with; for one alone, torch takes other back ends."""
CONVOLUTIONS = (aten.convolution.default, aten.convolution_backward.default)
BATCHED = {aten.convolution.default: (0,), aten.convolution_backward.default: (0, 1)}
"""Positions of the operands whose first dimension is the batch."""
LAYOUTS = (torch.strided, torch.sparse_coo, torch.sparse_csr, torch.sparse_csc)
WITHOUT = frozenset(
    {"aten::cat", "aten::clone", "aten::copy_", "aten::_to_copy", "aten::detach", "aten::alias",
     "aten::stack", "aten::embedding", "aten::fill_", "aten::zero_", "aten::_unsafe_view"}
)  # fmt: skip
"""Operators that hold nothing but operands and result."""


@dataclass(frozen=True)
class TensorShape:
    """An operand without its storage."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    layout: torch.layout
    nonzero: int = 0
    coalesced: bool = False

    @property
    def bytes(self) -> int:
        """What its elements take if none is shared."""
        count = math.prod(self.shape) if self.layout is torch.strided else 3 * self.nonzero
        return count * self.dtype.itemsize


@dataclass(frozen=True)
class Call:
    """An operator that ran in a trace, and its operands."""

    func: Any
    args: Any
    kwargs: Any
    results: int  # bytes of the storages that it made

    @property
    def key(self) -> str:
        """The same for calls that hold the same."""
        return repr((self.func, self.args, self.kwargs))


def call_of(func: Any, args: Any, kwargs: Any, result: Any) -> Call | None:
    """Return what to remember of an operator that may hold something inside, else None."""
    first = args[0] if args else None
    dense = not isinstance(first, Tensor) or first.layout is torch.strided
    if dense and _holds_nothing(func):
        return None
    leaves = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
    if not leaves or not all(leaf.layout in LAYOUTS for leaf in leaves):
        return None
    return _call(func, args, kwargs, result)


@cache
def _holds_nothing(func: Any) -> bool:
    """Tell whether an operator on strided tensors holds nothing but operands and result.

    Other libraries' operators are not run: who knows what they do (a collective would wait).
    """
    if getattr(func, "namespace", "") != "aten":
        return True
    if getattr(func, "is_view", False) or torch.Tag.pointwise in getattr(func, "tags", ()):
        return True
    return func.name().partition(".")[0] in WITHOUT


def _call(func: Any, args: Any, kwargs: Any, result: Any) -> Call:
    made = _storages(result)
    for key in _storages((args, kwargs)):
        made.pop(key, None)
    args, kwargs = tree_map(_shape_of, (args, kwargs))
    return Call(func, args, kwargs, sum(made.values()))


def _storages(tree: Any) -> dict[int, int]:
    """Return the bytes of storages by their address."""
    parts = [
        part for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) for part in dense_parts(leaf)
    ]
    return {part.untyped_storage()._cdata: part.untyped_storage().nbytes() for part in parts}


def _shape_of(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.layout is torch.strided:
        return TensorShape(tuple(value.shape), value.stride(), value.dtype, value.layout)
    coalesced = value.layout is torch.sparse_coo and value.is_coalesced()
    return TensorShape(tuple(value.shape), (), value.dtype, value.layout, value._nnz(), coalesced)


class Kernels:
    """Runs kernels and remembers what they held, within a limit of time."""

    def __init__(self) -> None:
        self._known: dict[str, int | None] = {}
        self._seconds = self._work = 0.0

    @property
    def exhausted(self) -> bool:
        """Tell whether no more kernels are run."""
        spent = self._work > MAX_WORK or len(self._known) > MAX_CALLS
        return spent or self._seconds > MAX_SECONDS or not can_be_watched()

    def inside(self, call: Call) -> int | None:
        """Return the bytes that a kernel holds beside operands and result, None if not known."""
        if call.key not in self._known:
            if self.exhausted:
                return None
            started = time.perf_counter()
            self._known[call.key] = _measured(call)
            self._seconds += time.perf_counter() - started
            self._work += sum(map(_operations, _asked(call)))
        return self._known[call.key]


def bound(call: Call) -> int:
    """Return what a kernel may hold inside at most."""
    shapes = _shapes(call)
    operands = sum(shape.bytes for shape in shapes) + call.results
    for shape in shapes:
        if not shape.dtype.is_floating_point:
            operands += math.prod(shape.shape) * torch.int64.itemsize  # sums are of this type
    if call.func not in CONVOLUTIONS:
        return operands
    inputs, weight = _convolution(call)
    spatial = math.prod(inputs.shape[2:])
    unfolded = inputs.shape[0] * inputs.shape[1] * math.prod(weight.shape[2:]) * spatial
    return 3 * operands + unfolded * inputs.dtype.itemsize


def _asked(call: Call) -> list[Call]:
    """Return what is run to measure a kernel: itself, with few samples instead, or nothing."""
    taken = sum(shape.bytes for shape in _shapes(call))
    if taken <= MAX_BYTES and _operations(call) <= MAX_OPERATIONS:
        return [call]
    if call.func not in CONVOLUTIONS or _convolution(call)[0].shape[0] < max(FEW):
        return []
    small = [_with_batch(call, count) for count in FEW]
    return [] if any(_operations(part) > MAX_OPERATIONS for part in small) else small


def _measured(call: Call) -> int | None:
    """Return what a kernel holds inside; what a convolution holds is linear in its samples."""
    found = [_run(asked) for asked in _asked(call)]
    known = [highest for highest in found if highest is not None]
    if not known or len(known) < len(found):
        return None
    more = (_convolution(call)[0].shape[0] - FEW[0]) * (known[1] - known[0]) if known[1:] else 0
    return max(known[0] + more - call.results, 0)


def _run(call: Call) -> int | None:
    """Return the most that a kernel allocates, its results included."""
    with (
        _disable_current_modes(),
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        try:
            args, kwargs = tree_map(_zeros, (call.args, call.kwargs))
            with Allocations() as found:
                result = call.func(*args, **kwargs)
            del result
        except Exception:
            return None
    return found.highest_bytes


def _with_batch(call: Call, count: int) -> Call:
    args = list(call.args)
    for position in BATCHED[call.func]:
        shape = args[position]
        args[position] = TensorShape(
            (count, *shape.shape[1:]), shape.stride, shape.dtype, shape.layout
        )
    return Call(call.func, tuple(args), call.kwargs, call.results)


def _operations(call: Call) -> float:
    """Return roughly how many multiplications a kernel takes."""
    shapes = [shape for shape in _shapes(call) if shape.layout is torch.strided]
    if call.func in CONVOLUTIONS:
        inputs, weight = _convolution(call)
        backward = call.func is aten.convolution_backward.default
        outputs = call.args[0] if backward else inputs
        spatial = math.prod(outputs.shape[2:])
        return (3 if backward else 1) * inputs.shape[0] * math.prod(weight.shape) * spatial
    shapes = [shape for shape in shapes if shape.dtype is not torch.uint8]  # workspaces
    largest = max((math.prod(shape.shape) for shape in shapes), default=0)
    widest = max((max(s.shape) for s in shapes if len(s.shape) > 1), default=1)
    name = call.func.name()
    if any(part in name for part in SLOW):
        return 20.0 * largest * widest
    products = any(part in name for part in ("mm", "attention", "rnn", "cdist"))
    return largest * widest if products else 20.0 * largest


def _convolution(call: Call) -> tuple[TensorShape, TensorShape]:
    first = 1 if call.func is aten.convolution_backward.default else 0
    return call.args[first], call.args[first + 1]


def _shapes(call: Call) -> list[TensorShape]:
    return [leaf for leaf in tree_leaves((call.args, call.kwargs)) if isinstance(leaf, TensorShape)]


def _zeros(value: Any) -> Any:
    """Make an operand of zeros; a sparse one has its elements spread evenly."""
    if not isinstance(value, TensorShape):
        return value
    if value.layout is torch.strided:
        made = torch.empty_strided(value.shape, value.stride, dtype=value.dtype)
        return made.zero_() if made.numel() else made
    rows, columns = value.shape[-2:]
    places = torch.arange(value.nonzero)
    if value.layout is torch.sparse_coo:
        at = (places * (rows * columns) // max(value.nonzero, 1)).clamp(max=rows * columns - 1)
        indices = torch.stack([at // columns, at % columns])
        return torch.sparse_coo_tensor(
            indices, torch.zeros(value.nonzero, dtype=value.dtype), value.shape,
            is_coalesced=value.coalesced, check_invariants=False,
        )  # fmt: skip
    by_rows = value.layout is torch.sparse_csr
    many, few = (rows, columns) if by_rows else (columns, rows)
    make = torch.sparse_csr_tensor if by_rows else torch.sparse_csc_tensor
    starts = torch.linspace(0, value.nonzero, many + 1).long()
    return make(
        starts, places % few, torch.zeros(value.nonzero, dtype=value.dtype), value.shape,
        check_invariants=False,
    )  # fmt: skip


def settle(
    live: Mapping[int, int],
    calls: Mapping[int, Call],
    formulas: Mapping[int, tuple[int, str]],
    kernels: Kernels,
    floor: int = 0,
) -> dict[int, tuple[int, str]]:
    """Return the scratch by event, measured where it may decide the highest point.

    `live` is what is alive at the event of every call, `formulas` what takes the place of a
    measurement that there is none of, `floor` the highest point without anything inside.
    """
    guess = {
        event: max(bound(call), formulas.get(event, (0, ""))[0]) for event, call in calls.items()
    }
    settled: dict[int, tuple[int, str]] = {
        event: found for event, found in formulas.items() if event not in calls
    }
    best = max((live[event] + found[0] for event, found in settled.items()), default=0)
    best = max(best, floor)
    for event in sorted(calls, key=lambda event: live[event] + guess[event], reverse=True):
        if live[event] + guess[event] <= best:
            break
        inside = kernels.inside(calls[event])
        if inside is None:
            found = formulas.get(event, (0, ""))
        else:
            found = (inside, formulas.get(event, (0, f"inside {calls[event].func.name()}"))[1])
        settled[event] = found
        best = max(best, live[event] + found[0])
    return settled
