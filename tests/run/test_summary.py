from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from expt.job import Metric
from expt.jobs.traffic.metrics import error_metrics
from expt.result import RunResult
from expt.run.summary import (
    compared,
    comparison_markdown,
    comparison_table,
    plot_history,
    print_result,
)
from expt.tables import print_table
from expt.units import GIB, MIB

RUN_DIR = Path("/runs/one")
FIVE_MINUTES, HOUR = 300, 3600
ACCURACY = Metric("accuracy", goal="max", label="accuracy", percent=True)


def completed() -> RunResult:
    result = RunResult(
        "completed", "early_stopping", preset="lite", epochs=12, steps=1200, seconds=187.0
    )
    result.describe(error_metrics(12, FIVE_MINUTES, "mph"), "mae")
    result.metrics |= {
        "val/mae": 3.1151,
        "test/mae": 3.3069,
        "test/mae_15min": 3.0004,
        "test/mae_30min": 3.38,
        "test/mae_60min": 3.74,
        "test/rmse": 6.5,
        "test/mape": 0.0912,
    }
    result.memory |= {"peak_allocated_bytes": 64 * MIB, "meter": "a ledger"}
    return result


def printed(result: RunResult, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Return what is printed: the title, the table's rows, and the rest under its first words."""
    print_result(result, RUN_DIR)
    title, table = capsys.readouterr().out.split("measure ", maxsplit=1)
    lines = [" ".join(title.split())]  # a long title is wrapped
    lines += [line.strip() for line in f"measure {table}".splitlines() if line.strip()]
    pairs = (re.split(r"\s{2,}|(?<=:) ", line, maxsplit=1) for line in lines)
    return {pair[0]: pair[1] if len(pair) > 1 else "" for pair in pairs}


def test_the_table_of_a_completed_run(capsys: pytest.CaptureFixture[str]) -> None:
    shown = printed(completed(), capsys)
    assert shown.pop("completed (early_stopping) after 12 epochs, 1,200 steps") == ""
    assert {name: text for name, text in shown.items() if "─" not in name} == {
        "measure": "value",
        "validation MAE (best)": "3.115 mph",
        "test MAE": "3.307 mph",
        "test MAE, 15 min": "3.000 mph",
        "test MAE, 30 min": "3.380 mph",
        "test MAE, 60 min": "3.740 mph",
        "test RMSE": "6.500 mph",
        "test MAPE": "9.12 %",
        "peak allocated memory": "64.0 MiB",
        "time": "3:07 min",
        "memory measured by:": "a ledger",
        "files:": "/runs/one",
    }


@pytest.mark.parametrize(("unit", "shown"), [("km/h", "3.307 km/h"), ("", "3.307")])
def test_figures_are_in_the_unit_of_the_data(
    unit: str, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    result = completed()
    result.describe(error_metrics(12, FIVE_MINUTES, unit), "mae")
    assert printed(result, capsys)["test MAE"] == shown
    assert result.unit == (unit or None)


def test_a_record_from_before_metrics_described_themselves(
    capsys: pytest.CaptureFixture[str],
) -> None:
    result = completed()
    result.metrics_meta = []
    shown = printed(result, capsys)
    assert (shown["validation MAE (best)"], shown["test MAE"]) == ("3.115 mph", "3.307 mph")
    assert shown["test MAPE"] == "9.12 %"


def test_the_table_of_a_metric_to_be_maximised(capsys: pytest.CaptureFixture[str]) -> None:
    result = RunResult("completed", "epochs")
    result.describe([ACCURACY, Metric("loss", label="loss")], "accuracy")
    result.metrics |= {"val/accuracy": 0.875, "test/accuracy": 0.5625, "test/loss": 0.3}
    shown = printed(result, capsys)
    assert shown["validation accuracy (best)"] == "87.5 %"
    assert (shown["test accuracy"], shown["test loss"]) == ("56.2 %", "0.300")
    assert "MAE" not in " ".join(shown)


def test_the_table_of_a_failed_run(capsys: pytest.CaptureFixture[str]) -> None:
    shown = printed(RunResult("failed", "non_finite_loss"), capsys)
    assert "failed (non_finite_loss) after 0 epochs, 0 steps" in shown
    assert shown["validation MAE (best)"] == "-"
    assert not any(name.startswith("test") for name in shown)
    assert shown["peak allocated memory"] == "not measured"
    assert shown["time"] == "0.0 s"
    assert not any(name.startswith(("memory measured", "MLflow")) for name in shown)


def test_what_a_gpu_and_a_tracker_add(capsys: pytest.CaptureFixture[str]) -> None:
    result = completed()
    result.memory |= {"peak_reserved_bytes": 3 * GIB, "predicted_peak_bytes": 2 * GIB}
    result.tracking |= {"uri": "sqlite:///x.db"}
    shown = printed(result, capsys)
    assert shown["peak reserved memory"] == "3.00 GiB"
    assert shown["predicted peak memory"] == "2.00 GiB"
    assert shown["MLflow:"] == "sqlite:///x.db  run not yet sent"
    result.tracking |= {"run_id": "abc"}
    assert printed(result, capsys)["MLflow:"] == "sqlite:///x.db  run abc"


def test_what_to_type_works_for_a_folder_with_a_blank(capsys: pytest.CaptureFixture[str]) -> None:
    result = RunResult("stopped", "signal")
    result.tracking |= {"uri": "sqlite:////my runs/x.db", "experiment_id": "1"}
    print_result(result, Path("/my runs/a"))
    out = capsys.readouterr().out
    assert "to go on: python -m expt 'trainer.resume=/my runs/a'" in out
    assert "--backend-store-uri 'sqlite:////my runs/x.db'" in out


def test_the_cells_of_a_run() -> None:
    heads, first, second = compared({"0": completed(), "1": RunResult("failed", "error")})
    assert dict(zip(heads, first, strict=True)) == {
        "job": "0",
        "preset": "lite",
        "status": "completed",
        "val MAE": "3.115",
        "test MAE": "3.307",
        "MAE, 15 min": "3.000",
        "MAE, 30 min": "3.380",
        "MAE, 60 min": "3.740",
        "RMSE": "6.500",
        "MAPE": "9.12",
        "peak": "64.0 MiB",
        "time": "3:07 min",
    }
    assert second == ["1", "-", "failed", *["-"] * 7, "not measured", "0.0 s"]


def hourly() -> RunResult:
    result = RunResult("completed", "epochs")
    result.describe(error_metrics(12, HOUR, "mph"), "mae")
    result.metrics |= {f"test/mae_{ahead}min": ahead / 60 for ahead in (720, 360, 180, 60)}
    return result


def test_the_rows_are_the_steps_that_were_tested(capsys: pytest.CaptureFixture[str]) -> None:
    shown = printed(hourly(), capsys)
    assert [(name, text) for name, text in shown.items() if name.endswith(" min")] == [
        ("test MAE, 60 min", "1.000 mph"),
        ("test MAE, 180 min", "3.000 mph"),
        ("test MAE, 360 min", "6.000 mph"),
        ("test MAE, 720 min", "12.000 mph"),
    ]


def test_runs_of_several_intervals_share_a_table() -> None:
    text = comparison_markdown({"0": completed(), "1": hourly()})
    heads, _, first, second = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()
    ]
    assert dict(zip(heads, first, strict=True))["MAE, 15 min"] == "3.000"
    assert dict(zip(heads, first, strict=True))["MAE, 720 min"] == "-"
    assert dict(zip(heads, second, strict=True))["MAE, 720 min"] == "12.000"
    assert dict(zip(heads, second, strict=True))["MAE, 15 min"] == "-"
    untested = comparison_markdown({"0": RunResult("failed", "error")})
    assert "| val MAE |" in untested and "| - | not measured |" in untested


def test_runs_side_by_side_are_not_cut_off(capsys: pytest.CaptureFixture[str]) -> None:
    results = {"0": completed(), "1": RunResult("failed", "error")}
    print_table(comparison_table(results))
    out = capsys.readouterr().out
    assert "…" not in out
    header, _, first, second = [line.split() for line in out.splitlines() if line.strip()]
    assert header == " ".join(compared(results, most=5)[0]).split()
    assert first[:3] == ["0", "lite", "completed"]
    assert second[:3] == ["1", "-", "failed"]


def test_a_table_fits_the_terminal_it_is_on() -> None:
    screen = io.StringIO()
    Console(file=screen, width=150).print(comparison_table({"0": completed()}))
    assert "3.380" in screen.getvalue()


def history(epochs: int = 3, **memory: float) -> list[dict[str, float]]:
    return [
        {
            "epoch": float(epoch),
            "step": 100.0 * epoch,
            "loss": 5.0 / epoch,
            "val": [4.0, 3.5, 3.7][epoch - 1],
            **memory,
        }
        for epoch in range(1, epochs + 1)
    ]


LEDGER = {"peak_allocated_bytes": 0.5 * GIB, "process_peak_bytes": 2.0 * GIB}


@pytest.mark.parametrize("epochs", [1, 3])
def test_the_history_is_a_png(tmp_path: Path, epochs: int) -> None:
    (path,) = plot_history(history(epochs, **LEDGER), Metric("mae"), tmp_path / "plots")
    assert path == tmp_path / "plots" / "history.png"
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert content.rstrip().endswith(b"IEND\xaeB`\x82")
    assert len(content) > 10_000
    assert list(path.parent.iterdir()) == [path]


def test_no_epoch_no_plot(tmp_path: Path) -> None:
    assert plot_history([], Metric("mae"), tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_what_the_plot_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    save = Figure.savefig

    def kept(figure: Figure, *args: Any, **kwargs: Any) -> None:
        drawn.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", kept)
    plot_history(history(3, **LEDGER), Metric("mae", unit="km/h"), tmp_path)
    plot_history(history(3, **LEDGER), Metric("mae"), tmp_path)
    plot_history(history(3, **LEDGER), ACCURACY, tmp_path)
    assert [figure.axes[0].get_ylabel() for figure in drawn] == [
        "MAE (km/h)",
        "MAE",
        "accuracy (%)",
    ]
    losses, memory = drawn[0].axes
    lines = {line.get_label(): line for line in [*losses.lines, *memory.lines]}
    assert list(lines["training loss"].get_xdata()) == [100, 200, 300]
    assert list(lines["validation MAE"].get_ydata()) == [4.0, 3.5, 3.7]
    assert list(lines["peak allocated"].get_ydata()) == [0.5, 0.5, 0.5]
    assert list(lines["process (resident, peak)"].get_ydata()) == [2.0, 2.0, 2.0]
    assert "peak reserved" not in lines
    assert [(note.get_text(), note.xy) for note in losses.texts] == [("best 3.500", (200, 3.5))]
    # The higher the better, in per cent, and not on the axis of the loss.
    accuracy, loss, _ = drawn[2].axes
    assert [line.get_label() for line in loss.lines] == ["training loss"]
    assert accuracy.yaxis.get_major_formatter()(3.5) == "350"
    highest = accuracy.texts
    assert [(note.get_text(), note.xy) for note in highest] == [("best 400.0 %", (100, 4.0))]


def test_a_history_without_memory_is_drawn_without_a_warning(tmp_path: Path) -> None:
    assert plot_history(history(), Metric("mae"), tmp_path)
