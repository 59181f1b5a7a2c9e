from __future__ import annotations

import pytest

from expt.commands.watch import session as module
from expt.commands.watch.session import ROOM, Session
from expt.commands.watch.targets import Look
from expt.memory.diagnosis.trend import Reading

MIB = 1024**2


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def look(seconds: float, mib: float, step: int | None = None, **more: object) -> Look:
    reading = Reading(seconds, round(mib * MIB), total_bytes=1000 * MIB)
    return Look({"budget": reading}, step, 2000, 0, **more)  # type: ignore[arg-type]


def test_the_alarm_rings_when_a_limit_is_near_and_not_again(clock: list[float]) -> None:
    session = Session(0.9)
    rang = [
        session.add(look(at, mib)) for at, mib in enumerate((500, 910, 920, 890, 905, 870, 950))
    ]
    assert [bool(one) for one in rang] == [False, True, False, False, False, False, True]
    assert rang[1] == [["alarm: budget is at 91% of 1000.0 MiB"]]


def test_alarms_of_the_run_are_shown_with_their_tensors() -> None:
    row = {
        "step": 7, "device": "budget", "used_fraction": 0.95, "total_bytes": 1000 * MIB,
        "moment": "after a step", "largest": [
            {"what": "parameter a.weight", "shape": [3, 4], "dtype": "float32", "device": "cpu",
             "bytes": 2 * MIB},
        ],
    }  # fmt: skip
    session = Session(0.9)
    (lines,) = session.add(look(0, 500, alarms=(row,)))
    assert lines == [
        "alarm of the run: budget was at 95% of 1000.0 MiB at step 7, after a step",
        "  parameter a.weight [3, 4] float32, 2.00 MiB",
    ]
    assert session.add(look(1, 500, alarms=({"step": 1},))) == [
        ["alarm of the run, in a form that cannot be read"]
    ]


def test_a_leak_is_forecast_with_step_and_time(clock: list[float]) -> None:
    session = Session(0.9)
    for at in range(60):
        clock[0] += 2
        session.add(look(2.0 * at, 300 + 5 * at, step=10 * at))
    (words,) = session.words()
    assert words.startswith("budget 595.0 MiB of 1000.0 MiB (60%), reaches 1000.0 MiB at step 1,")
    assert "in about 2:4" in words, "405 MiB at 5 MiB in 2 s"
    assert session.progress() == "step 590 of 2,000, epoch 1"
    (drawn,) = session.watched()
    assert drawn.ahead is not None
    assert drawn.ahead.at == pytest.approx(280, rel=0.02)
    (line,) = session.summary()
    assert line.startswith("budget: at most 595.0 MiB (60% of 1000.0 MiB)")
    assert "60 readings" in line


def test_what_is_kept_is_bounded_and_ends_with_the_newest() -> None:
    session = Session(0.9)
    for at in range(3 * ROOM):
        session.add(look(at, 300 + at % 3))
    (drawn,) = session.watched()
    assert len(drawn.readings) <= ROOM + 1
    assert drawn.readings[-1].step == 3 * ROOM - 1
    assert drawn.ahead is None
    assert session.progress() == ""
