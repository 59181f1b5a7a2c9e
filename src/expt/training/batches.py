"""Where the samples of a step come from, in which order, and how they reach the device.

`Batches` hides the difference between the two kinds of data. Samples of a `ResidentDataSet` are
indices, gathered on the device when their turn comes. Samples of a `StreamedDataSet` are read by
worker processes into host memory, ahead of time, and copied to the device one micro-batch at a
time. The order of an epoch follows from seed and epoch, a sample from seed, epoch and index, so
that the number of the step is all that resuming needs. A step that is redone for lack of memory
has the same `Samples` object, and nothing is read twice.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from expt.config.schema import BadSample, LoaderConfig
from expt.errors import DataError, LoaderError, first_line
from expt.job import (
    Batch,
    Collated,
    DataSet,
    Exemplary,
    Named,
    Resident,
    ResidentDataSet,
    Split,
    StreamedDataSet,
    Weighted,
    is_resident,
)


class StoppedWaitingError(LoaderError):
    """A run was asked to end while it waited for samples."""


Key = tuple[Split, int, int]
"""Split, epoch and index of a sample."""
MAX_REPLACEMENTS = 100
"""Unreadable samples in a row after which training gives up looking for one to take their place."""


class Samples(Protocol):
    """Some samples, wherever they are: those of a step, or a part of them."""

    def __len__(self) -> int:
        """Return how many they are."""

    def __getitem__(self, part: slice) -> Samples:
        """Return some of them."""

    def weight(self) -> Tensor:
        """Return what their summed loss is divided by, a scalar on the device."""

    def batch(self) -> Batch:
        """Return them on the device: gathered there, or copied from the host."""


@dataclass
class ResidentSamples:
    """Samples of data on the device: their indices [B], int64."""

    data: ResidentDataSet
    split: Split
    indices: Tensor

    def __len__(self) -> int:
        """Return how many they are."""
        return len(self.indices)

    def __getitem__(self, part: slice) -> ResidentSamples:
        """Return some of them."""
        return ResidentSamples(self.data, self.split, self.indices[part])

    def weight(self) -> Tensor:
        """Return the data set's weight of them."""
        return self.data.weight(self.split, self.indices)

    def batch(self) -> Batch:
        """Return them, gathered."""
        return self.data.gather(self.split, self.indices)

    def clone(self) -> ResidentSamples:
        """Return the same samples in a tensor of their own, for a captured step to read."""
        return ResidentSamples(self.data, self.split, self.indices.clone())

    def copy_(self, other: ResidentSamples) -> None:
        """Become other samples, as many as these."""
        self.indices.copy_(other.indices)


@dataclass
class HostSamples:
    """Samples in host memory, for a device."""

    data: DataSet
    host: Batch
    device: torch.device

    def __len__(self) -> int:
        """Return how many they are."""
        return len(self.host)

    def __getitem__(self, part: slice) -> HostSamples:
        """Return some of them; nothing is copied."""
        return HostSamples(self.data, self.host.each(lambda value: value[part]), self.device)

    def weight(self) -> Tensor:
        """Return the data set's weight of them, by default how many they are."""
        return batch_weight(self.data, self.host).to(self.device)

    def batch(self) -> Batch:
        """Return them on the device; a copy from pinned memory does not wait."""
        return self.host.each(lambda value: value.to(self.device, non_blocking=value.is_pinned()))


def micro_batches(samples: Samples, parts: int) -> Iterator[Samples]:
    """Yield the samples in at most `parts` parts, as even as `torch.tensor_split` makes them."""
    parts = min(parts, len(samples))
    size, longer = divmod(len(samples), parts)
    start = 0
    for number in range(parts):
        stop = start + size + (number < longer)
        yield samples[start:stop]
        start = stop


def batch_weight(data: DataSet, batch: Batch) -> Tensor:
    """Return what the summed loss of a streamed batch is divided by."""
    if isinstance(data, Weighted):
        return data.batch_weight(batch)
    return torch.tensor(float(len(batch)))


def place(data: DataSet, device: torch.device) -> None:
    """Move resident data to the device; streamed data are copied there sample by sample."""
    if is_resident(data):
        data.to(device)


