"""How the allocators, libraries and frameworks say that memory ran out, as patterns.

Patterns are tried from the one that says most to the one that says least; the first that matches
decides. None as a kind means that the group ``name`` is the device's.

Sources of the wordings: c10/cuda/CUDACachingAllocator.cpp, c10/core/CachingDeviceAllocator.h,
c10/xpu/XPUCachingAllocator.cpp, aten/src/ATen/mps/MPSAllocator.mm and c10/core/impl/alloc_cpu.cpp
of PyTorch 1.x to 2.13; the status names of cuBLAS, cuDNN 8 and 9, cuSOLVER, cuSPARSE and cuFFT;
NCCL's src/include/alloc.h; TensorFlow's bfc_allocator.cc and XLA's status messages; Paddle's
cuda_allocator.cc; issues of Ray, vLLM-Ascend and Intel's extension for PyTorch;
pytorch/pytorch#112377 for the assertion that hides an OOM on MIG.
"""

from __future__ import annotations

import re
from typing import Literal

Kind = Literal[
    "cuda",  # torch's caching allocator, or the CUDA runtime or driver itself
    "cublas",
    "cudnn",
    "cuda_library",  # cuSOLVER, cuSPARSE, cuFFT, cuRAND
    "nccl",  # NCCL or RCCL
    "nvml",  # a MIG slice: torch asks NVML for the figures of its message and is refused
    "hip",
    "xpu",
    "mps",
    "npu",  # Huawei's Ascend
    "device",  # another accelerator, or one that the message does not name
    "host_allocator",
    "memory_error",  # Python's MemoryError, NumPy's included
    "oom_killer",  # the kernel or the cluster ended the process
    "ray",  # Ray ended a process because its node ran low
    "killed",  # something killed a process without saying why; probably for memory
]

