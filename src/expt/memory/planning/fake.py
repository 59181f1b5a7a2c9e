"""A model without its weights: built on `meta`, its parameters and buffers then made fake.

Building on `meta` works where building inside a `FakeTensorMode` does not (modules that copy
themselves, like `nn.TransformerEncoder`), and costs nothing whatever the model's size. A model
that somebody else holds is copied without its weights, and stays as it is.

What a traced model keeps in a cache of its own (a positional table behind
`functools.lru_cache`) has no values, and is looked for afterwards.
"""

from __future__ import annotations

import copy
import functools
import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map_only

from expt.errors import UserError
from expt.memory.planning.cuda_names import cuda_names
from expt.memory.planning.hybrid import MAX_REAL_BYTES, HybridFakeMode

log = logging.getLogger(__name__)

REGISTRIES = frozenset(vars(nn.Module()))
"""What every module keeps by itself: parameters, buffers, hooks, modules."""
LIBRARIES = ("torch.", "functools", "typing", "sympy")
"""Where function caches hold no tensors of a model."""
Warm = Callable[[nn.Module], None]
"""Runs a model once, on whatever device its weights are, so that lazy modules get theirs."""


def build_fake(
    model_fn: Callable[[], nn.Module], mode: HybridFakeMode, warm: Warm | None = None
) -> nn.Module:
    """Build a model whose tensors are all fake, on the device `cpu`.

    A model that cannot be built on `meta` (it reads values while it is built, or keeps a sparse
    tensor, whose size depends on them) is built for real, and its tensors are replaced then;
    sparse ones stay real. The random state is the caller's to restore.

    Raises:
        UserError: `model_fn` returns no module.
        Exception: what `model_fn` raises, also without `meta`.

    """
    before = _modules()
    try:
        with cuda_names("meta"), torch.device("meta"):
            model = _checked(model_fn())
            _warm(model, warm)
    except UserError:
        raise
    except Exception:
        with cuda_names():
            model = _checked(model_fn())
            _warm(model, warm)
    if any(tensor.layout is not torch.strided for tensor in _tensors(model)):
        with cuda_names():
            model = _checked(model_fn())
            _warm(model, warm)
    if not _fresh(model, before):
        return _fake_copy(model, mode)
    make_fake(model, mode)
    return model


def build_real(model_fn: Callable[[], nn.Module], warm: Warm | None = None) -> nn.Module:
    """Build a model for real; one that somebody else holds is copied."""
    before = _modules()
    with cuda_names():
        model = _checked(model_fn())
        if not _fresh(model, before):
            model = _copy(model, {})
        _warm(model, warm)
    return model


def _checked(model: object) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    raise UserError(f"model_fn must return a torch.nn.Module, got {type(model).__name__}")


def _warm(model: nn.Module, warm: Warm | None) -> None:
    if warm is not None and any(is_lazy(tensor) for tensor in _tensors(model)):
        warm(model)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _modules() -> list[nn.Module]:
    """Return all modules that the collector looks after; those made since, inside `gc_frozen`.

    By type: asking an object for its class may run code of its own.
    """
    return [found for found in gc.get_objects() if issubclass(type(found), nn.Module)]


def _fresh(model: nn.Module, before: list[nn.Module]) -> bool:
    """Tell whether a model is the plan's own: none of its modules was there before.

    What was frozen before is not among the collector's objects, then or now. Those of before are
    held, so that none has the `id` of another.
    """
    young = {id(module) for module in _modules()} - {id(module) for module in before}
    return all(id(module) in young for module in model.modules())


def _fake_copy(model: nn.Module, mode: HybridFakeMode) -> nn.Module:
    """Copy a model with fake tensors in the place of its own."""
    fakes = _Fakes(mode)
    held: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            _collect(value, held)
    for tensor in [*_tensors(model), *held.values()]:
        fakes(tensor)
    return _copy(model, dict(fakes.replaced))


def _copy(model: nn.Module, tensors: dict[int, Any]) -> nn.Module:
    """Copy a model with others in the place of some tensors; what cannot be copied is shared."""
    try:
        return copy.deepcopy(model, dict(tensors))
    except Exception:  # locks, files, what a library keeps
        log.info("%s cannot be copied as a whole", type(model).__name__, exc_info=True)
    copies = {id(module): type(module).__new__(type(module)) for module in model.modules()}
    memo = {**tensors, **copies}
    for module in model.modules():
        for name, value in vars(module).items():
            try:
                copied = copy.deepcopy(value, memo)
            except Exception:
                copied = value
            vars(copies[id(module)])[name] = copied
    return copies[id(model)]


def _collect(value: Any, found: dict[int, Any]) -> None:
    if isinstance(value, Tensor | list | tuple | dict):
        tree_map_only(Tensor, lambda tensor: found.setdefault(id(tensor), tensor), value)


class _Fakes:
    """Makes one fake tensor for every tensor that it is given, however often."""

    def __init__(self, mode: HybridFakeMode) -> None:
        self.replaced: dict[int, Tensor] = {}
        self._mode = mode

    def __call__(self, tensor: Tensor) -> Tensor:
        if tensor.layout is not torch.strided or isinstance(tensor, FakeTensor):
            return tensor
        if id(tensor) not in self.replaced:
            self.replaced[id(tensor)] = self._of(tensor)
        return self.replaced[id(tensor)]

    def _of(self, tensor: Tensor) -> Tensor:
        if _small_integers(tensor):
            kept = tensor.detach().clone()
            self._mode.own([kept])
            return kept
        with self._mode.faking():
            new = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu"
            )
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(new, requires_grad=tensor.requires_grad)
        return new


def _small_integers(tensor: Tensor) -> bool:
    """Tell whether a tensor has values that code may ask for: positions, counts, masks."""
    return (
        tensor.device.type == "cpu"
        and not (tensor.is_floating_point() or tensor.is_complex())
        and tensor.nbytes <= MAX_REAL_BYTES
    )


def make_fake(model: nn.Module, mode: HybridFakeMode) -> None:
    """Replace every tensor that the modules hold by a fake one; shared ones stay shared."""
    fake = _Fakes(mode)
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


_set_aside_elsewhere = False
_set_aside_here = False


@contextmanager
def gc_frozen() -> Iterator[None]:
    """Keep Python's collector to what is made inside, since all the rest takes it long to look at.

    Does nothing where something else has set objects aside, nor after that: to ask takes as long
    as to count them all.
    """
    global _set_aside_elsewhere, _set_aside_here
    if not (_set_aside_elsewhere or _set_aside_here):
        _set_aside_elsewhere = gc.get_freeze_count() > 0
    ours = not (_set_aside_elsewhere or _set_aside_here)
    try:
        if ours:
            _set_aside_here = True
            gc.freeze()
        yield
    finally:
        if ours:
            gc.unfreeze()
            _set_aside_here = False


def any_left() -> bool:
    """Tell whether fake tensors are still held; quick inside `gc_frozen`."""
    gc.collect()
    return _held() > 0


def clear_leftovers() -> int:
    """Empty function caches and return how many fake tensors are held after it."""
    for found in gc.get_objects():
        # By type: asking an object for its class may run code of its own.
        if type(found) is functools._lru_cache_wrapper:
            module = str(getattr(found, "__module__", ""))
            if not module.startswith(LIBRARIES):
                found.cache_clear()
    gc.collect()
    return _held()


def _held() -> int:
    """Count the fake tensors of plans; what torch keeps of its own, of compiling, is no matter."""
    return sum(
        type(found) is FakeTensor and getattr(found.fake_mode, "of_a_plan", False)
        for found in gc.get_objects()
    )
