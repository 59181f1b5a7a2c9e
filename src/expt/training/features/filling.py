"""Making the features of every sample before training begins, or finding them made.

The first process prepares the store, each fills its own rows, the first gives the store its name
when all have; then they read. Whatever goes wrong on the disk, and a lack of memory that smaller
batches do not mend, is agreed on by all: the store is removed and training goes on without it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from expt.config.schema import LoaderConfig
from expt.errors import DataError, RecoveryError, StorageError, UserError
from expt.job import Batch, DataSet, FeatureCached, Split, StreamedDataSet
from expt.locks import Lock
from expt.memory.measuring.meter import MemoryMeter
from expt.memory.recovery.recovery import Recovery
from expt.training.batches import Batches, Samples
from expt.training.checkpoint import random_state, restore_random_state
from expt.training.features import store
from expt.training.features.feature import Arithmetic, computed, features_of
from expt.training.features.numbered import ROW, numbered
from expt.training.features.store import SPLITS, Rows, RowWriter
from expt.training.reading import Reader, sample_name
from expt.units import counted, format_bytes

ASK_EVERY_SECONDS = 1.0
"""How often a run asks whether another one has made the same features."""
DRAWS = 3
"""Times that a training sample is read with other random numbers, to see whether it changes."""


class Processes(Protocol):
    """What of Fabric several processes need to fill one store."""

    global_rank: int
    world_size: int

    def barrier(self) -> None:
        """Wait for the others."""

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Return what the process `src` gave."""

    def all_reduce(self, data: Tensor, reduce_op: str = "mean") -> Any:
        """Return what comes of the tensors of all."""


