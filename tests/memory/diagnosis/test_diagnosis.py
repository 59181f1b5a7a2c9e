from __future__ import annotations

import json
import re

import numpy as np
import pytest

from expt.memory.diagnosis import advice
from expt.memory.diagnosis.diagnosis import diagnose, diagnose_error

MESSAGE = (
    "RuntimeError: CUDA out of memory. Tried to allocate 2.50 GiB (GPU 0; 23.69 GiB total "
    "capacity; 21.45 GiB already allocated; 1.89 GiB free; 21.50 GiB reserved in total by PyTorch)"
)
HANDBOOK = "".join(
    f"[Step {step}] loss: 2.31, GPU memory: {memory} GB\n"
    for step, memory in zip(
        range(100, 1000, 100),
        (18.2, 18.6, 19.0, 19.5, 20.1, 20.8, 21.7, 22.8, 24.2),
        strict=True,
    )
)


def test_the_handbooks_message_is_really_full() -> None:
    found = diagnose(MESSAGE)
    assert found.kind == "oom"
    assert "not fragmentation: the device is really full" in found.cause
    assert "21.45 GiB of 23.69 GiB are in tensors" in found.cause
    assert "attention matrix" in found.cause
    assert any("0.2% of what is reserved" in line for line in found.evidence)
    order = ("accumulation", "checkpointing", "Mixed", "Fused", "Freeze", "Offload", "parallelism")
    for remedy, word in zip(found.advice, order, strict=False):
        assert word in remedy


@pytest.mark.parametrize("end", ["Step 1000: OOM\n", f"Step 1000\n{MESSAGE}\n", ""])
def test_the_handbooks_log_is_an_accelerating_leak(end: str) -> None:
    found = diagnose(HANDBOOK + end)
    assert found.kind == "leak"
    assert "accelerating" in found.cause
    assert "from step 100 to 900" in found.cause
    assert ("Memory ran out at step 1000." in found.evidence) == bool(end)
    told = " ".join(found.advice)
    for likely in ("loss is kept with its graph", "appended to a list", "Hooks", "cache grows"):
        assert likely in told


def test_a_steady_log() -> None:
    rng = np.random.default_rng(0)
    lines = [f"step {at} mem {18 + 0.1 * rng.normal():.2f} GB of 24 GB" for at in range(50)]
    found = diagnose("\n".join(lines))
    assert (found.kind, found.advice) == ("steady", ())
    assert found.forecast is not None
    assert found.forecast.risk < 0.01


def test_a_steady_log_that_ends_in_another_error_is_that_error() -> None:
    steady = "".join(f"step {at} mem 18.2 GB\n" for at in range(20))
    crash = "RuntimeError: CUDA error: device-side assert triggered\n"
    found = diagnose(steady + crash)
    assert (found.kind, found.evidence[0]) == ("not_oom", crash.strip())
    assert "steady" in found.evidence[1]
    assert diagnose(crash + steady).kind == "steady", "it was survived"


@pytest.mark.parametrize(
    "line",
    [
        "NCCL watchdog thread terminated normally",
        "evaluation: 3 boxes out of bounds were clipped",
        "UserWarning: cannot pin memory",
    ],
)
def test_a_steady_log_that_ends_in_no_error_is_steady(line: str) -> None:
    steady = "".join(f"step {at} mem 18.2 GB\n" for at in range(20))
    assert diagnose(steady + line).kind == "steady"


@pytest.mark.parametrize(
    "line",
    [
        "triton.runtime.errors.OutOfResources: out of resource: shared memory, Required: 147456",
        "Loss.cu:250: block: [0,0,0], thread: [1,0,0] device-side assert triggered",
        "tee: train.log: No space left on device",
        "[rank0]:[E ProcessGroupNCCL.cpp:475] NCCL timeout",
        "Failed to initialize NVML: Driver/library version mismatch",
    ],
)
def test_a_steady_log_that_ends_in_a_known_error_without_the_word_is_that_error(line: str) -> None:
    steady = "".join(f"step {at} mem 18.2 GB\n" for at in range(20))
    assert diagnose(steady + line).kind == "not_oom"


