"""`debug=profile`: a few training steps under torch's profiler, as a trace and a table."""

from __future__ import annotations

from pathlib import Path

from expt.files import write_text

TRACE, TABLE = "profile.json", "profile.txt"
WAIT_STEPS, WARMUP_STEPS, ACTIVE_STEPS = 2, 1, 3


class StepProfiler:
    """Does nothing; what a run without profiling gets."""

    def step(self) -> None:
        """Say that an optimizer step is over."""

    def stop(self) -> None:
        """Say that training is over."""


class TraceProfiler(StepProfiler):
    """Writes ``profile.json`` (open it in Perfetto or chrome://tracing) and ``profile.txt``."""

    def __init__(self, run_dir: Path) -> None:
        from torch import profiler

        self.run_dir = run_dir
        self._profiler = profiler.profile(
            schedule=profiler.schedule(
                wait=WAIT_STEPS, warmup=WARMUP_STEPS, active=ACTIVE_STEPS, repeat=1
            ),
            on_trace_ready=self._write,
            profile_memory=True,
            record_shapes=True,
        )
        self._profiler.start()

    def step(self) -> None:
        """Advance the profiler's schedule."""
        self._profiler.step()

    def stop(self) -> None:
        """Close the profiler; a run shorter than the schedule writes nothing."""
        self._profiler.stop()

    def _write(self, finished: object) -> None:
        self._profiler.export_chrome_trace(str(self.run_dir / TRACE))
        table = self._profiler.key_averages().table(sort_by="self_cpu_memory_usage", row_limit=30)
        write_text(self.run_dir / TABLE, table)