@dataclass
class Filling:
    """Everything that is needed to make the features of a data set.

    Args:
        model: with all of its parts, on the device.
        mode: of the features.
        data: streamed, whose samples they are of.
        loader: how these are read.
        seed: of the run.
        device: of the model.
        arithmetic: of the run.
        dtype: `memory.feature_cache_dtype`.
        root: folder of all stores.
        key: what features depend on; another one is another store.
        processes: Fabric.
        recovery: makes batches smaller where memory runs out.
        meter: sees what a batch takes.

    """

    model: FeatureCached
    mode: str
    data: StreamedDataSet
    loader: LoaderConfig
    seed: int
    device: torch.device
    arithmetic: Arithmetic
    dtype: str
    root: Path
    key: Mapping[str, Any]
    processes: Processes
    recovery: Recovery
    meter: MemoryMeter
    record: dict[str, Any] = field(default_factory=dict)
    """What ``result.json`` says about it."""

    def run(self) -> Rows | None:
        """Return the rows, made or found; None where there can be none, which a line says.

        Random states are afterwards as they were.

        Raises:
            DataError: a sample cannot be read, and `loader.on_bad_sample` is fail; or the inputs
                change by chance.
            ModelError: the features are not what they should be.

        """
        started, state = time.monotonic(), random_state()
        module = cast(nn.Module, self.model)
        training = module.training
        module.eval()
        try:
            rows, why = self._agreed_rows()
        finally:
            module.train(training)
            restore_random_state(state)
        self.record |= {"mode": self.mode, "rows": rows.count if rows else 0}
        self.record |= {"bytes": rows.bytes if rows else 0, "seconds": time.monotonic() - started}
        if why is not None and self.processes.global_rank == 0:
            self.record["live"] = why
            print(f"feature cache: {why}; training goes on live", flush=True)
        return rows

    def _agreed_rows(self) -> tuple[Rows | None, str | None]:
        first = self.processes.global_rank == 0
        digest = digest_of(self.key)
        final = self.root / digest
        lock: Lock | None = None
        fault: UserError | None = None
        prepared: Rows | str = ""
        done: np.ndarray | None = None
        try:
            lock, refused = self._locked(self.root / f".{digest}.lock")
            if refused is not None:
                return None, refused
            if first:
                with _said() as said:
                    try:
                        prepared = self._prepared(final)
                        # Once for all: the others may see marks that were set meanwhile.
                        done = prepared.done() if isinstance(prepared, Rows) else None
                    except RecoveryError as error:
                        prepared = str(error)
                    except UserError as error:
                        fault = error
                prepared = said.get("why", prepared)
            told = (fault and str(fault), prepared, done)
            refused, prepared, done = self.processes.broadcast(told, 0)
            if refused is not None:
                raise fault or DataError(refused)
            if isinstance(prepared, str):
                return None, prepared
            self.record["reused"] = prepared.folder == final
            if prepared.folder == final:
                if first:
                    print(
                        f"feature cache ({self.mode}): {prepared.count:,} samples, found in {final}"
                    )
                return prepared, None
            assert done is not None
            return self._filled(prepared, done, final)
        finally:
            if lock is not None:
                lock.release()

    def _locked(self, path: Path) -> tuple[Lock, str | None]:
        """Return the lock, which the first process has then; or why there can be none.

        All ask in turns: processes that only waited for the first would give it up in time.
        """
        first, lock, waited = self.processes.global_rank == 0, Lock(path), False
        while True:
            held = False
            with _said() as said:
                if first:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    held = lock.acquire()
            held, why = self.processes.broadcast((held, said.get("why")), 0)
            if held or why is not None:
                return lock, why
            if first and not waited:
                print(
                    "feature cache: another run makes the same features; waiting for it", flush=True
                )
            waited = True
            time.sleep(ASK_EVERY_SECONDS)

    def _prepared(self, final: Path) -> Rows | str:
        """Return the store as it is found, or one to fill; or why there can be none."""
        found = store.opened(final)
        if found is not None:
            return found
        sizes: dict[str, int] = {split: self.data.size(split) for split in SPLITS}
        features = features_of(self._of_first_sample(), 1, self.dtype)
        part = final.with_name(f".{final.name}.part")
        needed = sum(sizes.values()) * sum(feature.nbytes for feature in features)
        begun = sum(file.stat().st_blocks * 512 for file in part.glob("*.npy"))
        free = store.free_bytes(self.root)
        if needed - begun > free:
            return (
                f"{format_bytes(needed)} are needed in {self.root} for {sum(sizes.values()):,} "
                f"samples, and {format_bytes(free)} are free there (another disk: "
                "memory.feature_cache_folder=FOLDER)"
            )
        return store.create(part, features, sizes, {"key": dict(self.key)})

    def _filled(self, rows: Rows, done: np.ndarray, final: Path) -> tuple[Rows | None, str | None]:
        """Fill this process's share, wait for the others, and give the store its name."""
        first = self.processes.global_rank == 0
        fault: UserError | None = None
        unreadable: set[int] = set()
        with _said() as said:
            try:
                unreadable = self._fill(rows, done)
            except RecoveryError as error:
                said["why"] = str(error)
            except UserError as error:
                fault, said["why"] = error, str(error)
        if self._anybody(said.get("why")):
            if fault is None and first:
                store.remove(rows.folder)
            if fault is not None:
                raise fault
            return None, said.get("why") or "another process could not make its part"
        for rank in range(self.processes.world_size):
            unreadable = unreadable | self.processes.broadcast(unreadable, rank)
        with _said() as said:
            if first:
                _check_whole(rows, unreadable)
                store.finish(rows.folder, final)
        if self._anybody(said.get("why")):
            return None, said.get("why") or "the first process could not name the store"
        found = store.opened(final)
        if self._anybody(None if found else "gone"):
            return None, f"{final} is not to be seen by every process; they need one folder"
        return found, None

    def _fill(self, rows: Rows, done: np.ndarray) -> set[int]:
        """Make this process's share of the rows not `done`; return those that are unreadable."""
        if done.any() and self.processes.global_rank == 0:
            print(f"feature cache: going on, {int(done.sum()):,} of {rows.count:,} rows are there")
        writer, pace = RowWriter(rows), Pace(rows, self)
        module = cast(nn.Module, self.model)
        self.meter.take_in([*module.parameters(), *module.buffers()])  # also what is not used
        batches = RowBatches(numbered(self.data, rows), self.device, self.loader, self.seed)
        limit = self.recovery.evaluation_batch_size
        try:
            for split in SPLITS:
                start = rows.row(split, 0)
                missing = torch.arange(rows.sizes[split])[~done[start : start + rows.sizes[split]]]
                if not len(missing):  # which torch would split into one empty step
                    continue
                steps = missing.split(self.data.eval_batch_size)
                mine = steps[self.processes.global_rank :: self.processes.world_size]
                for samples in batches.of_steps(split, mine):
                    self._keep(samples, rows, writer)
                    pace.note(len(samples))
            writer.mark()
            return {rows.row(split, index) for split, index in batches.skipped}
        finally:
            self.recovery.evaluation_batch_size = limit
            self.recovery.evaluated()
            batches.close()
            writer.close()

    def _keep(self, samples: Samples, rows: Rows, writer: RowWriter) -> None:
        """Make the features of some samples, in parts as small as it takes, and write them."""
        self.meter.take_in(samples.on_host())
        done = 0

        def some(size: int) -> None:
            nonlocal done
            part = samples[done : done + size]
            batch = part.batch()
            inputs = {name: value for name, value in batch.inputs.items() if name != ROW}
            made = computed(self.model, self.mode, inputs, self.arithmetic)
            kept = {one.name: one.encode(made[one.name]) for one in rows.features}
            writer.write(batch.inputs[ROW].tolist(), kept)
            done += len(part)

        size = part_size(self.data, self.recovery.techniques.forward_chunks)
        while done < len(samples):
            with self.meter.evaluation():
                self.recovery.evaluation(some, size)

    def _of_first_sample(self) -> Mapping[str, Tensor]:
        """Return the features of the first training sample that can be read [1, ...]."""
        one = numbered(self.data, None)
        batches = RowBatches(one, self.device, in_this_process(self.loader), self.seed)
        samples = next(batches.of_steps("train", [torch.arange(1)]), None)
        if samples is None:
            raise DataError("no sample of the train part can be read")
        inputs, found = samples.batch().inputs, list[Mapping[str, Tensor]]()

        def work(_: int) -> None:
            found.append(computed(self.model, self.mode, inputs, self.arithmetic))

        while not found:
            self.recovery.evaluation(work, 1)
        return found[0]

    def _anybody(self, why: str | None) -> bool:
        """Tell whether it went wrong in any process."""
        count = torch.tensor(float(why is not None), device=self.device)
        if self.processes.world_size > 1:
            count = cast(Tensor, self.processes.all_reduce(count, reduce_op="sum"))
        return bool(count > 0)