def test_what_records_of_json_on_one_line_say_is_not_below_them() -> None:
    rows = [
        {"step": at, "memory_mb": 18000, "note": "OSError: Too many open files"} for at in range(20)
    ]
    assert diagnose(json.dumps(rows)).kind == "steady"


def test_what_stands_below_records_of_json_is_an_error_as_below_a_log() -> None:
    records = "".join(json.dumps({"step": at, "memory_mb": 18000}) + "\n" for at in range(20))
    crash = "RuntimeError: CUDA error: device-side assert triggered\n"
    assert diagnose(records).kind == "steady"
    for end in (crash, crash + "exitcode  : -9\n"):
        found = diagnose(records + end)
        assert (found.kind, found.evidence[0]) == ("not_oom", crash.strip())


@pytest.mark.parametrize(
    "echo", ["cache_size_limit: 64\n", "Can't initialize NVML\nstep 1: 3 GB\n"]
)
def test_what_a_log_merely_mentions_hides_no_kill(echo: str) -> None:
    assert diagnose(f"{echo}exitcode: -9\n").kind == "oom"


def test_the_compiler_that_gives_up_is_known() -> None:
    line = "torch._dynamo hit config.recompile_limit (8)"
    assert diagnose(line).kind == diagnose_error(RuntimeError(line)).kind == "not_oom"
    assert "compiler" in diagnose(line).cause


def test_a_lookalike_behind_another_error_is_found() -> None:
    error = ValueError("a bad batch")
    error.__cause__ = RuntimeError("CUDA error: device-side assert triggered")
    assert "assertion" in diagnose_error(error).cause


def test_a_steady_log_that_ends_in_an_oom_is_an_oom() -> None:
    lines = [f"step {at} mem 18.{at % 3} GB" for at in range(50)]
    assert diagnose("\n".join([*lines, MESSAGE])).kind == "oom"
    assert diagnose("\n".join([*lines, "step 51: OOM"])).kind == "oom"


def test_the_outlook_of_a_leak_that_has_not_run_out() -> None:
    lines = [f"step {at} mem {18 + 0.1 * at:.2f} GB of 24 GB" for at in range(50)]
    found = diagnose("\n".join(lines))
    assert found.kind == "leak"
    assert found.forecast is not None
    assert found.forecast.action == "halve_batch_and_checkpoint"
    assert "Meanwhile" in found.advice[-1]
    assert any("in about" in line for line in found.evidence)


def two_devices(gpu: float, cpu: float, end: str = "") -> str:
    """A log of a GPU and the host whose memory grows by so many GB a step."""
    lines = (
        f"step {at} GPU mem {10 + gpu * at:.2f} GB | CPU mem {40 + cpu * at:.2f} GB"
        for at in range(1, 41)
    )
    return "\n".join([*lines, end])


def test_of_several_devices_the_one_that_leaks_is_named() -> None:
    assert "on the GPU:" in diagnose(two_devices(0.3, 0)).cause
    host = diagnose(two_devices(0, 0.5))
    assert "on the CPU:" in host.cause
    assert "host's memory" in host.advice[0]
    both = diagnose(two_devices(0.3, 0.9))
    assert "on the GPU and the CPU" in both.cause
    assert both.trend is not None
    assert both.trend.growth_bytes_per_step == pytest.approx(3e8, rel=0.01), "the GPU's"
    assert diagnose(two_devices(0, 0)).kind == "steady"


def test_the_memory_that_ran_out_is_the_one_that_is_judged() -> None:
    full = diagnose(two_devices(0, 0.5, MESSAGE))
    assert full.kind == "oom", "the host leaks, and the GPU ran out"
    assert any(line.startswith("CPU: leak") for line in full.evidence)
    killed = diagnose(two_devices(0.3, 0.5, "failed (exitcode: -9) local_rank: 0 (pid: 43)"))
    assert killed.trend is not None
    assert killed.trend.growth_bytes_per_step == pytest.approx(5e8, rel=0.01), "the host's"
    assert "Memory probably ran out." in killed.evidence


