from __future__ import annotations

from itertools import pairwise

from expt.memory.diagnosis.trend import Reading
from expt.memory.watching.history import History, from_csv, to_csv


def test_a_long_run_keeps_its_whole_span() -> None:
    history = History(16)
    for at in range(1000):
        history.add(Reading(float(at), 100 + at))
    steps = [reading.step for reading in history.readings]
    assert 8 <= len(steps) <= 16
    assert steps[0] == 0
    assert steps[-1] >= 1000 - 1000 / 8
    gaps = {b - a for a, b in pairwise(steps)}
    assert len(gaps) == 1, "evenly spread"
    assert history.last is not None
    assert history.last.step == 999


def test_figures_are_of_all_readings_not_of_those_kept() -> None:
    history = History(8)
    assert history.statistics() == {}
    for at in range(100):
        history.add(Reading(float(at), at, peak_bytes=5000 if at == 51 else 0, reserved_bytes=7))
    assert history.statistics() == {
        "readings": 100,
        "allocated_bytes": 99,
        "mean_allocated_bytes": 50,
        "peak_allocated_bytes": 5000,
        "reserved_bytes": 7,
    }


def test_a_table_is_read_back_up_to_a_step() -> None:
    card = [Reading(1_234_567.0, 5, 6, 7, 8, 9), Reading(1_234_568.0, 6)]
    host = [Reading(3.0, 10, total_bytes=20)]
    text = to_csv({"cuda:0": card, "host": host})
    assert from_csv(text, until=2e6) == {"cuda:0": card, "host": host}
    assert from_csv(text, until=1_234_567) == {"cuda:0": card[:1], "host": host}
    assert from_csv(text[: text.index("6,7")], until=2e6) == {}, "torn in a row"
    assert from_csv("something else\n1,2\n", until=2e6) == {}
