# ruff: noqa: E501  (a message stays in one piece)

from __future__ import annotations

import errno
import subprocess
import sys

import numpy as np
import pytest
import torch

from expt.memory.diagnosis.oom import classify_oom

GIB = 1024**3
MIB = 1024**2
HINT = (
    " If reserved but unallocated memory is large try setting PYTORCH_ALLOC_CONF="
    "expandable_segments:True to avoid fragmentation.  See documentation for Memory Management "
    "(https://pytorch.org/docs/stable/notes/cuda.html#environment-variables)"
)
NEW = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 3.00 GiB. GPU 0 has a total "
    "capacity of 79.14 GiB of which 2.09 GiB is free. Including non-PyTorch memory, this process "
    "has 77.04 GiB memory in use. Of the allocated memory 75.40 GiB is allocated by PyTorch, and "
    "1.15 GiB is reserved by PyTorch but unallocated." + HINT
)
OLD = (
    "RuntimeError: CUDA out of memory. Tried to allocate 2.50 GiB (GPU 0; 23.69 GiB total "
    "capacity; 21.45 GiB already allocated; 1.89 GiB free; 21.50 GiB reserved in total by PyTorch)"
)
MPS = (
    "RuntimeError: MPS backend out of memory (MPS allocated: 17.36 {0}, other allocations: 613.56 "
    "{1}, max allowed: 18.13 {0}). Tried to allocate 192.00 {1} on private pool. Use "
    "PYTORCH_MPS_HIGH_WATERMARK_RATIO=0.0 to disable upper limit for memory allocations (may cause "
    "system failure)."
)
WORDINGS = [
    (NEW, "cuda"),
    (NEW.replace("torch.OutOfMemoryError", "torch.cuda.OutOfMemoryError"), "cuda"),
    (OLD, "cuda"),
    (NEW.replace("CUDA out", "HIP out"), "hip"),
    (NEW.replace("CUDA out", "XPU out"), "xpu"),
    (NEW.replace("CUDA out", "MLU out"), "device"),
    (NEW.replace("CUDA out", "Out"), "device"),
    ("CUDA out of memory. Tried to allocate more than 1EB memory.", "cuda"),
    ("torch.OutOfMemoryError: CUDA out of memory.", "cuda"),
    ("torch.AcceleratorError: CUDA error: out of memory\nCUDA kernel errors might be", "cuda"),
    ("RuntimeError: CUDA driver error: out of memory", "cuda"),
    ("RuntimeError: cuda runtime error (2) : out of memory at THCStorage.cu:58", "cuda"),
    ("RuntimeError: Triton Error [CUDA]: out of memory", "cuda"),
    ("cuMemAlloc failed: CUDA_ERROR_OUT_OF_MEMORY", "cuda"),
    ("Error out of memory at line 380 in file /src/csrc/pythonInterface.c", "cuda"),
    ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "cublas"),
    ("RuntimeError: cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "cudnn"),
    ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", "cudnn"),
    (
        "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate`",
        "cuda_library",
    ),
    ("RuntimeError: cuFFT error: CUFFT_ALLOC_FAILED", "cuda_library"),
    (
        "torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:1691, unhandled "
        "cuda error (run with NCCL_DEBUG=INFO for details), NCCL version 2.21.5\n"
        "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
        "Cuda failure 2 'out of memory'",
        "nccl",
    ),
    ("host:77:91 [0] include/alloc.h:99 NCCL WARN Cuda failure 'out of memory'", "nccl"),
    (
        "ncclUnhandledCudaError: Call to CUDA function failed.\n"
        "Failed to CUDA calloc 6291456 bytes",
        "nccl",
    ),
    (
        'RuntimeError: NVML_SUCCESS == r INTERNAL ASSERT FAILED at "../c10/cuda/'
        'CUDACachingAllocator.cpp":995, please report a bug to PyTorch.',
        "nvml",
    ),
    ("RuntimeError: HIP error: out of memory", "hip"),
    ("hipMalloc returned hipErrorOutOfMemory", "hip"),
    ("CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`", "hip"),
    ("level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)", "xpu"),
    (MPS.format("GB", "MB"), "mps"),
    (MPS.format("GiB", "MiB"), "mps"),
    ("RuntimeError: Invalid buffer size: 24.00 GiB", "mps"),
    ("Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)", "mps"),
    (
        "RuntimeError: [enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't "
        "allocate memory: you tried to allocate 189079224448 bytes. Error code 12 (Cannot allocate "
        "memory)",
        "host_allocator",
    ),
    (
        "RuntimeError: [enforce fail at alloc_cpu.cpp:114] data. DefaultCPUAllocator: not enough "
        "memory: you tried to allocate 9909043200 bytes.",
        "host_allocator",
    ),
    ("terminate called after throwing an instance of 'std::bad_alloc'", "host_allocator"),
    ("OSError: [Errno 12] Cannot allocate memory", "host_allocator"),
    (
        "RuntimeError: unable to mmap 4096 bytes from file <w.pt>: Cannot allocate memory (12)",
        "host_allocator",
    ),
    ('Traceback (most recent call last):\n  File "a.py", line 1\nMemoryError', "memory_error"),
    (
        "numpy._core._exceptions._ArrayMemoryError: Unable to allocate 7.11 PiB for an array with "
        "shape (1000000000000000,) and data type float64",
        "memory_error",
    ),
    (
        "[812.1] Out of memory: Killed process 4242 (python) total-vm:9kB, anon-rss:8kB",
        "oom_killer",
    ),
    ("slurmstepd: error: Detected 1 oom_kill event in StepId=64.0", "oom_killer"),
    ("Original Traceback (most recent call last):\nRuntimeError: CUDA out of memory.\n", "cuda"),
    (
        "Failed to load model (original error: CUDA out of memory. Tried to allocate 112.00 MiB.)",
        "cuda",
    ),
]
DECOYS = [
    "triton.runtime.errors.OutOfResources: out of resource: shared memory, Required: 102400, "
    "Hardware limit: 101376. Reducing block sizes or `num_stages` may help.",
    "RuntimeError: CUDA error: an illegal memory access was encountered",
    "RuntimeError: CUDA error: device-side assert triggered",
    "RuntimeError: CUDA error: too many resources requested for launch",
    "RuntimeError: Triton Error [CUDA]: an illegal memory access was encountered",
    "IndexError: index 12 is out of bounds for dimension 0 with size 12",
    "OSError: [Errno 28] No space left on device",
    "OSError: [Errno 24] Too many open files",
    "RuntimeError: unable to open shared memory object </torch_7> in read-write mode: Too many "
    "open files (24)",
    "RuntimeError: DataLoader worker (pid 123) is killed by signal: Bus error. It is possible that "
    "dataloader's workers are out of shared memory. Please try to raise your shared memory limit.",
    "ERROR: Unexpected bus error encountered in worker. This might be caused by insufficient "
    "shared memory (shm).",
    "torch._dynamo hit config.recompile_limit (8)",
    "RuntimeError: cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in "
    "a non-contiguous input.",
    "checked that model does not run out of memory: ok",
    "test_out_of_memory.py::test_recovers PASSED",
    "If you see CUDA out of memory, lower the batch size.",
    "If you see 'CUDA out of memory', lower the batch size.",
    "hint: this shows when CUBLAS_STATUS_ALLOC_FAILED is returned by another library",
    "INFO: to avoid CUDA out of memory errors, gradient checkpointing is on",
    "memory budget 8 GiB, 0 out of memory events",
    "NCCL error: unhandled cuda error, NCCL version 2.21.5\nCuda failure 1 'invalid argument'",
    "NCCL WARN Failed to CUDA calloc async 2432 bytes\nCuda failure 700 'illegal memory access'",
    "UserWarning: Can't initialize NVML",
    "RuntimeError: CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`",
    "RuntimeError: cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned",
    "ptxas error: Entry function uses too much shared data (0x19000 bytes, 0xc000 max)",
    "  except MemoryError:\n    raise RuntimeError('bad input')\nRuntimeError: bad input",
    "RecursionError: maximum recursion depth exceeded",
    "set PYTORCH_ALLOC_CONF=expandable_segments:True",
    "",
]


