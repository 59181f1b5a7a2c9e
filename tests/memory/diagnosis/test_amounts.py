"""Which numbers of a line are memory: those of memory are found, all others are left alone."""

# ruff: noqa: E501  (names and lines stay in one piece)

from __future__ import annotations

import json

import pytest

from expt.memory.diagnosis.amounts import amounts, cell_amounts
from expt.memory.diagnosis.log_reader import read_log
from expt.units import written_bytes

MIB, GIB, GB = 1024**2, 1024**3, 10**9

NOT_MEMORY = """
iteration {n}/1000 | learning rate: 1.300E-0{n} | loss: 8.9000E+00 | grad norm: 1.2E+01 |
step {n} lr 3.00E-4 wd 1E-2 eps 1E-8
step {n}: lr=2.5e-0{n}, beta=0.9{n}
Iter {n} | lr: 1.0E{n} | loss: 2.{n}E1
step {n} peak lr 6.0E-04 current lr {n}.1E-05
step {n} max learning rate 1E-3 used
step {n} momentum 9.{n}E-1 weight decay 5.0E-2
step {n} | tokens seen {n}.2M | loss 3.1
step {n} tokens: {n}2.0M
step {n} total tokens {n}.2G
step {n} | {n}00.0M tokens | ppl 12.1
step {n} consumed tokens = {n}.7B
step {n} used {n}2.0M tokens
step {n} current tokens/s 1{n}.0K
step {n} tok/s 12{n}.4K, tps: {n}8,000
step {n} max tokens {n}M per batch
step {n} GPU tokens {n}.0G
step {n} cached tokens {n}4.0M
step {n} samples {n}.2M, epochs 0.{n}
step {n} consumed samples: {n}28000
step {n}: seen {n}.0M images at 3.2 it/s
step {n} total samples {n}.1G
step {n} cached samples {n}.1M
step {n} free samples {n}M
step {n} examples {n}K of 200K
step {n} | sequences {n}12K | frames {n}.4M
step {n} params {n}.0M trainable {n}.1M
step {n} total params: 7.{n}B
step {n} parameters {n}24M (frozen {n}00M)
step {n} model size {n}.2B
step {n} weights {n}.5G
step {n} active params {n}3B of 671B
step {n} max params {n}G
step {n} {n}12.5 TFLOPs
step {n} flops {n}.2T, mfu 4{n}.1%
step {n} peak flops {n}12T
step {n} GPU flops {n}12T
step {n} MACs: {n}.1G
step {n} total FLOPs {n}.3E18
step {n} reading at {n}2 MB/s
step {n} throughput {n}.2 GB/s
step {n} bandwidth {n}00 GB
step {n} memory bandwidth: {n}00 GB/s
step {n} memory bandwidth {n}00.0 GB
step {n} speed {n}.1M
step {n} all-reduce {n}.1 GB at 20 GB/s
step {n} network {n}.1 GB sent
step {n} sent {n}12 MB, received {n}10 MB
step {n} PCIe traffic {n}.2 GB
step {n} nvlink rx {n}2 GB tx {n}1 GB
step {n} io read {n}.7 GB written {n}.1 GB
step {n} GPU upload {n}.2 GB
step {n} {n}.2 GB/step
step {n} {n}00 MB per second
step {n} bus bandwidth used {n}20 GB
step {n} saved checkpoint of 12{n} MB
step {n} checkpoint size: {n}.2 GB
step {n} wrote ckpt ({n}.25 GiB) in 3.1 s
step {n} saving {n}.1GB to disk
step {n} model file {n}40 MB
step {n} downloaded {n}.2 GB of data
step {n} {n}.2 GB downloaded
step {n} dataset {n}5 GB
step {n} data read: {n}.0 GB
step {n} uploaded artifact {n}2MB
step {n} disk used: {n}20 GB
step {n} disk free {n}20 GB of 500 GB
step {n} disk usage {n}20.5GiB
step {n} storage used {n}2 GB
step {n} swap used {n}.2 GB
step {n} log file {n}2 KB
step {n} shard {n} of 12, {n}00 MB each
step {n} bucket size {n}5 MB
step {n} object store used {n}.2 GB
step {n} freed {n}.2 GB
step {n} gradient norm {n}.2G
step {n} vocabulary {n}28K
step {n} video {n}.1 GB decoded
step {n} archive of {n}2 MB
step {n} size {n}M
step {n} loss 2.{n}
step {n} acc 0.{n}12 loss {n}.1
step {n} time 0.{n}50 s data 0.0{n}
step {n} eta {n}:12:01
step {n} grad {n}.2e-05
step {n} GPU util {n}2%, temp 6{n} C, power {n}10 W
step {n} gpu 0 util {n}1 %
step {n} memory {n}2%
step {n} mem: {n}2.5%
step {n} gpu_mem_util: {n}2
step {n} GPU clock {n}410 MHz
step {n} num_alloc_retries: {n}
step {n} num_ooms {n}
step {n} allocations: {n}
step {n} memory bank {n}096
step {n} memory_len: {n}12
step {n} replay memory: {n}00000
step {n} replay_memory_size={n}00000
step {n} memory queue {n}5536
step {n} memory slots {n}28
step {n} memory tokens: {n}56
step {n} memory: {n} of 12
step {n} mem usages: 0.9{n}
step {n} memory cells {n}12
step {n} episodic memory {n}00
step {n} remembered: {n}672
step {n} members: {n}672
step {n} seq_len {n}096 batch {n}2M
step {n} length: {n}12 | time per iteration (ms): {n}234.5
step {n} device-to-host bytes/s {n}00
step {n} cost {n}.1K USD
step {n} requests {n}2K, words {n}.1M
step {n} queue {n}2K rows {n}.4M
step {n} reward {n}1.2 memory {n}
step {n} A100-80GB x {n}
step {n} batch size {n}2 MB
step {n} tensor size {n}2 MB
step {n} shared memory {n}8 KB per block
step {n} message size {n}2 MB
step {n} max file size {n}2 MB
step {n} L2 cache {n}2 MB
step {n} GPU hours {n}.2K
step {n} {n}50 TFLOP/s/GPU
step {n}: throughput per GPU (TFLOP/s/GPU): {n}50.1
step {n} pinned buffers {n}2 MB
step {n} RAM disk {n}.2 GB
step {n} memory 1{n}E
step {n} memory {n}.0EB
step {n} memory {n}.0PB
step {n} memory used {n}00000 GB
step {n} +{n}.2 GB
step {n} -{n}.2 GB
step {n} {n} Gbit, {n} Gbps, {n}2 Mb
step {n} used {n}.2M
step {n} max {n}.2M peak {n}.1K
step {n} total {n}.1G
step {n} free {n}2M
step {n} limit {n}K
{"step": {n}, "lr": 1e-0{n}, "tokens": {n}000000, "memory_bank": {n}096}
{'step': {n}, 'train_samples': '{n}.2M', 'total_flos': {n}.2E16}
{'global_step': {n}, 'tokens_seen': '{n}2.0M', 'speed': '{n} MB/s'}
"""
MEMORY = [
    ("memory: 4672", 4672 * MIB),
    ("max mem: 4672", 4672 * MIB),
    ("memory: 5368709120", 5 * GIB),
    ("max_mem: 4672M", 4672 * MIB),
    ("mem 4672MB", 4672 * 10**6),
    ("GPU_mem 2.59G", round(2.59 * GIB)),
    ("'memory(GiB)': 41.1", round(41.1 * GIB)),
    ('"gpu_memory_mb": 4672.5', round(4672.5 * 10**6)),
    ("memory/max_active(GiB): 41.10", round(41.1 * GIB)),
    ("memory: 41.10GiB(52.01%)  tps: 8,000", round(41.1 * GIB)),
    ("GPU Mem (GB): 18.2", round(18.2 * GB)),
    ("memory (MB) | allocated: 5123.5 | max allocated: 7000.2", round(5123.5 * 10**6)),
    ("learning rate: 1.300E-06 | tokens 12.0M | mem 18.2 GB | 312 TFLOPs", round(18.2 * GB)),
    ("MA 10.2 GB  Max_MA 12.3 GB  CA 13.0 GB", round(10.2 * GB)),
    ("VmRSS: 1,024 kB", 1024 * 1000),
    ("vram usage 8.3Gi", round(8.3 * GIB)),
    ("bytes_in_use: 5368709120", 5 * GIB),
    ("allocated 18.2 GB tokens/s 400", round(18.2 * GB)),
    ("activation checkpointing mem 18.2 GB", round(18.2 * GB)),
    ("显存: 18.2GB", round(18.2 * GB)),
    ("GPU memory utilization: 18.2 GB", round(18.2 * GB)),
    ("used 18.2 GB", round(18.2 * GB)),
    ("18.2 GB", round(18.2 * GB)),
    ("gpu 0: 8.9G used", round(8.9 * GIB)),
]