HOST_KINDS = ("host_allocator", "memory_error", "oom_killer", "ray", "killed")
DEVICE_NAMES: dict[str, Kind] = {
    "CUDA": "cuda",
    "HIP": "hip",
    "XPU": "xpu",
    "MPS": "mps",
    "NPU": "npu",
}
_SAYS_SO = r"(?:^|[\"'`(:\]|>]\s*|Error\s+)"  # a message begins here: not in mid-sentence
_ENDS = r"(?=\s*(?:$|[.!;,\"'`)(\[]))"
_CALL_SAYS = r"(?:'out of memory'|(?:error|failed): out of memory\b)"
_NO_OTHER_FAULT = r"(?!(?s:.){0,400}(?:Cuda|HIP) failure(?: \d+)? '(?!out of memory))"
_NOT_ON_CHIP = r"(?![^\n]*memory space (?:vmem|smem|sflag|cmem))"
_SAYS_OUT = r"(?:[Oo]ut of memory|Attempting to allocate|[Ff]ailed to allocate|\bOOM\b)"
_WORDINGS: tuple[tuple[Kind | None, str], ...] = (
    ("nccl", r"\b[NR]CCL\b[^\n]*(?:Cuda|HIP) failure(?: \d+)? 'out of memory'"),
    ("nccl", rf"(?:[Uu]nhandled (?:cuda|hip) error|nccl\w*Error)(?s:.){{0,600}}?{_CALL_SAYS}"),
    ("nccl", r"(?:Cuda|HIP) failure(?: \d+)? 'out of memory'"),
    ("nccl", rf"Failed to (?:CUDA|HIP) [cm]alloc(?: \w+)? \d+ bytes{_NO_OTHER_FAULT}"),
    ("mps", r"MPS backend out of memory"),
    ("mps", r"kIOGPUCommandBufferCallbackErrorOutOfMemory"),
    ("mps", r"\bInvalid buffer size: [\d.]+ [KMGT]i?B"),
    (None, r"(?P<name>\b[A-Z]{2,5} )?[Oo]ut of memory\.?\s+Tried\s+to\s+allocate"),
    (None, rf"{_SAYS_SO}(?P<name>CUDA|HIP|XPU|NPU|MLU|MUSA|HPU) out of memory{_ENDS}"),
    (None, r"\b(?P<name>CUDA|HIP|XPU) (?:driver |runtime )?[Ee]rror: out of memory\b"),
    (None, r"Triton Error \[(?P<name>CUDA|HIP|XPU)\]: out of memory"),
    ("cublas", r"\bCUBLAS(?:LT)?_STATUS_ALLOC_FAILED\b"),
    ("cudnn", r"\bCUDNN_STATUS_ALLOC_FAILED\b"),
    ("cudnn", r"\bCUDNN_STATUS_INTERNAL_ERROR_(?:DEVICE|HOST)_ALLOCATION_FAILED\b"),
    ("cuda_library", r"\bCU(?:SOLVER|SPARSE)_STATUS_ALLOC_FAILED\b|\bCUFFT_ALLOC_FAILED\b"),
    ("cuda_library", r"\bCURAND_STATUS_ALLOCATION_FAILED\b"),
    ("hip", r"\b(?:HIP|ROC)BLAS_STATUS_ALLOC_FAILED\b|\bmiopenStatusAllocFailed\b"),
    ("hip", r"\bhipErrorOutOfMemory\b|\brocblas_status_memory_error\b"),
    ("cuda", r"\bCUDA_ERROR_OUT_OF_MEMORY\b|\bcudaErrorMemoryAllocation\b"),
    ("cuda", r"(?:cuda runtime|CUDA) error ?\(2\)(?: :|,) out of memory"),
    ("cuda", r"^Error out of memory at line \d+ in file"),  # bitsandbytes
    ("xpu", r"\b(?:UR|ZE|PI)_(?:RESULT_)?ERROR_OUT_OF_DEVICE_MEMORY\b"),
    ("host_allocator", r"\b(?:(?:UR|ZE|PI)_(?:RESULT_)?ERROR|VK_ERROR|CL)_OUT_OF_HOST_MEMORY\b"),
    ("nvml", r"NVML_SUCCESS == r\w* INTERNAL ASSERT FAILED at [^\n]*CachingAllocator"),
    ("cuda", r"\bcudaMalloc\w*(?: retry)? failed: out of memory"),  # llama.cpp, MXNet
    (
        "npu",
        r"\brtMalloc fail"
        r"|\b(?:alloc device memory failed, runtime result =|error code is) 207001\b",
    ),
    ("npu", r"\bACL_ERROR_(?:RT_MEMORY_ALLOCATION|BAD_ALLOC|STORAGE_OVER_LIMIT)\b"),
    ("npu", r"\bEL0004: (?s:.){0,80}?Failed to allocate memory"),
    ("npu", r"\bMalloc device memory failed\b|\bhalMemAlloc failed\b"),  # MindSpore, driver
    ("npu", r"\bmemory isn't enough and alloc failed\b|\bOut of Memory!!! Request memory size"),
    (
        "host_allocator",
        r"OOM when allocating tensor[^\n]{0,300}(?:device:CPU|allocator (?:mklcpu|cpu))",
    ),
    ("device", r"OOM when allocating tensor"),
    ("device", rf"RESOURCE_EXHAUSTED: {_NOT_ON_CHIP}[^\n]*{_SAYS_OUT}"),
    ("device", rf"(?:Xla|Jax)RuntimeError: {_NOT_ON_CHIP}\w+: [^\n]*{_SAYS_OUT}"),
    ("device", r"\bDst tensor is not initialized\b"),  # TensorFlow
    ("device", r"\bNo available memory for the cache blocks\b"),  # vLLM
    ("device", r"Free memory on device [^\n]{0,60}less than desired GPU memory utilization"),
    ("device", r"Resource exhausted: (?:[^\n]*Out of memory|OOM when)"),
    ("device", r"ResourceExhaustedError:\s[^\n]*(?:[Ff]ailed to allocate memory|\bOOM\b)"),
    ("device", r"Allocator \(\w+\) ran out of memory trying to allocate(?![^\n]*not a failure)"),
    ("device", r"Out of memory error on (?:GPU|XPU|NPU|device)\b[^\n]{0,10}"),  # Paddle
    ("device", r"\bCannot allocate [\d.]+[KMGT]?B memory on (?:GPU|XPU)"),
    ("device", r"\bpaddle::memory::allocation::BadAlloc\b"),
    ("device", r"Failed to allocate memory for requested buffer of size \d+"),  # ONNX Runtime
    ("device", r"PT_DEVMEM Allocation failed|\bsynStatus\w*OUT_OF_DEVICE_MEMORY\b"),  # Gaudi
    ("device", r"VK_ERROR_OUT_OF_DEVICE_MEMORY|ErrorOutOfDeviceMemory|\bCNRT_RET_ERR_NOMEM\b"),
    ("device", r"\bCL_MEM_OBJECT_ALLOCATION_FAILURE\b"),
    ("device", r"not enough GPU video memory available"),  # DirectML
    ("host_allocator", r"DefaultCPUAllocator: (?:can't allocate|not enough) memory"),
    ("host_allocator", r"C10 Out of Memory\. Trying to allocate"),
    ("host_allocator", r"\bstd::bad_alloc\b"),
    ("host_allocator", r"^(?:\w+\.)*OSError: \[Errno 12\] Cannot allocate memory"),
    (
        "host_allocator",
        r"(?:fork|mmap|malloc|posix_spawn|virtual memory exhausted)\w*(?: failed)?: "
        r"Cannot allocate memory",
    ),
    ("host_allocator", r"unable to mmap \d+ bytes [^\n]*Cannot allocate memory"),
    ("host_allocator", r"\[WinError (?:1455|8|14)\]|\bpaging file is too small\b"),
    ("host_allocator", r"Not enough memory resources are available to process this command"),
    ("host_allocator", r"\bFail(?:ed)? to alloc memory of \d+ size"),  # Paddle
    ("host_allocator", r"\bdiagnosed a low virtual memory condition"),  # Windows' event 2004
    ("host_allocator", r"\bmemory allocation of \d+ bytes failed"),  # Rust
    ("host_allocator", r"^fatal error: runtime: (?:out of memory|cannot allocate memory)"),  # Go
    ("host_allocator", r"\bC error: out of memory\b|\bJavaScript heap out of memory\b"),
    ("host_allocator", r"\bOutOfMemoryException: Out of Memory Error"),  # DuckDB
    ("host_allocator", r"java\.lang\.OutOfMemoryError"),
    ("memory_error", r"^(?:[\w.]+\.)?_?(?:Array|Arrow)?MemoryError(?::|\s*$)"),
    ("memory_error", r"Unable to allocate [\d.]+ [KMGTPE]?i?B for an array with shape"),
    ("oom_killer", r"Out of memory: Kill(?:ed)? process \d+|Memory cgroup out of memory"),
    ("oom_killer", r"(?<!\b0 )\boom[_-]kill event|\binvoked oom-killer|\boom-kill:constraint"),
    ("oom_killer", r"killed by the (?:cgroup )?(?:out-of-memory handler|OOM killer\.)"),
    ("oom_killer", r"may have been killed by the cgroup out-of-memory handler"),
    ("oom_killer", r"\bresult 'oom-kill'|\bOOM[- ]?[Kk]illed\b(?!\W{1,4}false)"),
    ("oom_killer", r"\blow on resource: memory\b|\bsystemd-oomd killed\b"),
    ("oom_killer", r"\b(?:exceeding|beyond physical) memory limits\b"),  # YARN
    ("oom_killer", r"\b[Ee]xceeded (?:(?:job|step) )?memory limit|\bTERM_MEMLIMIT\b"),
    ("oom_killer", r"\bmem \d+[kmg]?b exceeded limit \d+"),  # PBS
    ("oom_killer", r"\bState\s*[:=]\s*OUT_OF_MEMORY\b|\btasks? [\d,-]+: Out Of Memory\b"),
    ("ray", r"\bnode (?:is )?(?:running|ran) (?:low on|out of) memory"),
    ("ray", r"\b[1-9]\d* Workers \(tasks / actors\) killed due to memory pressure"),
    ("device", r"(?:^|\.)(?:CUDA)?OutOfMemoryError(?::|\s*$)"),
    (None, r"(?<!you )\bTried\s+to\s+allocate\s+[\d.]+\s+[KMGT]i?B\b"),
)
KILLED = re.compile(
    r"DataLoader worker \(pid[^)]*\) (?:is|was) killed by signal: Killed"
    r"|(?i:\b(?:exit ?codes?|return ?code|exit status|exited(?: with)?(?: code)?))"
    r"[\s:=(\"']*(?:-9|137)\b"
    r"|\bSignal 9 \(SIGKILL\)|terminated with signal SIGKILL|died with <Signals\.SIGKILL"
    r"|\bSIGKILL\(-9\)|\bexitcode=-SIGKILL\b"
    r"|\b(?:by|exit|with) signal:? 9\b|\bsignal: killed\b|\bKilled: 9\b|\btask \S+: Killed\b"
    r"|^\s*Killed\s*$|\bline \d+:\s+\d+ Killed\b|\bzsh: killed\b|^\[\d+\]\s+\d+ killed\b"
    r"|killed by SIGKILL by OOM killer",
    re.MULTILINE,
)
"""How a process ends that was killed without a word: by the system for memory, or by hand."""
KILLED_FOR_OTHERS = re.compile(
    r"TIME LIMIT|\bTIMEOUT\b|CANCELLED AT|[Pp]reempted|PREEMPTED|NODE_FAIL"
)
"""What explains such an end otherwise."""
PATTERNS = [(kind, re.compile(wording, re.MULTILINE)) for kind, wording in _WORDINGS]
HINT = re.compile(
    r"[Oo]ut[ _-][Oo]f[ _-](?:\w+_)?memory|OUT_OF_\w*MEMORY|ut of Memory|OutOfMemory"
    r"|to\s+allocate|t allocate|not enough memory|ALLOC\w*_FAILED|AllocFailed|[cm]alloc \w+"
    r"|NVML_SUCCESS|bad_alloc|MemoryError|MemoryAllocation|memory_error|OOM when|oom[-_]kill"
    r"|Errno 12|unable to mmap|[Bb]uffer (?:of )?size|RESOURCE_EXHAUSTED"
    r"|[Rr]esource ?[Ee]xhausted|Malloc|Cannot alloc|to alloc memory|BadAlloc|BAD_ALLOC"
    r"|virtual memory|error code is|Failed to allocate|ran out of memory|device memory failed"
    r"|MEMORY_ALLOCATION|OVER_LIMIT|OutOfDeviceMemory|ALLOCATION_FAILURE|NOMEM|PT_DEVMEM"
    r"|video memory|WinError|paging file|memory resources|memory allocation of|OOM.?[Kk]illed"
    r"|Out Of Memory|killed by the|memory limit|MEMLIMIT|exceeded limit"
    r"|(?:low on|out of) memory|memory pressure"
    r"|(?:Xla|Jax)RuntimeError|Dst tensor|cache blocks|than desired|C error|heap out"
    r"|Out of Memory Error"
    r"|on resource: memory|oomd killed|memory limits|halMemAlloc|alloc failed|Cuda failure"
    r"|HIP failure"
)
"""What every wording has in it."""
IN_PROSE = re.compile(
    r"\b(?:no|not|never|without|avoid\w*|prevent\w*|if|when|whether|should|could|would|may|might"
    r"|can|fix\w*|handle\w*|in case of)\b[^.:;]*$",
    re.IGNORECASE,
)
"""What stands before the words in a sentence about running out of memory, rather than a report."""
