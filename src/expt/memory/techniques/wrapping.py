"""Layers around a module's `forward`, put on and taken off by name while the model lives.

They sit on the instance, so that names, `state_dict` and the class stay as they are, and they are
objects with a reference to what they wrap, so that a deep copy of the model wraps its own copy.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer


class Layer(Protocol):
    """What is called instead of `forward`, with `forward` as its first argument."""

    def __call__(self, forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call `forward`, once or more often, and return its output."""


class Wrapped:
    """A module's `forward` with one more layer around it; `inner` may have layers of its own."""

    def __init__(self, name: str, inner: Callable[..., Any], layer: Layer) -> None:
        self.name = name
        self.inner = inner
        self.layer = layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the layer."""
        return self.layer(self.inner, *args, **kwargs)

    @property
    def __wrapped__(self) -> Callable[..., Any]:  # for inspect.signature
        return self.inner


def wrap(module: nn.Module, name: str, layer: Layer) -> None:
    """Put `layer` around `module.forward`, as the outermost, in place of one of that name."""
    unwrap(module, name)
    module.forward = Wrapped(name, module.forward, layer)


def unwrap(module: nn.Module, name: str) -> bool:
    """Take the layer of that name off `module.forward`; return whether there was one."""
    outer: Wrapped | None = None
    found = vars(module).get("forward")
    while isinstance(found, Wrapped) and found.name != name:
        outer, found = found, found.inner
    if not isinstance(found, Wrapped):
        return False
    if outer is not None:
        outer.inner = found.inner
    elif _is_own(found.inner, module):
        del module.forward
    else:  # a forward that someone else had put on the instance
        module.forward = found.inner
    return True


def layer_of(module: nn.Module, name: str) -> Layer | None:
    """Return the layer of that name around `module.forward`."""
    found = vars(module).get("forward")
    while isinstance(found, Wrapped):
        if found.name == name:
            return found.layer
        found = found.inner
    return None


def bare(model: nn.Module) -> nn.Module:
    """Return the model itself, without the wrapper that Fabric puts around it."""
    from lightning_fabric.wrappers import is_wrapped

    return model.module if is_wrapped(model) else model  # type: ignore[return-value]


def bare_optimizer(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer itself, without the wrapper that Fabric puts around it."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return inner if isinstance(inner, Optimizer) else optimizer


def _is_own(forward: Callable[..., Any], module: nn.Module) -> bool:
    """Tell whether this is the bound method of the module's class."""
    return isinstance(forward, MethodType) and forward.__func__ is type(module).forward
