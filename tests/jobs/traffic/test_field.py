"""Files as the field has them; what each has to give is in their README."""

from __future__ import annotations

from pathlib import Path

import pytest

from expt.errors import DataError
from expt.jobs.traffic.data import TrafficData

FILES = Path(__file__).parents[4] / "shared" / "field" / "data"
pytestmark = pytest.mark.skipif(not FILES.is_dir(), reason="the files are not here")
SENSORS = ("400001", "400017", "400030", "400040")


def traffic(name: str, **choice: object) -> TrafficData:
    options = (None, "", None, 12, 12, 8, 8, 0.7, 0.2, "mph")
    return TrafficData(str(FILES / name), *options, **choice)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "left"), [("flow_and_speed_frames.h5", "/flow"), ("meta_before_speed.h5", "/meta")]
)
def test_the_frame_of_speeds_is_read(name: str, left: str) -> None:
    data = traffic(name)
    assert f"data: read /speed, left {left}; data.key" in data.describe()
    assert data.series.sensor_ids == SENSORS
    assert 55 < data.mean < 65
    assert "warning" not in data.describe()


def test_flow_is_read_if_asked_for_and_is_no_speed() -> None:
    data = traffic("flow_and_speed_frames.h5", key="flow")
    assert data.mean > 200
    assert "warning: a typical reading is 220 mph" in data.describe()


def test_a_long_table_of_one_sensor() -> None:
    data = traffic("long_one_sensor.csv")
    assert data.series.sensor_ids == ("400001",)
    assert "data: long table: read speed by sensor_id" in data.describe()


def test_columns_of_other_scales() -> None:
    data = traffic("flow_occupancy_speed.csv")
    (warning,) = [line for line in data.describe().splitlines() if "warning" in line]
    assert "total_flow (220)" in warning and "avg_occupancy (0.0598)" in warning
    assert "avg_speed" not in warning
    only = traffic("flow_occupancy_speed.csv", channel="avg_speed")
    assert only.series.sensor_ids == ("avg_speed",) and "warning" not in only.describe()


def test_another_encoding() -> None:
    with pytest.raises(DataError, match=r"another encoding than UTF-8.*Reichsbrücke.*iconv"):
        traffic("latin1.csv")
