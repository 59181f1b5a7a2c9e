"""Features made by one process and by several: the same rows, each made once, and nobody waits."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from expt.config.schema import BadSample, LoaderConfig
from expt.errors import DataError
from expt.locks import Lock
from expt.memory.measuring.meter import LedgerMeter
from expt.memory.recovery.recovery import Recovery
from expt.memory.techniques.techniques import Techniques
from expt.training.features import store
from expt.training.features.filling import Filling, digest_of, first_samples


class One:
    global_rank, world_size = 0, 1

    def barrier(self) -> None: ...

    def broadcast(self, obj, src=0):
        return obj

    def all_reduce(self, data, reduce_op="mean"):
        return data


class Several(One):
    world_size = 2

    def __init__(self, rank: int) -> None:
        self.global_rank = rank

    def broadcast(self, obj, src=0):
        values = [obj]
        torch.distributed.broadcast_object_list(values, src)
        return values[0]

    def all_reduce(self, data, reduce_op="mean"):
        torch.distributed.all_reduce(data)
        return data


def filling(folder: str | Path, processes: One) -> Filling:
    from features import Deep, Pictures
    from lightning_fabric.plugins.precision import Precision

    torch.manual_seed(0)
    cpu = torch.device("cpu")
    return Filling(
        Deep(12), "prefix", Pictures(8, 6), LoaderConfig(num_workers=0), 0, cpu, Precision(),
        "auto", Path(folder) / "cache", {"a": 1}, processes, Recovery(Techniques(), cpu),
        LedgerMeter(),
    )  # fmt: skip


def fill(arguments: Sequence[str]) -> int:
    """Be one of two processes: which one, the folder, and what happens to the second."""
    rank, folder, mode = int(arguments[0]), arguments[1], arguments[2]
    if mode == "late" and rank == 1:
        begin = Filling._fill
        Filling._fill = lambda *given: time.sleep(1) or begin(*given)  # type: ignore[method-assign]
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    numbers, write = [], store.RowWriter.write

    def noted(self, rows, values):
        if mode == "fails" and rank == 1:
            raise OSError(28, "No space left on device")
        numbers.extend(rows)
        write(self, rows, values)

    store.RowWriter.write = noted  # type: ignore[method-assign]
    rows = filling(folder, Several(rank)).run()
    print("ROWS", json.dumps([rows is not None, numbers]), flush=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return 0


@pytest.fixture
def two(toys: Path, forked):
    """A function that runs two processes: whether each has rows, which it wrote, what it said."""

    def started(folder: Path, mode: str) -> list[tuple[bool, list[int], str]]:
        both = [forked.start(str(rank), str(folder), mode, run=fill) for rank in range(2)]
        found = []
        for process in both:
            code, said = forked.ended(process)
            assert code == 0, said
            line = next(one for one in said.splitlines() if one.startswith("ROWS"))
            found.append((*json.loads(line.removeprefix("ROWS ")), said))
        return found

    return started


def test_two_processes_make_disjoint_rows_that_are_those_of_one(two, tmp_path) -> None:
    alone = filling(tmp_path / "alone", One()).run()
    (tmp_path / "both").mkdir()
    first, second = two(tmp_path / "both", "works")
    assert first[0] and second[0]
    assert sorted(first[1] + second[1]) == list(range(68))
    assert min(len(first[1]), len(second[1])) > 20
    both = filling(tmp_path / "both", One())
    rows = both.run()
    assert both.record["reused"]
    assert rows.done().all()
    for index in range(44):
        one, other = rows.read("train", index), alone.read("train", index)
        assert torch.allclose(
            one["prefix"].view(torch.float32), other["prefix"].view(torch.float32)
        )


def test_a_process_that_begins_late_makes_the_rows_that_were_its_own(two, tmp_path) -> None:
    first, second = two(tmp_path, "late")
    assert first[0] and second[0]
    assert sorted(first[1] + second[1]) == list(range(68))


def test_where_one_process_fails_both_go_on_live(two, tmp_path) -> None:
    first, second = two(tmp_path, "fails")
    assert not first[0] and not second[0]
    assert "training goes on live" in first[2]
    assert not list((tmp_path / "cache").glob("*.part")) + list(
        (tmp_path / "cache").glob(".*.part")
    )


def test_a_store_that_lacks_rows_is_not_complete_and_the_next_run_goes_on(
    toys, tmp_path, monkeypatch, capsys
) -> None:
    write = store.RowWriter.write

    def losing(self, numbers, values):
        write(self, numbers, values)
        self._unmarked = [number for number in self._unmarked if number not in (9, 50)]

    with monkeypatch.context() as patch:
        patch.setattr(store.RowWriter, "write", losing)
        one = filling(tmp_path, One())
        assert one.run() is None
    assert "2 of 68 rows are not in" in one.record["live"]
    assert "the first is 9" in one.record["live"]
    rows = filling(tmp_path, One()).run()
    assert "going on, 66 of 68 rows are there" in capsys.readouterr().out
    assert rows.done().all()


def test_a_sample_that_cannot_be_read_has_no_row(toys, tmp_path) -> None:
    one = filling(tmp_path, One())
    one.data.broken = 3
    one.loader = LoaderConfig(num_workers=0, on_bad_sample=BadSample.skip)
    rows = one.run()
    assert (~rows.done()).nonzero()[0].tolist() == [3]


def test_all_processes_ask_while_another_run_makes_the_features(
    toys, tmp_path, monkeypatch, capsys
) -> None:
    class Counting(One):
        asked = 0

        def broadcast(self, obj, src=0):
            self.asked += 1
            if self.asked == 4:
                lock.release()
            return obj

    (tmp_path / "cache").mkdir()
    lock = Lock(tmp_path / "cache" / f".{digest_of({'a': 1})}.lock")
    assert lock.acquire()
    monkeypatch.setattr("expt.training.features.filling.ASK_EVERY_SECONDS", 0.01)
    processes = Counting()
    assert filling(tmp_path, processes).run() is not None
    assert processes.asked > 4
    assert capsys.readouterr().out.count("another run makes the same features") == 1


def test_random_states_and_the_mode_are_left_as_they_were(toys, tmp_path) -> None:
    one = filling(tmp_path, One())
    one.model.train()
    before = torch.get_rng_state()
    assert one.run() is not None
    assert torch.equal(torch.get_rng_state(), before)
    assert one.model.training


def test_rows_are_what_the_model_makes(toys, tmp_path) -> None:
    one = filling(tmp_path, One())
    rows = one.run()
    item = one.data.item("val", 5, torch.Generator())
    with torch.no_grad():
        made = one.model.eval().features("prefix", image=item.inputs["image"][None])["prefix"][0]
    assert torch.allclose(rows.read("val", 5)["prefix"].view(torch.float32), made, atol=1e-6)


def test_inputs_that_change_by_chance_are_found(toys) -> None:
    from features import Pictures

    steady = first_samples(Pictures(8, 6), ["image"], 0)
    assert steady == first_samples(Pictures(4, 3), ["image"], 1)
    assert steady != first_samples(Pictures(8, 6, pixels=13), ["image"], 0)
    with pytest.raises(DataError, match="differ from epoch to epoch"):
        first_samples(Pictures(8, 6, hidden_augmentation=True), ["image"], 0)
