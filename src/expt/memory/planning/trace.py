"""A trace of every tensor storage that one training step makes and drops, on fake tensors.

`StorageTrace` is a dispatch mode that sits above a `FakeTensorMode`: operators compute shapes
and nothing else, while every storage's birth and death is written down, with the phase of the
step and the module it happened in. From the record follow the peak, what was alive at the peak,
and what an allocator would have reserved.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, is_fake
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from expt.memory.measuring.in_place_sums import InPlaceSums
from expt.memory.measuring.ledger import dense_parts, has_shared_out, local
from expt.memory.planning.cpu_scratch import lstm_workspace, whole_result
from expt.memory.planning.kernel_memory import Call, Kernels, bound, call_of, settle

DEVICE_OF = torch.ops.prim.device.default
"""Asked for by most Python code that touches a tensor; answered without dispatching further."""

CONVOLUTION_COPIES = 3
"""cuDNN's workspaces over operands of the largest convolution, at most: see `card`."""
CONVOLUTION = torch.ops.aten.convolution.default
SPARSE_OF_PARTS = torch.ops.aten._sparse_coo_tensor_with_dims_and_tensors.default
ITEM_OF = torch.ops.aten._local_scalar_dense.default

SENDING = ("c10d", "fsdp")
"""Namespaces of operators that send to other processes, or make ready to."""

FAR = 1000.0
"""What an optimizer reads from its own state: steps taken, far enough for what it only does later.

Some divide by its distance from 0 or 1.
"""


@dataclass(slots=True)
class Storage:
    """One storage of the trace: its size, and where it came from."""

    bytes: int
    phase: str
    module: str
    operator: str
    made: bool  # by an operator of the trace; else it was there before
    category: str = ""


