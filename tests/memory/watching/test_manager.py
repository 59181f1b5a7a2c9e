from __future__ import annotations

import gc
import logging
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from expt.errors import UserError
from expt.memory import MemoryManager
from expt.memory.diagnosis.log_reader import read_log
from expt.memory.diagnosis.trend import Reading
from expt.memory.watching.gauges import CudaGauge, HostGauge

GIB = 1024**3


class FakeCard:
    """A gauge whose figures the test sets, in GiB of 10."""

    name = place = "cuda:0"
    total_bytes = 10 * GIB

    def __init__(self) -> None:
        self.used = 5.0
        self.others = 0
        self.reads = 0

    def read(self, step: float) -> Reading:
        self.reads += 1
        count = round(self.used * GIB)
        return Reading(step, count, count, self.others, None, self.total_bytes)

    def used_fraction(self, reading: Reading) -> float:
        return reading.allocated_bytes / self.total_bytes


@pytest.fixture
def card() -> FakeCard:
    return FakeCard()


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    fake = Clock()
    with monkeypatch.context() as patched:
        patched.setattr(time, "monotonic", fake)
        yield fake


def test_readings_are_taken_by_the_clock_and_not_by_the_step(card: FakeCard, clock: Clock) -> None:
    with MemoryManager(gauges=[card], reading_seconds=2) as manager:
        for _ in range(100):
            manager.step()
            clock.now += 0.1
        assert manager.statistics()["devices"]["cuda:0"]["readings"] == 5
    assert manager.statistics()["devices"]["cuda:0"]["readings"] == 6, "and one at the end"
    assert manager.steps == 100


def test_above_the_threshold_it_tidies_up_once_in_an_interval(card: FakeCard, clock: Clock) -> None:
    manager = MemoryManager(gauges=[card], interval=30, reading_seconds=1)
    calls = []

    @manager.on_cleanup
    def clear() -> None:
        calls.append(clock.now)
        card.used -= 0.2

    card.used = 8.4
    manager.step()
    assert calls == []
    card.used = 9.0
    clock.now += 2
    manager.step()
    assert len(calls) == 1
    (done,) = manager.cleanups
    assert done.step == 2
    assert "90%" in done.reason
    assert done.freed_bytes == {"cuda:0": pytest.approx(0.2 * GIB, rel=1e-6)}
    for _ in range(29):
        card.used = 9.0
        clock.now += 1
        manager.step()
    assert len(calls) == 1
    clock.now += 1.1
    manager.step()
    assert len(calls) == 2
    clock.now += 31
    card.used = 9.0
    manager.step()
    assert len(calls) == 2, "what did not help is tried again after twice the time"
    clock.now += 30
    manager.step()
    assert len(calls) == 3


def test_steps_force_a_cleanup(card: FakeCard) -> None:
    manager = MemoryManager(gauges=[card], force_cleanup_every=100, monitoring=False)
    for _ in range(250):
        manager.step()
    assert [done.step for done in manager.cleanups] == [100, 200]
    assert manager.histories["cuda:0"].count == 0, "monitoring is off"


def test_never_while_an_exception_is_handled(card: FakeCard) -> None:
    card.used = 9.5
    manager = MemoryManager(gauges=[card], force_cleanup_every=1)
    calls: list[int] = []
    manager.on_cleanup(lambda: calls.append(manager.steps))
    try:
        raise RuntimeError
    except RuntimeError:
        assert manager.cleanup() is None
        manager.step()
    assert calls == []
    manager.step()
    assert calls[0] == 2, "made up for in the next step"
    with pytest.raises(ValueError), manager:
        raise ValueError
    assert len(calls) == len(manager.cleanups)


def test_a_reading_by_the_clock_does_not_tidy_up_in_a_handler_either(card: FakeCard) -> None:
    card.used = 9.5
    manager = MemoryManager(gauges=[card], reading_seconds=0, interval=0)
    try:
        raise RuntimeError
    except RuntimeError:
        manager.step()
    assert manager.cleanups == []
    manager.step()
    assert manager.cleanups


def test_a_cleanup_collects_garbage_and_empties_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (GIB, 10 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {})
    manager = MemoryManager(gauges=[CudaGauge(torch.device("cuda", 0)), HostGauge()])

    class Node:
        pass

    gc.disable()
    try:
        node = Node()
        node.itself = node  # type: ignore[attr-defined]
        gone = weakref.ref(node)
        del node
        assert gone() is not None
        manager.cleanup()
        assert gone() is None
    finally:
        gc.enable()
    assert emptied == [1]
    MemoryManager("cpu").cleanup()
    assert emptied == [1], "without a card there is no cache to empty"


def test_a_callback_that_fails_ends_nothing(card: FakeCard, caplog) -> None:
    manager = MemoryManager(gauges=[card])
    called = []
    manager.on_cleanup(lambda: 1 / 0)
    manager.on_cleanup(lambda: called.append(1))
    with caplog.at_level(logging.WARNING):
        assert manager.cleanup() is not None
    assert called == [1]
    assert "ZeroDivisionError" in caplog.text


