# ruff: noqa: E501  (a line of a log stays in one piece)

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


@pytest.mark.parametrize(
    "end",
    [
        "step 9 no OOM so far",
        "step 9: smaller batch to avoid an OOM",
        "step 9 OOM-safe mode",
        "step 9 oom_count 0 OOM retries 0",
        "step 9 out_of_memory_events 0",
        "done",
    ],
)
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


def log(line: str, count: int = 12) -> str:
    """A log whose ``{n}`` counts up, ``{m}`` from 8300 by 300, ``{g}`` from 8.3 by 0.3."""
    return "".join(
        line.replace("{n}", str(n))
        .replace("{m}", str(8000 + 300 * n))
        .replace("{g}", f"{8 + 0.3 * n:.2f}")
        + "\n"
        for n in range(1, count + 1)
    )


def growth(text: str) -> dict[str, float]:
    """GB by which each series grows."""
    return {
        name: round((readings[-1].allocated_bytes - readings[0].allocated_bytes) / GB, 1)
        for name, readings in read_log(text).series.items()
    }


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("step {n} GPU mem {g} GB, CPU mem 44.1 GB", {"GPU": 3.3, "CPU": 0}),
        (
            "step {n} | GPU0: 40.1 GB | GPU1: {g} GB | RAM: 80 GB",
            {"GPU 0": 0, "GPU 1": 3.3, "CPU": 0},
        ),
        ("step {n} mem cuda:0={g}GB cuda:1=40.1GB", {"GPU 1": 0, "GPU 0": 3.3}),
        ("step {n} cuda:0 mem {m} cuda:1 mem 30000", {"GPU 1": 0, "GPU 0": 3.5}),
        ("[rank1]: step {n} mem {g} GB\n[rank0]: step {n} mem 40 GB", {"rank 0": 0, "rank 1": 3.3}),
        (
            "step {n} mem {g} GB\nstep {n} mem 40 GB",
            {"series 1 of 2 by size": 0, "series 2 of 2 by size": 3.3},
        ),
        ("step {n} mem: [{g} GB, 40.1 GB]", {"#2": 0, "#1": 3.3}),
        ("step {n} gpu_mem_gb=[{g}, 40.1]", {"GPU #2": 0, "GPU": 3.3}),
        ("step {n} host memory 20 GB device memory {g} GB", {"GPU": 3.3, "CPU": 0}),
        ("step {n} system memory: {g} GB used of 64 GB", {"CPU": 3.3}),
        ("step {n} 40.1 GB {g} GB", {"#1": 0, "#2": 3.3}),
        ("step {n} gpu(MB) {m}", {"GPU": 3.3}),
        ("step {n} loss 0.2\n  GPU memory: {g} GB\n  checkpoint of 3 GB", {"GPU": 3.3}),
        ("Epoch {n}/12\n100/100 [====] - 3s - loss: 0.3 - gpu_memory: {m}", {"GPU": 3.5}),
        ("step {n} activation mem 30 GB | optimizer mem {g} GB", {"": 0, "optimizer mem": 3.3}),
        ("iter: {n}, gpu mem: {m}Mb, mem: 12.3Gb, lr: 1.0e-03", {"GPU mem": 0, "GPU": 3.3}),
        ("step {n} | 8.1 GB on npu:0 | {g} GB on npu:1", {"NPU 1": 3.3, "NPU 0": 0}),
        ("iter {n}: RSS {m} MB, VMS 99000 MB, gpu 3.1 GB", {"GPU": 0, "CPU": 3.3}),
        ("step {n} cached {g} GB", {"reserved": 3.3}),
    ],
)
def test_each_device_is_a_series(line: str, expected: dict[str, float]) -> None:
    assert growth(log(line)) == expected


def test_allocated_and_reserved_are_told_apart() -> None:
    for line in (
        "step {n} | allocated 10 GB | reserved {g} GB | max_memory_allocated 30 GB",
        "step {n} mem alloc/res 10/{g} GB",
        "[{n}/100] GPU mem allocated/reserved: 10GB/{g}GB",
        "step {n} max_mem_reserved: {m} MB, max_mem_allocated: 10000 MB",
    ):
        readings = read_log(log(line)).readings
        assert {one.allocated_bytes for one in readings} == {10 * GB}
        assert [one.reserved_bytes for one in readings[::11]] == [round(8.3 * GB), round(11.6 * GB)]


MEGATRON = (
    " iteration {n}/ 100 | consumed samples: 1280 | learning rate: 1.300E-06 |\n"
    "[Rank {r}] (after {n} iterations) memory (MB) | allocated: {m}.0 | max allocated: 90000.2 | "
    "reserved: 91000.0 | max reserved: 91000.0"
)
YOLO = (
    "\n      Epoch    GPU_mem   box_loss   Instances       Size\n"
    "      {n}/50      0G      1.255   14   640:   0%|      | 0/8\r"
    "      {n}/50      {g}G      1.255         14        640: 100%|####| 8/8 [00:01<00:00,  4.5it/s]\n"
    "                 Class     Images  Instances      Box(P          R: 100%|##| 4/4 [00:00<00:00]\n"
    "                   all        128        929      0.64      0.53"
)


