"""How the comparison with the field's models goes on; the trainings themselves take hours."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from matplotlib.figure import Figure

from expt.config.compose import compose_lines
from expt.result import RunResult

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
COST = {
    "sensors": 29, "parameters": 1234, "batch_size": 64, "steps_per_epoch": 300,
    "batches_of_validation": 50, "epochs_at_most": 40, "predicted_bytes": 2**24,
    "predicted_cuda_bytes": 2**25, "measured_bytes": 2**24, "measured_step_bytes": 2**24,
    "step_seconds": 0.5, "evaluation_seconds": 0.6, "commit": "c" * 40,
}  # fmt: skip
ROW = "DLinear seed 0"


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    import common
    import peers
    import peers_slices

    monkeypatch.setattr(peers_slices, "STATE", tmp_path / "state")
    monkeypatch.setattr(peers, "ROOT", tmp_path)
    monkeypatch.setattr(peers, "plot", lambda record: None)
    measured = subprocess.CompletedProcess((), 0, stdout=json.dumps(COST))
    monkeypatch.setattr(peers, "subprocess", SimpleNamespace(run=lambda *line, **how: measured))
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(common, "PAGE", tmp_path / "results.md")
    (tmp_path / "results.md").write_text("<!-- peers:begin -->\n<!-- peers:end -->\n")


def comparison() -> Any:
    from peers import Comparison

    found = Comparison("metr_la_29")
    found.put("costs", "DLinear", COST)
    return found


class Slices:
    """Stands in for `run_slice`: every call leaves what a run would."""

    def __init__(self, *results: tuple[float, str]) -> None:
        self.results = list(results)
        self.commands: list[Sequence[str]] = []

    def __call__(self, command: Sequence[str], folder: Path, *limits: float) -> Any:
        from peers_slices import Slice

        self.commands.append(command)
        seconds, status = self.results.pop(0)
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        (folder / "checkpoints/last.pt").write_bytes(bytes(100))
        result = RunResult(status, "signal" if status == "stopped" else "epochs")
        result.epochs, result.metrics = 3, {"val/mae": 3.5}
        if status == "completed":
            result.metrics |= {f"test/mae{end}": 3.7 for end in ("", "_15min", "_30min", "_60min")}
        result.save(folder)
        return Slice(seconds, 0 if status == "completed" else 130)


def test_as_many_steps_as_the_time_is_enough_for() -> None:
    from peers_rows import steps_that_fit

    assert steps_that_fit(COST) == 300 * 3600 / (300 * 0.5 + 50 * 0.6)
    assert steps_that_fit({**COST, "step_seconds": 0.001}) == 40 * 300, "its settings' epochs"
    assert steps_that_fit({**COST, "step_seconds": 9999.0}) == 1


def test_a_trial_has_its_share_of_the_steps_and_what_it_fixes_is_not_searched_for() -> None:
    from peers_rows import SEARCH, SHARE_OF_TRIAL, searched

    given = [line for line in (*SEARCH, *searched("24MiB").settings) if line[:5] != "hydra"]
    trial = compose_lines(given, None)
    seed = compose_lines(["experiment=accuracy"], None)
    steps = seed.trainer.epochs * -(-23974 // seed.data.batch_size)  # windows of the training part
    share = trial.trainer.epochs * trial.trainer.steps_per_epoch
    assert share * SHARE_OF_TRIAL == pytest.approx(steps, rel=0.01)
    assert trial.data.batch_size == seed.data.batch_size
    assert set(trial.search.space) - {line.partition("=")[0] for line in given} == {
        "model.embed_dim", "model.num_layers", "model.num_stages", "model.patch_sizes",
        "model.cross_stage_attention",
    }  # fmt: skip
    assert trial.optimizer.lr == seed.optimizer.lr


def test_every_first_seed_comes_before_every_second() -> None:
    from peers import rows
    from peers_rows import PEERS

    found = list(rows())
    assert [seed for _, seed in found] == sorted(seed for _, seed in found)
    assert len(found) == sum(len(peer.seeds) for peer in PEERS.values())


def test_a_row_goes_on_until_it_is_finished(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import peers

    slices = Slices((100.0, "stopped"), (50.0, "completed"))
    monkeypatch.setattr(peers, "run_slice", slices)
    table = comparison()
    assert table.go_on("DLinear", 0, time.monotonic())
    row = table.part("rows")[ROW]
    assert (row["cpu_seconds"], row["finished"], row["state_kept"]) == (100.0, False, True)
    archive = tmp_path / "state/metr_la_29-dlinear-seed-0.zip"
    assert archive.exists()
    page = (tmp_path / "results.md").read_text()
    assert "| unfinished | 3.500 so far |" in page

    later = peers.Comparison("metr_la_29")  # as the next call reads it
    assert later.go_on("DLinear", 0, time.monotonic())
    assert later.finished("DLinear", 0)
    assert later.part("rows")[ROW]["cpu_seconds"] == 150.0
    assert not archive.exists()
    assert "3.70 / 3.70 / 3.70 | 3.700 (1 of 3 seeds) |" in (tmp_path / "results.md").read_text()
    assert slices.commands[0] == slices.commands[1], "the same line goes on"
    assert "trainer.max_steps=6000" in slices.commands[0]


def test_when_its_time_is_up_the_best_weights_are_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    import peers

    slices = Slices((3600.0, "stopped"), (9.0, "completed"))
    monkeypatch.setattr(peers, "run_slice", slices)
    table = comparison()
    assert table.go_on("DLinear", 0, time.monotonic())
    assert slices.commands[1] == [*slices.commands[0], "trainer.time_limit_seconds=0.001"]
    row = table.part("rows")[ROW]
    assert row["finished"]
    assert row["cpu_seconds"] == 3600.0, "the test does not count"


def test_a_row_whose_state_is_lost_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    import peers

    monkeypatch.setattr(peers, "run_slice", Slices((5.0, "stopped")))
    table = comparison()
    begun = {
        "model": "DLinear", "seed": 0, "cpu_seconds": 99.0, "slices": 4, "finished": False,
        "steps_planned": 7,
    }  # fmt: skip
    table.put("rows", ROW, begun)
    table.go_on("DLinear", 0, time.monotonic())
    assert table.part("rows")[ROW]["cpu_seconds"] == 5.0
    assert table.part("rows")[ROW]["slices"] == 1
    assert table.part("rows")[ROW]["steps_planned"] == 6000, "as many as fit today"


def test_what_another_call_stored_meanwhile_stays() -> None:
    from peers import Comparison

    ours, theirs = Comparison("metr_la_29"), Comparison("pems_bay")
    theirs.put("costs", "STID", COST)
    ours.put("costs", "DLinear", COST)
    later = Comparison("pems_bay")
    assert list(later.part("costs")) == ["STID"]
    assert list(later.record["costs"]["metr_la_29"]) == ["DLinear"]


def test_a_row_that_another_call_works_on_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import peers

    slices = Slices((100.0, "completed"))
    monkeypatch.setattr(peers, "run_slice", slices)
    line = ["peers.py", "--minutes", "9", "--only", "DLinear seed 1", ROW]
    monkeypatch.setattr(sys, "argv", line)
    held = comparison().lock("metr_la_29-dlinear-seed-0")
    assert held.acquire()
    peers.main()
    held.release()
    assert f"{ROW}: another call works on it" in capsys.readouterr().out
    assert [part for line in slices.commands for part in line if "seed=" in part] == [
        "trainer.seed=1"
    ]


def test_only_what_going_on_needs_is_packed_and_only_while_it_is_small(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import peers_slices

    run, again = tmp_path / "run", tmp_path / "again"
    for name in ("checkpoints/last.pt", "checkpoints/previous.pt", "launch.json"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(name)
    assert peers_slices.keep_state("row", run)
    assert not peers_slices.restore_state("another", again)
    assert peers_slices.restore_state("row", again)
    files = [path for path in again.rglob("*") if path.is_file()]
    assert [path.relative_to(again).as_posix() for path in files] == ["checkpoints/last.pt"]
    assert files[0].read_text() == "checkpoints/last.pt"
    monkeypatch.setattr(peers_slices, "LARGEST_BYTES", 300)
    assert not peers_slices.keep_state("second", run), "with the first it is too much"
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["row.zip"]


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_slice_is_told_to_stop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import peers_slices

    program = tmp_path / "python"
    program.write_text("#!/bin/sh\ntrap 'echo saved; exit 130' INT\nwhile :; do sleep 0.05; done\n")
    program.chmod(0o755)
    monkeypatch.setattr(peers_slices.sys, "executable", str(program))
    monkeypatch.setattr(peers_slices, "ROOT", tmp_path)
    done = peers_slices.run_slice([], tmp_path / "run", 1e9, time.monotonic())
    assert done.went_well
    assert not done.interrupted
    program.write_text("#!/bin/sh\necho 'no such setting'; exit 2\n")
    failed = peers_slices.run_slice([], tmp_path / "run", 1e9, time.monotonic() + 60)
    assert not failed.went_well
    assert peers_slices.what_it_said(tmp_path / "run") == "no such setting"


def test_a_winner_is_trained_with_what_its_search_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import peers
    from peers_slices import Slice

    def searched(command: Sequence[str], folder: Path, *limits: float) -> Slice:
        folder.mkdir(parents=True, exist_ok=True)
        best = {"params": {"model.patch_sizes": [1, 2], "memory.precision": "bf16"}, "val/mae": 3.1}
        summary = {"finished": 60, "budget_bytes": 2**25, "best": best}
        (folder / "sweep.json").write_text(json.dumps(summary))
        return Slice(700.0, 0)

    monkeypatch.setattr(peers, "run_slice", searched)
    table = peers.Comparison("metr_la_29")
    name = "search 24 MiB"
    assert table.settings(name) is None
    assert table.go_on(name, 0, time.monotonic())
    settings = table.settings(name)
    assert settings[-2:] == ["model.patch_sizes=[1,2]", 'memory.precision="bf16"']


def test_no_name_of_the_figure_covers_a_point_or_another_name():
    import peers_tables

    axes = Figure(figsize=(7, 4.6)).subplots()
    axes.set(xlim=(10, 500), ylim=(3.2, 3.5), xscale="log")
    names = ("minimal in micro-batches", "search 24 MiB", "STID", "search 54 MiB", "search 256 MiB")
    places = ((19, 3.28), (20, 3.30), (24, 3.302), (40, 3.305), (470, 3.4))
    drawn = [(peak, error, name) for (peak, error), name in zip(places, names, strict=True)]
    peers_tables.name_points(axes, drawn)
    axes.figure.draw_without_rendering()
    assert [text.get_text() for text in axes.texts] == list(names)
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    points = axes.transData.transform(places)
    assert not any(box.contains(*point) for box in boxes for point in points)
    assert all(axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 for box in boxes)