@dataclass
class Pace:
    """Says how long filling takes, once a batch was seen."""

    rows: Rows
    filling: Filling
    started: float = field(default_factory=time.monotonic)
    done: int = 0

    def note(self, samples: int) -> None:
        """Take a batch into account."""
        self.done += samples
        if self.done > samples or self.filling.processes.global_rank:
            return
        rows, folder = self.rows, self.filling.root
        seconds = (time.monotonic() - self.started) * rows.count / samples
        seconds /= self.filling.processes.world_size
        print(
            f"feature cache ({self.filling.mode}): making the features of {rows.count:,} samples, "
            f"{format_bytes(rows.bytes)} in {folder} (free there: "
            f"{format_bytes(store.free_bytes(folder))}), about {counted(round(seconds), 'second')}",
            flush=True,
        )


class RowBatches(Batches):
    """Batches of samples in an order of one's own."""

    def of_steps(self, split: Split, steps: Sequence[Tensor]) -> Iterator[Samples]:
        """Return the samples with these indices, one tensor [B] a batch."""
        return self._streamed(split, steps, 0)


def _check_whole(rows: Rows, unreadable: set[int]) -> None:
    """Refuse a store that lacks rows of samples that could be read.

    Raises:
        StorageError: it does; what is there stays, and another run goes on with it.

    """
    lacking = sorted(set(np.flatnonzero(~rows.done()).tolist()) - unreadable)
    if lacking:
        raise StorageError(
            f"{len(lacking):,} of {rows.count:,} rows are not in {rows.folder} (the first is "
            f"{lacking[0]}) after every process has made its part; the next run makes them. All "
            "processes must see one folder"
        )


def part_size(data: DataSet, forward_chunks: int) -> int:
    """Return how many samples the model sees at a time, as in evaluation."""
    return -(-data.eval_batch_size // forward_chunks)


def in_this_process(loader: LoaderConfig) -> LoaderConfig:
    """Return settings that read without worker processes."""
    return LoaderConfig(0, pin_memory=loader.pin_memory, on_bad_sample=loader.on_bad_sample)


def first_samples(data: StreamedDataSet, inputs: Sequence[str], seed: int) -> str:
    """Return a hash of inputs of the first sample of every split.

    Raises:
        DataError: those of a training sample change from epoch to epoch.

    """
    reader, digest = Reader(data, seed), hashlib.sha256()
    for split in SPLITS:
        draws = DRAWS if split == "train" else 1
        found = [_bytes(reader([(split, epoch, 0)]).batch, inputs) for epoch in range(draws)]
        if len(set(found)) > 1:
            raise DataError(
                "memory.feature_cache: the data set changes its inputs by chance "
                f"({', '.join(inputs)} of {sample_name(data, (split, 0, 0))} differ from epoch to "
                "epoch), so that features of one epoch are not those of another; switch its random "
                "augmentation off, or set memory.feature_cache=off"
            )
        digest.update(found[0])
    return digest.hexdigest()


def _bytes(batch: Batch | None, inputs: Sequence[str]) -> bytes:
    if batch is None:
        return b""
    digest = hashlib.sha256()
    for name in inputs:
        if name in batch.inputs:
            value = batch.inputs[name].contiguous().reshape(-1)
            digest.update(f"{name} {tuple(batch.inputs[name].shape)} {value.dtype}".encode())
            digest.update(value.view(torch.uint8).numpy().tobytes())
    return digest.digest()


def digest_of(key: Mapping[str, Any]) -> str:
    """Return a key as the name of a folder."""
    text = json.dumps(key, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


@contextmanager
def _said() -> Iterator[dict[str, str]]:
    """Catch what a disk refuses, and say it under ``why``."""
    said: dict[str, str] = {}
    try:
        yield said
    except OSError as error:
        said["why"] = f"the disk refused it ({error.strerror or error})"
    except StorageError as error:
        said["why"] = str(error)
