from __future__ import annotations

import pytest

from expt.memory.diagnosis.trend import Reading
from expt.memory.watching import outlook as module
from expt.memory.watching.history import History
from expt.memory.watching.outlook import LiveLine, in_words, outlook

MIB = 1024**2
GROWING = [Reading(10 * at, (1000 + 10 * at) * MIB) for at in range(60)]


def test_a_line_that_grows_meets_its_limit() -> None:
    ahead = outlook(GROWING, 2000 * MIB)
    assert ahead is not None
    assert ahead.at == pytest.approx(1000, rel=0.01), "a MiB a step, from 1000"
    assert ahead.left == pytest.approx(410, rel=0.01)
    others = [Reading(r.step, r.allocated_bytes, other_bytes=200 * MIB) for r in GROWING]
    nearer = outlook(others, 2000 * MIB)
    assert nearer is not None
    assert nearer.left == pytest.approx(210, rel=0.02), "what others hold is not to be had"


def test_what_does_not_grow_meets_nothing() -> None:
    wobble = [Reading(at, 1000 * MIB + (at % 7) * MIB) for at in range(60)]
    assert outlook(wobble, 2000 * MIB) is None
    assert outlook(GROWING[:3], 2000 * MIB) is None
    assert outlook([], 2000 * MIB) is None


def test_steady_memory_needs_no_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "judge", None)  # which imports SciPy, in the middle of a training
    assert outlook([Reading(at, 1000 * MIB + at) for at in range(60)], 2000 * MIB) is None


def test_words() -> None:
    assert in_words(2**31, 1030.2, 240.0) == "reaches 2.00 GiB at step 1,030, in about 4:00 min"
    assert in_words(2**31, None, 240.0) == "reaches 2.00 GiB in about 4:00 min"
    assert in_words(2**31, 1030.0, None) == "reaches 2.00 GiB at step 1,030"


def test_the_runs_line(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    history, line = History(512), LiveLine()
    assert line.words(history, 2000 * MIB) == ""
    for reading in GROWING:
        now[0] += 5.0
        history.add(reading)
        words = line.words(history, 2000 * MIB)
    assert words.startswith("1.55 GiB of 1.95 GiB, reaches 1.95 GiB at step 1,0")
    assert "in about 3:" in words, "410 steps of half a second"
