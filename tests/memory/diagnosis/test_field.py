"""Reports from the field: the answers that users should have had.

The lines here say the essential in our own words; the files they are taken after are read as well
where they lie beside the repository.
"""

# ruff: noqa: E501  (a message stays in one piece)

from __future__ import annotations

from pathlib import Path

import pytest

from expt.memory.diagnosis.diagnosis import Diagnosis, diagnose

FOLDER = Path(__file__).parents[4] / "shared" / "field" / "diagnose"


def rising(line: str, count: int = 30) -> str:
    """A log whose line ``{n}`` counts up; ``{m}`` rises by 300 from 8300."""
    return "".join(
        line.replace("{n}", str(n)).replace("{m}", str(8000 + 300 * n)) + "\n"
        for n in range(1, count + 1)
    )


LOGS = {
    "learning_rates_in_E.log": rising(
        "iteration {n}/1000 | learning rate: 1.{n}E-06 | loss: 8.9E0"
    ),
    "tokens_in_M.log": rising("step {n} | tokens seen {n}.2M | loss 3.1"),
    "gpu_leaks_beside_cpu.log": rising("[{n}/99] GPU memory: {m} MB, CPU memory: 44097.2 MB"),
    "other_process.txt": "CUDA out of memory. Tried to allocate 20.00 MiB (GPU 0; 61.00 GiB total "
    "capacity; 10.20 GiB already allocated; 18.00 MiB free; 10.65 GiB reserved in total by PyTorch)",
    "limit_with_room_left.txt": "HIP out of memory. Tried to allocate 2.00 MiB. GPU 0 has a total "
    "capacity of 288.00 GiB of which 276.00 GiB is free. 1.05 GiB allowed; Of the allocated memory "
    "1017.00 MiB is allocated by PyTorch, and 55.00 MiB is reserved by PyTorch but unallocated.",
    "really_full.txt": "CUDA out of memory. Tried to allocate 90.00 MiB. GPU 0 has a total capacity "
    "of 8.00 GiB of which 0 bytes is free. Including non-PyTorch memory, this process has 7.95 GiB "
    "memory in use. Of the allocated memory 7.30 GiB is allocated by PyTorch, and 120.00 MiB is "
    "reserved by PyTorch but unallocated.",
    "mps_other_allocations.txt": "MPS backend out of memory (MPS allocated: 9.57 GiB, other "
    "allocations: 17.35 GiB, max allowed: 27.20 GiB). Tried to allocate 292.50 MiB on private pool.",
    "ray_host.txt": "ray.exceptions.OutOfMemoryError: Task was killed due to the node running low on "
    "memory.\nMemory on the node where the task was running was 59.49GB / 62.58GB (0.950744)",
    "paddle.txt": "ResourceExhaustedError: \n\nOut of memory error on GPU 0. Cannot allocate "
    "3.500000GB memory on GPU 0, 21.000000GB memory has been allocated and available memory is only "
    "2.800000GB.",
    "loader_killed.txt": "RuntimeError: DataLoader worker (pid 4711) is killed by signal: Killed. ",
    "elastic.txt": "E api.py:914] failed (exitcode: -9) local_rank: 0 (pid: 43) of binary: python",
    "unitless_mb.log": rising(
        "Epoch [1][{n}/7724]\tlr: 1.000e-04, time: 1.26, memory: {m}, loss: 1.2"
    ),
    "dict_lines.log": rising(
        "{'loss': 0.8, 'memory(GiB)': {n}.10, 'global_step/max_steps': '{n}/99'}"
    ),
}
ANSWERS = {
    "learning_rates_in_E.log": ("not_oom", "Neither"),
    "tokens_in_M.log": ("not_oom", "Neither"),
    "gpu_leaks_beside_cpu.log": ("leak", "on the GPU"),
    "other_process.txt": ("other_process", "Other processes hold 50.33 GiB of 61.00 GiB"),
    "limit_with_room_left.txt": ("oom", "A limit of 1.05 GiB"),
    "really_full.txt": ("oom", "really full: 7.30 GiB of 8.00 GiB are in tensors"),
    "mps_other_allocations.txt": ("other_process", "17.35 GiB of 27.20 GiB are other allocations"),
    "ray_host.txt": ("oom", "on the host, and Ray ended a task"),
    "paddle.txt": ("oom", "really full"),
    "loader_killed.txt": ("oom", "probably ran out on the host: a data-loader worker was killed"),
    "elastic.txt": ("oom", "probably ran out on the host: a process was killed"),
    "unitless_mb.log": ("leak", "There is a leak"),
    "dict_lines.log": ("leak", "There is a leak"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_the_answer(name: str) -> None:
    kind, words = ANSWERS[name]
    found = diagnose(LOGS[name])
    assert (found.kind, words in found.cause) == (kind, True), found.cause
    more(name, found)


@pytest.mark.skipif(not FOLDER.is_dir(), reason="the files are not beside the repository")
@pytest.mark.parametrize("name", ANSWERS)
def test_the_answer_to_the_file_itself(name: str) -> None:
    kind, words = ANSWERS[name]
    found = diagnose((FOLDER / name).read_text())
    assert (found.kind, words in found.cause) == (kind, True), found.cause
    more(name, found)


def more(name: str, found: Diagnosis) -> None:
    """What else an answer must say."""
    if name == "gpu_leaks_beside_cpu.log":
        assert found.trend is not None
        assert found.trend.growth_bytes_per_step == pytest.approx(3e8, rel=0.01)
        assert any(line.startswith("CPU: steady") for line in found.evidence)
    if name in ("ray_host.txt", "loader_killed.txt", "elastic.txt"):
        assert any("loader workers" in line for line in found.advice), "advice for the host"
        assert not any("precision" in line for line in found.advice), "advice for a GPU"
    if name == "unitless_mb.log":
        assert any("taken to be in MiB" in line for line in found.evidence)
    if name == "dict_lines.log":
        assert found.trend is not None
        assert found.trend.growth_bytes >= 29 * 2**30


@pytest.mark.skipif(not FOLDER.is_dir(), reason="the files are not beside the repository")
def test_every_file_has_an_answer() -> None:
    assert {path.name for path in FOLDER.iterdir()} <= set(ANSWERS)
