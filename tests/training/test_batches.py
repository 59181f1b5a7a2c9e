"""Samples of both kinds: their order, what they draw, who reads them, and what cannot be read."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from expt.config.schema import BadSample, LoaderConfig
from expt.errors import DataError, LoaderError
from expt.job import Batch
from expt.jobs.vision.grouping import ordered_by_size
from expt.training.batches import (
    Batches,
    Examples,
    HostSamples,
    ResidentSamples,
    StoppedWaitingError,
    kept_on_device,
    micro_batches,
)
from expt.training.interruption import signals_held
from expt.training.predictions import write_predictions
from expt.training.reading import Items, Order, Request, become_worker, sample_generator

CPU = torch.device("cpu")


@pytest.fixture
def made(clips: Path) -> Iterator[Callable[..., Batches]]:
    """Make `Batches` of the toy clips; the workers end with the test."""
    from clips import Clips

    every: list[Batches] = []

    def make(seed: int = 0, log: str | None = None, **loader: Any) -> Batches:
        settings = LoaderConfig(**{"num_workers": 0, **loader})
        every.append(Batches(Clips(str(clips), 8, 5, log), CPU, settings, seed))
        return every[-1]

    yield make
    for batches in every:
        batches.close()


def values(batches: Batches, epoch: int, first: int = 0, last: int = 6) -> torch.Tensor:
    """Return all clips of some steps, one after the other."""
    steps = batches.training(epoch, first, last)
    return torch.cat([samples.batch().inputs["x"] for samples in steps])


def test_the_samples_of_a_step_depend_on_seed_epoch_and_index_alone(made) -> None:
    whole = values(made(), epoch=1)
    assert torch.equal(whole, values(made(num_workers=2), epoch=1))
    assert torch.equal(whole[24:], values(made(), epoch=1, first=3))
    assert not torch.equal(whole, values(made(), epoch=2))
    assert not torch.equal(whole, values(made(seed=1), epoch=1))
    state = torch.get_rng_state()
    values(made(), epoch=1)
    assert torch.equal(state, torch.get_rng_state()), "the training's random state has moved"


def test_a_data_set_may_say_who_is_in_a_step_with_whom(made) -> None:
    batches = made(seed=3)
    plain = values(batches, epoch=1)
    sizes = [(4, 4), (8, 8)] * 24
    batches.data.training_order = lambda seed, epoch: ordered_by_size(sizes, 8, seed, epoch)
    order = ordered_by_size(sizes, 8, 3, 1)
    expected = [[i % 2 for i in step.tolist()] for step in order.split(8)]
    assert all(len(set(step)) == 1 for step in expected)
    items = [batches.data.item("train", i, sample_generator(3, 1, i)) for i in order.tolist()]
    assert torch.equal(values(batches, epoch=1), torch.stack([item.inputs["x"] for item in items]))
    assert torch.equal(values(batches, 1, 2), values(batches, 1)[16:]), "a resume goes on with it"
    assert not torch.equal(values(batches, epoch=1), plain)
    for wrong in (torch.zeros(48, dtype=torch.int64), torch.arange(47)):
        batches.data.training_order = lambda seed, epoch, wrong=wrong: wrong
        with pytest.raises(DataError, match="every index from 0 to 47 once"):
            values(batches, epoch=1)


def test_an_epoch_reads_every_file_once_and_the_workers_stay(made, home: Path) -> None:
    batches = made(num_workers=2, log="reads")
    for epoch in (0, 1):
        values(batches, epoch)
        sizes = [len(samples) for samples in batches.evaluation("val", 12)]
        assert sizes == [5, 5, 2]
    reads = [line.split() for line in (home / "reads").read_text().splitlines()]
    assert set(Counter(name for _, name in reads).values()) == {2}
    assert len({pid for pid, _ in reads}) == 2
    assert str(os.getpid()) not in {pid for pid, _ in reads}
    assert batches.waited_seconds > 0


def test_an_epoch_that_is_broken_off_leaves_nothing_for_the_next(made) -> None:
    batches = made(num_workers=2)
    next(batches.training(0, 0, 6))
    assert torch.equal(values(batches, epoch=1), values(made(), epoch=1))


def test_the_parts_of_a_step_are_views_of_what_was_read(made) -> None:
    samples = next(made().training(0, 0, 1))
    assert isinstance(samples, HostSamples)
    parts = list(micro_batches(samples, 3, full=8))
    assert [len(part) for part in parts] == [3, 3, 2]
    assert torch.equal(
        torch.cat([part.batch().inputs["x"] for part in parts]), samples.batch().inputs["x"]
    )
    assert parts[0].batch().target.untyped_storage().data_ptr() == (
        samples.host.target.untyped_storage().data_ptr()
    )
    assert float(samples.weight()) == 8


@pytest.mark.parametrize(
    ("count", "parts", "full", "sizes"),
    [(32, 4, 32, [8] * 4), (5, 4, 32, [5]), (9, 4, 32, [5, 4]), (9, 6, 9, [2, 2, 2, 1, 1, 1])],
)
def test_a_smaller_last_batch_is_not_cut_finer_than_a_full_one(
    count: int, parts: int, full: int, sizes: list[int]
) -> None:
    samples = HostSamples(None, Batch({}, torch.zeros(count)), CPU)
    assert [len(part) for part in micro_batches(samples, parts, full)] == sizes


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_that_cannot_be_read_is_named(made, clips: Path, workers: int) -> None:
    (clips / "train_007_1.npy").write_bytes(b"no clip")
    with pytest.raises(DataError, match=r"train_007_1\.npy cannot be read: .*on_bad_sample=skip"):
        values(made(num_workers=workers), epoch=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_that_is_skipped_is_counted_and_replaced(made, clips, workers: int) -> None:
    for name in ("train_007_1", "val_003_0"):
        (clips / f"{name}.npy").write_bytes(b"no clip")
    batches = made(num_workers=workers, on_bad_sample=BadSample.skip)
    assert len(values(batches, epoch=0)) == 48, "a step keeps its size"
    assert batches.skipped == {("train", 7)}
    # An evaluation counts nothing twice: what cannot be read is left out.
    assert [len(samples) for samples in batches.evaluation("val", 12)] == [4, 5, 2]
    assert batches.skipped == {("train", 7), ("val", 3)}


def test_predictions_of_the_training_part_are_of_their_samples(made, clips, tmp_path) -> None:
    (clips / "train_007_1.npy").write_bytes(b"no clip")
    batches = made(on_bad_sample=BadSample.skip)
    means = [s.batch().inputs["x"].flatten(1).mean(dim=1) for s in batches.evaluation("train", 48)]
    write_predictions(batches, "train", torch.cat(means), tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz") as written:
        numbers, found = written["indices"], written["predictions"]
    assert numbers.tolist() == [n for n in range(48) if n != 7], "none has taken its place"
    items = [batches.data.item("train", n, sample_generator(0, 0, n)) for n in numbers.tolist()]
    np.testing.assert_allclose(found, [float(one.inputs["x"].mean()) for one in items], rtol=1e-5)


@pytest.mark.parametrize("skip", [BadSample.fail, BadSample.skip])
def test_a_lack_of_memory_is_no_bad_sample(made, monkeypatch, skip: BadSample) -> None:
    batches = made(on_bad_sample=skip)

    def lacking(*arguments: Any) -> Batch:
        raise torch.OutOfMemoryError("the budget")

    monkeypatch.setattr(type(batches.data), "item", lacking)
    with pytest.raises(torch.OutOfMemoryError):
        values(batches, epoch=0)


def test_nothing_that_can_be_read_is_an_error(made, clips) -> None:
    for file in clips.glob("train_*"):
        file.write_bytes(b"no clip")
    with pytest.raises(DataError, match="no sample of a step can be read"):
        values(made(on_bad_sample=BadSample.skip), epoch=0)
    with pytest.raises(DataError, match="no sample of the train part can be read"):
        Examples(made().data).batch("train", 3)


def look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have torch's loader ask after its workers five times a second, not every five seconds."""
    iterator = torch.utils.data.dataloader._MultiProcessingDataLoaderIter
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    monkeypatch.setattr(iterator._try_get_data, "__defaults__", (0.2,))