def test_there_are_as_many_wordings_and_decoys_as_promised() -> None:
    assert len({text for text, _ in WORDINGS}) >= 25
    assert len(set(DECOYS)) >= 10


@pytest.mark.parametrize(("text", "kind"), WORDINGS)
def test_a_wording_is_known(text: str, kind: str) -> None:
    report = classify_oom(text)
    assert report is not None
    assert report.kind == kind
    assert report.evidence
    line = "step 3 loss 0.1\n"
    logged = classify_oom(f"{line * 300}{text}\n{line * 300}")
    assert logged is not None
    assert (logged.kind, logged.figures) == (kind, report.figures)


@pytest.mark.parametrize("text", DECOYS)
def test_a_decoy_is_refused(text: str) -> None:
    assert classify_oom(text) is None
    assert classify_oom(RuntimeError(text)) is None


def test_figures_of_the_newer_wording() -> None:
    report = classify_oom(NEW)
    assert report is not None
    assert report.bytes_requested == 3 * GIB
    assert report.bytes_total == round(79.14 * GIB)
    assert report.bytes_free == round(2.09 * GIB)
    assert report.bytes_allocated == round(75.40 * GIB)
    assert report.bytes_reserved == pytest.approx(76.55 * GIB)
    assert report.figures.process_bytes == round(77.04 * GIB)
    assert report.cause == "full"


