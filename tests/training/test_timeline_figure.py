"""What is drawn of a timeline: nothing that was high is lost between two dots."""

from __future__ import annotations

from expt.memory.measuring.timeline_sums import Moment
from expt.training.timeline_figure import COLUMNS, by_column


def moment(at: int, count: int) -> Moment:
    return Moment(0, at, 0, {"activations": count})


def heights(seen: list[Moment], end: int) -> list[tuple[float, int]]:
    return [(share * COLUMNS, moment.bytes) for share, moment in by_column(seen, 0, end)]


def test_a_peak_shorter_than_a_dot_fills_a_column():
    width = 1000
    seen = [moment(0, 5), moment(2 * width + 10, 90), moment(2 * width + 11, 7)]
    assert heights(seen, COLUMNS * width) == [(0, 5), (1, 5), (2, 90), (3, 7)]


def test_what_is_carried_into_a_column_counts_in_it():
    width = 1000
    seen = [moment(0, 90), moment(width + 500, 3), moment(2 * width - 1, 4)]
    assert heights(seen, COLUMNS * width) == [(0, 90), (1, 90), (2, 4)]


def test_the_last_moment_is_in_the_last_column():
    assert heights([moment(0, 1), moment(COLUMNS, 2)], COLUMNS)[-1] == (COLUMNS, 2)
