from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from expt.memory.recovery.attempt import MAX_SNAPSHOTS, collect
from expt.memory.recovery.recovery import Recovery
from expt.memory.techniques.techniques import Techniques

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands for the allocator of a device that is not there."""
    monkeypatch.setattr(torch.cuda, "memory_summary", lambda device: f"table of {device}")
    monkeypatch.setattr(
        torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).write_bytes(b"snapshot")
    )


def test_a_table_and_a_snapshot_are_written_for_the_first_events(tmp_path):
    for number in range(1, MAX_SNAPSHOTS + 3):
        found = collect(CUDA, tmp_path / "memory", number)
        expected = [f"oom-{number}.txt", f"oom-{number}.pickle"] if number <= MAX_SNAPSHOTS else []
        assert [path.name for path in found] == expected
    assert (tmp_path / "memory/oom-1.txt").read_text() == "table of cuda:0"
    assert len(list((tmp_path / "memory").iterdir())) == 2 * MAX_SNAPSHOTS


def test_there_is_nothing_to_write_elsewhere(tmp_path):
    assert collect(torch.device("cpu"), tmp_path / "memory", 1) == []
    assert not (tmp_path / "memory").exists()


def test_a_snapshot_that_fails_does_not_end_the_run(tmp_path, monkeypatch, caplog):
    def fail(path: str) -> None:
        raise RuntimeError("not built with it")

    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", fail)
    assert [path.name for path in collect(CUDA, tmp_path, 1)] == ["oom-1.txt"]
    assert "not built with it" in caplog.text


def test_evidence_is_taken_while_the_tensors_are_alive(tmp_path):
    model = nn.Linear(2, 2)
    seen = []

    class Held:
        alive = 0

        def __init__(self) -> None:
            Held.alive += 1

        def __del__(self) -> None:
            Held.alive -= 1

    def look(number: int) -> list[Path]:
        seen.append((number, Held.alive))
        return [tmp_path / "file"]

    def work(_: object) -> None:
        held = Held()
        if not seen:
            raise torch.OutOfMemoryError("CUDA out of memory")
        del held

    recovery = Recovery(
        Techniques(),
        torch.device("cpu"),
        collect=look,
        on_event=lambda event: seen.append(("released", Held.alive)),
    )
    recovery.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    recovery.step(work, None, 4)
    assert seen == [(1, 1), ("released", 0)]
    assert recovery.events[0]["evidence"] == [str(tmp_path / "file")]