def test_the_handbooks_message_is_full_and_not_fragmented() -> None:
    for text in (OLD, OLD.replace("; ", ";\n  ").replace(" (GPU", "\n(GPU")):
        report = classify_oom(text)
        assert report is not None
        assert report.bytes_requested == round(2.5 * GIB)
        assert report.bytes_total == round(23.69 * GIB)
        assert report.bytes_allocated == round(21.45 * GIB)
        assert report.bytes_free == round(1.89 * GIB)
        assert report.bytes_reserved == round(21.5 * GIB)
        assert report.cause == "full"
    retold = "Tried to allocate 2.50 GiB; 23.69 total, 21.45 allocated, 1.89 free, 21.50 reserved"
    report = classify_oom(retold)
    assert report is not None
    assert (report.bytes_total, report.cause) == (round(23.69 * GIB), "full")


def test_the_traffic_guides_message() -> None:
    text = (
        "Tried to allocate 5.88 GiB; 31.36 GiB total, 5.61 GiB free, 24.93 GiB allocated by PyTorch"
    )
    report = classify_oom(text)
    assert report is not None
    assert (report.kind, report.cause) == ("cuda", "full")
    assert report.bytes_allocated == round(24.93 * GIB)


def newer(
    requested: str, total: str, free: str, allocated: str, unused: str, more: str = ""
) -> str:
    """The message of torch 2, with figures in GiB."""
    return (
        f"CUDA out of memory. Tried to allocate {requested} GiB. GPU 0 has a total capacity of {total} "
        f"GiB of which {free} GiB is free. {more}Of the allocated memory {allocated} GiB is allocated "
        f"by PyTorch, and {unused} GiB is reserved by PyTorch but unallocated."
    )


def older(requested: str, total: str, allocated: str, free: str, reserved: str) -> str:
    """The message of torch 1, with figures in GiB."""
    return (
        f"CUDA out of memory. Tried to allocate {requested} GiB (GPU 0; {total} GiB total capacity; "
        f"{allocated} GiB already allocated; {free} GiB free; {reserved} GiB reserved in total by "
        "PyTorch)"
    )


