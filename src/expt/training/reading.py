"""Reading streamed samples, in a worker process or in the one that trains.

A sample depends on seed, epoch and index alone. What goes wrong is a value (`Read`), since the
loader would raise it in the training process with a traceback of the worker's; all but a lack of
memory inside the budget.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from expt.config.schema import BadSample
from expt.errors import DataError, first_line
from expt.job import (
    Batch,
    Collated,
    DataSet,
    Named,
    Split,
    StreamedDataSet,
)
from expt.training.interruption import hear_signals, stay_held

Key = tuple[Split, int, int]
"""Split, epoch and index of a sample."""
MAX_REPLACEMENTS = 100
"""Unreadable samples in a row after which training gives up looking for one to take their place."""

GRACE_SECONDS = 30.0
"""How long a worker goes on after a SIGTERM."""


@runtime_checkable
class ByEpoch(Protocol):
    """A streamed data set whose samples have other inputs in some epochs."""

    def item_of(self, key: Key, generator: torch.Generator) -> Batch:
        """Read one sample as its epoch has it; see `expt.job.StreamedDataSet.item`."""


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
class Read:
    """What a worker read: the samples as one batch, and why others are not in it.

    `error` says why the samples make no batch.
    """

    batch: Batch | None
    unreadable: list[tuple[Key, str, str]]
    error: str | None = None
    seconds: float = 0.0
    """How long reading took."""

    def lines(self) -> str:
        """Return the samples that could not be read, and why."""
        return "; ".join(f"{name} cannot be read: {why}" for _, name, why in self.unreadable)

    def pin_memory(self) -> Read:
        """Return the same in page-locked memory; the loader calls this."""
        batch = None if self.batch is None else self.batch.each(Tensor.pin_memory)
        return Read(batch, self.unreadable, self.error, self.seconds)


@dataclass(frozen=True)
class Request:
    """The samples of a batch; those of a step of training may be replaced by others."""

    keys: Sequence[Key]
    training: bool


@dataclass
class Reader:
    """Reads samples, in a worker or in this process."""

    data: StreamedDataSet
    seed: int

    def __call__(self, keys: Sequence[Key], replace: bool = False) -> Read:
        """Read the samples and make them one batch.

        With `replace`, another sample takes the place of one that is unreadable.
        """
        items: list[Batch] = []
        unreadable: list[tuple[Key, str, str]] = []
        for key in keys:
            item = self._item(key, unreadable, replace)
            if item is not None:
                items.append(item)
        if not items:
            return Read(None, unreadable)
        wrong = _wrong_kind(items[0])
        if wrong is not None:
            return Read(None, unreadable, f"{type(self.data).__name__}.item: {wrong}")
        try:
            return Read(self._collate(items), unreadable)
        except DataError as error:
            return Read(None, unreadable, str(error))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            named = sample_name(self.data, keys[0])
            return Read(
                None, unreadable, f"the batch of {named} cannot be made: {first_line(error)}"
            )

    def _item(
        self, key: Key, unreadable: list[tuple[Key, str, str]], replace: bool
    ) -> Batch | None:
        split, epoch, index = key
        size = self.data.size(split)
        tries = min(MAX_REPLACEMENTS, size) if replace else 1
        for offset in range(tries):
            place = (index + offset) % size
            try:
                generator = sample_generator(self.seed, epoch, place)
                if isinstance(self.data, ByEpoch):
                    return self.data.item_of((split, epoch, place), generator)
                return self.data.item(split, place, generator)
            except torch.OutOfMemoryError:
                raise  # the budget's, and recovery's affair; a MemoryError may be a broken header's
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


class Items(Dataset[Any]):
    """A data set as the loader sees it: a request in, a batch out."""

    def __init__(self, data: StreamedDataSet, seed: int, on_bad_sample: BadSample) -> None:
        self._read = Reader(data, seed)
        self._skip = on_bad_sample is BadSample.skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Be unpickled, which a worker is for; see `become_worker`."""
        stay_held()
        vars(self).update(state)

    def __getitem__(self, request: Request) -> Read:
        started = time.perf_counter()
        found = self._read(request.keys, replace=self._skip and request.training)
        found.seconds = time.perf_counter() - started
        return found


class Order:
    """The sampler: whatever requests are next; the list is the caller's, who changes it."""

    def __init__(self, requests: list[Request]) -> None:
        self._requests = requests

    def __iter__(self) -> Iterator[Request]:
        return iter(list(self._requests))

    def __len__(self) -> int:
        return len(self._requests)


def become_worker(number: int) -> None:
    """Leave signals to the process that trains, and end when it is gone.

    A scheduler sends SIGTERM to every process of a job; the one that trains then ends its step,
    for which it may need what is read here, and saves. SIGTERM is also how the loader ends a worker
    that hangs, so this one ends after a while.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        told, tell = os.pipe()
        os.set_blocking(tell, False)
        signal.signal(signal.SIGTERM, lambda number, frame: None)
        signal.set_wakeup_fd(tell)  # is written to while the interpreter waits for a file system
        threading.Thread(target=_end_when_told, args=(told,), daemon=True).start()
        hear_signals()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_when_told(told: int) -> None:
    while os.read(told, 1) != bytes([signal.SIGTERM]):
        pass  # another signal that the data set has a handler for
    time.sleep(GRACE_SECONDS)
    os._exit(1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