def kept_on_device(data: DataSet) -> list[Tensor]:
    """Return the tensors that a data set keeps on the device; streamed data keep none."""
    if isinstance(data, Resident):
        return list(data.resident())
    return list(_tensors(vars(data))) if is_resident(data) else []


@dataclass
class Examples:
    """Batches of the right shapes, for a plan; of streamed data, one sample is read at most."""

    data: DataSet
    device: torch.device | None = None
    """Where resident data are; the CPU if not given."""
    _first: dict[Split, Batch] = field(default_factory=dict)

    def batch(self, split: Split, count: int) -> Batch:
        """Return a batch of `count` samples.

        Raises:
            DataError: not even one sample can be read.

        """
        if is_resident(self.data):
            return self.data.gather(split, torch.arange(count, device=self.device))
        if isinstance(self.data, Exemplary):
            return self.data.example(split, count)
        first = self._item(split)
        return first.each(lambda value: torch.zeros((count, *value.shape[1:]), dtype=value.dtype))

    def weight(self, split: Split, count: int, batch: Batch) -> Tensor:
        """Return the weight of a batch of `count` samples."""
        if is_resident(self.data):
            return self.data.weight(split, torch.arange(count, device=self.device))
        return batch_weight(self.data, batch)

    def input_names(self) -> list[str]:
        """Return the names under which a model gets its inputs."""
        return list(self.batch("train", 1).inputs)

    def _item(self, split: Split) -> Batch:
        """Return the first sample that can be read, as a batch of one."""
        if split not in self._first:
            reader = _Reader(cast(StreamedDataSet, self.data), 0, replace=False)
            tries = min(MAX_REPLACEMENTS, self.data.size(split))
            found = (reader([(split, 0, index)]) for index in range(tries))
            read = next((read for read in found if read.batch or read.error), None)
            if read is None or read.batch is None:
                first = reader([(split, 0, 0)])
                raise DataError(
                    first.error or f"no sample of the {split} part can be read: {first.lines()}"
                )
            self._first[split] = read.batch
        return self._first[split]