@pytest.mark.parametrize(
    ("line", "head", "device", "unit"),
    [
        # MMEngine, torchvision, Detectron2: MiB by convention
        ("Epoch [1][{n}0/7724]\tlr: 1.000e-04, time: 1.26, memory: {m}, loss: 122", "", "", 2**20),
        ("Iter(train) [ {n}0/1000]  lr: 2.0e-04  time: 1.2  memory: {m}  loss: 1.2", "", "", 2**20),
        ("Epoch: [0]  [ {n}0/625]  eta: 0:05:12  lr: 0.1  time: 0.5  max mem: {m}", "", "", 2**20),
        ("eta: 1:00:00  iter: {n}9  total_loss: 1.5  lr: 1.0e-05  max_mem: {m}M", "", "", 2**20),
        ("Train: [0/300][{n}0/1251]  eta 0:20:00 lr 0.1  mem {m}MB", "", "", 10**6),
        # dictionaries: ms-swift, Axolotl, JAX
        ("{'loss': 0.8, 'memory(GiB)': {g}, 'global_step/max_steps': '{n}/22156'}", "", "", 2**30),
        ("{'loss': 0.8, 'epoch': 0.{n}1, 'memory/max_mem_active(gib)': {g}}", "", "", 2**30),
        ("{'loss': 0.8, 'gpu_mem_gb': {g}}", "", "GPU", GB),
        ("step {n}: {'bytes_in_use': {m}000000, 'bytes_limit': 99000000000}", "", "", 10**6),
        # JSON lines, whole or after a prefix
        ('{"mode": "train", "epoch": 1, "iter": {n}0, "memory": {m}, "time": 0.5}', "", "", 2**20),
        ('INFO {"epoch": 1, "iter": {n}0, "lr": 0.0001, "memory": {m}}', "start\n", "", 2**20),
        ('{"step": {n}, "gpu": {"0": {"memory_gb": {g}}}}', "", "GPU 0", GB),
        (
            '{"_step": {n}, "system.proc.memory.rssMB": {m}.1, "system.memory": 33.2}',
            "",
            "CPU",
            10**6,
        ),
        # tables with a head: YOLO, fastai, Markdown, Rich, CSV inside a log
        (YOLO, "", "GPU", 2**30),
        (
            "{n}     0.5     0.4     {m}  00:12",
            "epoch  train_loss  valid  gpu_mem_mb  time\n",
            "GPU",
            10**6,
        ),
        ("| {n} | 2.3 | {g} |", "| step | loss | mem (GB) |\n|----|----|----|\n", "", GB),
        ("│ {n} │ 2.3 │ {g} │", "│ epoch │ loss │ gpu mem (GB) │\n", "GPU", GB),
        ("{n},{m},0.3", "INFO start\nstep,mem_mb,loss\n", "", 10**6),
        ("{n}\t{m}\t0.3", "step\tmem_mb\tloss\n", "", 10**6),
        ("{n} 8.1 {g}G", "step loss gpu_mem\n", "GPU", 2**30),
        # others: Megatron, DeepSpeed, torchtitan, progress bars, colours
        (MEGATRON.replace("{r}", "0"), "", "rank 0", 10**6),
        ("step={n}, MA {g} GB         Max_MA 30.3 GB         CA 33.0 GB", "", "", GB),
        (
            "[rank0]:[titan] - root - step: {n}  loss:  8.0  memory: {g}GiB(52.01%)  tps: 8,000",
            "",
            "rank 0",
            2**30,
        ),
        (
            "Epoch 0:  10%|#   | {n}/1000 [00:30<03:40,  4.00it/s, loss=2.3, gpu_mem={g}GB]",
            "",
            "GPU",
            GB,
        ),
        ("\x1b[34mstep {n}\x1b[0m mem=\x1b[1m{g}GB\x1b[0m", "", "", GB),
        ("step {n} GPU 0 (NVIDIA A100-SXM4-80GB): {g} GB", "", "GPU 0", GB),
    ],
)
def test_the_logs_of_many_programs(line: str, head: str, device: str, unit: int) -> None:
    content = read_log(head + log(line))
    readings = content.series[device]
    assert len(readings) == 12
    scale = 1 if "{g}" in line else 1000
    for reading, at in ((readings[0], 8.3), (readings[-1], 11.6)):
        assert reading.allocated_bytes == pytest.approx(at * scale * unit, rel=1e-4)
    steps = [reading.step for reading in readings]
    assert steps == sorted(set(steps))
    assumed = not any(
        word in line + head
        for word in ("GB", "gb", "gib", "GiB", "mb", "MB", "{m}M", "{g}G", "bytes")
    )
    assert bool(content.notes) == assumed