NAMES_OF_OTHER_THINGS = """
lr learning_rate train/learning_rate base_lr lr_pg0 lr-AdamW loss train_loss val/loss nll perplexity
accuracy top1 f1_score grad_norm gnorm weight_norm momentum beta1 eps scale loss_scale tokens num_tokens
tokens_seen consumed_tokens total_tokens tokens_per_second tokens/s samples consumed_samples
samples_per_second train_samples num_samples examples images images_per_sec frames frames_per_second
sequences seq_len sequence_length max_length context_length batch_size global_batch_size micro_batch
params num_params trainable_params total_parameters model_size model_size_mb weights flops total_flos
tflops TFLOPs/GPU mfu hfu macs throughput throughput(GB/s) bandwidth_gbps bus_bandwidth_gb algbw busbw
speed train_speed(iter/s) iter_time step_time time_per_iteration data_time forward_ms eta elapsed
epoch epochs num_epochs gpu_util gpu_utilization utilization.gpu(%) utilization.memory(%) gpu_temp
temperature.gpu power.draw(W) gpu_power clocks.mem(MHz) fan.speed(%) memory(%) mem_percent memory_util
mem_pct gpu_mem_fraction system.memory.percent num_alloc_retries num_ooms alloc_count oom_events
disk_gb disk_used_gb disk.free(GiB) checkpoint_mb ckpt_size_gb file_size_bytes bytes_sent bytes_received
network_mb downloaded_gb uploaded_mb dataset_gb shard_mb swap_used_gb swap_gb io_read_mb io_write_mb
pcie_rx_mb nvlink_gb memory_bank memory_len mem_len replay_memory replay_memory_size memory_tokens
memory_slots episodic_memory members remembered num_workers queue_size vocab_size reward episode_length
score cost_usd requests words documents seed port pid version
"""
VALUES = ("{n}200", "{n}.5", "1.{n}E-05", "{n}.2M", "{n}12.0K", "{n}.1G", "{n}0000000000")


