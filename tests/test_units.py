from __future__ import annotations

import pytest

from expt.units import GIB, MIB, format_bytes, format_seconds


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, "not measured"),
        (0, "0.0 MiB"),
        (32_715_571, "31.2 MiB"),
        (99 * MIB, "99.0 MiB"),
        (GIB // 10 + 1, "0.10 GiB"),
        (int(0.47 * GIB), "0.47 GiB"),
        (GIB, "1.00 GiB"),
        (139 * GIB + GIB // 2, "139.50 GiB"),
    ],
)
def test_bytes_for_a_reader(count: int | None, text: str) -> None:
    assert format_bytes(count) == text


def test_the_units_are_binary() -> None:
    assert (MIB, GIB) == (2**20, 2**30)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (8.24, "8.2 s"),
        (59.9, "59.9 s"),
        (60, "1:00 min"),
        (187, "3:07 min"),
        (3599.4, "59:59 min"),
        (3599.6, "1:00:00 h"),
        (7500, "2:05:00 h"),
        (100 * 3600 + 61, "100:01:01 h"),
        (59.97, "1:00 min"),
    ],
)
def test_durations_for_a_reader(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
