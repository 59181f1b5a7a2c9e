from __future__ import annotations

import json

import pytest

from expt.memory.diagnosis.log_reader import read_log
from expt.memory.diagnosis.trend import Reading
from expt.memory.watching.history import to_csv

GB = 10**9
GIB = 1024**3


@pytest.mark.parametrize(
    "line",
    [
        "Step 100: 18.2 GB",
        "18.2 GB at step 100",
        "[Step 100] loss=2.31 | GPU memory: 18.2GB",
        "2026-11-21 10:00:01 INFO step=100 loss 2.5 memory_gb=18.2",
        "iter 100, GPU Mem (GB): 18.2",
        "{'step': 100, 'gpu_mem': '18.2 GB'}",
        "[100/1000] mem 18.2 GB, 3.2 it/s, 12 MB/s",
        "step 100/1000 18.2/24.0 GB",
        "step 100 18.2GB/24GB used",
        "step 100 of 1000: allocated 18.2 GB reserved 20.1 GB",
        "step 100 | 18.2 GB allocated 20.1 GB reserved",
        "step 100 | reserved: 20.1 GB, allocated: 18.2 GB, peak: 22.5 GB, free: 1 GB",
        "train step 1,00 mem 18.2 GB",
        "epoch 3 batch 100 vram 18.2 GB",
        "global_step: 100 mem_usage:cuda:0 18.2GB, 0.750 sec/step",
        "step 100 saved checkpoint of 120 MB, mem 18.2 GB",
    ],
)
def test_a_line_of_a_log(line: str) -> None:
    (reading,) = read_log(f"starting\n{line}\n").readings
    assert reading.step == 100
    assert reading.allocated_bytes == pytest.approx(18.2 * GB)
    assert reading.reserved_bytes in (None, round(20.1 * GB))
    assert reading.total_bytes in (None, 24 * GB)
    assert reading.peak_bytes in (None, round(22.5 * GB))
    assert ("20.1" in line) == (reading.reserved_bytes is not None)
    assert ("24" in line) == (reading.total_bytes is not None)


@pytest.mark.parametrize(
    "line",
    [
        "loss 2.5 mem 18.2 GB",
        "step 100 loss 2.5",
        "step 100 saved checkpoint of 120 MB",
        "step 100 reading at 12 MB/s",
        "stepping stones: 18.2 GB",
    ],
)
def test_a_line_that_is_no_reading(line: str) -> None:
    assert read_log(line).readings == ()


def test_our_own_lines() -> None:
    line = "epoch   3  step 900  train loss 3.1  val mae 3.210 *  peak 0.47 GiB  3:07 min"
    (reading,) = read_log(line).readings
    assert (reading.step, reading.high_water) == (900, True)
    assert reading.allocated_bytes == round(0.47 * GIB)


def test_epochs_count_where_there_are_no_steps() -> None:
    content = read_log("Epoch 1: mem 18 GB\nEpoch 2: mem 19 GB\n")
    assert [reading.step for reading in content.readings] == [1, 2]


def test_steps_that_begin_again_count_on_and_ranks_do_not() -> None:
    text = "".join(f"epoch {e} step {s} mem {10 + e} GB\n" for e in (1, 2) for s in (100, 200, 300))
    assert [r.step for r in read_log(text).readings] == [100, 200, 300, 400, 500, 600]
    ranks = "step 95 mem 8 GB\nstep 95 mem 9 GB\nstep 96 mem 9 GB\nstep 95 mem 7 GB\n"
    readings = read_log(ranks).readings
    assert [(r.step, r.allocated_bytes) for r in readings] == [(95, 9 * GB), (96, 9 * GB)]


@pytest.mark.parametrize(
    ("end", "step", "kind"),
    [
        ("Step 1000: OOM!", 1000, None),
        ("OOM at step 1000", 1000, None),
        ("step 1000 CUDA out of memory", 1000, None),
        ("RuntimeError: CUDA out of memory. Tried to allocate 2.50 GiB (GPU 0", 900, "cuda"),
    ],
)
def test_where_memory_ran_out(end: str, step: int, kind: str | None) -> None:
    content = read_log(f"step 900 mem 24.2 GB\n{end}\n")
    assert content.ran_out
    assert content.oom_step == step
    assert (content.oom.kind if content.oom else None) == kind
    assert len(content.readings) == 1, "the message's own amounts are no reading"


@pytest.mark.parametrize("end", ["step 9 no OOM so far", "step 9 out_of_memory_events 0", "done"])
def test_memory_did_not_run_out(end: str) -> None:
    content = read_log(f"step 8 mem 2 GB\n{end}\n")
    assert not content.ran_out
    assert content.oom_step is None


def test_csv_with_units_in_the_header() -> None:
    text = "step,mem_gb,reserved_gb,loss\n10,18.2,20,0.1\n20,18.3,20,0.2\n"
    content = read_log(text)
    assert content.form == "csv"
    assert [r.step for r in content.readings] == [10, 20]
    assert content.readings[1].allocated_bytes == round(18.3 * GB)
    assert content.readings[1].reserved_bytes == 20 * GB


def test_csv_of_nvidia_smi() -> None:
    rows = [
        f"2026/11/21 10:00:{at:02d}.1, {gpu}, {used} MiB, 24564 MiB"
        for at in range(3)
        for gpu, used in ((0, 15), (1, 1000 + at))
    ]
    text = "\n".join(["timestamp, index, memory.used [MiB], memory.total [MiB]", *rows])
    readings = read_log(text).readings
    assert [r.allocated_bytes // 1024**2 for r in readings] == [1000, 1001, 1002], "the busy card"
    assert [r.step for r in readings] == [0, 1, 2]
    assert readings[0].total_bytes == 24564 * 1024**2


def test_the_managers_csv_comes_back() -> None:
    readings = [Reading(float(at), 100 + at, 200, None, 150, 1000) for at in range(5)]
    text = to_csv({"cuda:0": readings, "host": [Reading(1.0, 5, total_bytes=10)]})
    assert list(read_log(text).readings) == readings


def test_a_history_of_a_gpu_and_of_a_cpu() -> None:
    gpu = {"allocated_bytes": 5.0, "reserved_bytes": 9.0, "peak_allocated_bytes": 8.0}
    rows = [{"epoch": 1.0, "step": 300.0, "loss": 4.6, **gpu, "peak_reserved_bytes": 10.0}]
    (reading,) = read_log(json.dumps(rows)).readings
    assert reading == Reading(300.0, 5, 9, None, 8)
    cpu = [{"step": 300.0, "peak_allocated_bytes": 8.0, "process_peak_bytes": 90.0}]
    (reading,) = read_log(json.dumps(cpu, indent=2)).readings
    assert reading == Reading(300.0, 90, high_water=True)
    lines = "\n".join(
        json.dumps({"kind": "metrics", "step": s, "values": {"memory/allocated_bytes": 7}})
        for s in (1, 2)
    )
    assert [r.allocated_bytes for r in read_log(lines + "\n{torn").readings] == [7, 7]


def test_nothing_found_is_no_error() -> None:
    for text in (
        "",
        "hello",
        "[1, 2]",
        "{}",
        '{"a": [1]}',
        "a,b\n1,2\n",
        "[broken",
        "step,mem_gb\nx,y",
        "step,mem_gb\n1,inf\n2,nan",
    ):
        content = read_log(text)
        assert content.readings == ()
        assert not content.ran_out
