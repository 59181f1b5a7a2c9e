from __future__ import annotations

import json
from math import inf
from pathlib import Path

import pytest
import torch

from expt.memory.diagnosis.trend import Reading
from expt.memory.measuring.budget_ledger import BudgetLedger
from expt.memory.watching import alarms as module
from expt.memory.watching import largest
from expt.memory.watching.alarms import Alarm, load_alarms
from expt.memory.watching.gauges import HostGauge
from expt.memory.watching.manager import MemoryManager


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def reading(used: float) -> Reading:
    return Reading(7, round(used * 1000), total_bytes=1000)


def test_it_rings_once_each_time(caplog: pytest.LogCaptureFixture) -> None:
    heard: list[tuple[str, float]] = []
    gauge = HostGauge()
    alarm = Alarm(0.9, lambda name, used: heard.append((name, used)))
    rang = [alarm.hear(gauge, used, reading(used)) for used in (0.5, 0.95, 0.97, 0.6, 0.92)]
    assert rang == [False, True, False, False, True]
    assert heard == [("host", 0.95), ("host", 0.92)]
    assert "memory of host: 95 %" in caplog.text


def test_the_largest_tensors_are_told_and_kept(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    clock: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    speed, *others = made = [torch.empty(100_000 - at) for at in range(9)]
    monkeypatch.setattr(largest, "_alive", lambda: iter(made))
    file = tmp_path / "alarms.json"
    file.write_text('[{"step": 3}]')  # of the part before a resume
    alarm = Alarm(0.9, names=lambda: [("data speed", speed)], file=file)
    gauge = HostGauge()
    for used in (0.95, 0.5, 0.96):
        alarm.hear(gauge, used, reading(used))
    first, second = alarm.rung
    assert len(first.largest) == 5
    assert [one.what for one in first.largest] == ["data speed", *["other"] * 4]
    assert len(others) == 8
    assert first.found_bytes == sum(one.nbytes for one in made)
    assert "  data speed [100000] float32, 390.62 KiB" in caplog.text
    assert second.largest == () and second.found_bytes is None, "searches are rare"
    clock[0] += module.LOOK_SECONDS
    alarm.hear(gauge, 0.1, reading(0.1))
    alarm.hear(gauge, 0.99, reading(0.99))
    assert alarm.rung[-1].largest
    kept = load_alarms(file)
    assert kept == json.loads(file.read_text())
    assert [row["step"] for row in kept] == [3, 7, 7, 7]
    assert kept[1]["largest"][0]["shape"] == [100_000]
    assert kept[1]["moment"] == "after a step"


def test_it_waits_for_the_end_of_an_exceptions_handling() -> None:
    alarm, gauge = Alarm(0.9), HostGauge()
    try:
        raise RuntimeError
    except RuntimeError:
        assert not alarm.hear(gauge, 0.95, reading(0.95))
    assert alarm.rung == []
    assert alarm.hear(gauge, 0.95, reading(0.95))


def test_a_file_that_cannot_be_written_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "folder").write_text("in the way")
    alarm = Alarm(0.9, file=tmp_path / "folder" / "alarms.json")
    assert alarm.hear(HostGauge(), 0.95, reading(0.95))
    assert "not kept" in caplog.text
    assert load_alarms(tmp_path / "folder") == []


def test_a_ledger_rings_in_the_operator_that_comes_near_its_budget() -> None:
    rung: list[tuple[str, float]] = []
    manager = MemoryManager("cpu", on_alarm=lambda *seen: seen[0] == "budget" and rung.append(seen))
    with BudgetLedger(100_000) as ledger:
        manager.limit(100_000, torch.device("cpu"), ledger)
        held = [torch.zeros(20_000), torch.zeros(1_000)]  # 84 kB
        assert manager.step()
        assert rung == []
        held.append(held[1] * 2)
        assert rung == []
        held.append(held[1] * 3)
        assert rung == [("budget", pytest.approx(0.92))]
        del held[-1]
        held.append(held[1] * 4)
        assert len(rung) == 1, "a step that goes up and down is one alarm"
    (alarm,) = manager.alarms
    assert (alarm.moment, alarm.device, alarm.total_bytes) == (
        "while a tensor was made",
        "budget",
        100_000,
    )
    assert manager.now()["budget"]["allocated_bytes"] == 84_000
    assert manager.line() == "0.1 MiB of 0.1 MiB"