def test_fragmentation_other_processes_and_reserves_in_a_log() -> None:
    growing = [f"step {at} allocated 10 GB reserved {11 + 0.1 * at:.1f} GB" for at in range(60)]
    assert diagnose("\n".join(growing)).kind == "fragmentation"
    others = [f"step {at} allocated 10 GB, others {1 + 0.1 * at:.1f} GB" for at in range(60)]
    assert diagnose("\n".join(others)).kind == "other_process"


@pytest.mark.parametrize(
    ("text", "kind", "first"),
    [
        (
            "CUDA out of memory. Tried to allocate 764.00 MiB. GPU 0 has a total capacity of 47.37 "
            "GiB of which 442.88 MiB is free. Of the allocated memory 42.40 GiB is allocated by "
            "PyTorch, and 3.24 GiB is reserved by PyTorch but unallocated.",
            "fragmentation",
            "expandable_segments",
        ),
        (
            "CUDA out of memory. Tried to allocate 978.00 MiB. GPU 0 has a total capacity of 15.98 "
            "GiB of which 630.00 MiB is free. Process 81 has 14.9 GiB memory in use. Of the "
            "allocated memory 0 bytes is allocated by PyTorch, and 0 bytes is reserved by PyTorch "
            "but unallocated.",
            "other_process",
            "nvidia-smi",
        ),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling x", "oom", "workspace"),
        ("NCCL WARN Cuda failure 2 'out of memory'", "oom", "NCCL"),
        ("MemoryError", "oom", "loader workers"),
        (
            "triton.runtime.errors.OutOfResources: out of resource: shared memory, Required: "
            "102400, Hardware limit: 101376",
            "not_oom",
            "block sizes",
        ),
        ("OSError: [Errno 28] No space left on device", "not_oom", "hydra.run.dir"),
        ("RuntimeError: CUDA error: device-side assert triggered", "not_oom", "trainer.device=cpu"),
        ("DataLoader worker (pid 1) is killed by signal: Bus error", "not_oom", "/dev/shm"),
        ("all is well", "not_oom", "whole traceback"),
    ],
)
def test_the_first_advice_fits(text: str, kind: str, first: str) -> None:
    found = diagnose(text)
    assert found.kind == kind
    assert first in found.advice[0]


def test_an_exception() -> None:
    error = ValueError("the step failed")
    error.__cause__ = RuntimeError(MESSAGE)
    assert diagnose_error(error).kind == "oom"
    assert diagnose_error(RuntimeError("CUDA error: an illegal memory access")).kind == "not_oom"
    assert diagnose_error(KeyError("x")).kind == "not_oom"


def test_it_can_be_written_as_json() -> None:
    written = json.loads(json.dumps(diagnose(HANDBOOK + "Step 1000: OOM").as_dict()))
    assert list(written)[:4] == ["kind", "cause", "evidence", "advice"]
    assert written["trend"]["first_step"] == 100
    assert json.loads(json.dumps(diagnose(MESSAGE).as_dict()))["oom"]["kind"] == "cuda"


def test_every_setting_that_is_named_exists(composed) -> None:
    sentences = [
        line for name in dir(advice) if name.isupper() for line in _lines(getattr(advice, name))
    ]
    settings = {found for line in sentences for found in re.findall(r"\b[a-z]+\.[a-z_]+=\w+", line)}
    settings |= {found for line in sentences for found in re.findall(r"\bmemory=\w+", line)}
    settings -= {"trainer.resume=RUN_DIR"}
    assert "memory.activation_checkpointing=true" in settings
    assert "memory=lite" in settings
    assert any("memory.gradient_accumulation" in line for line in sentences)
    for setting in settings | {"memory.gradient_accumulation=2", "data.batch_size=4"}:
        if "(" not in setting and not setting.startswith("torch."):
            composed(setting.replace("memory=", "+memory="))


def _lines(value: object) -> list[str]:
    if isinstance(value, dict):
        return [line for part in value.values() for line in _lines(part)]
    return [value] if isinstance(value, str) else list(value) if isinstance(value, tuple) else []