class StorageTrace(TorchDispatchMode):
    """Context manager that records births and deaths of storages.

    `events` holds (storage number, bytes added or removed, phase number); `phases` names them.
    """

    def __init__(
        self,
        scratch_of: Callable[[Any, tuple[Any, ...], Any], tuple[str, int] | None] | None = None,
        runs_kernels: bool = False,
        result_of: Callable[[Any, tuple[Any, ...], Any], Any] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages: list[Storage] = []
        self.events: list[tuple[int, int, int]] = []
        self.phases: list[str] = ["build"]
        self.scratch: list[tuple[int, int, str]] = []  # (event, bytes, name)
        self.runs_kernels = runs_kernels
        self.kernels = Kernels()
        self._scratch_of, self._result_of = scratch_of, result_of
        self._in_place_sums = InPlaceSums()
        self._numbers: dict[int, int] = {}  # storage's address -> number
        self._holders: dict[int, int] = {}  # addresses by number, where there is more than one
        self._modules: list[str] = []
        self._names: dict[int, str] = {}
        self._stepping = 0
        self._counting = True
        self._automatic = False
        self._paused = False
        self.calls: list[tuple[int, Call]] = []  # operators that may hold something, by event
        self.convolution_bytes = 0  # operands and result of the largest convolution

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled while a step is traced

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Compute shapes and enter the storages that were read and made."""
        if func is DEVICE_OF and hasattr(args[0], "fake_device"):
            return args[0].fake_device
        if has_shared_out(types):
            return NotImplemented  # and come back with their local parts
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():  # shapes are computed by code that modes would see
            return self._record(func, args, kwargs)

    def _record(self, func: Any, args: Any, kwargs: Any) -> Any:
        if self._paused:
            return func(*args, **kwargs)
        name = _name(func)
        if self._automatic:
            self._find_phase()
        self._enter_all(args, name, made=False)
        if kwargs:
            self._enter_all(kwargs, name, made=False)
        if func is ITEM_OF and self._asks_for_count(args[0]):
            return FAR  # a count of steps, or what follows from one
        in_place = self._in_place_sums.has(func, args)
        if func.namespace in SENDING:
            from expt.memory.measuring.sharded import sent

            result = sent(func, args, kwargs)
        else:
            result = lstm_workspace(func, args, func(*args, **kwargs))
        if self.runs_kernels:
            result = whole_result(func, args, result)
        if self._result_of is not None:
            result = self._result_of(func, args, result)
        if func is CONVOLUTION:
            operands = sum(tensor.nbytes for tensor in (*args[:2], result))
            self.convolution_bytes = max(self.convolution_bytes, operands)
        if func is SPARSE_OF_PARTS:  # its parts are the operands, which had to be made again
            for part in tree_iter(args[3:5]):
                self._hand_over(part)
        if in_place and result.nbytes == args[0].nbytes:
            self._hand_over(args[0])
        if args and getattr(func, "is_view", False):
            self._share(args[0], result)
        self._enter_all(result, name, made=True)
        if self._scratch_of is not None:
            self._note_scratch(func, args, kwargs, result)
        return result

    def like(self) -> StorageTrace:
        """Return an empty trace for the same target."""
        return StorageTrace(self._scratch_of, self.runs_kernels, self._result_of)

    @property
    def workspace_bytes(self) -> int:
        """What cuDNN may take for workspaces, where there is room."""
        return CONVOLUTION_COPIES * self.convolution_bytes

    def _note_scratch(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        assert self._scratch_of is not None
        event = len(self.events) - 1
        if found := self._scratch_of(func, args, result):
            self.scratch.append((event, found[1], found[0]))
        if self.runs_kernels and (call := call_of(func, args, kwargs, result)) is not None:
            self.calls.append((event, call))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Say which part of the step runs inside."""
        outer = "between" if self.phases[-1] == "build" else self.phases[-1]
        self.phases.append(name)
        try:
            yield
        finally:
            self.phases.append(outer)

    def _asks_for_count(self, tensor: Tensor) -> bool:
        return bool(self._stepping) and self._counting and tensor.dtype is not torch.bool

    @contextmanager
    def finding_phases(self) -> Iterator[None]:
        """Tell the parts of a step apart by what runs inside, whoever wrote it."""
        self._automatic = True
        try:
            yield
        finally:
            self._automatic = False
            self.mark("forward", "activations")
            self.phases.append("between")

    def _find_phase(self) -> None:
        phase = "forward"
        if self._stepping:
            phase = "optimizer_step"
        elif torch._C._current_autograd_node() is not None:
            phase = "backward"
        if phase != self.phases[-1]:
            if self.phases[-1] == "forward":
                self.mark("forward", "activations")
            self.phases.append(phase)

    def mark(self, phase: str, category: str) -> None:
        """Give what a phase made and left alive a category."""
        for number in self.alive():
            storage = self.storages[number]
            if storage.made and storage.phase == phase and not storage.category:
                storage.category = category

    def step_begins(self, counting: bool = True) -> None:
        """Say that an optimizer steps from now on, in whatever phase.

        `counting`: what it reads are counts of steps, not losses.
        """
        self._stepping += 1
        self._counting = counting

    def step_ends(self) -> None:
        """Say that the optimizer has stepped."""
        self._stepping -= 1

    @contextmanager
    def outside_step(self) -> Iterator[None]:
        """Say that an optimizer that steps calls the loss again."""
        stepping, self._stepping = self._stepping, 0
        try:
            yield
        finally:
            self._stepping = stepping

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing inside."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def live_bytes(self) -> int:
        """Return what is alive now."""
        return sum(self.storages[number].bytes for number in self.alive())

    def numbers(self, tensors: Iterable[Tensor]) -> list[int]:
        """Return the numbers of tensors' storages, of those that have one."""
        keys = [tensor.untyped_storage()._cdata for tensor in _dense(tensors)]
        return [self._numbers[key] for key in keys if key in self._numbers]

    @contextmanager
    def naming(self, model: nn.Module) -> Iterator[None]:
        """Note which of `model`'s modules makes a storage, while inside."""
        self._names = {id(module): name for name, module in model.named_modules()}

        def enter(module: nn.Module, _: Any) -> None:
            self._modules.append(self._names.get(id(module), type(module).__name__))

        def leave(module: nn.Module, _: Any, __: Any) -> None:
            self._modules.pop()

        handles = [
            register_module_forward_pre_hook(enter),
            register_module_forward_hook(leave, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def enter(self, tensors: Iterable[Tensor], category: str, module: str = "") -> None:
        """Enter tensors that are known to be of a category (parameters, gradients, …).

        `module` is the name of the one they belong to, where that is known.
        """
        for tensor in _dense(tensors):
            self._enter(tensor, category, made=False)
            number = self._numbers.get(tensor.untyped_storage()._cdata)
            if number is not None:
                storage = self.storages[number]
                storage.category, storage.module = category, module or storage.module

    def repeat(self, event: int, storage: int) -> dict[int, int] | None:
        """Enter all from an event and a storage on once more, as if it had been run again.

        Returns the new numbers of the storages that are made again; None, and nothing is entered,
        if that cannot be told: see `once_more`.
        """
        again = once_more(self.events[event:], storage)
        if again is None:
            return None
        numbers: dict[int, int] = {}
        places = []  # of every event from `event` on, the last that is entered for it
        for entered in again:
            if entered is not None:
                number, change, phase = entered
                if number not in numbers:
                    numbers[number] = len(self.storages)
                    self.storages.append(replace(self.storages[number]))
                self.events.append((numbers[number], change, phase))
            places.append(len(self.events) - 1)
        self.scratch += [
            (places[at - event], count, name) for at, count, name in self.scratch if at >= event
        ]
        self.calls += [(places[at - event], call) for at, call in self.calls if at >= event]
        return numbers

    def alive(self) -> list[int]:
        """Return the numbers of the storages that are alive now."""
        return list(dict.fromkeys(self._numbers.values()))

    def settled_scratch(self, sums: Sequence[int], start: int) -> dict[int, tuple[int, str]]:
        """Return (bytes, name) of what kernels hold inside, by event; the largest of each event.

        `sums` is what is alive after every event; the kernels from `start` on that may decide the
        highest point are run.
        """
        formulas: dict[int, tuple[int, str]] = {}
        for event, count, name in self.scratch:
            formulas[event] = max(formulas.get(event, (0, "")), (count, name))
        calls: dict[int, Call] = {}
        for event, call in self.calls:
            if event >= start and (event not in calls or bound(call) > bound(calls[event])):
                calls[event] = call
        live = {event: sums[event] for event in {*calls, *formulas} if event >= 0}
        floor = max(sums[start:], default=0)
        return settle(live, calls, formulas, self.kernels, floor)

    def _enter_all(self, tree: Any, operator: str, made: bool) -> None:
        kind = type(tree)
        if kind is FakeTensor and tree.layout is torch.strided:
            storage = tree.untyped_storage()
            number = self._numbers.get(storage._cdata)
            if number is None or storage.nbytes() != self.storages[number].bytes:
                self._enter(tree, operator, made)
        elif kind is tuple or kind is list:
            for part in tree:
                self._enter_all(part, operator, made)
        elif isinstance(tree, Tensor):
            self._enter(tree, operator, made)
        elif isinstance(tree, list | tuple | dict):
            for part in tree.values() if isinstance(tree, dict) else tree:
                self._enter_all(part, operator, made)

    def _hand_over(self, tensor: Tensor) -> None:
        """End a storage whose place the result of an in-place sum takes."""
        key = tensor.untyped_storage()._cdata
        if key in self._numbers:
            self._leave(key)

    def _share(self, base: Tensor, views: Any) -> None:
        """Let fake views of a real tensor stand for its storage, instead of one of their own."""
        if is_fake(base) or base.layout is not torch.strided:
            return
        number = self._numbers.get(base.untyped_storage()._cdata)
        if number is None:
            return
        for view in tree_iter(views):
            storage = view.untyped_storage()
            if storage._cdata not in self._numbers:
                self._numbers[storage._cdata] = number
                self._holders[number] = self._holders.get(number, 1) + 1
                weakref.finalize(storage, self._leave, storage._cdata, number).atexit = False

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Enter that a storage has another size now."""
        number, count = self._numbers.get(storage._cdata), storage.nbytes()
        if number is not None and count != self.storages[number].bytes:
            self.events.append((number, count - self.storages[number].bytes, len(self.phases) - 1))
            self.storages[number].bytes = count

    def _enter(self, tensor: Tensor, operator: str, made: bool) -> None:
        tensor = local(tensor)
        if tensor.layout is not torch.strided:
            for part in dense_parts(tensor):
                self._enter(part, operator, made)
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        number = self._numbers.get(key)
        count = storage.nbytes()
        phase = len(self.phases) - 1
        if number is None:
            if tensor.device.type == "meta":
                return
            number = len(self.storages)
            module = self._modules[-1] if self._modules else ""
            self.storages.append(Storage(count, self.phases[-1], module, operator, made))
            self._numbers[key] = number
            self.events.append((number, count, phase))
            weakref.finalize(storage, self._leave, key, number).atexit = False
        elif count != self.storages[number].bytes:
            self.events.append((number, count - self.storages[number].bytes, phase))
            self.storages[number].bytes = count

    def _leave(self, key: int, number: int | None = None) -> None:
        """End the storage at an address; `number` is given where another may have its place."""
        if number is not None and self._numbers.get(key) != number:
            return
        number = self._numbers.pop(key)
        if self._holders.get(number, 1) > 1:
            self._holders[number] -= 1
            return
        self.events.append((number, -self.storages[number].bytes, len(self.phases) - 1))


def once_more(
    events: Sequence[tuple[int, int, int]], storage: int
) -> list[tuple[int, int, int] | None] | None:
    """Return what events would be if the same were run again, None for those that would not be.

    `storage` is the number of the first that they made. What a storage holds when all is done was
    made for good, and is not made again. Without a list it cannot be told: a storage from before
    has changed, or one that was made for good has changed meanwhile.
    """
    left: dict[int, int] = defaultdict(int)
    changes: dict[int, int] = defaultdict(int)
    for number, change, _ in events:
        left[number] += change
        changes[number] += 1
    if any(n < storage or (left[n] > 0 and changes[n] > 1) for n in left):
        return None
    return [None if left[event[0]] > 0 else event for event in events]


@cache
def _name(func: Any) -> str:
    return func.name() if hasattr(func, "name") else str(func)


def _dense(tensors: Iterable[Tensor]) -> list[Tensor]:
    with no_dispatch():
        return [part for tensor in tensors for part in dense_parts(tensor)]


@dataclass(frozen=True)
class Peak:
    """The highest point of a trace: bytes, its phase, and what was alive there."""

    bytes: int
    phase: str
    alive: dict[int, int]  # bytes by storage number
    scratch: dict[str, int]  # bytes inside the kernel that ran, by name


def find_peak(
    trace: StorageTrace, size: Callable[[int], int], start: int = 0, end: int | None = None
) -> Peak:
    """Return the highest point from event `start` on, with `size` applied to every storage.

    `size` is the allocator's rounding: what it takes for a request of so many bytes.
    """
    sums = running_sums(trace.events, size)
    scratch = trace.settled_scratch(sums, start)
    best, at = 0, -1
    for index in range(start, len(sums) if end is None else end):
        total = sums[index] + (scratch[index][0] if index in scratch else 0)
        if total > best:
            best, at = total, index
    alive: dict[int, int] = defaultdict(int)
    for number, change, _ in trace.events[: at + 1]:
        alive[number] += change
    return Peak(
        bytes=best,
        phase=trace.phases[trace.events[at][2]] if at >= 0 else "none",
        alive={number: size(count) for number, count in alive.items() if count > 0},
        scratch={scratch[at][1]: scratch[at][0]} if scratch.get(at, (0, ""))[0] else {},
    )


def running_sums(events: Iterable[tuple[int, int, int]], size: Callable[[int], int]) -> list[int]:
    """Return what is alive after every event."""
    live: dict[int, int] = defaultdict(int)
    sums, total = [], 0
    for number, change, _ in events:
        before = live[number]
        live[number] = before + change
        total += size(before + change) - size(before)
        sums.append(total)
    return sums
