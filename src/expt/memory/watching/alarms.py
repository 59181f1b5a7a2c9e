"""Alarms: what is nearly full is told once, with the largest tensors that live at that moment.

Nothing is looked for while an exception is being handled, whose traceback holds tensors that are
about to go: the alarm then rings at the next look.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expt.errors import StorageError
from expt.files import write_json
from expt.memory.diagnosis.trend import Reading
from expt.memory.watching.gauges import BUDGET_NAME, Gauge
from expt.memory.watching.largest import LiveTensor, find_largest
from expt.units import format_bytes

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

ALARMS_NAME = "alarms.json"
"""In a run's directory."""
LOOK_SECONDS = 60.0
"""Between two searches for tensors: use that goes up and down about the limit must cost nothing."""
MOST_ALARMS = 50
"""Kept in the file, the last ones."""


@dataclass(frozen=True)
class AlarmRecord:
    """One alarm; `rung_at` is in seconds since 1970.

    `found_bytes` is None where no tensors were looked for.
    """

    step: int
    device: str
    used_fraction: float
    total_bytes: int
    allocated_bytes: int
    reserved_bytes: int | None
    peak_bytes: int | None
    moment: str
    found_bytes: int | None = None
    largest: tuple[LiveTensor, ...] = ()
    rung_at: float = field(default_factory=time.time)
    """Tells the alarm of a step from that of the same step, taken again after a resume."""

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {**vars(self), "largest": [tensor.as_dict() for tensor in self.largest]}

    def lines(self) -> list[str]:
        """Return it for a reader, the tensors one a line."""
        total, percent = format_bytes(self.total_bytes), f"{100 * self.used_fraction:.0f} %"
        first = f"memory of {self.device}: {percent} of {total} in use"
        if self.device == BUDGET_NAME:
            first = f"{percent} of the memory budget of {total} in use"
        if not self.largest:
            return [first]
        first += f" at step {self.step}, {self.moment}; the largest tensors:"
        return [first, *(f"  {tensor.line()}" for tensor in self.largest)]


class Alarm:
    """Warns when something becomes fuller than a part of it; again only after it was emptier.

    Args:
        part: of what there is, 0 to 1; `parts` has another one of some gauges, by name.
        callback: also called then, with the device's name and the part in use.
        names: returns what tensors are, as `find_largest` takes it.
        file: where the alarms of a run are kept, after those that are there.
        warn: also log a warning; else the log has it as information.

    """

    def __init__(
        self,
        part: float,
        callback: Callable[[str, float], object] | None = None,
        names: Callable[[], Iterable[tuple[str, Tensor]]] = tuple,
        file: Path | None = None,
        warn: bool = True,
    ) -> None:
        self.part = part
        self.parts: dict[str, float] = {}
        self._level = logging.WARNING if warn else logging.INFO
        self.rung: list[AlarmRecord] = []
        self._callback = callback
        self._names = names
        self._file = file
        self._ringing: set[str] = set()
        self._next_look = 0.0
        self._earlier: list[dict[str, Any]] | None = None

    def above(self, gauge: Gauge) -> float:
        """Return the part of what a gauge reads above which to ring."""
        return self.parts.get(gauge.name, self.part)

    def is_ringing(self, gauge: Gauge) -> bool:
        """Tell whether it has rung, and use has not come down since."""
        return gauge.name in self._ringing

    def hear(self, gauge: Gauge, used: float, reading: Reading, eased: bool = True) -> bool:
        """Take note of how full something is after a step; return whether that rang.

        Args:
            gauge: what was read.
            used: the part in use then.
            reading: the figures.
            eased: False where it was fuller since the reading before, so that the alarm goes on.

        """
        if used <= self.above(gauge):
            if eased:
                self._ringing.discard(gauge.name)
            return False
        return self.ring(gauge, used, reading, "after a step")

    def ring(self, gauge: Gauge, used: float, reading: Reading, moment: str) -> bool:
        """Warn, unless it was done before or an exception is being handled; return whether."""
        if gauge.name in self._ringing or sys.exception() is not None:
            return False
        self._ringing.add(gauge.name)
        record = self._record(gauge, used, reading, moment)
        self.rung = [*self.rung, record][-MOST_ALARMS:]
        log.log(self._level, "%s", "\n".join(record.lines()))
        self._write()
        if self._callback is not None:
            self._callback(gauge.name, used)
        return True

    def _record(self, gauge: Gauge, used: float, reading: Reading, moment: str) -> AlarmRecord:
        figures = (
            int(reading.step), gauge.name, used, gauge.total_bytes, reading.allocated_bytes,
            reading.reserved_bytes, reading.peak_bytes, moment,
        )  # fmt: skip
        now = time.monotonic()
        if now < self._next_look or "torch" not in sys.modules:
            return AlarmRecord(*figures)
        self._next_look = now + LOOK_SECONDS
        try:
            found = find_largest(gauge.place, self._names())
        except Exception as error:  # it would leave through an operator, or end the training
            log.warning("tensors could not be looked for: %s: %s", type(error).__name__, error)
            return AlarmRecord(*figures)
        return AlarmRecord(*figures, found.bytes, found.largest)

    def _write(self) -> None:
        if self._file is None:
            return
        if self._earlier is None:  # of the part of the run before it was resumed
            self._earlier = load_alarms(self._file)
        rows = [*self._earlier, *(record.as_dict() for record in self.rung)][-MOST_ALARMS:]
        try:
            write_json(self._file, rows, durable=False)
        except StorageError as error:  # the checkpoint will say so, and what it means
            log.warning("the alarm is not kept: %s", error)


def load_alarms(file: Path) -> list[dict[str, Any]]:
    """Return the alarms that a run has kept; none where there is no such file."""
    with suppress(OSError, ValueError):
        stored = json.loads(file.read_text(encoding="utf-8"))
        return [row for row in stored if isinstance(row, dict)] if isinstance(stored, list) else []
    return []
