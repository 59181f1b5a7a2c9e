"""A data set whose samples have features in the place of the inputs that they were made of.

`with_features` wraps a streamed data set: everything that it offers is still offered, with its
optional protocols (`expt.job`), but its items. Inputs that features replace are not even read where
the data set can do without (`expt.job.WithoutInputs`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor

from expt.job import Batch, Collated, Split, StreamedDataSet, WithoutInputs
from expt.training.batches import Examples
from expt.training.features.feature import Feature
from expt.training.features.store import Rows


def with_features(
    data: StreamedDataSet,
    features: Sequence[Feature],
    replaced: Sequence[str],
    rows: Rows | None = None,
) -> StreamedDataSet:
    """Return the data set with features in the place of inputs.

    Args:
        data: streamed, as it was built.
        features: what every sample has.
        replaced: names of the inputs that they take the place of.
        rows: where they are; None for a plan, which asks for shapes only.

    """
    kind = offering(FeatureData, data, {"collate": collate})
    return cast(StreamedDataSet, kind(data, features, replaced, rows))


class Offered:
    """An attribute of the data set that is wrapped."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, owner: Any, kind: type | None = None) -> Any:
        return self if owner is None else getattr(owner.base, self.name)

    def __set__(self, owner: Any, value: Any) -> None:
        setattr(owner.base, self.name, value)


def offering(wrapper: type, data: object, own: Mapping[str, Any]) -> type:
    """Return a class like `wrapper` with all that `data` has and it has not.

    Of `own` it has what `data` has too. As attributes of the class: `isinstance` of a protocol does
    not see those of ``__getattr__``.
    """
    names = {name for name in (*dir(type(data)), *vars(data)) if not name.startswith("_")}
    hidden = {*dir(wrapper), "without"}
    found: dict[str, Any] = {name: Offered(name) for name in names - hidden}
    known = {"collate": isinstance(data, Collated), "plots": hasattr(data, "plots")}
    for name, function in {"plots": plots, **own}.items():
        found.pop(name, None)
        if known[name]:
            found[name] = function
    return type(wrapper.__name__, (wrapper,), found)


class FeatureData:
    """See `with_features`."""

    def __init__(
        self,
        base: StreamedDataSet,
        features: Sequence[Feature],
        replaced: Sequence[str],
        rows: Rows | None,
    ) -> None:
        self.base, self.rows = base, rows
        self.features, self.replaced = list(features), list(replaced)
        self.reading = base.without(replaced) if isinstance(base, WithoutInputs) else base
        self._examples, self._whole = Examples(self.reading), Examples(base)

    def __reduce__(self) -> tuple[Any, ...]:
        return with_features, (self.base, self.features, self.replaced, self.rows)

    def __getattr__(self, name: str) -> Any:
        if name in ("base", "__setstate__"):
            raise AttributeError(name)
        found = getattr(self.base, name)
        if isinstance(found, MethodType) and found.__self__ is self.base:
            return MethodType(found.__func__, self)  # what it reads are our items
        return found

    def item(self, split: Split, index: int, generator: torch.Generator) -> Batch:
        """Read one sample and its features."""
        assert self.rows is not None, "a plan reads no sample"
        item = self.reading.item(split, index, generator)
        return Batch({**self._others(item), **self.rows.read(split, index)}, item.target)

    def example(self, split: Split, count: int) -> Batch:
        """Return a batch of zeros; see `expt.job.Exemplary`."""
        batch = self._examples.batch(split, count)
        zeros = {feature.name: feature.zeros(count) for feature in self.features}
        return Batch({**self._others(batch), **zeros}, batch.target)

    def _others(self, item: Batch) -> dict[str, Tensor]:
        return {name: value for name, value in item.inputs.items() if name not in self.replaced}


def collate(data: Any, items: Sequence[Batch]) -> Batch:
    """Return samples as one batch, by the data set's own function; features are stacked."""
    names = [name for name in items[0].inputs if name in {one.name for one in data.features}]
    kept = [{name: item.inputs[name] for name in names} for item in items]
    others = [
        Batch({k: v for k, v in item.inputs.items() if k not in names}, item.target)
        for item in items
    ]
    batch = data.base.collate(others)
    stacked = {name: torch.stack([one[name] for one in kept]) for name in names}
    return Batch({**batch.inputs, **stacked}, batch.target)


def plots(
    data: Any, predict: Callable[[Batch], Tensor], metrics: Any, folder: Path
) -> Sequence[Path]:
    """Draw what the data set draws; items that it reads for it have features."""
    found: Sequence[Path] = type(data.base).plots(data, predict, metrics, folder)
    return found
