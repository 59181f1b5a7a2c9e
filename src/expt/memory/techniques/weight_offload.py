"""Weight offload: frozen weights wait in host memory, and are on the device while a block runs.

Before a block's forward pass its frozen weights are copied to the device, and dropped after it.
What autograd keeps for the backward pass is where they are, not the copy (saved-tensor hooks): each
is copied again when it is needed there, also where autocast had cast it. They are the same numbers,
so that nothing is computed otherwise. What is in no repeated block stays on the device.

On a model of fake tensors the originals are on `meta`, which takes no bytes, and copies are made:
a plan made under `FakeTensorMode` sees both.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from expt.memory.techniques.repeated_blocks import repeated_blocks
from expt.memory.techniques.wrapping import layer_of, unwrap, wrap

NAME = "weight_offload"
ANYWHERE = False
"""Also copy where the weights are on the device already, to test without a GPU."""
CAST = torch.ops.aten._to_copy.default


def offload_weights(model: nn.Module) -> int:
    """Let the frozen weights of `model`'s blocks wait on the host; return how many blocks have any.

    In place, reversible; may be called again, also between steps.
    """
    found = offloadable(model)
    for block in repeated_blocks(model):
        if block not in found:
            unwrap(block, NAME)
    for block, weights in found.items():
        layer = layer_of(block, NAME)
        if not isinstance(layer, HostWeights):
            layer = HostWeights(block)
            wrap(block, NAME, layer)
        known, brought = layer.by_id(), dict[int, Waiting]()
        for module, name, weight in weights:
            one = known.get(id(weight)) or brought.get(id(weight)) or Waiting.of(weight)
            brought[id(weight)] = one
            module._parameters[name] = one.weight
        layer.waiting = list(brought.values())
    return len(found)


def keep_weights(model: nn.Module) -> int:
    """Keep all weights on the device again, where the trained ones are; return how many blocks."""
    others = [weight for weight in model.parameters() if weight.requires_grad]
    count = 0
    for block in model.modules():
        layer = layer_of(block, NAME)
        if isinstance(layer, HostWeights):
            waiting = layer.by_id()
            for module, name, weight in _weights(block):
                if id(weight) in waiting:
                    device = others[0].device if others else weight.device
                    module._parameters[name] = waiting[id(weight)].back(device)
            count += unwrap(block, NAME)
    return count


def offloadable(model: nn.Module) -> dict[nn.Module, list[tuple[nn.Module, str, nn.Parameter]]]:
    """Return the blocks with frozen weights, and where these are; none that others share."""
    blocks = repeated_blocks(model)
    inside = {id(module) for block in blocks for module in block.modules()}
    shared = {
        id(weight)
        for module in model.modules()
        if id(module) not in inside
        for weight in module.parameters(recurse=False)
    }
    found = {}
    for block in blocks:
        frozen = [
            entry
            for entry in _weights(block)
            if not entry[2].requires_grad and id(entry[2]) not in shared
        ]
        if frozen:
            found[block] = frozen
    return found


def place_others(model: nn.Module, device: torch.device) -> None:
    """Move everything to a device but the weights that wait on the host."""
    waiting = {
        number
        for block in model.modules()
        if isinstance(layer := layer_of(block, NAME), HostWeights)
        for number in layer.by_id()
    }
    for module in model.modules():
        for weight in module.parameters(recurse=False):
            if id(weight) not in waiting:
                weight.data = weight.data.to(device)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def _weights(block: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for module in block.modules():
        if isinstance(module, nn.RNNBase):
            continue  # keeps references to its weights beside them
        for name, weight in module._parameters.items():
            if weight is not None:
                yield module, name, weight


@dataclass
class Waiting:
    """A weight on the host, in place of which copies are used; of a fake one, its description."""

    weight: nn.Parameter
    fake: FakeTensor | None = None

    @classmethod
    def of(cls, weight: nn.Parameter) -> Waiting:
        """Bring a weight to the host."""
        if isinstance(weight, FakeTensor):
            away = torch.empty_strided(
                weight.shape, weight.stride(), dtype=weight.dtype, device="meta"
            )
            return cls(nn.Parameter(away, requires_grad=False), weight)
        host = weight.data.cpu()
        weight.data = host.pin_memory() if torch.cuda.is_available() else host
        return cls(weight)

    def fetch(self, device: torch.device) -> Tensor:
        """Return a copy on a device."""
        if self.fake is not None:
            return _made(self.fake)
        host = self.weight.data
        if device == host.device:
            return host.clone()
        return host.to(device, non_blocking=host.is_pinned())

    def back(self, device: torch.device) -> nn.Parameter:
        """Return the weight on a device for good."""
        if self.fake is not None:
            return self.fake  # type: ignore[return-value]  # a parameter all the same
        self.weight.data = self.weight.data.to(device)
        return self.weight


def _made(fake: FakeTensor) -> Tensor:
    """Return a fake tensor like another, newly allocated, under the modes that are on."""
    mode: Any = fake.fake_mode
    building = getattr(mode, "building", None)  # a mode that makes small tensors for real
    if building is not None:
        mode.building = True
    try:
        made = torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device="cpu")
        if not isinstance(made, FakeTensor):
            with mode:
                made = torch.empty_strided(
                    fake.shape, fake.stride(), dtype=fake.dtype, device="cpu"
                )
    finally:
        if building is not None:
            mode.building = building
    return made


@dataclass
class Reference:
    """What autograd keeps of a copy: which weight, as which type, seen how."""

    waiting: Waiting
    device: torch.device
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def restore(self) -> Tensor:
        """Return the same view of a new copy."""
        with torch.no_grad():
            copy = self.waiting.fetch(self.device).to(self.dtype)
            return copy.as_strided(self.size, self.stride, self.offset)


@dataclass
class HostWeights:
    """The layer around a block's `forward`; see `expt.memory.techniques.wrapping`.

    `waiting` are its weights on the host.
    """

    block: nn.Module
    waiting: list[Waiting] = field(default_factory=list)

    def by_id(self) -> dict[int, Waiting]:
        """Return the weights by the id of the parameter that stands for them in the model."""
        return {id(one.weight): one for one in self.waiting}

    def __call__(self, forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run the block with copies of its weights."""
        device = _device(args, kwargs)
        fake = any(one.fake is not None for one in self.waiting)
        if device is None or (device.type == "cpu" and not fake and not ANYWHERE):
            return forward(*args, **kwargs)  # they are at home
        waiting, copies, origins = self.by_id(), dict[int, nn.Parameter](), Origins()
        homes = [(m, n, w) for m, n, w in _weights(self.block) if id(w) in waiting]
        for _, _, weight in homes:
            if id(weight) not in copies:
                copy = nn.Parameter(waiting[id(weight)].fetch(device), requires_grad=False)
                copies[id(weight)] = copy
                origins.note(copy, waiting[id(weight)])
        try:
            for module, name, weight in homes:
                module._parameters[name] = copies[id(weight)]
            with self._kept(origins, device), noting_casts(origins, device):
                return forward(*args, **kwargs)
        finally:
            for module, name, weight in homes:
                module._parameters[name] = weight

    def _kept(self, origins: Origins, device: torch.device) -> AbstractContextManager[Any]:
        """Keep references to copies; what is no copy is kept as it would be without us."""
        if not torch.is_grad_enabled():
            return nullcontext()
        outer = torch._C._autograd._top_saved_tensors_default_hooks(True)
        pack_rest, unpack_rest = outer or (lambda tensor: tensor, lambda packed: packed)

        def pack(tensor: Tensor) -> Any:
            one = origins.of(tensor)
            if one is None:
                return pack_rest(tensor)
            offset = int(tensor.storage_offset())
            return Reference(one, device, tensor.dtype, tensor.size(), tensor.stride(), offset)

        def unpack(packed: Any) -> Tensor:
            if isinstance(packed, Reference):
                return packed.restore()
            found: Tensor = unpack_rest(packed)
            return found

        return saved_tensors_hooks(pack, unpack)


