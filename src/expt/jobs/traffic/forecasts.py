"""Forecasts as a file: npz for programs, parquet for tables.

The npz holds ``forecast`` [W, P, N] in the series' unit, ``issued`` [W] (the time of the last
reading that a forecast saw), ``timestamps`` [W, P] (what it is for), and ``sensor_ids`` [N]. The
parquet has a row per forecast step with ``issued``, ``timestamp``, and a column per sensor, called
``sensor issued`` where a sensor has one of these names.

Letters: `W` windows, `P` horizon, `N` sensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from expt.files import replace_atomically


@dataclass(frozen=True)
class Forecasts:
    """What a model forecast of some windows."""

    values: npt.NDArray[np.float32]
    """[W, P, N], in `unit`."""
    issued: npt.NDArray[np.datetime64]
    """[W], the time of the last reading of each window's input."""
    step_seconds: int
    sensor_ids: tuple[str, ...]
    unit: str

    @property
    def timestamps(self) -> npt.NDArray[np.datetime64]:
        """What the forecasts are for [W, P]."""
        ahead = np.arange(1, self.values.shape[1] + 1) * np.timedelta64(self.step_seconds, "s")
        found: npt.NDArray[np.datetime64] = self.issued[:, None] + ahead
        return found

    def write(self, path: Path) -> None:
        """Write the file, in the format that its ending names."""
        write = self._parquet if path.suffix == ".parquet" else self._npz
        replace_atomically(path, write)

    def _npz(self, path: Path) -> None:
        with path.open("wb") as file:
            np.savez_compressed(
                file,
                forecast=self.values,
                issued=self.issued,
                timestamps=self.timestamps,
                sensor_ids=np.array(self.sensor_ids),
                unit=np.array(self.unit),
            )

    def _parquet(self, path: Path) -> None:
        import pandas as pd

        windows, steps, sensors = self.values.shape
        times = {
            "issued": np.repeat(self.issued, steps),
            "timestamp": self.timestamps.reshape(-1),
        }
        names = [f"sensor {name}" if name in times else name for name in self.sensor_ids]
        table = pd.DataFrame(self.values.reshape(windows * steps, sensors), columns=names)
        for place, (name, column) in enumerate(times.items()):
            table.insert(place, name, column)
        table.to_parquet(path, index=False)
