"""Whether a run waits for its samples, what is advised then, and what is changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from expt.config.schema import LoaderConfig
from expt.memory.techniques.techniques import Techniques
from expt.training import loading, tuning
from expt.training.batches import Batches
from expt.training.checkpoint import Progress
from expt.training.loading import LoaderFigures, announcement, memory_of
from expt.training.tuning import Change, NoTuner, Tuner, loader_change, parts_change, tuner_for

MIB = 2**20
HISTORY = [{"peak_allocated_bytes": 20.0 * MIB}]


def figures(**seen: Any) -> LoaderFigures:
    return LoaderFigures(**{"steps": 100, "step_seconds": 10.0, "read_seconds": 25.0, **seen})


@pytest.fixture(autouse=True)
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (loading, tuning):
        monkeypatch.setattr(module, "usable_cores", lambda: 4)


def test_a_run_that_keeps_up_is_told_nothing():
    assert figures(waited_seconds=0.9).verdict(LoaderConfig(), []) is None
    assert figures(waited_seconds=5.0, steps=3).verdict(LoaderConfig(), []) is None


def test_too_few_workers_are_the_first_advice():
    found = figures(waited_seconds=15.0).verdict(LoaderConfig(num_workers=1), ["data.resize=64"])
    assert found == (
        "bound by the loader: 60 % of training was spent waiting for samples (a step takes 100 ms, "
        "reading its samples 250 ms of one worker). What would help: loader.num_workers=3, or "
        "data.resize=64"
    )


def test_where_cores_are_lacking_the_samples_have_to_be_cheaper():
    seen = figures(waited_seconds=15.0, read_seconds=90.0)
    assert "What would help: data.frame_cache=9MB" in str(
        seen.verdict(LoaderConfig(num_workers=4), ["data.frame_cache=9MB"])
    )
    assert "faster storage" in str(seen.verdict(LoaderConfig(num_workers=4), []))


def test_workers_that_are_late_now_and_then_hold_more_ready():
    seen = figures(waited_seconds=3.0, read_seconds=5.0)
    assert "loader.prefetch_factor=4" in str(seen.verdict(LoaderConfig(num_workers=2), []))


def test_what_is_ahead_is_said_before_and_kept_after():
    settings = LoaderConfig(num_workers=3, prefetch_factor=2)
    assert announcement(settings, 5 * MIB) == (
        "3 workers hold up to 6 batches of 5.0 MiB ready: 30.0 MiB of host memory beside their own"
    )
    assert announcement(LoaderConfig(num_workers=0), MIB) is None
    record = figures(waited_seconds=20.0, batch_bytes=5 * MIB).record(settings)
    assert record["ahead_bytes"] == 30 * MIB
    assert (record["ratio"], record["verdict"]) == (3.0, "bound by the loader")


def test_the_memory_of_processes_is_theirs():
    import os

    assert memory_of([os.getpid()]) > 30 * MIB
    assert memory_of([2**22 + 7]) == 0


def test_the_loop_measures_both_sides(clips: Path):
    from clips import Clips

    batches = Batches(Clips(str(clips), 4, 4), torch.device("cpu"), LoaderConfig(num_workers=0), 0)
    for _ in batches.training(0, 0, 12):
        torch.ones(1).sum()
    seen = batches.figures
    assert seen.steps == 11  # the first waits for the workers to start
    assert seen.read_seconds <= seen.waited_seconds
    assert seen.batch_bytes == 4 * (4 * 6 * 6 * 4) + 4 * 8
    assert seen.since(replace(seen)).steps == 0


@pytest.mark.parametrize(
    ("seen", "workers", "preprocess_on", "change"),
    [
        (figures(waited_seconds=15.0), 1, "device", ("loader.num_workers", 3)),
        (figures(waited_seconds=15.0), 3, "worker", ("data.preprocess_on", "device")),
        (figures(waited_seconds=15.0), 4, "device", None),
        (figures(waited_seconds=0.01, read_seconds=5.0), 3, "device", ("loader.num_workers", 1)),
        (figures(waited_seconds=0.5, read_seconds=5.0), 3, "device", None),
        (figures(waited_seconds=15.0, steps=2), 0, "worker", None),
    ],
)
def test_the_loader_is_changed_by_what_was_seen(seen, workers, preprocess_on, change):
    found = loader_change(seen, LoaderConfig(num_workers=workers), preprocess_on)
    assert (found and (found.setting, found.value)) == change


@pytest.mark.parametrize(
    ("parts", "peak", "limit", "exact", "value"),
    [
        (4, 40, 100, True, 2),
        (1, 40, 100, True, None),
        (4, 95, 100, True, 8),
        (8, 95, 100, True, None),
        (4, 95, 100, False, None),
        (4, 60, 100, True, None),
        (4, 95, None, True, None),
    ],
)
def test_parts_of_a_batch_follow_the_memory_that_is_left(parts, peak, limit, exact, value):
    found = parts_change(Techniques(gradient_accumulation=parts), 8, peak, limit, exact)
    assert (found.value if found else None) == value


class FakeRecovery:
    over_the_batch = False

    def __init__(self) -> None:
        self.techniques = Techniques(gradient_accumulation=4)

    def set_parts(self, parts: int) -> None:
        self.techniques = Techniques(gradient_accumulation=parts)


def test_changes_are_made_told_kept_and_made_again_after_a_resume(capsys):
    data = SimpleNamespace(tune=True, preprocess_on="worker", batch_size=8)
    forgotten: list[int] = []
    tuner = tuner_for(data, 100 * MIB, lambda: forgotten.append(1))
    assert isinstance(tuner, Tuner)
    closed: list[int] = []
    batches: Any = SimpleNamespace(
        data=data,
        settings=LoaderConfig(num_workers=1),
        figures=figures(waited_seconds=15.0),
        close=lambda: closed.append(1),
        device=torch.device("cpu"),
    )
    progress, recovery = Progress(epoch=2, history=HISTORY), FakeRecovery()
    tuner.after_epoch(progress, batches, recovery)
    assert batches.settings.num_workers == 3
    assert recovery.techniques.gradient_accumulation == 2
    assert [kept["setting"] for kept in progress.tuned] == [
        "loader.num_workers",
        "memory.gradient_accumulation",
    ]
    assert (closed, forgotten) == ([1], [1])
    assert "tuned: loader.num_workers=3 from the next epoch on (60 % of the time" in (
        capsys.readouterr().out
    )
    assert batches.figures.steps == 0  # a verdict is of the settings that held
    tuner.after_epoch(progress, batches, recovery)  # nothing new was seen
    assert batches.settings.num_workers == 3
    assert recovery.techniques.gradient_accumulation == 2

    resumed: Any = SimpleNamespace(
        data=data, settings=LoaderConfig(num_workers=1), figures=LoaderFigures(), close=lambda: None
    )
    tuner_for(data, None, lambda: None).restore(progress, resumed)
    assert resumed.settings.num_workers == 3


def test_there_are_few_changes(monkeypatch):
    monkeypatch.setattr(tuning, "MAX_CHANGES", 1)
    data = SimpleNamespace(tune=True, preprocess_on="device", batch_size=8)
    progress = Progress(history=HISTORY)
    batches: Any = SimpleNamespace(
        data=data,
        settings=LoaderConfig(num_workers=1),
        figures=figures(waited_seconds=15.0),
        close=lambda: None,
        device=torch.device("cpu"),
    )
    tuner_for(data, 100 * MIB, lambda: None).after_epoch(progress, batches, FakeRecovery())
    assert len(progress.tuned) == 1


def test_short_epochs_are_looked_at_together():
    data = SimpleNamespace(tune=True, preprocess_on="device", batch_size=8)
    batches: Any = SimpleNamespace(
        data=data,
        settings=LoaderConfig(num_workers=1),
        figures=figures(steps=3, step_seconds=0.3, read_seconds=0.9, waited_seconds=0.6),
        close=lambda: None,
        device=torch.device("cpu"),
    )
    progress, tuner = Progress(), tuner_for(data, None, lambda: None)
    tuner.after_epoch(progress, batches, FakeRecovery())
    assert progress.tuned == []
    batches.figures = figures(steps=6, step_seconds=0.6, read_seconds=1.8, waited_seconds=1.2)
    tuner.after_epoch(progress, batches, FakeRecovery())
    assert [change["value"] for change in progress.tuned] == [3]


def test_a_data_set_that_does_not_ask_is_left_alone():
    assert isinstance(tuner_for(SimpleNamespace(tune=False, preprocess_on=""), 1, int), NoTuner)
    assert isinstance(tuner_for(SimpleNamespace(), 1, int), NoTuner)
    assert Change("a", 1, "b").line() == "tuned: a=1 from the next epoch on (b)"