XPU = (
    "XPU out of memory. Tried to allocate {0} GiB. GPU 0 has a total capacity of 15.11 GiB{1}. Of the "
    "allocated memory 0 bytes is allocated by PyTorch, and 0 bytes is reserved by PyTorch but "
    "unallocated."
)
WHY = [
    # room left: a limit if one is named, else it was gone for a moment only
    (newer("2.00", "80.00", "50.00", "7.50", "0.30", "8.00 GiB allowed; "), "limit"),
    # under a limit too, pieces that would hold it are fragmentation
    (newer("0.02", "24.00", "18.00", "4.00", "1.98", "6.00 GiB allowed; "), "fragmentation"),
    (newer("2.20", "24.00", "18.00", "4.00", "1.90", "6.00 GiB allowed; "), "limit"),
    (newer("2.00", "80.00", "50.00", "28.00", "1.00"), "transient"),
    (older("2.26", "6.00", "0.76", "3.03", "1.24"), "transient"),
    (older("10.84", "23.65", "1.06", "10.26", "12.53"), "fragmentation"),
    # others hold it, whatever lies unused
    (older("0.02", "61.00", "10.20", "0.01", "10.65"), "other_process"),
    (older("1.00", "24.00", "3.00", "0.50", "6.00"), "other_process"),
    (
        newer("1.00", "24.00", "0.50", "3.00", "4.00", "Process 7 has 15.50 GiB memory in use. "),
        "other_process",
    ),
    (older("0.02", "60.97", "10.24", "0.01", "10.65").replace("CUDA", "NPU"), "other_process"),
    # full is full, with the rest of its blocks; so is a small card with a context of its own
    (newer("0.09", "8.00", "0.00", "7.30", "0.12"), "full"),
    (newer("0.02", "23.69", "0.01", "22.50", "0.60"), "full"),
    (older("0.02", "3.94", "2.98", "0.01", "3.00"), "full"),
    (older("0.02", "1.96", "1.24", "0.00", "1.25"), "full"),
    (newer("4.00", "80.00", "1.00", "74.00", "2.00"), "full"),
    # a real share lies in pieces
    (newer("3.00", "24.00", "0.20", "12.00", "11.00"), "fragmentation"),
    (newer("1.00", "80.00", "0.30", "60.00", "18.00"), "fragmentation"),
    # what is free is not said, and the request would have fit
    (XPU.format("1.71", ""), "other_process"),
    (XPU.format("8.00", ""), "limit"),
    (XPU.format("16.00", ""), "too_large"),
    (XPU.format("9.00", " of which 12.50 GiB is free"), "transient"),
    (XPU.format("9.00", " of which 1.50 GiB is free"), "other_process"),
    (
        "RuntimeError: Current platform can NOT allocate memory block with size larger than 4GB! Tried to "
        "allocate 6.85 GiB (GPU 0; 15.56 GiB total capacity; 0 bytes already allocated; 0 bytes reserved "
        "in total by PyTorch)",
        "limit",
    ),
    # other back ends
    (
        "torch.OutOfMemoryError: Allocation on device 0 would exceed allowed memory. (out of memory)\n"
        "Currently allocated     : 7.45 GiB\nRequested               : 2.50 GiB\n"
        "Device limit            : 23.69 GiB\nFree (according to CUDA): 14.00 GiB\n"
        "PyTorch limit (set by user-supplied memory fraction)\n                        : 8.00 GiB",
        "limit",
    ),
    (
        "cupy.cuda.memory.OutOfMemoryError: Out of memory allocating 8,000 bytes (allocated so far: 0 bytes).",
        "unknown",
    ),
    (MPS.format("GiB", "MiB").replace("613.56", "0.10").replace("17.36", "18.00"), "full"),
    (
        "MPS backend out of memory (MPS allocated: 2.00 GB, other allocations: 6.50 GB, max allowed: 9.07 "
        "GB). Tried to allocate 1.00 GB on private pool.",
        "other_process",
    ),
    (
        "Out of memory error on GPU 0. Cannot allocate 3GB memory on GPU 0, 6GB memory has been allocated "
        "and available memory is only 1.0MB.",
        "full",
    ),
    (
        "RESOURCE_EXHAUSTED: Attempting to allocate 4.00G. That was not possible. There are 2.62G free.",
        "full",
    ),
]


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        # 3.2 GiB lie unused in pieces and 0.75 are asked for
        (
            "CUDA out of memory. Tried to allocate 764.00 MiB. GPU 0 has a total capacity of 47.37 "
            "GiB of which 442.88 MiB is free. Of the allocated memory 42.40 GiB is allocated by "
            "PyTorch, and 3.24 GiB is reserved by PyTorch but unallocated.",
            "fragmentation",
        ),
        (
            "CUDA out of memory. Tried to allocate 978.00 MiB. GPU 0 has a total capacity of 15.98 "
            "GiB of which 630.00 MiB is free. Process 81 has 14.9 GiB memory in use. Process 99 "
            "has 0.5 GiB memory in use. Of the allocated memory 0 bytes is allocated by PyTorch, "
            "and 0 bytes is reserved by PyTorch but unallocated.",
            "other_process",
        ),
        (
            "CUDA out of memory. Tried to allocate 256.00 MiB. GPU 0 has a total capacity of 47.53 "
            "GiB of which 16.88 MiB is free. Process 3652628 has 47.51 GiB memory in use. Of the "
            "allocated memory 47.14 GiB is allocated by PyTorch, and 57.79 MiB is reserved by "
            "PyTorch but unallocated.",
            "full",
        ),
        (
            "CUDA out of memory. Tried to allocate 130206.04 GiB. GPU 0 has a total capacty of "
            "23.56 GiB of which 16.57 GiB is free.",
            "too_large",
        ),
        (
            "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.14 "
            "GiB of which 60.00 GiB is free. 8.00 GiB allowed; Of the allocated memory 7.99 GiB is "
            "allocated by PyTorch, and 8.00 MiB is reserved by PyTorch but unallocated.",
            "limit",
        ),
        ("torch.OutOfMemoryError: CUDA out of memory.", "unknown"),
        *WHY,
    ],
)
def test_the_figures_say_why(text: str, cause: str) -> None:
    report = classify_oom(text)
    assert report is not None
    assert report.cause == cause