class Batches:
    """The steps of an epoch and the parts of an evaluation, as `Samples`.

    Args:
        data: resident or streamed.
        device: where the samples are needed.
        loader: how streamed samples are read; nothing of it matters to resident ones.
        seed: of the order, and of what a streamed sample draws.
        repeat_first_epoch: give the samples of epoch 0 in every epoch.
        stopped: tells whether a signal has asked the run to end.

    """

    def __init__(
        self,
        data: DataSet,
        device: torch.device,
        loader: LoaderConfig,
        seed: int,
        repeat_first_epoch: bool = False,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self.data, self.device, self.settings = data, device, loader
        self.seed, self.repeat_first_epoch, self.stopped = seed, repeat_first_epoch, stopped
        self.waited_seconds = 0.0
        """For streamed samples, in all."""
        self.skipped: set[tuple[Split, int]] = set()
        """Samples that could not be read: split and index."""
        self._loader: DataLoader[Any] | None = None
        self._keys: list[list[Key]] = []

    @property
    def streamed(self) -> bool:
        """Whether samples are read while training goes on."""
        return not is_resident(self.data)

    def training(self, epoch: int, first: int, last: int) -> Iterator[Samples]:
        """Return the steps `first` to `last` (exclusive) of an epoch."""
        epoch = 0 if self.repeat_first_epoch else epoch
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(self.data.size("train"), generator=generator)
        if is_resident(self.data):
            steps = order.to(self.device).split(self.data.batch_size)[first:last]
            data = self.data
            return iter([ResidentSamples(data, "train", indices) for indices in steps])
        return self._streamed("train", order.split(self.data.batch_size)[first:last], epoch)

    def evaluation(self, split: Split, count: int) -> Iterator[Samples]:
        """Return the first `count` samples of a split; streamed ones by `eval_batch_size`."""
        if is_resident(self.data):
            indices = torch.arange(count, device=self.device)
            return iter([ResidentSamples(self.data, split, indices)])
        return self._streamed(split, torch.arange(count).split(self.data.eval_batch_size), 0)

    def of(self, indices: Tensor) -> Samples:
        """Return the training samples with these indices [B]."""
        if is_resident(self.data):
            return ResidentSamples(self.data, "train", indices.to(self.device))
        return next(self._streamed("train", [indices], 0))

    def close(self) -> None:
        """End the worker processes."""
        iterator = getattr(self._loader, "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()
        self._loader = None

    def _streamed(self, split: Split, steps: Sequence[Tensor], epoch: int) -> Iterator[Samples]:
        keys: list[list[Key]] = [[(split, epoch, index) for index in s.tolist()] for s in steps]
        self._keys[:] = keys
        if self._loader is None:
            self._loader = self._make_loader()
        with self._alive(keys[0] if keys else []):
            results = iter(self._loader)
        return self._read(results, keys)

    def _read(self, results: Iterator[_Read], keys: list[list[Key]]) -> Iterator[Samples]:
        for expected in keys:
            started = time.monotonic()
            with self._alive(expected):
                read = next(results)
            self.waited_seconds += time.monotonic() - started
            if read.error is not None:
                raise DataError(read.error)
            if read.unreadable and self.settings.on_bad_sample is BadSample.fail:
                raise DataError(
                    f"{read.lines()}; loader.on_bad_sample=skip goes on without such samples"
                )
            self.skipped |= {(key[0], key[2]) for key, _, _ in read.unreadable}
            if read.batch is not None:
                yield HostSamples(self.data, read.batch, self.device)
            elif expected[0][0] == "train":
                raise DataError(f"no sample of a step can be read: {read.lines()}")

    @contextmanager
    def _alive(self, expected: Sequence[Key]) -> Iterator[None]:
        """Say which samples were waited for when a worker died; begin anew with the next epoch.

        Raises:
            LoaderError: a worker died.
            StoppedWaitingError: one died after a signal, which whoever stops the run sent to all.

        """
        try:
            yield
        except RuntimeError as error:
            workers = getattr(getattr(self._loader, "_iterator", None), "_workers", [])
            if isinstance(error, torch.OutOfMemoryError) or all(w.is_alive() for w in workers):
                raise  # not a worker's death: recovery's affair, or a fault in the data set
            self._loader = None  # a broken loader hangs when it is asked again
            kind = StoppedWaitingError if self.stopped() else LoaderError
            raise kind(self._what_died(error, expected)) from error

    def _make_loader(self) -> DataLoader[Any]:
        settings, workers = self.settings, self.settings.num_workers
        data = cast(StreamedDataSet, self.data)
        pin = self.device.type == "cuda" if settings.pin_memory is None else settings.pin_memory
        context = None
        if workers:
            # Not fork: this process has threads. The server imports torch once, and then forks.
            known = multiprocessing.get_all_start_methods()
            context = multiprocessing.get_context(
                "forkserver" if "forkserver" in known else "spawn"
            )
            context.set_forkserver_preload(["torch", __name__])
        return DataLoader(
            cast("Dataset[Any]", _Items(data, self.seed, settings.on_bad_sample)),
            batch_size=None,
            sampler=_Order(self._keys),
            num_workers=workers,
            prefetch_factor=settings.prefetch_factor if workers else None,
            persistent_workers=bool(workers) and settings.persistent_workers,
            pin_memory=pin,
            multiprocessing_context=context,
            worker_init_fn=_become_worker if workers else None,
            # Its own: the loader draws from it, and the training's random state must not move.
            generator=torch.Generator().manual_seed(self.seed),
        )

    def _what_died(self, error: RuntimeError, expected: Sequence[Key]) -> str:
        named = [sample_name(self.data, key) for key in expected[:3]]
        more = f" and {len(expected) - 3} more" if len(expected) > 3 else ""
        return (
            f"a worker process of the data loader died ({first_line(error)}) while these samples "
            f"were waited for: {', '.join(named)}{more}. The system may have killed it for lack of "
            "host memory: try a smaller loader.num_workers or loader.prefetch_factor. A sample may "
            "have crashed its decoder: loader.num_workers=0 shows where"
        )


def sample_name(data: DataSet, key: Key) -> str:
    """Return a sample for a message: its file where the data set says so."""
    split, _, index = key
    if isinstance(data, Named):
        return data.sample_name(split, index)
    return f"sample {index} of the {split} part"


def sample_generator(seed: int, epoch: int, index: int) -> torch.Generator:
    """Return the generator of one sample; it depends on nothing else."""
    state = np.random.SeedSequence((seed, epoch, index)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) & (2**63 - 1))


@dataclass
class _Read:
    """What a worker read: the samples as one batch, and why others are not in it.

    `error` says why the samples make no batch. Errors are values, since the loader would raise
    them in the training process with a traceback of the worker's.
    """

    batch: Batch | None
    unreadable: list[tuple[Key, str, str]]
    error: str | None = None

    def lines(self) -> str:
        """Return the samples that could not be read, and why."""
        return "; ".join(f"{name} cannot be read: {why}" for _, name, why in self.unreadable)

    def pin_memory(self) -> _Read:
        """Return the same in page-locked memory; the loader calls this."""
        batch = None if self.batch is None else self.batch.each(Tensor.pin_memory)
        return _Read(batch, self.unreadable, self.error)


@dataclass
class _Reader:
    """Reads samples, in a worker or in this process."""

    data: StreamedDataSet
    seed: int
    replace: bool
    """Whether another sample of the training part takes the place of one that is unreadable."""

    def __call__(self, keys: Sequence[Key]) -> _Read:
        items: list[Batch] = []
        unreadable: list[tuple[Key, str, str]] = []
        for key in keys:
            item = self._item(key, unreadable)
            if item is not None:
                items.append(item)
        if not items:
            return _Read(None, unreadable)
        wrong = _wrong_kind(items[0])
        if wrong is not None:
            return _Read(None, unreadable, f"{type(self.data).__name__}.item: {wrong}")
        try:
            return _Read(self._collate(items), unreadable)
        except DataError as error:
            return _Read(None, unreadable, str(error))
        except Exception as error:
            named = sample_name(self.data, keys[0])
            return _Read(
                None, unreadable, f"the batch of {named} cannot be made: {first_line(error)}"
            )

    def _item(self, key: Key, unreadable: list[tuple[Key, str, str]]) -> Batch | None:
        split, epoch, index = key
        size = self.data.size(split)
        tries = min(MAX_REPLACEMENTS, size) if self.replace and split == "train" else 1
        for offset in range(tries):
            place = (index + offset) % size
            try:
                generator = sample_generator(self.seed, epoch, place)
                return self.data.item(split, place, generator)
            except Exception as error:
                at = (split, epoch, place)
                unreadable.append((at, sample_name(self.data, at), first_line(error)))
        return None

    def _collate(self, items: list[Batch]) -> Batch:
        if isinstance(self.data, Collated):
            return self.data.collate(items)
        inputs = {name: _stacked(name, [i.inputs[name] for i in items]) for name in items[0].inputs}
        return Batch(inputs, _stacked("target", [item.target for item in items]))


def _wrong_kind(item: object) -> str | None:
    """Return what is wrong with a sample as such, None if nothing is."""
    if not isinstance(item, Batch):
        return f"it returned {type(item).__name__}; it must return an expt.job.Batch"
    for name, value in {**item.inputs, "target": item.target}.items():
        if not isinstance(value, Tensor):
            return f"{name} is {type(value).__name__}, not a tensor"
    return None


def _stacked(name: str, values: list[Tensor]) -> Tensor:
    shapes = {tuple(value.shape) for value in values}
    if len(shapes) > 1:
        shown = ", ".join(str(list(shape)) for shape in sorted(shapes))
        raise DataError(
            f"the samples of a batch have different shapes of {name} ({shown}); item() must return "
            "the same shape for every sample, or the data set needs a collate() of its own"
        )
    return torch.stack(values)


class _Items(Dataset[Any]):
    """A data set as the loader sees it: a list of keys in, a batch out."""

    def __init__(self, data: StreamedDataSet, seed: int, on_bad_sample: BadSample) -> None:
        self._read = _Reader(data, seed, replace=on_bad_sample is BadSample.skip)

    def __getitem__(self, keys: Sequence[Key]) -> _Read:
        return self._read(keys)


class _Order:
    """The sampler: whatever keys are next; the list is the caller's, who changes it."""

    def __init__(self, keys: list[list[Key]]) -> None:
        self._keys = keys

    def __iter__(self) -> Iterator[list[Key]]:
        return iter(list(self._keys))

    def __len__(self) -> int:
        return len(self._keys)


def _become_worker(number: int) -> None:
    """Leave Ctrl-C to the process that trains, and end when it is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _tensors(values: Any) -> Iterator[Tensor]:
    """Yield the tensors in an object's attributes and in dictionaries there."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from _tensors(value)
