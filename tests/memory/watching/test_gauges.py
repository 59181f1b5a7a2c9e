from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from expt.memory.watching.gauges import CudaGauge, HostGauge, gauge_for

GIB = 1024**3


def test_the_host_sees_what_this_process_takes() -> None:
    gauge = HostGauge()
    before = gauge.read(0)
    kept = mmap.mmap(-1, 80_000_000)  # of the system: the heap may hold as much that is free
    for _ in range(80):  # in parts: what is written may stay in the heap
        kept.write(b"1" * 1_000_000)
    after = gauge.read(1)
    assert after.allocated_bytes - before.allocated_bytes == pytest.approx(len(kept), rel=0.2)
    assert 0 < gauge.used_fraction(after) < 1
    assert after.total_bytes == gauge.total_bytes > GIB // 2


def test_the_containers_limit_counts(tmp_path: Path) -> None:
    machine = HostGauge(cgroup=tmp_path / "none", proc=tmp_path).total_bytes
    (tmp_path / "memory.max").write_text("max\n")
    assert HostGauge(cgroup=tmp_path).total_bytes == machine
    (tmp_path / "memory.max").write_text("123456789\n")
    assert HostGauge(cgroup=tmp_path).total_bytes == 123456789
    (tmp_path / "memory.max").unlink()
    (tmp_path / "memory").mkdir()
    limit = tmp_path / "memory/memory.limit_in_bytes"
    limit.write_text("9223372036854771712\n")
    assert HostGauge(cgroup=tmp_path).total_bytes == machine, "no limit, in version 1's words"
    limit.write_text("5000000\n")
    assert HostGauge(cgroup=tmp_path).total_bytes == 5000000


def test_the_processs_own_group_counts(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self/cgroup").write_text("0::/job/7\n")
    (tmp_path / "job/7").mkdir(parents=True)
    (tmp_path / "job/7/memory.max").write_text("7654321\n")
    assert HostGauge(proc=tmp_path, cgroup=tmp_path).total_bytes == 7654321
    (tmp_path / "job/memory.max").write_text("1234567\n")
    assert HostGauge(proc=tmp_path, cgroup=tmp_path).total_bytes == 1234567, "of the group above"


def test_without_the_kernels_files_it_is_the_peak(tmp_path: Path) -> None:
    reading = HostGauge(proc=tmp_path).read(3)
    assert reading.high_water
    assert reading.allocated_bytes > 10 * 1024**2


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Stand in for CUDA's statistics; the test sets the figures."""
    figures = {"allocated": 2 * GIB, "reserved": 3 * GIB, "peak": 5 * GIB, "free": 4 * GIB}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (figures["free"], 12 * GIB))
    monkeypatch.setattr(
        torch.cuda,
        "memory_stats",
        lambda device: {
            "allocated_bytes.all.current": figures["allocated"],
            "allocated_bytes.all.peak": figures["peak"],
            "reserved_bytes.all.current": figures["reserved"],
        },
    )
    return figures


def test_a_cards_figures(card: dict[str, int]) -> None:
    gauge = gauge_for(None)
    assert isinstance(gauge, CudaGauge)
    reading = gauge.read(7)
    assert (reading.step, reading.allocated_bytes, reading.reserved_bytes) == (7, 2 * GIB, 3 * GIB)
    assert reading.peak_bytes == 5 * GIB
    assert reading.other_bytes == 5 * GIB, "of 12: 4 free, 3 reserved here"
    assert gauge.used_fraction(reading) == pytest.approx(8 / 12)
    assert (gauge.name, gauge.total_bytes) == ("cuda:0", 12 * GIB)


def test_the_device_decides(card: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(gauge_for("cuda:0"), CudaGauge)
    for device in ("cpu", torch.device("cpu"), "mps"):
        assert isinstance(gauge_for(device), HostGauge)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert isinstance(gauge_for(None), HostGauge)
    with pytest.raises(ValueError, match="no CUDA device"):
        gauge_for("cuda")
