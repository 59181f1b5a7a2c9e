from __future__ import annotations

import pytest

from expt.memory.diagnosis.quantities import quantities, to_bytes

GIB = 1024**3


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("2.50 GiB", [round(2.5 * GIB)]),
        ("18.2GB and 512 MB", [18_200_000_000, 512_000_000]),
        ("8589934592 bytes", [8589934592]),
        ("1,024 KiB", [1024**2]),
        ("8.9G used", [round(8.9 * GIB)]),
        ("12 MB/s, 3 Gbit, 4 batches, v2.5GBx", []),
        ("7.11 PiB", [round(7.11 * 1024**5)]),
        ("", []),
    ],
)
def test_amounts_in_text(text: str, counts: list[int]) -> None:
    assert [one.count_bytes for one in quantities(text)] == counts


def test_the_place_is_known() -> None:
    (one,) = quantities("mem 18.2 GB.")
    assert (one.start, one.end) == (4, 11)


def test_gb_that_means_gib() -> None:
    assert to_bytes("2", "GB") == 2 * 10**9
    assert to_bytes("2", "GB", binary=True) == 2 * GIB
    assert to_bytes("2", "GiB", binary=True) == 2 * GIB
    assert to_bytes("2.5e3") == 2500
