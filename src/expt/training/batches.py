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
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing import forkserver
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from expt.config.schema import BadSample, LoaderConfig
from expt.errors import DataError, LoaderError, first_line
from expt.job import (
    Batch,
    DataSet,
    Exemplary,
    Ordered,
    Resident,
    ResidentDataSet,
    Split,
    StreamedDataSet,
    Weighted,
    is_resident,
)
from expt.training.interruption import signals_held
from expt.training.loading import LoaderFigures, memory_of
from expt.training.ranks import OneRank, SeveralRanks, Share
from expt.training.reading import (
    MAX_REPLACEMENTS,
    Items,
    Key,
    Order,
    Read,
    Reader,
    Request,
    become_worker,
    sample_name,
)

MEMORY_READ_AT = frozenset((5, 50, 500, 5000))
"""Steps after which the workers' memory is looked at, beside the end of an epoch."""


class StoppedWaitingError(LoaderError):
    """A run was asked to end while it waited for samples."""


class Samples(Protocol):
    """Some samples, wherever they are: those of a step, or a part of them."""

    def __len__(self) -> int:
        """Return how many they are."""

    def __getitem__(self, part: slice) -> Samples:
        """Return some of them."""

    def weight(self) -> Tensor:
        """Return what their summed loss is divided by, a scalar on the device."""

    def on_host(self) -> list[Tensor]:
        """Return the tensors in host memory that hold them; none where they are on the device."""

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

    def on_host(self) -> list[Tensor]:
        """Return nothing."""
        return []

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

    def on_host(self) -> list[Tensor]:
        """Return the tensors of the batch."""
        return [*self.host.inputs.values(), self.host.target]

    def batch(self) -> Batch:
        """Return them on the device; a copy from pinned memory does not wait."""
        return self.host.each(lambda value: value.to(self.device, non_blocking=value.is_pinned()))


class NoSamples:
    """Samples of which none could be read."""

    def __len__(self) -> int:
        """Return 0."""
        return 0

    def __getitem__(self, part: slice) -> Samples:
        """Return none."""
        return self

    def weight(self) -> Tensor:
        """Return 0."""
        return torch.zeros(())

    def on_host(self) -> list[Tensor]:
        """Return nothing."""
        return []

    def batch(self) -> Batch:
        """Raise DataError: a model has to be given something."""
        raise DataError("none of the first samples of a split can be read by one of the processes")


@dataclass
class SharedSamples:
    """A process's share of some samples, where several process them together.

    As many as the largest share, for whoever asks how many a process has at once.
    """

    own: Samples
    """One that is not to be counted, where there is none."""
    share: Share
    whole: Samples | None
    """All of them, of data that every process has; None for streamed ones."""
    total: Tensor | None = None
    """The weight of all streamed samples."""

    def __len__(self) -> int:
        """Return how many they are in the largest share."""
        return self.share.largest

    def __getitem__(self, part: slice) -> Samples:
        """Return some of this process's."""
        return self.own[part]

    def weight(self) -> Tensor:
        """Return what the summed loss of all processes is divided by."""
        if self.whole is not None:
            return self.whole.weight()
        assert self.total is not None, "evaluation asks for no weight"
        return self.total

    def on_host(self) -> list[Tensor]:
        """Return the tensors in host memory that hold this process's."""
        return self.own.on_host()

    def batch(self) -> Batch:
        """Return this process's on the device."""
        return self.own.batch()

    def parts(self, parts: int, full: int) -> Iterator[tuple[Samples, bool]]:
        """Yield as many parts in every process, and whether they are to be counted.

        Args:
            parts: of a full batch.
            full: samples in the largest share of a full batch.

        """
        parts = parts_of(self.share.largest, parts, full)
        count = len(self.own) if self.share.counts else 0
        size, longer = divmod(count, parts)
        start = 0
        for number in range(parts):
            stop = start + size + (number < longer)
            yield (self.own[start:stop], True) if stop > start else (self.own[:1], False)
            start = stop


