"""How the race of the sweepers is read; each search itself takes minutes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from matplotlib.image import imread

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


def row(at: float, error: float | None, kind: str = "completed") -> dict[str, object]:
    return {"at_seconds": at, "val_mae": error, "kind": kind, "in_budget": error is not None}


def made() -> dict[str, object]:
    """Two seeds of 9 minutes; the first stock side of seed 1 was not run yet."""
    ours = [row(60, 4.0), row(100, None, "out_of_memory"), row(300, 3.5), row(530, 3.4)]
    worse = [row(170, 4.2), row(400, 3.6)]
    patched = [row(200, 3.9), row(250, None, "out_of_memory"), row(539, 3.3), row(700, 1.0)]
    return {
        "minutes": 9.0,
        "runs": {
            "0": {
                "ours": {"rows": ours, "commit": "c" * 40},
                "stock": {"rows": worse, "commit": "c" * 40},
                "stock, patched": {"rows": patched, "commit": "c" * 40},
            },
            "1": {"ours": {"rows": worse, "commit": "c" * 40},
                  "stock, patched": {"rows": [], "commit": "c" * 40}},
        },
        "made": {
            "date": "2026-01-01", "commit": "d" * 40, "torch": "2", "command": "python x",
            "hardware": {"cores": 2, "cpu": "A"},
        },
    }  # fmt: skip


def test_the_standings_are_read_at_each_third_of_the_time() -> None:
    from sweep_race import best_by, tables

    assert best_by([row(10, 4.0), row(20, 3.0), row(30, None)], 25) == 3.0
    assert best_by([row(10, 4.0)], 5) is None
    lines = tables(made()).splitlines()
    assert lines[0].startswith("| search | seeds | after 3 min | after 6 min | after 9 min |")
    assert lines[2] == (
        "| ours | 2 | 4.100 (4.000 to 4.200) | 3.850 (3.500 to 4.200) | 3.500 (3.400 to 3.600) |"
        "  | 3 | 17% |"
    )
    assert (
        lines[3] == "| stock | 1 | 4.200 (4.200 to 4.200) | 4.200 (4.200 to 4.200) | "
        "3.600 (3.600 to 3.600) | 1 of 1 | 2 | 0% |"
    )
    assert "| 1 of 2 had none |" in lines[4] and "| 1 of 2 |" in lines[4], "3.3 was better than 3.4"


def test_what_ended_after_the_time_does_not_count(tmp_path: Path) -> None:
    from sweep_race import _ahead, plot

    runs = made()["runs"]
    assert not _ahead(runs["0"], "stock, patched", 540)  # type: ignore[index]
    assert _ahead(runs["0"], "stock, patched", 535)  # type: ignore[index]
    assert _ahead(runs["1"], "stock, patched", 540), "the other has none"  # type: ignore[index]
    plot(made(), tmp_path / "race.png")
    assert imread(tmp_path / "race.png").std() > 0.05, "it is not blank"


def test_a_side_is_run_from_its_start_and_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sweep_race
    from sweep_searches import Clock

    from expt.config.command_line import run_command

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    left = tmp_path / "seed_0" / "stock_patched"
    left.mkdir(parents=True)
    (left / "stock.db").write_text("cut")
    monkeypatch.setattr(sweep_race, "NO_END", 1)
    monkeypatch.setattr(sweep_race, "OURS_GIVEN", ("memory.on_overflow=adapt",))
    lines = [*sweep_race.SHARED, *sweep_race.SIZES[True], f"memory.budget={sweep_race.BUDGET}"]
    run, start = sweep_race.search, sweep_race.Clock.run

    def start_side(clock: Clock, command: list[str], folder: Path, *rest: object) -> None:
        """Run ours in this process, which spares two of them seconds of imports."""
        if command[:2] != ["-m", "expt"]:
            start(clock, command, folder, *rest)  # type: ignore[arg-type]
            return
        monkeypatch.chdir(folder)
        assert run_command(command[2:]) == 0

    monkeypatch.setattr(sweep_race.Clock, "run", start_side)
    with ThreadPoolExecutor(1) as pool:
        stock = pool.submit(run, "stock, patched", left, lines, 0, 2.0, True)
        ran = {"ours": run("ours", left.parent / "ours", lines, 0, 2.0, True)}
        ran["stock, patched"] = stock.result()

    def search(side: str, folder: Path, given: list[str], *rest: object) -> object:
        assert folder == left.parent / side.replace(", ", "_")
        assert given == lines
        return ran[side]

    monkeypatch.setattr(sweep_race, "search", search)
    sides = ["--sides", "ours", "stock, patched"]
    sweep_race.main(["--smoke", "--minutes", "2", "--folder", str(tmp_path), *sides])
    said = capsys.readouterr().out
    assert "seed 0, ours:" in said and "seed 0, stock, patched:" in said
    assert said.count(" 1 of 1 trials trained") + said.count(" 2 of 2 trials trained") == 2
    assert (tmp_path / "sweep_race.png").exists()