def test_mps_wrote_gb_for_gib() -> None:
    for text in (MPS.format("GB", "MB"), MPS.format("GiB", "MiB")):
        report = classify_oom(text)
        assert report is not None
        assert report.bytes_allocated == round(17.36 * GIB)
        assert report.bytes_requested == 192 * MIB


def test_real_exceptions_of_the_host() -> None:
    with pytest.raises(RuntimeError) as torchs:
        torch.empty(10**15)
    with pytest.raises(MemoryError) as numpys:
        np.empty(10**15)
    with pytest.raises(MemoryError) as pythons:
        bytearray(10**15)
    reports = [classify_oom(raised.value) for raised in (torchs, numpys, pythons)]
    kinds = [report.kind for report in reports if report is not None]
    assert kinds == ["host_allocator", "memory_error", "memory_error"]
    assert reports[0] is not None
    assert reports[0].bytes_requested == 4 * 10**15
    assert reports[2] is not None
    assert reports[2].evidence == "MemoryError"


def test_the_type_alone_is_enough() -> None:
    report = classify_oom(torch.OutOfMemoryError("the budget of 200 MiB is used up"))
    assert report is not None
    assert (report.kind, report.figures.limit_bytes) == ("device", 200 * MIB)
    report = classify_oom(OSError(errno.ENOMEM, "Cannot allocate memory", "fork"))
    assert report is not None
    assert report.kind == "host_allocator"
    assert classify_oom(OSError(errno.ENOSPC, "No space left on device")) is None


def test_causes_contexts_and_groups_are_searched() -> None:
    inner = torch.OutOfMemoryError(OLD)
    with pytest.raises(ValueError) as caused:
        raise ValueError("the step failed") from inner
    assert classify_oom(caused.value) is not None
    with pytest.raises(KeyError) as during:
        try:
            raise inner
        except RuntimeError:
            raise KeyError("cleanup") from None
    assert classify_oom(during.value) is None, "whoever wrote `from None` says it is unrelated"
    with pytest.raises(KeyError) as during:
        try:
            raise inner
        except RuntimeError:
            {}["cleanup"]
    assert classify_oom(during.value) is not None
    assert classify_oom(ExceptionGroup("two", [ValueError("a"), inner])) is not None
    circle, other = ValueError("a"), ValueError("b")
    circle.__cause__, other.__cause__ = other, circle
    assert classify_oom(circle) is None


def test_a_long_log_takes_no_time() -> None:
    text = "step 1 loss 0.1 NCCL INFO Channel unhandled cuda error, all is well\n" * 20_000
    assert classify_oom(text) is None


def test_importing_memory_stays_without_torch_and_scipy() -> None:
    program = (
        "import sys, expt.memory as m\n"
        "assert m.classify_oom('CUDA out of memory.').kind == 'cuda'\n"
        "import expt.memory.diagnosis.diagnosis\n"
        "print('torch' in sys.modules, 'scipy' in sys.modules, 'MemoryManager' in dir(m))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert ran.stdout.split() == ["False", "False", "True"]
    import expt.memory

    with pytest.raises(AttributeError, match="nothing"):
        _ = expt.memory.nothing


def test_the_figures_of_two_ranks_are_not_mixed() -> None:
    first = "[rank0]: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 23.69 GiB total"
    second = (
        "[rank1]: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has 23.69 GiB total. "
        "Process 77 has 20.00 GiB memory in use. 2.50 GiB is allocated by PyTorch"
    )
    report = classify_oom(f"{first}\n{second}")
    assert report is not None
    assert report.figures == classify_oom(first).figures  # type: ignore[union-attr]
