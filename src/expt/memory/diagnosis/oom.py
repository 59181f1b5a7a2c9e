"""Tell whether an error is a lack of memory, and whose.

`classify_oom` knows how the allocators and libraries under torch and other frameworks say that
memory ran out, and is not fooled by sentences that merely contain the words. Patterns are tried
from the one that says most to the one that says least; the first that matches decides.
`probable_oom` knows how a process ends that the system killed, which has other reasons as well.

Sources of the wordings: c10/cuda/CUDACachingAllocator.cpp, c10/core/CachingDeviceAllocator.h,
c10/xpu/XPUCachingAllocator.cpp, aten/src/ATen/mps/MPSAllocator.mm and c10/core/impl/alloc_cpu.cpp
of PyTorch 1.x to 2.13; the status names of cuBLAS, cuDNN 8 and 9, cuSOLVER, cuSPARSE and cuFFT;
NCCL's src/include/alloc.h; TensorFlow's bfc_allocator.cc and XLA's status messages; Paddle's
cuda_allocator.cc; issues of Ray, vLLM-Ascend and Intel's extension for PyTorch;
pytorch/pytorch#112377 for the assertion that hides an OOM on MIG.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from expt.memory.diagnosis.oom_figures import Cause, Figures, likely_cause, read_figures

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
_DEVICE_NAMES: dict[str, Kind] = {
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
    ("cuda", r"cuda runtime error \(2\) : out of memory"),
    ("cuda", r"^Error out of memory at line \d+ in file"),  # bitsandbytes
    ("xpu", r"\b(?:UR|ZE|PI)_(?:RESULT_)?ERROR_OUT_OF_(?:DEVICE|HOST)_MEMORY\b"),
    ("nvml", r"NVML_SUCCESS == r\w* INTERNAL ASSERT FAILED at [^\n]*CachingAllocator"),
    ("cuda", r"\bcudaMalloc\w*(?: retry)? failed: out of memory"),  # llama.cpp, MXNet
    ("npu", r"\brtMalloc fail|\balloc device memory failed, runtime result = 207001"),
    ("npu", r"\b(?:ACL_ERROR_RT_MEMORY_ALLOCATION|ACL_ERROR_STORAGE_OVER_LIMIT)\b"),
    ("npu", r"\bEL0004: (?s:.){0,80}?Failed to allocate memory"),
    ("npu", r"\bMalloc device memory failed\b"),  # MindSpore
    (
        "host_allocator",
        r"OOM when allocating tensor[^\n]{0,300}(?:device:CPU|allocator (?:mklcpu|cpu))",
    ),
    ("device", r"OOM when allocating tensor"),
    ("device", rf"RESOURCE_EXHAUSTED: {_NOT_ON_CHIP}[^\n]*{_SAYS_OUT}"),
    ("device", r"Resource exhausted: (?:[^\n]*Out of memory|OOM when)"),
    ("device", r"ResourceExhaustedError:\s[^\n]*(?:[Ff]ailed to allocate memory|\bOOM\b)"),
    ("device", r"Allocator \(\w+\) ran out of memory trying to allocate(?![^\n]*not a failure)"),
    ("device", r"Out of memory error on (?:GPU|XPU|NPU|device)\b[^\n]{0,10}"),  # Paddle
    ("device", r"\bCannot allocate [\d.]+[KMGT]?B memory on (?:GPU|XPU)"),
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
    ("host_allocator", r"\bmemory allocation of \d+ bytes failed"),  # Rust
    ("host_allocator", r"^fatal error: runtime: (?:out of memory|cannot allocate memory)"),  # Go
    ("host_allocator", r"java\.lang\.OutOfMemoryError"),
    ("memory_error", r"^(?:[\w.]+\.)?_?(?:Array|Arrow)?MemoryError(?::|\s*$)"),
    ("memory_error", r"Unable to allocate [\d.]+ [KMGTPE]?i?B for an array with shape"),
    ("oom_killer", r"Out of memory: Killed process \d+|Memory cgroup out of memory"),
    ("oom_killer", r"(?<!\b0 )\boom[_-]kill event|\binvoked oom-killer|\boom-kill:constraint"),
    ("oom_killer", r"killed by the (?:cgroup )?(?:out-of-memory handler|OOM killer\.)"),
    ("oom_killer", r"may have been killed by the cgroup out-of-memory handler"),
    ("oom_killer", r"\bresult 'oom-kill'|\bOOMKilled\b(?!\W{1,4}false)"),
    ("oom_killer", r"\b[Ee]xceeded (?:job|step) memory limit|\bTERM_MEMLIMIT\b"),
    ("oom_killer", r"\bmem \d+[kmg]?b exceeded limit \d+"),  # PBS
    ("oom_killer", r"\bState\s*[:=]\s*OUT_OF_MEMORY\b|\btasks? [\d,-]+: Out Of Memory\b"),
    ("ray", r"the node running low on memory"),
    ("ray", r"\b[1-9]\d* Workers \(tasks / actors\) killed due to memory pressure"),
    ("device", r"(?:^|\.)(?:CUDA)?OutOfMemoryError(?::|\s*$)"),
    (None, r"(?<!you )\bTried\s+to\s+allocate\s+[\d.]+\s+[KMGT]i?B\b"),
)
_KILLED = re.compile(
    r"DataLoader worker \(pid[^)]*\) (?:is|was) killed by signal: Killed"
    r"|(?i:\b(?:exit ?codes?|return ?code|exit status|exited with(?: code)?))[\s:=(]*(?:-9|137)\b"
    r"|\bSignal 9 \(SIGKILL\)|terminated with signal SIGKILL|died with <Signals\.SIGKILL"
    r"|\bSIGKILL\(-9\)|\bkilled by signal 9\b|\bsignal: killed\b|\bKilled: 9\b|\btask \S+: Killed\b"
    r"|^\s*Killed\s*$|\bline \d+:\s+\d+ Killed\b|\bzsh: killed\b"
    r"|killed by SIGKILL by OOM killer",
    re.MULTILINE,
)
"""How a process ends that was killed without a word: by the system for memory, or by hand."""
_KILLED_FOR_OTHERS = re.compile(r"TIME LIMIT|TIMEOUT|CANCELLED AT|[Pp]reempt|PREEMPT|node failure")
"""What explains such an end otherwise."""
_PATTERNS = [(kind, re.compile(wording, re.MULTILINE)) for kind, wording in _WORDINGS]
_HINT = re.compile(
    r"[Oo]ut[ _-][Oo]f[ _-](?:\w+_)?memory|OUT_OF_\w*MEMORY|ut of Memory|OutOfMemory|to\s+allocate"
    r"|t allocate|not enough memory|ALLOC\w*_FAILED|AllocFailed|[cm]alloc \w+|NVML_SUCCESS"
    r"|bad_alloc|MemoryError|MemoryAllocation|memory_error|OOM when|oom[-_]kill|Errno 12"
    r"|unable to mmap|[Bb]uffer (?:of )?size|RESOURCE_EXHAUSTED|[Rr]esource ?[Ee]xhausted|Malloc"
    r"|Cannot alloc|Failed to allocate|ran out of memory|device memory failed|MEMORY_ALLOCATION"
    r"|OVER_LIMIT|OutOfDeviceMemory|ALLOCATION_FAILURE|NOMEM|PT_DEVMEM|video memory|WinError"
    r"|paging file|memory resources|memory allocation of|OOMKilled|killed by the|memory limit"
    r"|MEMLIMIT|exceeded limit|low on memory|memory pressure"
)
"""What every wording has in it."""
_IN_PROSE = re.compile(
    r"\b(?:no|not|never|without|avoid\w*|prevent\w*|if|when|whether|should|could|would|may|might"
    r"|can|fix\w*|handle\w*|in case of)\b[^.:;]*$",
    re.IGNORECASE,
)
"""What stands before the words in a sentence about running out of memory, rather than a report."""


@dataclass(frozen=True)
class OomReport:
    """One failure to allocate; figures that the message does not give are None.

    `figures.reserved_bytes` is all the caching allocator holds, allocated included.
    """

    kind: Kind
    cause: Cause
    figures: Figures
    evidence: str  # the line that says so

    @property
    def bytes_requested(self) -> int | None:
        """What was asked for."""
        return self.figures.requested_bytes

    @property
    def bytes_free(self) -> int | None:
        """What the device had left."""
        return self.figures.free_bytes

    @property
    def bytes_total(self) -> int | None:
        """The device's capacity."""
        return self.figures.total_bytes

    @property
    def bytes_allocated(self) -> int | None:
        """What this process's tensors took."""
        return self.figures.allocated_bytes

    @property
    def bytes_reserved(self) -> int | None:
        """What torch's caching allocator held, allocated included."""
        return self.figures.reserved_bytes


