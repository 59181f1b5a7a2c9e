"""Watch memory during any training loop, tidy up when it gets tight, and say what to change.

::

    with MemoryManager() as manager:
        manager.on_cleanup(frame_cache.clear)
        for batch in batches:
            train_step(batch)
            manager.step()
    print(manager.suggestions())

Between readings `step` costs less than a microsecond; a reading is taken at most once in
`reading_seconds`. Tidying up is `expt.memory.watching.cleaning`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property, wraps
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from expt.errors import UserError
from expt.files import write_text
from expt.memory.diagnosis.trend import Forecast, Reading, Trend, forecast, judge
from expt.memory.watching.alarms import Alarm, AlarmRecord
from expt.memory.watching.cleaning import Cleaner, Cleanup
from expt.memory.watching.gauges import BUDGET_NAME, BudgetGauge, Gauge, HostGauge, gauge_for
from expt.memory.watching.history import History, from_csv, to_csv
from expt.memory.watching.largest import Names

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.optim import Optimizer

    from expt.memory.measuring.budget_ledger import BudgetLedger
    from expt.memory.watching.outlook import LiveLine

P = ParamSpec("P")
R = TypeVar("R")


class MemoryManager:
    """Context manager around a training loop; `step` belongs after every optimizer step.

    Args:
        device: what to watch besides the host; None is CUDA's current device where there is one.
        gpu_threshold: part of the device's memory, reserved or held by others, above which to
            tidy up.
        cpu_threshold: the same of the host's (or container's) memory held by this process.
        interval: seconds between two cleanups for a threshold; doubles while they do not help.
        force_cleanup_every: steps between cleanups in any case; None is never.
        alarm: part of a device's memory, or of the budget (`limit`), above which a warning is
            logged, once each time, with the largest live tensors.
        on_alarm: also called then, with the device's name and the part in use.
        alarm_file: a JSON file that keeps the alarms.
        warn: False keeps alarms in the file and tells `on_alarm`, without a warning.
        reading_seconds: shortest time between two readings.
        history: readings kept of each device, spread over the whole run.
        monitoring: False takes no readings; forced cleanups still happen.
        gauges: what to read instead of `device` and the host.

    Raises:
        UserError: a threshold that is no part of a whole, or a negative time or count.

    """

    def __init__(
        self,
        device: torch.device | str | None = None,
        *,
        gpu_threshold: float = 0.85,
        cpu_threshold: float = 0.80,
        interval: float = 30.0,
        force_cleanup_every: int | None = None,
        alarm: float = 0.90,
        on_alarm: Callable[[str, float], object] | None = None,
        alarm_file: Path | None = None,
        warn: bool = True,
        reading_seconds: float = 1.0,
        history: int = 512,
        monitoring: bool = True,
        gauges: Sequence[Gauge] | None = None,
    ) -> None:
        _check_parts(gpu_threshold=gpu_threshold, cpu_threshold=cpu_threshold, alarm=alarm)
        _check_seconds(interval=interval, reading_seconds=reading_seconds)
        _check_counts(force_cleanup_every, history)
        if gauges is None:
            own = gauge_for(device)
            gauges = [own] if isinstance(own, HostGauge) else [own, HostGauge()]
        self._gauges = list(gauges)
        self._thresholds = {
            gauge.name: cpu_threshold if isinstance(gauge, HostGauge) else gpu_threshold
            for gauge in self._gauges
        }
        self.histories = {gauge.name: History(history) for gauge in self._gauges}
        self.steps = 0
        self._seconds = 0.0
        self._earlier: dict[str, list[Reading]] = {}
        self._cleaner = Cleaner(self._gauges, interval)
        self._force_every = force_cleanup_every
        self._names = Names()
        self._alarm = Alarm(alarm, on_alarm, self._names, alarm_file, warn)
        self._history = history
        self._reading_seconds = reading_seconds if monitoring else float("inf")
        self._next_reading = 0.0 if monitoring else float("inf")

    @property
    def cleanups(self) -> list[Cleanup]:
        """Every tidying up so far."""
        return self._cleaner.done

    @cached_property
    def _live_line(self) -> LiveLine:
        from expt.memory.watching.outlook import LiveLine

        return LiveLine()

    @property
    def alarms(self) -> list[AlarmRecord]:
        """The last alarms, each with the tensors that were largest then."""
        return self._alarm.rung

    @property
    def seconds(self) -> float:
        """Time spent in readings and cleanups."""
        return self._seconds + self._cleaner.seconds

    def __enter__(self) -> MemoryManager:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None and self._next_reading != float("inf"):
            self._read()

    def limit(
        self, budget_bytes: int, device: torch.device, ledger: BudgetLedger | None = None
    ) -> None:
        """Also watch a budget, by the name ``budget``.

        Args:
            budget_bytes: the limit of what this process's tensors take.
            device: where they are.
            ledger: what enforces the budget where there is no caching allocator; it rings in the
                operator that comes too near, when the tensors of the step are all there.

        """
        if self._next_reading == float("inf"):
            return
        gauge = BudgetGauge(budget_bytes, device, ledger)
        self._gauges = [*(g for g in self._gauges if g.name != gauge.name), gauge]
        self._thresholds[gauge.name] = 1.0  # tidying up is for devices
        self.histories.setdefault(gauge.name, History(self._history))

        self._alarm.parts.pop(gauge.name, None)
        self._listen(gauge)

    def expect(self, peak_bytes: int | None) -> None:
        """Let the budget's alarm ring only above what is expected, if that is more of it.

        Args:
            peak_bytes: what the training may take of the budget when all goes as planned; as
                much as the budget, or None, is no expectation.

        """
        for gauge in self._gauges:
            if gauge.name == BUDGET_NAME:
                used = (peak_bytes or 0) / gauge.total_bytes
                self._alarm.parts[gauge.name] = max(self._alarm.part, used if used < 1 else 0.0)
                self._listen(gauge)

    def _listen(self, gauge: Gauge) -> None:
        """Let a budget's ledger ring in the operator that comes too near."""
        ledger = gauge.ledger if isinstance(gauge, BudgetGauge) else None
        if ledger is None:
            return

        def tell() -> bool:
            if self._alarm.is_ringing(gauge):
                return True
            if sys.exception() is not None:
                return False
            reading = gauge.read(self.steps)
            return self._alarm.ring(
                gauge, gauge.used_fraction(reading), reading, "while a tensor was made"
            )

        ledger.tell_above(int(self._alarm.above(gauge) * gauge.total_bytes), tell)

    def knows(
        self,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        data: object | None = None,
    ) -> None:
        """Let alarms say what a tensor is of, and keep none of these alive.

        Args:
            model: its weights, buffers and gradients are told by name.
            optimizer: its state is told by the name of the weight.
            data: any object; tensors that are its attributes are told by theirs.

        """
        self._names.know(model, optimizer, data)

    def step(self) -> bool:
        """Count a step; read, warn and tidy up if it is time to; return whether it was read."""
        self.steps += 1
        every = self._force_every
        if every is not None and self.steps % every == 0:
            self.cleanup(f"every {every} steps")
        pending = self._cleaner.pending
        if time.monotonic() < self._next_reading and pending is None:
            return False
        if pending is not None and sys.exception() is None:
            self.cleanup(pending)
        if time.monotonic() >= self._next_reading:
            self._read()
            self._next_reading = time.monotonic() + self._reading_seconds
            return True
        return False

    def watch(self, function: Callable[P, R]) -> Callable[P, R]:
        """Decorate a training step: `step` is called after it, unless it raised."""

        @wraps(function)
        def watched(*args: P.args, **kwargs: P.kwargs) -> R:
            result = function(*args, **kwargs)
            self.step()
            return result

        return watched

    def on_cleanup(self, callback: Callable[[], object]) -> Callable[[], object]:
        """Call this whenever there is tidying up, first come first; returns it (a decorator)."""
        self._cleaner.callbacks.append(callback)
        return callback

    def cleanup(self, reason: str = "asked for") -> Cleanup | None:
        """Call the callbacks, collect garbage, empty the device's cache.

        Returns None while an exception is being handled: it is put off to the next step.
        """
        return self._cleaner.clean(self.steps, reason)

    def leak(self) -> Trend:
        """Return the verdict over the history of the first device."""
        return judge(self._first.readings)

    def risk(
        self, horizon_steps: float = 100, capacity_bytes: int | None = None
    ) -> Forecast | None:
        """Return how likely the first device runs out within so many steps; None if too early.

        Args:
            horizon_steps: how far to look ahead.
            capacity_bytes: a budget; None is what the device has, less what others hold.

        """
        capacity = self._gauges[0].total_bytes
        if capacity_bytes is not None:  # of this process alone, whatever others hold
            capacity = min(capacity, capacity_bytes + self._others)
        return forecast(self._first.readings, capacity, horizon_steps)

    def statistics(self) -> dict[str, Any]:
        """Return steps, cleanups, seconds spent, and bytes by device."""
        return {
            "steps": self.steps,
            "cleanups": len(self.cleanups),
            "seconds": self.seconds,
            "devices": {name: found.statistics() for name, found in self.histories.items()},
        }

    def now(self) -> dict[str, dict[str, float]]:
        """Return the last reading of every device, by name, for JSON."""
        return {
            name: {key: value for key, value in vars(one.last).items() if value is not None}
            for name, one in self.histories.items()
            if one.last is not None
        }

    def line(self) -> str:
        """Return what is in use of the budget or the first device, and when that will be full."""
        gauge = next((g for g in self._gauges if isinstance(g, BudgetGauge)), self._gauges[0])
        return self._live_line.words(self.histories[gauge.name], gauge.total_bytes)

    def suggestions(self) -> list[str]:
        """Return what to change, the most urgent first; empty when all is well."""
        fractions = {
            gauge.name: gauge.used_fraction(last)
            for gauge in self._gauges
            if (last := self.histories[gauge.name].last) is not None
        }
        peak = self._first.statistics().get("peak_allocated_bytes")
        from expt.memory.diagnosis.advice import suggest

        return suggest(
            self.leak(),
            self.risk(),
            over=[name for name, used in fractions.items() if used > self._thresholds[name]],
            peak_fraction=(
                None if peak is None else (peak + self._others) / self._gauges[0].total_bytes
            ),
            on_gpu=not isinstance(self._gauges[0], HostGauge),
        )

    def resume(self, path: Path, step: int) -> None:
        """Go on after a step with the file of readings that an earlier process wrote.

        They stand before this process's in `write_csv`, and are in no verdict: another process
        holds other bytes. Readings after that step, which is taken again, are left out.
        """
        self.steps = step
        with suppress(OSError, UnicodeDecodeError):
            self._earlier = from_csv(path.read_text(encoding="utf-8"), until=step)

    def write_csv(self, path: Path) -> None:
        """Write the readings that are kept; `task=diagnose` reads them."""
        own = {name: one.readings for name, one in self.histories.items()}
        write_text(path, to_csv(self._earlier, own))

    @property
    def _first(self) -> History:
        return self.histories[self._gauges[0].name]

    @property
    def _others(self) -> int:
        """What others hold of the first device now."""
        last = self._first.last
        return 0 if last is None else last.other_bytes or 0

    def _read(self) -> None:
        began = time.monotonic()
        tight = None
        for gauge in self._gauges:
            reading = gauge.read(self.steps)
            self.histories[gauge.name].add(reading)
            used = gauge.used_fraction(reading)
            self._hear(gauge, used, reading)
            if used > self._thresholds[gauge.name]:
                tight = f"{gauge.name} at {used:.0%}"
        self._seconds += time.monotonic() - began
        self._cleaner.when_tight(self.steps, tight)

    def _hear(self, gauge: Gauge, used: float, reading: Reading) -> None:
        """Ring if it is too full; a budget's alarm ends with a time in which no operator was above.

        After a step its tensors are gone: what is held then does not say that use came down.
        """
        ledger = gauge.ledger if isinstance(gauge, BudgetGauge) else None
        eased = ledger is None or not ledger.was_above()
        was_ringing = self._alarm.is_ringing(gauge)
        self._alarm.hear(gauge, used, reading, eased)
        if was_ringing and not self._alarm.is_ringing(gauge):
            self._listen(gauge)


def _check_parts(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value <= 1:
            raise UserError(f"{name}={value}: a part of the memory, above 0 to 1, as in 0.85")


def _check_seconds(**values: float) -> None:
    for name, value in values.items():
        if not value >= 0:
            raise UserError(f"{name}={value}: seconds, 0 or more")


def _check_counts(force_cleanup_every: int | None, history: int) -> None:
    if force_cleanup_every is not None and force_cleanup_every < 1:
        raise UserError(f"force_cleanup_every={force_cleanup_every}: steps, 1 or more, or None")
    if history < 8:
        raise UserError(f"history={history}: readings to keep, 8 or more")
