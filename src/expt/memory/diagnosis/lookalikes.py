"""Errors that are taken for a lack of memory and are something else, with what to do instead."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Lookalike:
    """A problem that is not out of memory."""

    name: str
    pattern: re.Pattern[str]
    advice: str
    follows: bool = False  # may follow from a lack of memory elsewhere
    prose: bool = False  # a line of a run that is well may say the same


def _of(
    name: str, pattern: str, advice: str, follows: bool = False, prose: bool = False
) -> Lookalike:
    return Lookalike(name, re.compile(pattern, re.IGNORECASE), advice, follows, prose)


LOOKALIKES = (
    _of(
        "a kernel's tile does not fit the GPU's shared memory (on-chip, not the card's memory)",
        r"out of resources?: (?:shared|tensor) memory|uses too much shared data"
        r"|in memory space (?:vmem|smem|sflag|cmem)|exceeded scoped vmem limit",
        "smaller block sizes or fewer num_stages in the Triton kernel; another attention kernel",
    ),
    _of(
        "a kernel asks for more registers or threads than the GPU has",
        r"too many resources requested for launch",
        "fewer threads a block; for a kernel of torch's own, report it to PyTorch",
    ),
    _of(
        "a kernel read or wrote where it must not",
        r"illegal memory access|misaligned address|out[- ]of[- ]bounds",
        "run again with CUDA_LAUNCH_BLOCKING=1 to see which operator, and check its indices",
        prose=True,
    ),
    _of(
        "an assertion inside a kernel failed, mostly a label or an index out of range",
        r"device-side assert",
        "run the same batch with trainer.device=cpu: the CPU says which index",
    ),
    _of(
        "the shared memory of data-loading processes (/dev/shm) is too small",
        r"out of shared memory|insufficient shared memory|killed by signal: bus error"
        r"|unable to (?:open|allocate|write to) (?:file|shared memory)",
        "fewer loader workers, or a larger /dev/shm (docker run --shm-size=8g)",
    ),
    _of(
        "the disk is full",
        r"no space left on device|disk quota exceeded",
        "free some space, or choose another folder with hydra.run.dir=FOLDER",
    ),
    _of(
        "Ray's object store is full: it is a part of /dev/shm, not the memory of a process",
        r"ObjectStoreFullError|object store (?:is full|memory is full)",
        "delete references to objects, or raise object_store_memory in ray.init",
    ),
    _of(
        "a message or a quota is too large for a service, which also says 'resource exhausted'",
        r"RESOURCE_EXHAUSTED: (?:Quota|Received message larger|Sent message larger)|quota exceeded",
        "raise the service's limit, or send less at once",
    ),
    _of(
        "a data-loading process ended, without a signal that says why",
        r"DataLoader worker \(.{0,80}?\) (?:exited unexpectedly|is killed by signal: (?!Killed))",
        "read the lines above it, or run with no loader workers to see the error itself",
        follows=True,
    ),
    _of(
        "too many files are open",
        r"too many open files",
        "raise the limit (ulimit -n), or fewer loader workers",
    ),
    _of(
        "the compiler has given up specialising a function whose shapes keep changing",
        r"hit config\.\w*(?:recompile|cache_size)_limit|recompile_limit reached"
        r"|FailOn(?:Recompile|Cache)LimitHit",
        "pad inputs to a few fixed shapes, or mark the changing dimension as dynamic",
    ),
    _of(
        "this layout or type has no kernel in cuDNN",
        r"CUDNN_STATUS_NOT_SUPPORTED",
        "make the input contiguous, or set torch.backends.cudnn.enabled = False to see it",
    ),
    _of(
        "the library cuDNN failed to start or found no algorithm, for which it may lack memory",
        r"CUDNN_STATUS_(?:NOT_INITIALIZED|EXECUTION_FAILED)"
        r"|unable to find (?:a valid cuDNN|an engine)",
        "try a smaller batch; if it stays, compare the versions of cuDNN, CUDA and the driver",
    ),
    _of(
        "the Intel device ran out of resources, of which memory is only one",
        r"ERROR_OUT_OF_RESOURCES",
        "try a smaller batch; if it stays, update the driver",
    ),
    _of(
        "a Ray worker died, and Ray does not say why",
        r"WorkerCrashedError",
        "look for the node's memory in the dashboard, and for the end in python-core-worker-*.log",
        follows=True,
    ),
    _of(
        "a kernel of a library failed",
        r"CUBLAS_STATUS_(?:EXECUTION_FAILED|NOT_INITIALIZED|INTERNAL_ERROR|INVALID_VALUE)",
        "run again with CUDA_LAUNCH_BLOCKING=1; if the card was nearly full, try a smaller batch",
    ),
    _of(
        "a tensor that already is on the GPU was to be pinned",
        r"cannot pin",
        "pin_memory=False where the data set returns CUDA tensors",
        prose=True,
    ),
    _of(
        "ranks lost each other",
        r"NCCL (?:error|timeout|watchdog)|nccl\w*Error|unhandled cuda error",
        "run again with NCCL_DEBUG=INFO and look for the first rank that failed",
        follows=True,
        prose=True,
    ),
    _of(
        "the driver cannot be asked about the GPU",
        r"can't initialize NVML|Driver/library version mismatch",
        "compare nvidia-smi with the installed driver; a restart after an update often helps",
    ),
)


_ERROR = re.compile(
    r"(?:Error|Exception|ERROR|FATAL)\b|\berror\s*:|\[E\b|CUDA error|timeout|illegal"
)


def find_lookalike(text: str, in_log: bool = False) -> tuple[Lookalike, str] | None:
    """Return the first of these problems in a text, with the line that says so.

    Args:
        text: a message, or what stands below the readings of a log.
        in_log: whether it is the latter: what may be prose has to say that it is an error.

    """
    for line in text.splitlines():
        for lookalike in LOOKALIKES:
            if lookalike.pattern.search(line):
                if in_log and lookalike.prose and _ERROR.search(line) is None:
                    continue
                return lookalike, " ".join(line.split())[:400]
    return None
