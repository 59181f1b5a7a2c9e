"""How many back ends say that memory ran out, whose it was, and what only sounds like it.

The messages are written after those of the programs named beside them, with figures of our own.
"""

# ruff: noqa: E501  (a message stays in one piece)

from __future__ import annotations

import pytest

from expt.memory.diagnosis.diagnosis import diagnose, diagnose_error
from expt.memory.diagnosis.oom import classify_oom, probable_oom

OUT_OF_MEMORY = {
    "cuda": [
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 512.00 MiB. GPU 3 has a "
        "total capacity of 39.39 GiB of which 101.00 MiB is free.",
        "RuntimeError: CUDA error: out of memory",
        "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 9216.00 MiB on device 0: "
        "cudaMalloc failed: out of memory",
        "mxnet.base.MXNetError: src/storage/pooled_storage_manager.h:161: cudaMalloc retry failed: "
        "out of memory",
        "failed to allocate 6.10G (6549825536 bytes) from device: CUDA_ERROR_OUT_OF_MEMORY",
        "torch.OutOfMemoryError: CUDA error(2), out of memory.",
        "MemoryError: std::bad_alloc: out_of_memory: CUDA error at: mr.hpp:70: "
        "cudaErrorMemoryAllocation out of memory",
    ],
    "cublas": ["RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasLtCreate"],
    "cudnn": ["RuntimeError: cuDNN error: CUDNN_STATUS_ALLOC_FAILED"],
    "cuda_library": [
        "cusparse error: CUSPARSE_STATUS_ALLOC_FAILED",
        "CURAND_STATUS_ALLOCATION_FAILED",
    ],
    "nccl": [
        "node7:12:40 [3] transport/shm.cc:31 NCCL WARN Cuda failure 2 'out of memory'",
        "node7:12:40 [3] RCCL WARN HIP failure 'out of memory'",
    ],
    "hip": [
        "torch.OutOfMemoryError: HIP out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total "
        "capacity of 63.98 GiB of which 1.02 GiB is free.",
        "MIOpen(HIP): Error miopenStatusAllocFailed",
        "hipErrorOutOfMemory: hipMalloc of the workspace",
    ],
    "xpu": [
        "torch.OutOfMemoryError: XPU out of memory. Tried to allocate 1.00 GiB. GPU 0 has a total "
        "capacity of 11.59 GiB of which 12.00 MiB is free.",
        "RuntimeError: Native API failed. Native API returns: UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY",
        "RuntimeError: XPU error: out of memory",
    ],
    "mps": [
        "RuntimeError: MPS backend out of memory (MPS allocated: 8.80 GiB, other allocations: 200.00 "
        "MiB, max allowed: 9.07 GiB). Tried to allocate 256.00 MiB on private pool.",
        "Error: command buffer exited with error status. Insufficient Memory "
        "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)",
    ],
    "npu": [
        "RuntimeError: NPU out of memory. Tried to allocate 3.00 GiB (NPU 0; 60.97 GiB total capacity; "
        "58.92 GiB already allocated; 58.92 GiB current active; 1.66 GiB free; 58.95 GiB reserved in "
        "total by PyTorch)",
        "EL0004: [PID: 77] 2026-01-02-03:04:05 Failed to allocate memory.\n"
        "        Possible Cause: Available memory is insufficient.",
        "        alloc device memory failed, runtime result = 207001[FUNC:ReportCallError]",
        "Call rtMalloc fail, purpose: page caching, type = 2, size:3221291008, device_id:0",
        "[npu_driver.cc:12] MallocDevice: [drv api] halMemAlloc failed: size=2147483648, drvRetCode=6!",
        "Out of Memory!!! Request memory size: 34359738368, Memory Statistic:",
        "Malloc device memory failed, size[2147483648], ret[207001], Device[0] Available memory "
        "size: 1024 may be other processes occupying this card",
    ],
    "device": [
        "torch.OutOfMemoryError: MLU out of memory. Tried to allocate 1.00 GiB.",
        # TensorFlow
        "ResourceExhaustedError: OOM when allocating tensor with shape[64,512,7,7] and type float on "
        "/job:localhost/replica:0/task:0/device:GPU:0 by allocator GPU_0_bfc [Op:Conv2D]",
        "ResourceExhaustedError: {{function_node __wrapped__Mul}} failed to allocate memory [Op:Mul]",
        "W bfc_allocator.cc:479] Allocator (GPU_0_bfc) ran out of memory trying to allocate 1.17GiB "
        "(rounded to 1258291200)requested by op Add",
        # JAX and XLA
        "jaxlib.xla_extension.XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory while trying to "
        "allocate 17179869184 bytes.",
        "XlaRuntimeError: RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of "
        "15.48G hbm. Exceeded hbm capacity by 5.02G.",
        "jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: Attempting to allocate 4.00G. That was not "
        "possible. There are 2.62G free.; (0x0x0_HBM0)",
        "RESOURCE_EXHAUSTED: Failed to allocate request for 2.00GiB (2147483648B) on device ordinal 0",
        "XlaRuntimeError: INTERNAL: Failed to allocate 1073741824 bytes for new constant",
        "InternalError: Failed copying input tensor to GPU:0: Dst tensor is not initialized.",
        "ValueError: No available memory for the cache blocks. Try increasing gpu_memory_utilization",
        # Paddle
        "ResourceExhaustedError: \n\nOut of memory error on GPU 1. Cannot allocate 98.25MB memory on "
        "GPU 1, 6.000000GB memory has been allocated and available memory is only 0.000000B.",
        "Out of memory error on GPU 0. Cannot allocate 3.125000GB memory on GPU 0, available memory is "
        "only 117.750000MB.",
        # ONNX Runtime, CuPy, Gaudi, Vulkan, OpenCL, DirectML
        "bfc_arena.cc:376 AllocateRawInternal Failed to allocate memory for requested buffer of size "
        "67108864",
        "cupy.cuda.memory.OutOfMemoryError: Out of memory allocating 8,000,000,000 bytes (allocated so "
        "far: 512 bytes).",
        "FATAL ERROR :: MODULE:PT_DEVMEM Allocation failed for size::268435456 (256)MB",
        "vk::Device::allocateMemory: ErrorOutOfDeviceMemory",
        "pyopencl error: CL_MEM_OBJECT_ALLOCATION_FAILURE",
        "RuntimeError: Could not allocate tensor with 52428800 bytes. There is not enough GPU video "
        "memory available!",
    ],
    "host_allocator": [
        "RuntimeError: [enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't "
        "allocate memory: you tried to allocate 68719476736 bytes. Error code 12",
        "OOM when allocating tensor with shape[9000000,300] and type float on /job:localhost/replica:0/"
        "task:0/device:CPU:0 by allocator cpu",
        "terminate called after throwing an instance of 'std::bad_alloc'\n  what():  std::bad_alloc",
        "OSError: [Errno 12] Cannot allocate memory",
        "bash: fork: Cannot allocate memory",
        "OSError: [WinError 1455] The paging file is too small for this operation to complete. Error "
        'loading "cufft64_11.dll"',
        "OSError: [WinError 1455] Die Auslagerungsdatei ist zu klein",
        "OSError: [WinError 8] Not enough memory resources are available to process this command",
        "memory allocation of 4294967296 bytes failed",
        "pandas.errors.ParserError: Error tokenizing data. C error: out of memory",
        "fatal error: runtime: out of memory",
        "java.lang.OutOfMemoryError: Java heap space",
        "level_zero backend failed with error: 38 (UR_RESULT_ERROR_OUT_OF_HOST_MEMORY)",
    ],
    "memory_error": [
        "numpy.core._exceptions._ArrayMemoryError: Unable to allocate 29.8 GiB for an array with shape "
        "(4000000000,) and data type float64",
        "pyarrow.lib.ArrowMemoryError: malloc of size 4294967296 failed",
        "MemoryError",
    ],
    "oom_killer": [
        "kernel: Out of memory: Killed process 991 (python3) total-vm:98kB, anon-rss:63kB",
        "kernel: Out of memory: Kill process 991 (python) score 900 or sacrifice child",
        "Memory cgroup out of memory: Killed process 991 (python3)",
        "kernel: python3 invoked oom-killer: gfp_mask=0xcc0, order=0, oom_score_adj=0",
        "slurmstepd: error: Detected 3 oom_kill events in StepId=77.batch. Some of the step tasks have "
        "been OOM Killed.",
        "slurmstepd: error: Detected 1 oom-kill event(s) in step 77.batch cgroup. Some of your "
        "processes may have been killed by the cgroup out-of-memory handler.",
        "Some of your processes may have been killed by the cgroup out-of-memory handler.",
        "srun: error: gpu01: task 0: Out Of Memory",
        "slurmstepd: error: Exceeded job memory limit at some point.",
        "State: OUT_OF_MEMORY (exit code 0)",
        "train.service: Failed with result 'oom-kill'.",
        "    Last State:  Terminated\n      Reason:    OOMKilled\n      Exit Code: 137",
        "The node was low on resource: memory. Container main was using 30Gi",
        "Container killed by YARN for exceeding memory limits. 5.5 GB of 5.5 GB physical memory used.",
        "TERM_MEMLIMIT: job killed after reaching LSF memory usage limit.",
        "=>> PBS: job killed: mem 16803452kb exceeded limit 16777216kb",
    ],
    "ray": [
        "ray.exceptions.OutOfMemoryError: Task was killed due to the node running low on memory.",
        "(raylet) node_manager.cc:3084: 4 Workers (tasks / actors) killed due to memory pressure (OOM), "
        "0 Workers crashed due to other reasons at node (ID: b2)",
    ],
}
PROBABLY = [
    "RuntimeError: DataLoader worker (pid 12) is killed by signal: Killed. ",
    "E0612 api.py:914] failed (exitcode: -9) local_rank: 1 (pid: 43) of binary: /usr/bin/python",
    "  exitcode  : -9 (pid: 1812)",
    "traceback : Signal 9 (SIGKILL) received by PID 43",
    "[launch.py:325:sigkill_handler] main.py exits with return code = -9",
    "torch.multiprocessing.spawn.ProcessExitedException: process 2 terminated with signal SIGKILL",
    "subprocess.CalledProcessError: Command 'train' died with <Signals.SIGKILL: 9>.",
    "joblib.externals.loky.TerminatedWorkerError: The exit codes of the workers are {SIGKILL(-9)}",
    "container exited with code 137",
    "train-1   Exited (137) 2 minutes ago",
    "NCCL_TIMEOUT=1800\n<Process name='rank1' pid=7 parent=3 stopped exitcode=-SIGKILL>",
    "make: *** [train] Error: exit status 137",
    "epoch 3 loss 0.1\nKilled\n",
    "run.sh: line 12:  4242 Killed                  python train.py",
    "zsh: killed     python train.py",
    "[1]    12345 killed     python train.py",
    "Command terminated by signal 9",
    "srun: error: gpu01: task 3: Killed",
    "Worker exit detail: Worker unexpectedly exits. There are some potential root causes. (1) The "
    "process is killed by SIGKILL by OOM killer due to high memory usage. (2) ray stop --force",
]
NOT_OUT_OF_MEMORY = [
    # on-chip memory of one kernel
    "triton.runtime.errors.OutOfResources: out of resource: shared memory, Required: 131072, Hardware "
    "limit: 101376. Reducing block sizes or `num_stages` may help.",
    "OutOfResources: out of resource: tensor memory, Required: 640, Hardware limit: 512.",
    "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 20.0M of 16.0M vmem.",
    "JaxRuntimeError: RESOURCE_EXHAUSTED: Ran out of memory in memory space smem while allocating",
    "too many resources requested for launch",
    "RuntimeError: Unable to find a valid cuDNN algorithm to run convolution",
    "Native API returns: 40 (UR_RESULT_ERROR_OUT_OF_RESOURCES)",
    "ray.exceptions.WorkerCrashedError: The worker died unexpectedly while executing this task.",
    # services
    "grpc: RESOURCE_EXHAUSTED: Received message larger than max (5000000 vs. 4194304)",
    "google.api_core.exceptions.ResourceExhausted: 429 RESOURCE_EXHAUSTED: Quota exceeded for quota",
    # warnings that say so themselves
    "W bfc_allocator.cc] Allocator (GPU_0_bfc) ran out of memory trying to allocate 2.13GiB with "
    "freed_by_count=0. The caller indicates that this is not a failure, but this may mean that there "
    "could be performance gains if more memory were available.",
    # shared memory, disks, files
    "RuntimeError: DataLoader worker (pid 9) is killed by signal: Bus error.",
    "ray.exceptions.ObjectStoreFullError: Failed to put object because the object store is full",
    "RuntimeError: DataLoader worker (pid(s) 12, 13) exited unexpectedly",
    "RuntimeError: DataLoader worker (pid 9) is killed by signal: Segmentation fault.",
    "RuntimeError: DataLoader worker (pid 9) is killed by signal: Aborted.",
    "OSError: [Errno 28] No space left on device",
    "OSError: [Errno 122] Disk quota exceeded",
    "OSError: [WinError 1114] A dynamic link library (DLL) initialization routine failed",
    "OSError: [WinError 126] The specified module could not be found",
    # other ends of a process
    "failed (exitcode: 1) local_rank: 0 (pid: 43) of binary: /usr/bin/python",
    "failed (exitcode: -11) local_rank: 0 (pid: 43) of binary: /usr/bin/python",
    "failed (exitcode: -6) local_rank: 0 (pid: 43)",
    "Signal 15 (SIGTERM) received by PID 43",
    "slurmstepd: error: *** JOB 77 ON gpu01 CANCELLED AT 2026-01-02 DUE TO TIME LIMIT ***\nKilled",
    "job 77 was preempted\nexitcode: -9",
    "State: TIMEOUT (exit code 0)",
    "container exited with code 1",
    "the loss was 137 and the exit code: 0",
    "exit code 1370",
    '"OOMKilled": false, "ExitCode": 1',
    "Detected 0 oom_kill events",
    "(raylet) 0 Workers (tasks / actors) killed due to memory pressure (OOM), 3 Workers crashed",
    # talk
    "# what to do if CUDA runs out of memory",
    "This avoids CUDA out of memory errors on small cards.",
    "UserWarning: the batch may not fit; expect CUDA out of memory",
    "test_killed_worker.py::test_sigkill PASSED",
    "catching torch.OutOfMemoryError and retrying when it is raised",
    "Killed 3 stale lock files",
    "the best run killed the baseline",
    "INFO memory: 4672, out_of_memory_events 0",
    "CUDA error: an illegal memory access was encountered",
    "CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "CUDNN_STATUS_EXECUTION_FAILED",
    "NCCL WARN Cuda failure 'peer access is not supported'",
    "HIP error: invalid device function",
    "NPU function error: AclrtSynchronizeDeviceWithTimeout, error code is 507013",
    "ValueError: cannot allocate a name for the axis",
    "KeyError: 'memory'",
]
HOST = ("host_allocator", "memory_error", "oom_killer", "ray")
WORDINGS = [(text, kind) for kind, texts in OUT_OF_MEMORY.items() for text in texts]


