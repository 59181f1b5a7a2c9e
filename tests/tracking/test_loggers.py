from __future__ import annotations

import csv
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from expt.config.schema import TrackingConfig
from expt.tracking import loggers
from expt.tracking.tracker import NullTracker, Tracker


def part(run_dir: Path) -> Tracker:
    return loggers.beside(NullTracker(), TrackingConfig(loggers=["csv"]), run_dir)


def rows(run_dir: Path) -> list[tuple[int, dict[str, float]]]:
    with (run_dir / "csv/metrics.csv").open(newline="") as file:
        return [
            (int(row.pop("step")), {name: float(value) for name, value in row.items() if value})
            for row in csv.DictReader(file)
        ]


@pytest.fixture
def first(tmp_path: Path) -> list[tuple[int, dict[str, float]]]:
    tracker = part(tmp_path)
    for step in (1, 2, 3):
        tracker.metrics({"loss": 1 / step}, step)
    tracker.metrics({"val": 0.5}, 3)
    tracker.finish("FAILED")
    return rows(tmp_path)


def test_a_run_that_goes_on_has_one_csv_file_with_every_figure_once(
    tmp_path: Path, first: list[tuple[int, dict[str, float]]]
) -> None:
    tracker = part(tmp_path)
    assert rows(tmp_path) == first
    tracker.metrics({"loss": 7.0}, 3)
    tracker.metrics({"loss": 0.2, "new": 1.0}, 4)
    tracker.finish("FINISHED")
    assert rows(tmp_path) == [*first, (4, {"loss": 0.2, "new": 1.0})]
    assert [path.name for path in tmp_path.iterdir()] == ["csv"]


@contextmanager
def full_disk(path: Path, left: int) -> Iterator[None]:
    """Let no file grow beyond the size that one has, and a few bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + left, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("new", [{}, {"new": 1.0}])
def test_a_full_disk_costs_no_figures(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, new: dict[str, float]
) -> None:
    tracker, path = part(tmp_path), tmp_path / "csv/metrics.csv"
    wanted = [(step, {"loss": 1 / step}) for step in range(1, 100)]
    for step, values in wanted:
        tracker.metrics(values, step)
    with full_disk(path, 5):
        for step in (100, 101):
            tracker.metrics({"loss": 1 / step} | new, step)
        assert rows(tmp_path) == wanted and path.read_bytes().endswith(b"\n")
        assert not tracker.finish("FAILED")
        part(tmp_path)  # killed there, and gone on with
        assert rows(tmp_path) == wanted
    tracker.metrics({"loss": 0.1}, 102)
    assert tracker.finish("FINISHED")
    late = [(step, {"loss": 1 / step} | new) for step in (100, 101)]
    assert rows(tmp_path) == [*wanted, *late, (102, {"loss": 0.1})]
    assert [path.name for path in tmp_path.rglob("*")] == ["csv", "metrics.csv"]
    assert [entry.message[:12] for entry in caplog.records] == ["figures wait"]


def test_a_row_that_a_kill_cut_short_is_done_again(
    tmp_path: Path, first: list[tuple[int, dict[str, float]]]
) -> None:
    with (tmp_path / "csv/metrics.csv").open("a") as file:
        file.write("0.12,4")  # of 0.1234, and of a step that may be 40
    tracker = part(tmp_path)
    assert rows(tmp_path) == first
    tracker.metrics({"loss": 0.1234}, 4)
    assert rows(tmp_path) == [*first, (4, {"loss": 0.1234})]


def test_what_a_power_cut_left_of_a_file_does_not_keep_a_run_from_going_on(
    tmp_path: Path, first: list[tuple[int, dict[str, float]]]
) -> None:
    with (tmp_path / "csv/metrics.csv").open("ab") as file:
        file.write(b"0.1,\xff\xfe\n" + b"\0" * 200_000 + b"\n0.125,4,\r\n")
    tracker = part(tmp_path)
    tracker.metrics({"loss": 0.1}, 5)
    assert rows(tmp_path) == [*first, (4, {"loss": 0.125}), (5, {"loss": 0.1})]


def test_a_file_that_an_earlier_version_set_aside_is_read(
    tmp_path: Path, first: list[tuple[int, dict[str, float]]]
) -> None:
    (tmp_path / "csv/metrics.csv").replace(tmp_path / ".metrics.before.csv")
    (tmp_path / "csv/metrics.csv").write_text("loss,step\n1.0,1\n")
    part(tmp_path)
    assert rows(tmp_path) == first
    assert [path.name for path in tmp_path.iterdir()] == ["csv"]