def test_the_alarm_rings_once_each_time(card: FakeCard, caplog) -> None:
    rung: list[tuple[str, float]] = []
    manager = MemoryManager(
        gauges=[card], reading_seconds=0, on_alarm=lambda *seen: rung.append(seen)
    )
    with caplog.at_level(logging.WARNING):
        for card.used in (8.9, 9.2, 9.3, 5.0, 9.5):
            manager.step()
    assert rung == [("cuda:0", pytest.approx(0.92)), ("cuda:0", pytest.approx(0.95))]
    assert caplog.text.count("memory of cuda:0") == 2
    assert "92 % of 10.00 GiB" in caplog.text


def test_a_watched_step(card: FakeCard) -> None:
    manager = MemoryManager(gauges=[card])

    @manager.watch
    def train_step(value: int) -> int:
        """Take a step."""
        if value < 0:
            raise ValueError
        return value + 1

    assert train_step(1) == 2
    assert train_step(value=2) == 3
    with pytest.raises(ValueError):
        train_step(-1)
    assert manager.steps == 2
    assert train_step.__doc__ == "Take a step."


def test_a_leak_is_told_and_forecast_from_the_history(card: FakeCard, tmp_path: Path) -> None:
    manager = MemoryManager(gauges=[card], reading_seconds=0, interval=1e9)
    for at in range(80):
        card.used = 4 + 0.06 * at
        manager.step()
    assert manager.leak().verdict == "leak"
    soon = manager.risk(horizon_steps=50)
    assert soon is not None
    assert soon.risk > 0.9
    late = manager.risk(horizon_steps=10)
    assert late is not None
    assert late.risk < 0.1
    capped = manager.risk(horizon_steps=10, capacity_bytes=9 * GIB)
    assert capped is not None
    assert capped.risk > 0.8
    told = manager.suggestions()
    assert "runs out" in told[0]
    assert "leak" in told[1]
    manager.write_csv(tmp_path / "readings.csv")
    text = (tmp_path / "readings.csv").read_text()
    assert list(read_log(text).readings) == manager.histories["cuda:0"].readings


def test_what_others_hold_counts_for_a_device_and_not_for_a_budget(card: FakeCard) -> None:
    manager = MemoryManager(gauges=[card], reading_seconds=0, interval=1e9)
    card.used, card.others = 3.0, 6 * GIB
    for _ in range(20):
        manager.step()
        card.used += 0.02
    assert "runs out" in manager.suggestions()[0]
    budget = manager.risk(horizon_steps=10, capacity_bytes=4 * GIB)
    assert budget is not None
    assert budget.risk < 0.1


def test_suggestions_for_a_calm_run(card: FakeCard) -> None:
    manager = MemoryManager(gauges=[card], reading_seconds=0)
    assert manager.suggestions() == []
    for _ in range(20):
        manager.step()
    assert manager.suggestions() == []
    roomy = FakeCard()
    roomy.used = 3.0
    manager = MemoryManager(gauges=[roomy], reading_seconds=0)
    for _ in range(20):
        manager.step()
    (larger,) = manager.suggestions()
    assert "30%" in larger
    assert "larger data.batch_size" in larger
    roomy.used = 8.8
    for _ in range(20):
        manager.step()
    assert any("above its threshold" in line for line in manager.suggestions())


def test_on_a_machine_without_a_card() -> None:
    with MemoryManager("cpu", reading_seconds=0) as manager:
        for _ in range(10):
            manager.step()
    figures = manager.statistics()["devices"]["host"]
    assert figures["readings"] == 11
    assert figures["peak_allocated_bytes"] > 10 * 1024**2
    assert manager.leak().verdict == "steady"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gpu_threshold", 85),
        ("gpu_threshold", 0),
        ("cpu_threshold", -0.1),
        ("alarm", float("nan")),
        ("interval", -1),
        ("reading_seconds", float("nan")),
        ("force_cleanup_every", 0),
        ("history", 3),
    ],
)
def test_a_wrong_setting_is_named(card: FakeCard, name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{name}={value}"):
        MemoryManager(gauges=[card], **{name: value})  # type: ignore[arg-type]


def test_a_resumed_run_goes_on_with_the_readings_of_the_first(
    card: FakeCard, tmp_path: Path
) -> None:
    path = tmp_path / "readings.csv"
    first = MemoryManager(gauges=[card], reading_seconds=0)
    for _ in range(7):
        first.step()
    first.write_csv(path)
    second = MemoryManager(gauges=[card], reading_seconds=0)
    second.resume(path, 5)
    for _ in range(3):
        second.step()
    second.write_csv(path)
    steps = [reading.step for reading in read_log(path.read_text()).readings]
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8]
    assert len(path.read_text().splitlines()) == 1 + 8, "6 and 7 are taken again"
    assert len(second.histories["cuda:0"].readings) == 3, "a verdict is about one process"
    third = MemoryManager(gauges=[card], reading_seconds=0)
    third.resume(tmp_path / "none.csv", 5)
    third.step()
    assert third.steps == 6
