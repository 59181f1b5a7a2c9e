from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from expt.training import host_heap as host_allocator
from expt.training.host_heap import VARIABLES, keep_freed_memory

GLIBC = platform.libc_ver()[0] == "glibc"
FAULTS_OF_A_STEP = """
import resource
import sys
import numpy as np
from expt.training.host_heap import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
for step in range(20):
    if step == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [np.ones(2_000_000) for _ in range(4)]
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
HUGE_PAGES_OF_THE_HEAP = """
import re
from pathlib import Path
import numpy as np
from expt.training.host_heap import keep_freed_memory
assert keep_freed_memory()
block = np.ones(10_000_000)
parts = re.split(r"\\n(?=[0-9a-f]+-)", Path("/proc/self/smaps").read_text())
offered = [part for part in parts if "[heap]" in part and re.search(r"VmFlags:.* hg\\b", part)]
print(sum(int(re.search(r"Rss: *(\\d+)", part)[1]) for part in offered) * 1024, block.nbytes)
"""


@pytest.mark.skipif(not GLIBC, reason="another C library")
def test_pages_are_taken_from_the_system_once() -> None:
    faults = {
        mode: int(subprocess.check_output([sys.executable, "-c", FAULTS_OF_A_STEP, mode]))
        for mode in ("returned", "kept")
    }
    assert faults["kept"] < faults["returned"] / 10


@pytest.mark.skipif(not GLIBC or not HUGE_PAGES.exists(), reason="no huge pages to be had")
def test_large_tensors_lie_where_huge_pages_may_back_them() -> None:
    command = [sys.executable, "-c", HUGE_PAGES_OF_THE_HEAP]
    offered, block = map(int, subprocess.check_output(command).split())
    assert offered >= block


@pytest.mark.skipif(not GLIBC, reason="another C library")
def test_growing_the_heap_takes_no_memory() -> None:
    program = (
        "import resource\n"
        "from expt.training.host_heap import OFFERED_BYTES, keep_freed_memory\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\nkeep_freed_memory()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, OFFERED_BYTES // 1024)"
    )
    taken, offered = map(int, subprocess.check_output([sys.executable, "-c", program]).split())
    assert taken < offered / 20


@pytest.mark.parametrize("name", VARIABLES)
def test_the_users_own_setting_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "131072")
    assert not keep_freed_memory()


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_allocator.ctypes, "CDLL", lambda _: object())
    assert not keep_freed_memory()