def test_a_worker_that_dies_is_one_line_that_names_the_files(made, monkeypatch) -> None:
    look_often(monkeypatch)
    batches = made(num_workers=1, prefetch_factor=1)
    steps = batches.training(0, 0, 6)
    next(steps)
    (worker,) = batches._loader._iterator._workers
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(LoaderError, match=r"worker process .* died .*train_\d+_\d\.npy"):
        for _ in steps:
            pass
    # It can be asked again, with new workers.
    assert torch.equal(values(batches, epoch=0), values(made(), epoch=0))


def test_workers_leave_ctrl_c_to_the_process_that_trains(made) -> None:
    batches = made(num_workers=1)
    steps = batches.training(0, 0, 6)
    next(steps)
    (worker,) = batches._loader._iterator._workers
    os.kill(worker.pid, signal.SIGINT)
    time.sleep(0.1)
    assert len(list(steps)) == 5


def test_a_worker_reads_on_after_sigterm_while_the_process_that_trains_saves(made) -> None:
    batches = made(num_workers=1)
    steps = batches.training(0, 0, 6)
    next(steps)
    (worker,) = batches._loader._iterator._workers
    os.kill(worker.pid, signal.SIGTERM)
    os.kill(forkserver._forkserver._forkserver_pid, signal.SIGTERM)
    time.sleep(0.1)
    assert len(list(steps)) == 5
    batches.close()
    worker.join(5)
    assert worker.exitcode == 0, "it ends when it has nothing more to do"


