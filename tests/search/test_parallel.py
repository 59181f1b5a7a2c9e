"""How many trials run side by side."""

from __future__ import annotations

import pytest

from expt.errors import ConfigError
from expt.search import parallel
from expt.search.parallel import SideBySide, side_by_side
from expt.units import GIB


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """Eight cores and 16 GiB."""
    monkeypatch.setattr(parallel, "cores", lambda: 8)
    monkeypatch.setattr(parallel, "host_bytes", lambda: 16 * GIB)


def asked(n_jobs, devices=(), on_mps=False, budget=None, **more):
    return side_by_side(n_jobs, devices, on_mps, budget, environment=more.pop("env", {}), **more)


def test_a_number_is_taken_and_the_cores_are_shared():
    assert asked(1) == SideBySide(1, None)
    assert asked(2) == SideBySide(2, 4)
    assert asked(16) == SideBySide(16, 1)
    assert asked(2, ["0", "1"]) == SideBySide(2, None)
    assert asked(2, env={"OMP_NUM_THREADS": "3"}) == SideBySide(2, None), "what is given wins"


def test_auto_is_one_for_each_core_or_gpu():
    assert asked("auto") == SideBySide(8, 1)
    assert asked("auto", ["0", "1", "2"]) == SideBySide(3, None)
    assert asked("auto", on_mps=True) == SideBySide(1, None), "MPS is one device"


def test_auto_leaves_each_trial_its_budget():
    assert asked("auto", budget=2 * GIB) == SideBySide(8, 1)
    found = asked("auto", budget=5 * GIB)
    assert (found.n_jobs, found.threads) == (3, 2)
    assert "3 at a time, not one for each of 8 cores" in found.note
    assert asked("auto", budget=16 * GIB).n_jobs == 1


def test_no_more_run_side_by_side_than_there_are_and_these_share_all_cores():
    assert asked("auto", most=2) == asked(8, most=2) == SideBySide(2, 4)
    assert asked(8, most=1) == SideBySide(1, None)
    assert asked(2, most=5) == SideBySide(2, 4)
    assert asked("auto", ["0", "1", "2"], most=2) == SideBySide(2, None)


def test_a_launcher_gets_a_number():
    assert asked(4, launcher="ray") == SideBySide(4)
    with pytest.raises(ConfigError, match=r"search\.n_jobs=auto counts the cores or GPUs"):
        asked("auto", launcher="submitit_slurm")
