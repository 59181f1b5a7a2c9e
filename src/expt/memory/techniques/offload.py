"""Saved-tensor offload: what the backward pass needs waits in host memory instead of on the GPU.

`offload_saved_tensors` wraps a model's `forward`: every tensor that autograd saves inside it is
copied to the host and back when it is needed, through pinned memory on CUDA, so that the copies
run beside the computation. Weights and buffers stay, since they are on the device anyway, and so
do tensors too small to be worth a transfer. With checkpointing, it is the blocks' inputs that go.

On a model of fake tensors nothing is copied, and what is offloaded takes no bytes: a plan made
under `FakeTensorMode` sees the saving on any fake device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks

from expt.memory.techniques.wrapping import unwrap, wrap

NAME = "saved_tensor_offload"
MIN_BYTES = 1024**2
"""Smaller tensors stay: CUDA's allocator serves them from pools of their own, and a transfer of
1 MiB takes tens of microseconds, which is what starting it costs."""


def offload_saved_tensors(model: nn.Module) -> None:
    """Keep in host memory what `model`'s backward pass needs; in place, reversible."""
    wrap(model, NAME, Offloaded(model))


def remove_offload(model: nn.Module) -> bool:
    """Keep it on the device again; return whether it was offloaded."""
    return unwrap(model, NAME)


class Offloaded:
    """The layer around a model's `forward`; see `expt.memory.techniques.wrapping`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run the model; what it saves for the backward pass goes to the host."""
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # Asked anew each time: the model may have moved, and its storages with it.
        own = {_storage_key(tensor) for tensor in (*self.model.parameters(), *self.model.buffers())}

        def pack(tensor: Tensor) -> Tensor | OnHost | Absent:
            if tensor.nbytes < MIN_BYTES or _storage_key(tensor) in own:
                return tensor
            if tensor.layout is not torch.strided or _repeats(tensor):
                return tensor
            if isinstance(tensor, FakeTensor):
                return Absent(tensor)
            return OnHost(tensor) if leaves_device(tensor) else tensor

        with saved_tensors_hooks(pack, _unpack):
            return forward(*args, **kwargs)


class OnHost:
    """A copy of a tensor in host memory, pinned where it came from CUDA."""

    def __init__(self, tensor: Tensor) -> None:
        pinned = tensor.is_cuda
        self.device = tensor.device
        self.copy = torch.empty_like(tensor, device="cpu", pin_memory=pinned)
        # Both copies run on the current stream, which also orders them.
        self.copy.copy_(tensor, non_blocking=pinned)

    def restore(self) -> Tensor:
        """Return the tensor, on the device it came from."""
        if not self.copy.is_pinned():
            return self.copy.to(self.device)
        return self.copy.to(self.device, non_blocking=True)


class Absent:
    """What is left of a fake tensor: no bytes, until it is needed."""

    def __init__(self, tensor: FakeTensor) -> None:
        self.shape, self.stride = tensor.shape, tensor.stride()
        self.dtype, self.device, self.mode = tensor.dtype, tensor.device, tensor.fake_mode

    def restore(self) -> Tensor:
        """Return a fake tensor of the same kind, newly allocated."""
        with self.mode:
            return torch.empty_strided(
                self.shape, self.stride, dtype=self.dtype, device=self.device
            )


def leaves_device(tensor: Tensor) -> bool:
    """Tell whether the host is elsewhere: not for a tensor that is on it already."""
    return tensor.device.type != "cpu"


def _unpack(packed: Tensor | OnHost | Absent) -> Tensor:
    return packed if isinstance(packed, Tensor) else packed.restore()


def _storage_key(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key


def _repeats(tensor: Tensor) -> bool:
    """Tell whether elements share memory, as in an expanded tensor: a copy would be larger."""
    return any(
        step == 0 and size > 1 for size, step in zip(tensor.shape, tensor.stride(), strict=True)
    )
