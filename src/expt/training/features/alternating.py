"""Alternating epochs: live ones, in which everything trains, and ones on the last hidden states.

Epochs 0, N, 2N, … are live: the model runs whole, and what its trained layers make of a sample is
written to its row on the way. In the epochs between, samples have their rows instead of pictures
and text: only what lies above trains, and the layers below (LoRA's) get no gradient. So the rows
are as old as the last live epoch; how far they are off is measured on a few fixed samples.

Letters: `B` samples of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from expt.errors import DataError, StorageError
from expt.job import Batch, Split, StreamedDataSet
from expt.memory.techniques.wrapping import wrap
from expt.training.features import store
from expt.training.features.dataset import FeatureData, offering
from expt.training.features.feature import (
    NAME,
    Arithmetic,
    Feature,
    FeatureInputs,
    accepted,
    computed,
    features_of,
)
from expt.training.features.numbered import ROW
from expt.training.features.store import Rows, RowWriter
from expt.training.reading import Key, Reader

READY = "ready"
"""File in the store that says that a whole live epoch has written it."""
PROBE = 8
"""Samples on which staleness is measured, at most."""
STALENESS, LIVE = "feature_cache/staleness", "feature_cache/live"
"""Figures of an epoch: how far rows are off, and whether the epoch was a live one."""


class AlternatingData(FeatureData):
    """A data set that reads rows in some epochs, and everything in the others."""

    def __init__(
        self,
        base: StreamedDataSet,
        features: Sequence[Feature],
        replaced: Sequence[str],
        rows: Rows,
        interval: int,
    ) -> None:
        super().__init__(base, features, replaced, rows)
        self.interval = interval

    def __reduce__(self) -> tuple[Any, ...]:
        return alternating, (self.base, self.features, self.replaced, self.rows, self.interval)

    def item(self, split: Split, index: int, generator: torch.Generator) -> Batch:
        """Read one sample, live."""
        return self.base.item(split, index, generator)

    def example(self, split: Split, count: int) -> Batch:
        """Return a batch of live samples."""
        return self._whole.batch(split, count)

    def item_of(self, key: Key, generator: torch.Generator) -> Batch:
        """Read one sample as its epoch has it; see `expt.training.reading.ByEpoch`."""
        split, epoch, index = key
        assert self.rows is not None
        if split != "train":
            return self.base.item(split, index, generator)
        if is_live(epoch, self.interval) or not (self.rows.folder / READY).exists():
            item = self.base.item(split, index, generator)
            return Batch({**item.inputs, ROW: torch.tensor(index)}, item.target)
        return super().item(split, index, generator)


def alternating(
    data: StreamedDataSet,
    features: Sequence[Feature],
    replaced: Sequence[str],
    rows: Rows,
    interval: int,
) -> StreamedDataSet:
    """Return the data set with live epochs and ones of rows."""
    kind = offering(AlternatingData, data, {"collate": collate})
    return cast(StreamedDataSet, kind(data, features, replaced, rows, interval))


def is_live(epoch: int, interval: int) -> bool:
    """Tell whether an epoch is a live one."""
    return epoch % interval == 0


class LiveFeatures(FeatureInputs):
    """The layer around `forward` that keeps what a live epoch makes on its way."""

    def __init__(
        self,
        model: nn.Module,
        mode: str,
        features: Sequence[Feature],
        replaced: Sequence[str],
        keep: Callable[[list[int], Mapping[str, Tensor]], None],
    ) -> None:
        super().__init__(features)
        self.model, self.mode, self.replaced, self.keep = model, mode, list(replaced), keep

    def __call__(self, forward: Callable[..., Any], /, *args: Any, **inputs: Any) -> Any:
        """Call the model; samples that know their row leave their features there."""
        numbers = inputs.pop(ROW, None)
        if numbers is None:
            return super().__call__(forward, *args, **inputs)
        model = cast(Any, self.model)
        given = {name: inputs[name] for name in accepted(model, inputs)}
        made = model.features(self.mode, **given)
        self.keep(
            numbers.tolist(), {name: one.encode(made[name]) for name, one in self.features.items()}
        )
        rest = {name: value for name, value in inputs.items() if name not in self.replaced}
        return forward(*args, **rest, **made)


class Alternation:
    """The rows of a run with alternating epochs, and how old they are.

    Args:
        model: whole, on the device, before Fabric's wrapper.
        mode: of the features.
        data: as it was built.
        dtype: `memory.feature_cache_dtype`.
        interval: of live epochs.
        folder: of the rows, the run's own.
        seed: of the run.
        device: of the model.
        arithmetic: of the run.

    """

    def __init__(
        self,
        model: nn.Module,
        mode: str,
        data: StreamedDataSet,
        dtype: str,
        interval: int,
        folder: Path,
        seed: int,
        device: torch.device,
        arithmetic: Arithmetic,
    ) -> None:
        self.model, self.mode, self.interval = model, mode, interval
        self.device, self.arithmetic = device, arithmetic
        self.epoch = 0
        self._numbers, self._probe = _probe(data, seed)
        features = features_of(self._live(), len(self._probe), dtype)
        replaced = list(cast(Any, model).feature_inputs(mode))
        self.rows = store.create(folder, features, {"train": data.size("train")}, {"mode": mode})
        self._writer: RowWriter | None = RowWriter(self.rows)
        self.data = alternating(data, features, replaced, self.rows, interval)
        wrap(model, NAME, LiveFeatures(model, mode, features, replaced, self.keep))

    def keep(self, numbers: list[int], values: Mapping[str, Tensor]) -> None:
        """Write rows; where the disk is full all epochs are live from then on, and a line says it.

        The layer calls this.
        """
        if self._writer is None:
            return
        try:
            self._writer.write(numbers, values)
        except OSError as error:
            self._give_up(error)

    def mark(self) -> None:
        """Note the rows written so far as there: a run that is resumed does not make them again."""
        if self._writer is not None:
            try:
                self._writer.mark()
            except (OSError, StorageError) as error:
                self._give_up(error)

    def after_epoch(self, epoch: int, whole: bool) -> dict[str, float]:
        """Return the figures of an epoch, counted from 0; all of its steps were done if `whole`."""
        live = is_live(epoch, self.interval)
        self.mark()
        if self._writer is not None and live and whole:
            try:
                (self.rows.folder / READY).touch()
            except OSError as error:
                self._give_up(error)
        if self._writer is None:
            return {LIVE: 1.0}
        if not (self.rows.folder / READY).exists():
            return {LIVE: float(live)}
        return {STALENESS: self.staleness(), LIVE: float(live)}

    def staleness(self) -> float:
        """Return how far rows are from what the model makes now, as a part of its norm."""
        made, apart, whole = self._live(), 0.0, 0.0
        rows = [self.rows.read("train", number) for number in self._numbers]
        for one in self.rows.features:
            if one.dtype.is_floating_point:
                kept = one.decode(torch.stack([row[one.name] for row in rows]).to(self.device))
                now = made[one.name].double()
                apart += float((now - kept.double()).square().sum())
                whole += float(now.square().sum())
        return math.sqrt(apart / whole) if whole else 0.0

    def _live(self) -> Mapping[str, Tensor]:
        """Return the features of the fixed samples by the weights of now."""
        training = self.model.training
        self.model.eval()
        batch = self._probe.each(lambda value: value.to(self.device))
        made = computed(self.model, self.mode, batch.inputs, self.arithmetic)
        self.model.train(training)
        return made

    def _give_up(self, error: OSError | StorageError) -> None:
        assert self._writer is not None
        self._writer.close()
        self._writer = None
        store.remove(self.rows.folder)
        why = getattr(error, "strerror", None) or str(error)
        print(f"feature cache: the disk refused it ({why}); every epoch is live from now on")


def collate(data: Any, items: Sequence[Batch]) -> Batch:
    """Return samples as one batch; what the data set does not know of is stacked beside it."""
    own = {ROW, *(one.name for one in data.features)}
    names = [name for name in items[0].inputs if name in own]
    others = [
        Batch({k: v for k, v in item.inputs.items() if k not in names}, item.target)
        for item in items
    ]
    batch = data.base.collate(others)
    stacked = {name: torch.stack([item.inputs[name] for item in items]) for name in names}
    return Batch({**batch.inputs, **stacked}, batch.target)


def _probe(data: StreamedDataSet, seed: int) -> tuple[list[int], Batch]:
    """Return the first training samples that can be read, and their numbers.

    Raises:
        DataError: none can be.

    """
    wanted = min(PROBE, data.eval_batch_size, data.size("train"))
    reader, numbers = Reader(data, seed), list[int]()
    for index in range(data.size("train")):
        if reader([("train", 0, index)]).batch is not None:
            numbers.append(index)
        if len(numbers) == wanted:
            break
    read = reader([("train", 0, index) for index in numbers]) if numbers else None
    if read is None or read.batch is None:
        raise DataError("no sample of the train part can be read")
    return numbers, read.batch