def test_json_in_columns_and_with_a_device_in_a_field() -> None:
    columns = {"step": [1, 2], "memory_gb": [8, 9], "loss": [0.1, 0.2]}
    assert [one.allocated_bytes for one in read_log(json.dumps(columns)).readings] == [
        8 * GB,
        9 * GB,
    ]
    assert growth(log('{"step": {n}, "gpu": "{g} GB"}')) == {"GPU": 3.3}
    rows = (
        '{"step": {n}, "device": "cuda:1", "mem": {m}}\n{"step": {n}, "device": "cpu", "mem": 9000}'
    )
    assert growth(log(rows)) == {"GPU 1": 3.5, "CPU": 0}


def test_torch_memory_stats_in_a_csv() -> None:
    stage = "Monitor.on_train_batch_start/"
    names = (
        "allocated_bytes.all.current",
        "allocated_bytes.all.allocated",
        "allocation.all.current",
    )
    names = (*names, "allocated_bytes.large_pool.current", "reserved_bytes.all.current")
    head = ",".join(("epoch", "step", *(stage + name for name in names)))
    content = read_log(
        head + "\n" + log("0,{n},8000000000,{m}00000000,4{n}0,7000000000,9000000000")
    )
    assert {name: len(readings) for name, readings in content.series.items()} == {"": 12}
    assert content.readings[0] == Reading(1, 8 * GB, 9 * GB)


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


@pytest.mark.parametrize(
    ("line", "steps"),
    [
        ("Epoch {e}: 100%|███| {n}/100 [00:30<00:00, 12.9it/s, gpu_mem=18.2GB]", (100,)),
        ("Epoch {e} [{n}/100] mem: 18.2 GB", (100,)),
        ("Epoch(train) [{e}][{n}/100] lr: 1e-4 memory: 4672", (50, 100)),
        ("[{e}/30] [{n}/100] mem 18.2 GB", (50, 100)),
        ('{{"epoch": {e}, "iter": {n}, "memory": 4672}}', (50, 100)),
    ],
)
def test_steps_that_begin_again_with_an_epoch_are_counted_on(
    line: str, steps: tuple[int, ...]
) -> None:
    text = "\n".join(line.format(e=e, n=n) for e in range(5) for n in steps)
    found = [one.step for one in read_log(text).readings]
    assert found == [100 * e + n for e in range(5) for n in steps]


def test_steps_of_the_whole_run_stay_as_they_are_where_epochs_are_named() -> None:
    lines = [(0, 50), (0, 100), (1, 100), (1, 150), (0, 125), (2, 200)]  # a rank is behind
    text = "\n".join(f"epoch {e} step {n} mem 18.2 GB" for e, n in lines)
    assert [one.step for one in read_log(text).readings] == [50, 100, 125, 150, 200]


def test_the_steps_of_a_validation_follow_those_of_its_epoch() -> None:
    lines = [
        (e, *one) for e in range(3) for one in (("", 100), ("", 200), ("val ", 10), ("val ", 30))
    ]
    text = "\n".join(f"epoch {e} {part}step {n} mem 18.2 GB" for e, part, n in lines)
    found = [one.step for one in read_log(text).readings]
    assert found == [230 * e + n for e in range(3) for n in (100, 200, 210, 230)]
    text = "\n".join(f"epoch {e} {p}step {n + 200 * e * (not p)} mem 18.2 GB" for e, p, n in lines)
    found = [one.step for one in read_log(text).readings]
    assert [one for one in found if one <= 600] == [
        100,
        200,
        210,
        230,
        300,
        400,
        410,
        430,
        500,
        600,
    ]


def test_the_steps_of_ranks_that_print_one_after_the_other_are_the_same() -> None:
    lines = [(e, r, n) for e in range(3) for r in range(2) for n in range(0, 100, 5)]
    text = "\n".join(f"[rank{r}] epoch {e} step {n} mem 18.2 GB" for e, r, n in lines)
    steps = {one.step for series in read_log(text).series.values() for one in series}
    assert steps == {95 * e + n for e in range(3) for n in range(0, 100, 5)}


@pytest.mark.parametrize("speed", ["steps/s: 2.30", "it/sec=2.3", "s/it: 0.43", "sec/step: 3"])
def test_a_speed_is_no_step(speed: str) -> None:
    content = read_log(log(f"{speed} step: {{n}} gpu mem: {{g}} GB"))
    assert [one.step for one in content.readings] == list(range(1, 13))


@pytest.mark.parametrize(
    ("word", "ran_out"),
    [
        ("OOM: 0", False),
        ("OOM=False", False),
        ("'OOM': None", False),
        ("0 OOM", False),
        ("OOM", True),
        (": OOM", True),
        ("OOM: 0.5 GiB missing", True),
    ],
)
def test_a_word_says_that_memory_ran_out_or_that_it_did_not(word: str, ran_out: bool) -> None:
    assert read_log(log("step {n} mem {g} GB") + f"\nstep 1001 {word}").ran_out == ran_out