def test_there_are_as_many_as_promised() -> None:
    assert len({text for text, _ in WORDINGS} | set(PROBABLY)) >= 60
    assert len(set(NOT_OUT_OF_MEMORY)) >= 30


@pytest.mark.parametrize(("text", "kind"), WORDINGS)
def test_whose_memory_ran_out(text: str, kind: str) -> None:
    filler = "step 3 loss 0.1\n" * 300
    for whole in (text, f"{filler}{text}\n{filler}"):
        report = classify_oom(whole)
        assert report is not None
        assert report.kind == kind
        answer = diagnose(whole)
        assert answer.kind in ("oom", "other_process", "fragmentation")
        assert ("on the host" in answer.cause) == (kind in HOST)
        assert "probably ran out" not in answer.cause


@pytest.mark.parametrize("text", PROBABLY)
def test_a_killed_process_is_a_guess(text: str) -> None:
    assert classify_oom(text) is None, "recovery does not act on a guess"
    for answer in (diagnose(text), diagnose(f"step 1 loss 2\n{text}\nbye\n")):
        assert answer.kind == "oom"
        assert "probably ran out on the host" in answer.cause
        assert "Make sure that it was memory" in answer.advice[0]


@pytest.mark.parametrize("text", NOT_OUT_OF_MEMORY)
def test_what_only_sounds_like_it(text: str) -> None:
    assert classify_oom(text) is None
    assert classify_oom(RuntimeError(text)) is None
    assert diagnose(text).kind == "not_oom"


def test_a_guess_gives_way_to_what_is_known() -> None:
    killed = PROBABLY[1]
    assert diagnose(f"{WORDINGS[0][0]}\n{killed}").oom.kind == "cuda"  # type: ignore[union-attr]
    asserted = f"CUDA error: device-side assert triggered\n{killed}"
    assert diagnose(asserted).kind == "not_oom"
    lost = f"NCCL watchdog timeout: ranks are gone\n{killed}"
    assert diagnose(lost).kind == "oom", "a rank that was killed is why the others lost it"
    of_device = MemoryError(
        "std::bad_alloc: out_of_memory: cudaErrorMemoryAllocation out of memory"
    )
    assert diagnose_error(of_device).oom.kind == "cuda"  # type: ignore[union-attr]
    assert diagnose_error(RuntimeError(PROBABLY[0])).kind == "oom"
    assert probable_oom("all is well") is None


def test_a_loader_is_named() -> None:
    assert "a data-loader worker was killed" in diagnose(PROBABLY[0]).cause