def classify_oom(error: BaseException | str) -> OomReport | None:
    """Return what ran out of memory, or None if this is some other problem.

    Args:
        error: an exception, whose causes, contexts and groups are searched too, or any text:
            a message, a traceback, a whole log. In a text the first report counts.

    """
    if isinstance(error, str):
        return _classify_text(error)
    for one in _chain(error):
        report = _classify_exception(one)
        if report is not None:
            return report
    return None


def probable_oom(text: str) -> OomReport | None:
    """Return a report on a process that was killed, probably for memory; None if nothing was.

    Whoever reads an exception to recover from it should not guess: `classify_oom` does not.
    """
    found = _KILLED.search(text)
    if found is None or _KILLED_FOR_OTHERS.search(text):
        return None
    start = text.rfind("\n", 0, found.end() - 1) + 1
    end = text.find("\n", found.end())
    line = text[start : end if end >= 0 else len(text)].strip()
    return OomReport("killed", "unknown", Figures(), " ".join(line.split())[:400])


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield the exception, those in its group, and those it came from, each once."""
    waiting, seen = [error], set()
    while waiting:
        one = waiting.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        if isinstance(one, BaseExceptionGroup):
            waiting += one.exceptions
        if one.__cause__ is not None:
            waiting.append(one.__cause__)
        elif one.__context__ is not None and not one.__suppress_context__:
            waiting.append(one.__context__)


def _classify_exception(error: BaseException) -> OomReport | None:
    text = str(error)
    report = _classify_text(text)
    if report is not None and not isinstance(error, MemoryError):
        return report
    names = {base.__name__ for base in type(error).__mro__}
    kind: Kind
    if isinstance(error, MemoryError):
        kind = "memory_error"
    elif "OutOfMemoryError" in names:  # torch's, without importing torch
        kind = "device"
    elif isinstance(error, OSError) and error.errno == errno.ENOMEM:
        kind = "host_allocator"
    else:
        return None
    return _report(kind, text, f"{type(error).__name__}: {text}".rstrip(": "))


def _classify_text(text: str) -> OomReport | None:
    if len(text) > _MESSAGE_LENGTH:
        text = _near_hints(text)
    for kind, pattern in _PATTERNS:
        for found in pattern.finditer(text):
            line_start = text.rfind("\n", 0, found.start()) + 1
            says_figures = "allocate" in found[0]
            if not says_figures and _IN_PROSE.search(text[line_start : found.start() + 1]):
                continue
            name = (found.groupdict().get("name") or "").strip()
            message = text[line_start : found.end() + _MESSAGE_LENGTH]
            line_end = text.find("\n", found.end())
            line = text[line_start : line_end if line_end >= 0 else len(text)].strip()
            shortened = found[0].startswith("Tried") and re.search("GPU|PyTorch", message)
            named = _DEVICE_NAMES.get(name, "cuda" if shortened else "device")
            return _report(kind or named, message, line)
    return None


_MESSAGE_LENGTH = 1500
"""Characters after its first words in which a message gives its figures."""


def _near_hints(text: str) -> str:
    """Return the parts of a long text in which a report could be, so that a log is read fast."""
    parts: list[str] = []
    end = 0
    for hint in _HINT.finditer(text):
        start = max(text.rfind("\n", 0, max(hint.start() - 200, 0)) + 1, hint.start() - 1000, end)
        if hint.end() > end:
            end = hint.end() + _MESSAGE_LENGTH
            parts.append(text[start:end])
    return "".join(parts)


def _report(kind: Kind, message: str, evidence: str) -> OomReport:
    figures = read_figures(message)
    return OomReport(kind, likely_cause(figures), figures, " ".join(evidence.split())[:400])
