from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from expt.memory import host_allocator
from expt.memory.host_allocator import VARIABLES, keep_freed_memory

GLIBC = platform.libc_ver()[0] == "glibc"
FAULTS_OF_A_STEP = """
import resource
import sys
import numpy as np
from expt.memory.host_allocator import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
for step in range(20):
    if step == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [np.ones(2_000_000) for _ in range(4)]
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not GLIBC, reason="another C library")
def test_pages_are_taken_from_the_system_once() -> None:
    faults = {
        mode: int(subprocess.check_output([sys.executable, "-c", FAULTS_OF_A_STEP, mode]))
        for mode in ("returned", "kept")
    }
    assert faults["kept"] < faults["returned"] / 10


@pytest.mark.parametrize("name", VARIABLES)
def test_the_users_own_setting_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "131072")
    assert not keep_freed_memory()


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_allocator.ctypes, "CDLL", lambda _: object())
    assert not keep_freed_memory()
