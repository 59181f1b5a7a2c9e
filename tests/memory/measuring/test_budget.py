from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from expt.errors import ConfigError
from expt.memory.measuring import device_memory
from expt.memory.measuring.budget import Budget
from expt.memory.measuring.device_memory import free_bytes, host_bytes, total_bytes
from expt.units import GIB, MIB

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
CARD = 24 * GIB


class Card:
    """The figures of a CUDA device that is not there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fraction, self.set, self.emptied = 1.0, [], 0
        properties = type("Properties", (), {"total_memory": CARD})()
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * GIB, CARD))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: GIB)
        monkeypatch.setattr(torch.cuda, "empty_cache", self.empty)
        monkeypatch.setattr(
            torch.cuda, "get_per_process_memory_fraction", lambda device: self.fraction
        )
        monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", self.cap)

    def empty(self) -> None:
        self.emptied += 1

    def cap(self, fraction: float, device: Any) -> None:
        self.fraction = fraction
        self.set.append(fraction)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    return Card(monkeypatch)


@pytest.mark.parametrize(
    ("value", "count"),
    [
        ("200MiB", 200 * MIB),
        ("6GiB", 6 * GIB),
        ("6GB", 6 * 10**9),
        ("80%", int(0.8 * CARD)),
        (123456, 123456),
        ("100%", CARD),
        ("auto", 6 * GIB),  # what the driver has free, and what the allocator holds already
    ],
)
def test_what_a_budget_stands_for_on_a_card(card, value, count):
    assert Budget.parse(value, CUDA).bytes == count


def test_a_budget_larger_than_the_card_is_refused_with_what_it_has(card):
    with pytest.raises(ConfigError, match=r"memory\.budget=40GiB.*cuda.*24\.00 GiB.*100%"):
        Budget.parse("40GiB", CUDA)


@pytest.mark.parametrize("value", ["6 gigs", -1, 0, "150%", "abc", float("nan"), True, "0%", None])
def test_what_is_no_budget_is_refused_under_its_name(value):
    with pytest.raises(ConfigError, match=r"^limit=.*") as refused:
        Budget.parse(value, CPU, name="limit")
    assert "MiB" in str(refused.value) or "%" in str(refused.value)


def test_on_cuda_the_allocator_is_capped_and_set_back(card):
    card.fraction = 0.9
    with pytest.raises(KeyError), Budget.parse("6GiB", CUDA).enforce(CUDA) as ledger:
        assert ledger is None
        assert card.fraction == pytest.approx(0.25)
        raise KeyError
    assert card.set == [0.25, 0.9]
    assert card.emptied == 1


def test_a_device_without_a_number_is_the_current_one(card, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    capped = []
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, device: capped.append(device)
    )
    with Budget.parse("6GiB", torch.device("cuda")).enforce(torch.device("cuda")):
        pass
    assert capped == [torch.device("cuda", 1)] * 2


def test_on_the_host_a_ledger_refuses_and_lets_go_afterwards():
    with Budget.parse("1MiB", CPU).enforce(CPU) as ledger:
        kept = torch.zeros(100_000)
        with pytest.raises(torch.OutOfMemoryError):
            torch.zeros(200_000)
        assert len(kept) == 100_000
    assert ledger.peak_bytes == 400_000
    torch.zeros(200_000)


def test_a_share_of_the_host_is_of_its_containers_limit(monkeypatch, tmp_path: Path):
    machine = host_bytes()
    (tmp_path / "memory.max").write_text(f"{64 * MIB}\n")
    (tmp_path / "memory.current").write_text(f"{60 * MIB}\n")
    monkeypatch.setattr(device_memory, "CGROUP", tmp_path)
    assert total_bytes(CPU) == 64 * MIB < machine
    assert free_bytes(CPU) == 4 * MIB
    assert Budget.parse("50%", CPU).bytes == 32 * MIB
    (tmp_path / "memory.max").write_text("max\n")
    assert total_bytes(CPU) == machine or total_bytes(CPU) > 64 * MIB
    assert 4 * MIB < free_bytes(CPU) <= machine


def test_every_phase_of_training_may_be_refused():
    def outcome(limit: int) -> str:
        phase = "build"
        try:
            with Budget(limit, "x").enforce(CPU):
                model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
                optimizer = torch.optim.AdamW(model.parameters())
                phase = "forward"
                loss = model(torch.ones(256, 64)).sum()
                phase = "backward"
                loss.backward()
                phase = "step"
                del loss
                optimizer.step()
        except torch.OutOfMemoryError:
            return phase
        return "done"

    found = [outcome(limit) for limit in range(10_000, 500_000, 10_000)]
    assert list(dict.fromkeys(found)) == ["build", "forward", "backward", "done"]


def test_what_is_free_is_within_the_processs_own_group(monkeypatch, tmp_path: Path):
    (tmp_path / "self").mkdir()
    (tmp_path / "self/cgroup").write_text("0::/job/7\n")
    own = tmp_path / "job/7"
    own.mkdir(parents=True)
    (own / "memory.max").write_text(f"{64 * MIB}\n")
    (own / "memory.current").write_text(f"{60 * MIB}\n")
    monkeypatch.setattr(device_memory, "PROC", tmp_path)
    monkeypatch.setattr(device_memory, "CGROUP", tmp_path)
    assert (total_bytes(CPU), free_bytes(CPU)) == (64 * MIB, 4 * MIB)