def test_names_of_other_things_are_no_memory() -> None:
    names = NAMES_OF_OTHER_THINGS.split()
    assert len(set(names)) >= 100
    for value in VALUES:
        values = [[value.replace("{n}", str(n))] * len(names) for n in range(1, 9)]
        head, rows = ["step", *names], [[str(n), *row] for n, row in enumerate(values, 1)]
        forms = {
            "csv": "\n".join(",".join(row) for row in [head, *rows]),
            "table": "\n".join("  ".join(row) for row in [head, *rows]),
            "bars": "\n".join(f"| {' | '.join(row)} |" for row in [head, *rows]),
            "json": json.dumps([dict(zip(head, row, strict=True)) for row in rows]),
            "lines": "\n".join(json.dumps(dict(zip(head, row, strict=True))) for row in rows),
            "numbers": json.dumps(
                [dict(zip(head, map(_number, row), strict=True)) for row in rows]
            ),
            "dict": "\n".join(f"INFO {dict(zip(head, row, strict=True))}" for row in rows),
        }
        for form, text in forms.items():
            assert dict(read_log(text).series) == {}, (form, value)
        for name in names:
            log = "\n".join(f"step {n} {name}={row[0]}" for n, row in enumerate(values, 1))
            assert dict(read_log(log).series) == {}, (name, value)


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def lines_that_are_no_memory() -> list[str]:
    return [line for line in NOT_MEMORY.splitlines() if line.strip()]