class Origins:
    """Which storages are copies of which weights, for as long as they live."""

    def __init__(self) -> None:
        self._by_storage: dict[int, Waiting] = {}
        self._whole: set[int] = set()

    def note(self, copy: Tensor, waiting: Waiting, cast: bool = False) -> None:
        """Note a copy; one in another type is not looked at when it is cast again."""
        storage = copy.untyped_storage()
        key = storage._cdata
        self._by_storage[key] = waiting
        if not cast:
            self._whole.add(key)
        # Another tensor may have its place afterwards.
        weakref.finalize(storage, self._forget, key).atexit = False

    def _forget(self, key: int) -> None:
        self._by_storage.pop(key, None)
        self._whole.discard(key)

    def of(self, tensor: Tensor) -> Waiting | None:
        """Return the weight that a tensor is a copy of, or a view of one; None if it is none."""
        if tensor.layout is not torch.strided:
            return None
        return self._by_storage.get(tensor.untyped_storage()._cdata)

    def cast(self, tensor: Tensor) -> Waiting | None:
        """Return the weight that a tensor is a whole copy of, in the weight's type."""
        one = self.of(tensor)
        if one is None or tensor.untyped_storage()._cdata not in self._whole:
            return None
        known = one.weight
        same = tensor.shape == known.shape and tensor.stride() == known.stride()
        return one if same and tensor.storage_offset() == 0 else None


class NotingCasts(TorchDispatchMode):
    """Notes which tensors are copies of weights in another type, as autocast makes them."""

    def __init__(self, origins: Origins) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.origins = origins

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator; see the class."""
        result = func(*args, **(kwargs or {}))
        one = self.origins.cast(args[0]) if func is CAST else None
        if one is not None and result.stride() == args[0].stride():
            self.origins.note(result, one, cast=True)
        return result


def noting_casts(origins: Origins, device: torch.device) -> AbstractContextManager[Any]:
    """Return what notes casts, where autocast is on."""
    on = torch.is_grad_enabled() and torch.is_autocast_enabled(device.type)
    return NotingCasts(origins) if on else nullcontext()


def _device(*trees: Any) -> torch.device | None:
    """Return the device of the first tensor among arguments."""
    return next((leaf.device for leaf in tree_iter(trees) if isinstance(leaf, Tensor)), None)