def test_a_budget_is_not_watched_where_nothing_is() -> None:
    manager = MemoryManager("cpu", monitoring=False)
    with BudgetLedger(1000) as ledger:
        manager.limit(1000, torch.device("cpu"), ledger)
        assert torch.zeros(240).sum() == 0
    assert manager.alarms == []
    assert set(manager.histories) == {"host"}


def test_it_rings_without_tensors_where_they_cannot_be_looked_for(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def names() -> list[tuple[str, torch.Tensor]]:
        raise RuntimeError("a view that was changed in place")

    alarm = Alarm(0.9, names=names)
    assert alarm.hear(HostGauge(), 0.95, reading(0.95))
    assert alarm.rung[0].largest == () and alarm.rung[0].found_bytes is None
    assert "could not be looked for: RuntimeError: a view that was" in caplog.text


def budget_of(ledger: BudgetLedger, rung: list[str]) -> MemoryManager:
    """Let a manager watch a budget alone: the host may be full on any machine."""
    manager = MemoryManager(
        on_alarm=lambda name, _: rung.append(name), reading_seconds=0, gauges=[HostGauge()]
    )
    manager._alarm.parts["host"] = inf
    manager.limit(100_000, torch.device("cpu"), ledger)
    return manager


def test_a_ledger_rings_again_when_no_operator_came_near_for_a_while() -> None:
    rung: list[str] = []
    with BudgetLedger(100_000) as ledger:
        manager = budget_of(ledger, rung)

        def step(count: int) -> None:
            held = torch.zeros(count)
            del held
            manager.step()

        for count in (23_000, 23_000, 24_000, 1_000, 1_000):
            step(count)
        assert rung == ["budget"], "every step is above, until the last two"
        step(23_000)
        assert rung == ["budget", "budget"]


def test_a_ledger_reads_nothing_more_after_an_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    rung: list[str] = []
    with BudgetLedger(100_000) as ledger:
        kept = torch.zeros(23_000)
        manager = budget_of(ledger, rung)
        assert kept.sum() == 0 and ledger.allocated_bytes > 90_000
        rung.clear()
        manager = budget_of(ledger, rung)
        manager.step()
        assert rung == ["budget"], "the reading after a step was the first to see it"
        (gauge,) = [gauge for gauge in manager._gauges if gauge.name == "budget"]
        reads: list[float] = []
        read = gauge.read
        monkeypatch.setattr(gauge, "read", lambda step: (reads.append(step), read(step))[1])
        for _ in range(3):
            assert kept.sum() == 0
        assert reads == []
        manager.step()
        assert rung == ["budget"] and len(reads) == 1


@pytest.mark.parametrize(
    ("expected", "quiet", "loud"),
    [(94_000, 23_000, 24_000), (50_000, 22_000, 23_000), (120_000, 22_000, 23_000)],
)
def test_what_is_expected_of_a_budget_is_no_alarm(expected: int, quiet: int, loud: int) -> None:
    rung: list[str] = []
    with BudgetLedger(100_000) as ledger:
        manager = budget_of(ledger, rung)
        manager.expect(expected)
        held = torch.zeros(quiet)
        manager.step()
        assert rung == []
        del held
        held = torch.zeros(loud)
        assert rung == ["budget"] and len(held) == loud


def test_an_alarm_that_is_only_kept_warns_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alarm = Alarm(0.9, file=tmp_path / "alarms.json", warn=False)
    assert alarm.hear(HostGauge(), 0.95, reading(0.95))
    assert [row["device"] for row in load_alarms(tmp_path / "alarms.json")] == ["host"]
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_a_budget_is_called_one(caplog: pytest.LogCaptureFixture) -> None:
    rung: list[str] = []
    with BudgetLedger(100_000) as ledger:
        budget_of(ledger, rung)
        held = torch.zeros(23_000)
    assert rung and len(held) == 23_000
    assert "92 % of the memory budget of 0.1 MiB in use at step 0, while" in caplog.text
