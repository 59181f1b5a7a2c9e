"""A model without its weights: built on `meta`, its parameters and buffers then made fake.

Building on `meta` works where building inside a `FakeTensorMode` does not (modules that copy
themselves, like `nn.TransformerEncoder`), and costs nothing whatever the model's size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

REGISTRIES = frozenset(vars(nn.Module()))
"""What every module keeps by itself: parameters, buffers, hooks, modules."""


def fake_mode() -> FakeTensorMode:
    """Return a mode in which real tensors (a data set's) may be read and become fake."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def build_fake(model_fn: Callable[[], nn.Module], mode: FakeTensorMode) -> nn.Module:
    """Build a model whose tensors are all fake, on the device `cpu`.

    A model that cannot be built on `meta` (it reads values while it is built, or keeps a sparse
    tensor, whose size depends on them) is built for real, and its tensors are replaced then;
    sparse ones stay real. The random state is the caller's to restore.
    """
    try:
        with torch.device("meta"):
            model = model_fn()
    except (NotImplementedError, RuntimeError):
        model = model_fn()
    if any(tensor.layout is not torch.strided for tensor in _tensors(model)):
        model = model_fn()
    make_fake(model, mode)
    return model


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def make_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replace every tensor that the modules hold by a fake one; shared ones stay shared."""
    replaced: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if tensor.layout is not torch.strided:
            return tensor
        if id(tensor) not in replaced:
            with mode:
                new = torch.empty_strided(
                    tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu"
                )
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, requires_grad=tensor.requires_grad)
            replaced[id(tensor)] = new
        return replaced[id(tensor)]

    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                setattr(module, name, fake(parameter))  # some modules keep lists of them in step
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = fake(buffer)
        for name, value in list(vars(module).items()):
            if isinstance(value, Tensor | list | tuple | dict) and name not in REGISTRIES:
                vars(module)[name] = tree_map_only(Tensor, fake, value)
