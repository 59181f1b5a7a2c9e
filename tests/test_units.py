from __future__ import annotations

import pytest

from expt.units import (
    GIB,
    MIB,
    budget_problem,
    counted,
    format_allocation,
    format_bytes,
    format_seconds,
    parse_bytes,
    spell_bytes,
)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, "not measured"),
        (0, "0.0 MiB"),
        (32_715_571, "31.2 MiB"),
        (99 * MIB, "99.0 MiB"),
        (GIB // 10 + 1, "102.4 MiB"),
        (GIB - MIB, "1023.0 MiB"),
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


@pytest.mark.parametrize(
    ("value", "count"),
    [
        ("200MiB", 200 * MIB),
        ("6GiB", 6 * GIB),
        ("6gib", 6 * GIB),
        ("6GB", 6 * 10**9),
        ("1.5 GiB", 3 * GIB // 2),
        ("2TiB", 2 * 1024 * GIB),
        ("512KiB", 512 * 1024),
        ("100 B", 100),
        ("1048576", MIB),
        (MIB, MIB),
        (1e9, 10**9),
        (2**62 + 1, 2**62 + 1),
    ],
)
def test_amounts_of_memory(value: object, count: int) -> None:
    assert parse_bytes(value) == count


@pytest.mark.parametrize(
    ("count", "text"),
    [(2**30, "1GiB"), (47185920, "45MiB"), (3 * 2**29, "1536MiB"), (10**9, "1000000000"), (0, "0")],
)
def test_bytes_are_spelled_without_loss(count: int, text: str) -> None:
    assert spell_bytes(count) == text
    assert count == 0 or parse_bytes(text) == count


@pytest.mark.parametrize(
    ("value", "word"),
    [
        ("6 gigs", "'gigs'"),
        ("6G", "GiB or GB"),
        ("abc", "not an amount"),
        ("", "not an amount"),
        ("nan", "not an amount"),
        (float("nan"), "positive"),
        (float("inf"), "positive"),
        (-1, "positive"),
        ("-6GiB", "positive"),
        (0, "at least one byte"),
        ("0GiB", "at least one byte"),
        ("0.5", "at least one byte"),
        ("1e999", "at least one byte"),
        (True, "not an amount"),
        (None, "not an amount"),
        ([1], "not an amount"),
        ("6GiB/s", "not an amount"),
    ],
)
def test_what_is_no_amount_of_memory(value: object, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        parse_bytes(value)
    assert word in str(budget_problem(value))


@pytest.mark.parametrize("value", ["80%", "100 %", "0.5%", "auto", "AUTO", "6GiB"])
def test_a_budget_may_be_a_share_or_what_is_free(value: str) -> None:
    assert budget_problem(value) is None


@pytest.mark.parametrize("value", ["150%", "0%", "-5%", "100.1%"])
def test_a_share_is_of_the_device(value: str) -> None:
    assert "at most 100%" in str(budget_problem(value, "limit"))
    assert str(budget_problem(value, "limit")).startswith(f"limit={value}")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.00 KiB"), (5 * GIB // 2, "2.50 GiB")],
)
def test_bytes_as_an_allocator_writes_them(count: int, text: str) -> None:
    assert format_allocation(count) == text


def test_a_noun_agrees_with_its_count() -> None:
    assert [counted(count, "step") for count in (0, 1, 1000)] == [
        "0 steps",
        "1 step",
        "1,000 steps",
    ]
