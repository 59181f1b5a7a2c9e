"""The largest live tensors, by what they are: a weight, its gradient, its optimizer state, data.

They are looked for among the objects that Python's collector knows, and a storage counts once,
however many tensors view it. What only a backward pass holds (activations without a name in
Python) is not among them, so that `Found.bytes` may be less than what is allocated; the difference
is what has no name. A search takes some 0.1 s, keeps no reference, and is for alarms.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from expt.units import format_allocation

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

COUNT = 5
"""Tensors that an alarm names."""


@dataclass(frozen=True)
class LiveTensor:
    """One storage, as the tensor that names it; `bytes` are the storage's."""

    what: str
    shape: tuple[int, ...]
    dtype: str
    device: str
    bytes: int

    def line(self) -> str:
        """Return it for a reader: ``parameter head.weight [64, 12] float32, 3.00 KiB``."""
        sizes = ", ".join(map(str, self.shape))
        return f"{self.what} [{sizes}] {self.dtype}, {format_allocation(self.bytes)}"

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {**asdict(self), "shape": list(self.shape)}


@dataclass(frozen=True)
class Found:
    """The largest tensors of a device, largest first, and the bytes of all that were seen."""

    largest: tuple[LiveTensor, ...]
    bytes: int


def named_tensors(
    model: nn.Module | None, optimizer: Optimizer | None, data: object
) -> Iterator[tuple[str, Tensor]]:
    """Yield (what it is, tensor) of weights, buffers, gradients, optimizer state and data.

    Of `data`, which may be anything, those are yielded that are its attributes, or in
    dictionaries there.
    """
    import torch

    of: dict[int, str] = {}
    for name, weight in () if model is None else _bare(model).named_parameters():
        of[id(weight)] = name
        yield f"parameter {name}", weight
        if weight.grad is not None:
            yield f"gradient of {name}", weight.grad
    for name, buffer in () if model is None else _bare(model).named_buffers():
        yield f"buffer {name}", buffer
    inner = getattr(optimizer, "optimizer", optimizer)  # Fabric's wrapper may have an old state
    state = {} if inner is None else inner.state
    for owner, held in state.items():
        name = of.get(id(owner), "an unnamed weight")
        for key, value in held.items() if isinstance(held, Mapping) else ():
            if isinstance(value, torch.Tensor):
                yield f"optimizer state {key} of {name}", value
    yield from _attributes("data ", vars(data) if hasattr(data, "__dict__") else {})


def _attributes(prefix: str, values: Mapping[Any, Any]) -> Iterator[tuple[str, Tensor]]:
    import torch

    for key, value in values.items():
        name = f"{prefix}{str(key).lstrip('_')}"
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, dict):
            yield from _attributes(f"{name}.", value)


class Names:
    """What the tensors of a training are, as a function of no arguments; keeps none alive."""

    def __init__(self) -> None:
        self._owners: list[Callable[[], Any]] = [_nothing] * 3

    def know(
        self, model: nn.Module | None, optimizer: Optimizer | None, data: object | None
    ) -> None:
        """Take these, by weak references; of what has none (a dictionary), nothing is known."""
        self._owners = []
        for owner in (model, optimizer, data):
            try:
                self._owners.append(_nothing if owner is None else weakref.ref(owner))
            except TypeError:
                self._owners.append(_nothing)

    def __call__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what `named_tensors` says of them."""
        model, optimizer, data = (owner() for owner in self._owners)
        return named_tensors(model, optimizer, data)


def _nothing() -> None:
    """Stand for what is not known."""


def find_largest(place: str, names: Iterable[tuple[str, Tensor]] = (), count: int = COUNT) -> Found:
    """Return the largest tensors that live on a device.

    Args:
        place: a device like ``cpu``, ``cuda`` or ``cuda:0``.
        names: what tensors are (`named_tensors`); the first name of a storage counts.
        count: how many to return.

    """
    named: dict[int, tuple[str, Tensor]] = {}
    for what, tensor in names:
        for key, part in _storages(tensor, place):
            named.setdefault(key, (what, part))
    chosen = dict(named)
    for tensor in _alive():
        for key, part in _storages(tensor, place):
            known = chosen.get(key)
            if key not in named and (known is None or part.numel() > known[1].numel()):
                chosen[key] = (_guess(tensor), part)
    sizes = {key: part.untyped_storage().nbytes() for key, (_, part) in chosen.items()}
    order = sorted(chosen, key=lambda key: -sizes[key])[:count]
    return Found(
        tuple(
            LiveTensor(
                what,
                tuple(part.shape),
                str(part.dtype).removeprefix("torch."),
                str(part.device),
                sizes[key],
            )
            for key in order
            for what, part in (chosen[key],)
        ),
        sum(sizes.values()),
    )


def _alive() -> Iterator[Tensor]:
    """Yield every tensor that Python's collector knows."""
    import torch

    for found in gc.get_objects():
        # Not isinstance, which asks the object itself, and some answer by importing a package.
        if issubclass(type(found), torch.Tensor):
            yield found


def _storages(tensor: Tensor, place: str) -> Iterator[tuple[int, Tensor]]:
    """Yield (key of the storage, dense tensor) of the parts of a tensor that are on a device."""
    import torch
    from torch._subclasses.fake_tensor import is_fake

    from expt.memory.measuring.ledger import dense_parts

    try:
        device = str(tensor.device)
        if is_fake(tensor) or (device != place and not device.startswith(f"{place}:")):
            return
        for part in dense_parts(tensor):
            storage = part.untyped_storage()
            if storage.nbytes():
                yield storage._cdata, part
    except (RuntimeError, NotImplementedError, torch.jit.Error):
        return  # a wrapper without a storage of its own, or one that was given back


def _guess(tensor: Tensor) -> str:
    """Say what an unnamed tensor is, as far as it tells itself."""
    try:
        made_by = tensor.grad_fn
    except RuntimeError:  # of several views made at once (`unbind`), changed in place since
        return "activation"
    if made_by is not None:
        return f"activation ({made_by.name()})"
    return "leaf that wants a gradient" if tensor.requires_grad else "other"


def _bare(model: nn.Module) -> nn.Module:
    from expt.memory.techniques.wrapping import bare

    return bare(model)