class SlowToUnpickle:
    """A data set that is sent SIGTERM while a worker is still given it."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        if multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGTERM)

    def __getstate__(self) -> dict[str, Any]:
        return {"some": "state"}

    def item(self, split: str, index: int, generator: torch.Generator) -> Batch:
        return Batch({"x": torch.zeros(1)}, torch.tensor(index))

    def size(self, split: str) -> int:
        return 4


def test_a_worker_that_is_starting_leaves_sigterm_to_the_process_that_trains() -> None:
    with signals_held():
        forkserver.ensure_running()
    items = Items(SlowToUnpickle(), 0, BadSample.fail)
    requests = [Request([("train", 0, index)], True) for index in range(4)]
    loader = DataLoader(
        items, batch_size=None, sampler=Order(requests), num_workers=1,
        multiprocessing_context="forkserver", worker_init_fn=become_worker,
    )  # fmt: skip
    assert [int(read.batch.target) for read in loader] == [0, 1, 2, 3]


def test_a_worker_that_hangs_ends_a_while_after_sigterm_and_after_no_other_signal() -> None:
    program = (
        "import os, signal, sys, time; from expt.training import reading\n"
        "signal.signal(signal.SIGALRM, lambda *_: None)\n"
        "reading.GRACE_SECONDS = 0.1; reading.become_worker(0)\n"
        "signal.raise_signal(signal.SIGALRM); time.sleep(0.5)\n"
        "print('ready', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as started:
        assert started.stdout.readline() == b"ready\n"
        started.terminate()
        assert started.wait(10) == 1


def test_shapes_that_differ_are_said(made, monkeypatch) -> None:
    batches = made()
    monkeypatch.setattr(
        type(batches.data), "item",
        lambda self, split, index, generator: Batch({"x": torch.zeros(index + 1)}, torch.tensor(0)),
    )  # fmt: skip
    with pytest.raises(DataError, match=r"different shapes of x .*collate"):
        values(batches, epoch=0)


def test_an_example_has_the_shapes_of_a_batch_and_reads_one_file(made, home: Path) -> None:
    data = made(log="reads").data
    examples = Examples(data)
    batch = examples.batch("train", 7)
    real = next(made().training(0, 0, 1)).batch()
    assert batch.inputs["x"].shape == (7, *real.inputs["x"].shape[1:])
    assert (batch.inputs["x"].dtype, batch.target.dtype) == (torch.float32, torch.int64)
    assert examples.input_names() == ["x"]
    assert float(examples.weight("train", 7, batch)) == 7
    assert len((home / "reads").read_text().splitlines()) == 1
    assert kept_on_device(data) == []


def test_resident_samples_are_indices_on_the_device(toys) -> None:
    from blobs import Blobs

    data = Blobs(batch_size=10, eval_batch_size=16)
    batches = Batches(data, CPU, LoaderConfig(), seed=0)
    steps = list(batches.training(0, 0, 10))
    assert [len(samples) for samples in steps] == [10] * 9 + [6]
    assert sorted(torch.cat([samples.indices for samples in steps]).tolist()) == list(range(96))
    (everything,) = batches.evaluation("val", 48)
    assert isinstance(everything, ResidentSamples) and len(everything) == 48
    copy = steps[0].clone()
    copy.copy_(steps[1])
    assert torch.equal(copy.indices, steps[1].indices)
    assert not torch.equal(copy.indices, steps[0].indices)
    assert sum(tensor is data.x or tensor is data.y for tensor in kept_on_device(data)) == 2


def test_generators_of_two_samples_draw_differently() -> None:
    draws = {
        float(torch.rand((), generator=sample_generator(*key)))
        for key in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 1, 1)]
    }
    assert len(draws) == 5


def test_a_worker_that_dies_between_two_splits_is_said(made, monkeypatch) -> None:
    look_often(monkeypatch)
    batches = made(num_workers=1)
    list(batches.training(0, 0, 2))
    (worker,) = batches._loader._iterator._workers
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    with pytest.raises(LoaderError, match=r"val_000_0\.npy"):
        list(batches.evaluation("val", 4))
    assert len(list(batches.evaluation("val", 4))) == 1


def test_after_a_signal_a_dead_worker_is_a_stop(made, monkeypatch) -> None:
    look_often(monkeypatch)
    batches = made(num_workers=1, prefetch_factor=1)
    batches.stopped = lambda: True
    steps = batches.evaluation("val", 12)
    next(steps)
    (worker,) = batches._loader._iterator._workers
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    with pytest.raises(StoppedWaitingError):
        list(steps)


def test_a_batch_that_cannot_be_made_is_no_dead_worker(made) -> None:
    batches = made()
    # A class of its own: what isinstance finds of a protocol's attribute is remembered of a class.
    own = {"collate": lambda self, items: torch.stack([])}
    batches.data.__class__ = type("Unequal", (type(batches.data),), own)
    with pytest.raises(DataError, match="cannot be made: RuntimeError"):
        next(batches.training(0, 0, 1))


@pytest.mark.parametrize(
    ("returned", "words"),
    [((1, 2), "returned tuple"), (Batch({"x": 1.0}, torch.tensor(0)), "x is float, not a tensor")],
)
def test_an_item_of_the_wrong_kind_is_one_sentence(made, monkeypatch, returned, words) -> None:
    batches = made(on_bad_sample=BadSample.skip)
    monkeypatch.setattr(type(batches.data), "item", lambda *arguments: returned)
    with pytest.raises(DataError, match=rf"Clips\.item: .*{words}"):
        next(batches.training(0, 0, 1))
    with pytest.raises(DataError, match=words):
        Examples(batches.data).batch("train", 2)


def test_an_example_is_taken_of_whatever_can_be_read(made, clips) -> None:
    (clips / "val_000_0.npy").write_bytes(b"no clip")
    assert len(Examples(made().data).batch("val", 3)) == 3
