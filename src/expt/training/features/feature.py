"""`Feature`: one of the tensors that a frozen part gives, as it is computed, kept and handed over.

On disk and on their way to the model features are whole numbers of as many bits: NumPy has no
bfloat16, and Fabric casts what is floating to the precision of the run, which would lose bits of
features in fp32. `FeatureInputs`, a layer around the model's `forward`, turns them back.

Letters: `B` samples of a batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from expt.errors import ConfigError, ModelError
from expt.memory.techniques.wrapping import unwrap, wrap

NAME = "feature_inputs"
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Feature:
    """One feature of a sample.

    Args:
        name: under which `forward` takes it.
        shape: of a sample's, without B.
        dtype: as the model computes it, and gets it again.
        stored: as it is kept.

    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    stored: torch.dtype

    @property
    def bits(self) -> torch.dtype:
        """The whole numbers that hold it."""
        return BITS[self.stored.itemsize] if self.stored.is_floating_point else self.stored

    @property
    def nbytes(self) -> int:
        """Bytes of a sample's."""
        return prod(self.shape) * self.stored.itemsize

    def encode(self, value: Tensor) -> Tensor:
        """Return [B, ...] as it is kept.

        Raises:
            ModelError: it is of another shape than the first sample's.
            ConfigError: a value is too large for what it is kept in.

        """
        if tuple(value.shape[1:]) != self.shape:
            raise ModelError(
                f"the feature {self.name} of the first sample has the shape {list(self.shape)}, "
                f"and another {list(value.shape[1:])}; cached ones must all have the same: pad "
                "the inputs to one length, or set memory.feature_cache=off"
            )
        kept = value.detach().to(self.stored).contiguous()
        narrower = self.stored is torch.float16 and self.dtype is not torch.float16
        if (
            narrower
            and not isinstance(kept, FakeTensor)
            and bool((kept.isinf() & value.isfinite()).any())
        ):
            raise ConfigError(
                f"memory.feature_cache_dtype=fp16: the feature {self.name} has values above "
                "65504, which fp16 does not hold; use bf16, or auto"
            )
        return kept.view(self.bits)

    def decode(self, value: Tensor) -> Tensor:
        """Return [B, ...] as the model computed it, rounded as it was kept."""
        if value.dtype is not self.bits:
            return value  # a float was given, by who knows what the model takes
        return value.view(self.stored).to(self.dtype)

    def zeros(self, count: int) -> Tensor:
        """Return what `count` samples take, as it is kept."""
        return torch.zeros((count, *self.shape), dtype=self.bits)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        words = {name: str(getattr(self, name)) for name in ("dtype", "stored")}
        return {"name": self.name, "shape": list(self.shape), **words}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Feature:
        """Return the feature that `as_dict` made plain."""
        types = [
            getattr(torch, stored[name].removeprefix("torch.")) for name in ("dtype", "stored")
        ]
        return cls(stored["name"], tuple(stored["shape"]), types[0], types[1])


def features_of(made: object, count: int, dtype: str) -> list[Feature]:
    """Describe what a model made of `count` samples, to be kept as `memory.feature_cache_dtype`.

    Raises:
        ModelError: it is no mapping of names to tensors [B, ...].

    """
    if not isinstance(made, Mapping) or not made:
        raise ModelError(
            f"the model's features() returned {type(made).__name__}; it must return tensors "
            "[B, ...] by the names under which its forward takes them"
        )
    found = []
    for name, value in made.items():
        if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[0] != count:
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ModelError(f"the feature {name} of {count} samples is {got}; it must be [B, ...]")
        floating = value.dtype.is_floating_point
        kept = DTYPES[dtype] if floating and dtype != "auto" else value.dtype
        found.append(Feature(str(name), tuple(value.shape[1:]), value.dtype, kept))
    return found


class FeatureInputs:
    """The layer around a model's `forward` that takes features as they are kept."""

    def __init__(self, features: Iterable[Feature]) -> None:
        self.features = {feature.name: feature for feature in features}

    def __call__(self, forward: Callable[..., Any], /, *args: Any, **inputs: Any) -> Any:
        """Call the model with its features as it computed them."""
        given = {
            name: feature.decode(inputs[name])
            for name, feature in self.features.items()
            if name in inputs
        }
        return forward(*args, **{**inputs, **given})


def take_features(model: nn.Module, features: Iterable[Feature]) -> None:
    """Let `model` take features as they are kept; in place, reversible by `take_no_features`."""
    wrap(model, NAME, FeatureInputs(features))


def take_no_features(model: nn.Module) -> None:
    """Let `model` take its inputs only."""
    unwrap(model, NAME)


class Arithmetic(Protocol):
    """What of `lightning_fabric`'s precision a forward pass needs."""

    def forward_context(self) -> AbstractContextManager[Any]:
        """Return the context that it runs in."""

    def convert_input(self, data: Any) -> Any:
        """Return inputs as the model gets them."""


@torch.no_grad()
def computed(
    model: Any, mode: str, inputs: Mapping[str, Tensor], arithmetic: Arithmetic
) -> Mapping[str, Tensor]:
    """Return a model's features of a batch, in the arithmetic of the run."""
    given = {name: inputs[name] for name in accepted(model, inputs)}
    with arithmetic.forward_context():
        found: Mapping[str, Tensor] = model.features(mode, **arithmetic.convert_input(given))
    return found


def accepted(model: Any, inputs: Iterable[str]) -> list[str]:
    """Return the inputs that a model's `features` takes: those that it names, or all."""
    parameters = inspect.signature(model.features).parameters
    if any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        return list(inputs)
    return [name for name in inputs if name in parameters]
