from __future__ import annotations

import csv
import errno
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


def test_a_full_disk_loses_no_figures_of_earlier_parts(
    tmp_path: Path,
    first: list[tuple[int, dict[str, float]]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(columns: object, *more: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(csv.DictWriter, "writerows", full)
        for _ in range(2):
            part(tmp_path)
    assert str(tmp_path / ".metrics.before.0.csv") in caplog.text
    tracker = part(tmp_path)  # there is room again
    monkeypatch.setattr(loggers, "_put_together", full)
    tracker.metrics({"loss": 0.2}, 4)
    part(tmp_path).metrics({"loss": 0.1}, 5)
    monkeypatch.undo()
    part(tmp_path)
    assert rows(tmp_path) == [*first, (4, {"loss": 0.2}), (5, {"loss": 0.1})]
    assert [path.name for path in tmp_path.iterdir()] == ["csv"]


def test_a_file_that_an_earlier_version_set_aside_is_read(
    tmp_path: Path, first: list[tuple[int, dict[str, float]]]
) -> None:
    (tmp_path / "csv/metrics.csv").replace(tmp_path / ".metrics.before.csv")
    (tmp_path / "csv/metrics.csv").write_text("loss,step\n1.0,1\n")
    part(tmp_path)
    assert rows(tmp_path) == first
    assert [path.name for path in tmp_path.iterdir()] == ["csv"]
