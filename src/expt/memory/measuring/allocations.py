"""What torch's CPU allocator handed out during some work, kernels' own memory included.

Read from the events of torch's older profiler, which is quick to start and prints nothing.
"""

from __future__ import annotations

from types import TracebackType

from torch._C._autograd import (
    _disable_profiler_legacy,
    _enable_profiler_legacy,
    _profiler_enabled,
)
from torch._C._profiler import ProfilerConfig, ProfilerState, _ExperimentalConfig


def can_be_watched() -> bool:
    """Tell whether no profiler is on already."""
    return not _profiler_enabled()


class Allocations:
    """Context manager; `highest_bytes` is the most that was allocated inside at once.

    Memory from before that is given back inside counts against it.
    """

    def __init__(self) -> None:
        self.highest_bytes = 0
        self.left_bytes = 0

    def __enter__(self) -> Allocations:
        _enable_profiler_legacy(
            ProfilerConfig(
                ProfilerState.CPU, False, True, False, False, False, _ExperimentalConfig()
            )
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        total = 0
        for events in _disable_profiler_legacy():
            for event in events:
                if str(event.kind()) == "memory_alloc":
                    total += event.cpu_memory_usage()
                    self.highest_bytes = max(self.highest_bytes, total)
        self.left_bytes = total