def parts_of(count: int, parts: int, full: int) -> int:
    """Return in how many parts samples are taken, when a full batch is taken in `parts`.

    None is larger than one of a full batch. As many parts of an epoch's smaller last batch would
    be of fewer samples, which costs time, and batch normalisation fails over a single one.
    """
    return min(-(-count * parts // full), parts, count)


def micro_batches(samples: Samples, parts: int, full: int) -> Iterator[Samples]:
    """Yield the samples in parts, as even as `torch.tensor_split` makes them; see `parts_of`."""
    parts = parts_of(len(samples), parts, full)
    size, longer = divmod(len(samples), parts)
    start = 0
    for number in range(parts):
        stop = start + size + (number < longer)
        yield samples[start:stop]
        start = stop


def nbytes(batch: Batch) -> int:
    """Return the bytes of a batch's tensors."""
    return batch.target.nbytes + sum(value.nbytes for value in batch.inputs.values())


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
            reader = Reader(cast(StreamedDataSet, self.data), 0)
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
        ranks: the processes that share the samples; with several, what is returned are
            `SharedSamples`, and of an evaluation as many at a time as all of them take at once.

    """

    def __init__(
        self,
        data: DataSet,
        device: torch.device,
        loader: LoaderConfig,
        seed: int,
        repeat_first_epoch: bool = False,
        stopped: Callable[[], bool] = lambda: False,
        ranks: OneRank | None = None,
    ) -> None:
        self.ranks = ranks or OneRank()
        self.data, self.device, self.settings = data, device, loader
        self.seed, self.repeat_first_epoch, self.stopped = seed, repeat_first_epoch, stopped
        self.waited_seconds = 0.0
        """For streamed samples, in all."""
        self.figures = LoaderFigures()
        self.skipped: set[tuple[Split, int]] = set()
        """Samples that could not be read: split and index."""
        self._loader: DataLoader[Any] | None = None
        self._requests: list[Request] = []

    @property
    def streamed(self) -> bool:
        """Whether samples are read while training goes on."""
        return not is_resident(self.data)

    def training(self, epoch: int, first: int, last: int) -> Iterator[Samples]:
        """Return the steps `first` to `last` (exclusive) of an epoch."""
        epoch = 0 if self.repeat_first_epoch else epoch
        order = self._order(epoch)
        if isinstance(self.ranks, SeveralRanks):
            steps = order.split(self.data.batch_size)[first:last]
            return self._shared("train", steps, epoch, training=True)
        if is_resident(self.data):
            steps = order.to(self.device).split(self.data.batch_size)[first:last]
            data = self.data
            return iter([ResidentSamples(data, "train", indices) for indices in steps])
        steps = order.split(self.data.batch_size)[first:last]
        return self._streamed("train", steps, epoch, training=True)

    def _order(self, epoch: int) -> Tensor:
        """Return the order of the training samples in an epoch, int64 [N]."""
        count = self.data.size("train")
        if not isinstance(self.data, Ordered):
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            return torch.randperm(count, generator=generator)
        order = self.data.training_order(self.seed, epoch)
        if not torch.equal(order.sort().values, torch.arange(count)):
            raise DataError(
                f"{type(self.data).__name__}.training_order(seed, epoch) must return every index "
                f"from 0 to {count - 1} once, as int64; it returned {tuple(order.shape)} of "
                f"{order.dtype}"
            )
        return order

    def evaluation(self, split: Split, count: int) -> Iterator[Samples]:
        """Return the first `count` samples of a split; streamed ones by `eval_batch_size`."""
        if isinstance(self.ranks, SeveralRanks):
            size = self.ranks.count * self.data.eval_batch_size
            return self._shared(split, torch.arange(count).split(size), 0)
        if is_resident(self.data):
            indices = torch.arange(count, device=self.device)
            return iter([ResidentSamples(self.data, split, indices)])
        return self._streamed(split, torch.arange(count).split(self.data.eval_batch_size), 0)

    def of(self, indices: Tensor) -> Samples:
        """Return the training samples with these indices [B]."""
        if is_resident(self.data):
            return ResidentSamples(self.data, "train", indices.to(self.device))
        return next(self._streamed("train", [indices], 0, training=True))

    def share_skipped(self) -> None:
        """Take over what the other processes could not read."""
        self.skipped = set().union(*self.ranks.gathered(self.skipped))

    def close(self) -> None:
        """End the worker processes."""
        iterator = getattr(self._loader, "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()
            for worker in getattr(iterator, "_workers", []):
                if worker.is_alive():  # it hangs, and the end of this process would wait for it
                    worker.kill()
        self._loader = None

    def _shared(
        self, split: Split, rounds: Sequence[Tensor], epoch: int, training: bool = False
    ) -> Iterator[SharedSamples]:
        """Return this process's share of the samples of steps, or of rounds of evaluation."""
        ranks = cast(SeveralRanks, self.ranks)
        shares = [ranks.share(len(indices)) for indices in rounds]
        own = [one[share.start : share.stop] for one, share in zip(rounds, shares, strict=True)]
        if is_resident(self.data):
            data = self.data
            for indices, part, share in zip(rounds, own, shares, strict=True):
                whole = ResidentSamples(data, split, indices.to(self.device))
                yield SharedSamples(
                    ResidentSamples(data, split, part.to(self.device)), share, whole
                )
            return
        before: Samples = NoSamples()
        streamed = self._streamed(split, own, epoch, training)
        for samples, share in zip(streamed, shares, strict=True):
            if not len(samples):  # none of them could be read: those before are done once more
                samples, share = before[:1], replace(share, counts=False)
            before, total = samples, None
            if training:
                weight = samples.weight()
                total = ranks.sum_(weight.clone() if share.counts else torch.zeros_like(weight))
            yield SharedSamples(samples, share, None, total)

    def _streamed(
        self, split: Split, steps: Sequence[Tensor], epoch: int, training: bool = False
    ) -> Iterator[Samples]:
        requests = [
            Request([(split, epoch, index) for index in indices.tolist()], training)
            for indices in steps
        ]
        self._requests[:] = requests
        if self._loader is None:
            self._loader = self._make_loader()
        with self._alive(requests[0].keys if requests else []):
            results = iter(self._loader)
        return self._read(results, requests)

    def _read(self, results: Iterator[Read], requests: list[Request]) -> Iterator[Samples]:
        for place, request in enumerate(requests):
            started, training = time.monotonic(), request.training
            with self._alive(request.keys):
                read = next(results)
            waited = time.monotonic() - started
            self.waited_seconds += waited
            if training and place == 0:
                self.figures.starting_seconds += waited
            if read.error is not None:
                raise DataError(read.error)
            if read.unreadable and self.settings.on_bad_sample is BadSample.fail:
                raise DataError(
                    f"{read.lines()}; loader.on_bad_sample=skip goes on without such samples"
                )
            self.skipped |= {(key[0], key[2]) for key, _, _ in read.unreadable}
            if read.batch is not None:
                handed = time.monotonic()
                yield HostSamples(self.data, read.batch, self.device)
                if training and place:
                    self._note(read, waited, time.monotonic() - handed)
            elif training:
                raise DataError(f"no sample of a step can be read: {read.lines()}")
            elif isinstance(self.ranks, SeveralRanks):  # they go on together
                yield NoSamples()

    def _note(self, read: Read, waited: float, worked: float) -> None:
        """Take a step into the figures; the first of an epoch is left out, it waits for workers."""
        figures = self.figures
        assert read.batch is not None
        figures.batch_bytes = max(figures.batch_bytes, nbytes(read.batch))
        figures.steps += 1
        figures.waited_seconds += waited
        figures.step_seconds += worked
        figures.read_seconds += read.seconds
        if figures.steps in MEMORY_READ_AT:
            self.note_memory()

    def note_memory(self) -> None:
        """Look at how much memory the workers take."""
        workers = getattr(getattr(self._loader, "_iterator", None), "_workers", [])
        taken = memory_of([worker.pid for worker in workers if worker.pid])
        if taken:
            self.figures.worker_bytes = max(self.figures.worker_bytes or 0, taken)

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
        context: Any = None
        if workers:
            # Not fork: this process has threads. The server imports torch once, and then forks.
            if "forkserver" in multiprocessing.get_all_start_methods():
                context = multiprocessing.get_context("forkserver")
                context.set_forkserver_preload(["torch", __name__])
                with signals_held():
                    forkserver.ensure_running()
            else:
                context = multiprocessing.get_context("spawn")
        return DataLoader(
            cast("Dataset[Any]", Items(data, self.seed, settings.on_bad_sample)),
            batch_size=None,
            sampler=Order(self._requests),
            num_workers=workers,
            prefetch_factor=settings.prefetch_factor if workers else None,
            persistent_workers=bool(workers) and settings.persistent_workers,
            pin_memory=pin,
            multiprocessing_context=context,
            worker_init_fn=become_worker if workers else None,
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


def _tensors(values: Any) -> Iterator[Tensor]:
    """Yield the tensors in an object's attributes and in dictionaries there."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from _tensors(value)
