"""Forecasts as files; what `task=predict` writes is tested there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from expt.jobs.traffic.forecasts import Forecasts

ISSUED = np.array(["2024-01-01", "2024-01-02"], "datetime64[s]")


@pytest.mark.parametrize("names", [("a", "b"), ("issued", "timestamp")])
def test_any_sensor_has_a_column_beside_those_of_times(tmp_path: Path, names: tuple[str]) -> None:
    values = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    forecasts = Forecasts(values, ISSUED, 300, names, "mph")
    forecasts.write(tmp_path / "x.parquet")
    table = pd.read_parquet(tmp_path / "x.parquet")
    own = list(names) if "a" in names else ["sensor issued", "sensor timestamp"]
    assert list(table.columns) == ["issued", "timestamp", *own]
    np.testing.assert_array_equal(table[own], values.reshape(6, 2))
    np.testing.assert_array_equal(table["issued"], ISSUED.repeat(3))
    np.testing.assert_array_equal(table["timestamp"], forecasts.timestamps.reshape(-1))