def test_there_are_as_many_lines_as_promised() -> None:
    assert len(set(lines_that_are_no_memory())) >= 100


@pytest.mark.parametrize("line", lines_that_are_no_memory())
def test_a_number_that_is_no_memory_is_not_read(line: str) -> None:
    log = "\n".join(line.replace("{n}", str(n)) for n in range(1, 9))
    assert dict(read_log(log).series) == {}


@pytest.mark.parametrize("line", lines_that_are_no_memory())
def test_memory_beside_it_is_read(line: str) -> None:
    log = "\n".join(f"{line.replace('{n}', str(n))} | memory: 18.{n} GB" for n in range(1, 9))
    if not line.startswith(("{", "step {n} memory", "step {n} mem")):
        assert [one.allocated_bytes for one in read_log(log).readings] == [
            round((18 + n / 10) * GB) for n in range(1, 9)
        ]


@pytest.mark.parametrize(("text", "count"), MEMORY)
def test_an_amount_of_memory_is_read(text: str, count: int) -> None:
    (reading,) = read_log(f"step 7 | {text}").readings
    assert (reading.step, reading.allocated_bytes) == (7, count)


def test_what_an_amount_is_of() -> None:
    def found(line: str) -> list[tuple[str, str, float]]:
        return [(one.device, one.role, one.count_bytes / GB) for one in amounts(line)]

    assert found("reserved: 20 GB, max allocated 19 GB, allocated: 18 GB, free: 1 GB") == [
        ("", "reserved_bytes", 20),
        ("", "peak_bytes", 19),
        ("", "allocated_bytes", 18),
        ("", "free_bytes", 1),
    ]
    assert found("18 GB allocated 20 GB reserved") == [
        ("", "allocated_bytes", 18),
        ("", "reserved_bytes", 20),
    ]
    assert found("cuda:1 used 18/24 GB, CPU 5 GB of 64 GB") == [
        ("GPU 1", "allocated_bytes", 18),
        ("GPU 1", "total_bytes", 24),
        ("CPU", "allocated_bytes", 5),
        ("CPU", "total_bytes", 64),
    ]
    assert found("[rank3] GPU mem: 18 GB (peak 20 GB), others 2 GB") == [
        ("rank 3 GPU", "allocated_bytes", 18),
        ("rank 3 GPU", "peak_bytes", 20),
        ("rank 3 GPU", "other_bytes", 2),
    ]


@pytest.mark.parametrize(
    ("name", "value", "count"),
    [
        ("memory.used [MiB]", "1000 MiB", 1000 * MIB),
        ("memory.used [MiB]", "1000", 1000 * MIB),
        ("GPU_mem", "2.59G", round(2.59 * GIB)),
        ("mem", "4672", 4672 * MIB),
        ("reserved_gb", "20", 20 * GB),
        ("utilization.memory [%]", "63", None),
        ("memory/num_ooms", "63", None),
        ("disk_gb", "63", None),
        ("tokens", "1.2G", None),
        ("mem_gb", "x", None),
        ("mem_gb", "nan", None),
        ("mem_gb", "-3", None),
        ("mem_gb", "", None),
        ("mem_gb", "1e999", None),
    ],
)
def test_a_cell_of_a_table(name: str, value: str, count: int | None) -> None:
    assert [one.count_bytes for one in cell_amounts(name, value)] == [count] * (count is not None)


def test_units() -> None:
    assert written_bytes("2", "GB") == 2 * GB
    assert written_bytes("2", "GB", binary=True) == 2 * GIB
    assert written_bytes("2", "GiB", binary=True) == 2 * GIB
    assert written_bytes("1,024", "KiB") == MIB
    assert written_bytes("2.5e3", "") == 2500
    assert written_bytes("7.11", "PiB") == round(7.11 * 1024**5)
