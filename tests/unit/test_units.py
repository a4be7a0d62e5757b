"""Sizes and durations as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierblk import units


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        (0, 0),
        (4096, 4096),
        ("4096", 4096),
        ("17B", 17),
        ("64KiB", 65536),
        (" 64 KiB ", 65536),
        ("1.5GiB", 3 * 2**29),
        ("10GB", 10**10),
        ("3kB", 3000),
        ("2TiB", 2**41),
        ("1PiB", 2**50),
        ("1PB", 10**15),
    ],
)
def test_sizes(text: str | int, size_bytes: int) -> None:
    assert units.parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text",
    [
        "",
        "KiB",
        "4 gigs",
        "4gib",
        "-1",
        "-4KiB",
        "1e3",
        "0x10",
        "1.5",
        "1.0001KiB",
        "٤KiB",
        "1" * 40,
        "nan",
        "4KiB\n4",
    ],
)
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="size is"):
        units.parse_size(text)


@pytest.mark.parametrize("value", [-1, True, 1.5, None, [1]])
def test_values_that_are_no_sizes(value: object) -> None:
    with pytest.raises(ValueError, match="size is"):
        units.parse_size(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (65536, "64 KiB"),
        (1536, "1.5 KiB"),
        (2**20 - 1, "1 MiB"),
        (1023 * 1024 + 972, "1023.9 KiB"),
        (1023 * 1024 + 973, "1 MiB"),
        (2**30 + 2**29, "1.5 GiB"),
        (5000 * 2**50, "5000 PiB"),
        (-1536, "-1.5 KiB"),
    ],
)
def test_sizes_for_people(size_bytes: int, text: str) -> None:
    assert units.format_size(size_bytes) == text


@given(st.integers(0, 2**63))
def test_a_size_for_people_is_right_to_its_last_digit_and_short(size_bytes: int) -> None:
    text = units.format_size(size_bytes)
    number, unit = text.split()
    error = abs(float(number) * units.SIZE_UNITS[unit] - size_bytes)
    assert error <= 0.0501 * units.SIZE_UNITS[unit]
    assert len(number) <= 6


@given(st.integers(0, 2**63))
def test_an_exact_size_comes_back(size_bytes: int) -> None:
    assert units.parse_size(units.format_exact_size(size_bytes)) == size_bytes


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5s", 5.0), ("100ms", 0.1), ("2m", 120.0), ("1h", 3600.0), ("1.5s", 1.5), ("0s", 0.0)],
)
def test_durations(text: str, seconds: float) -> None:
    assert units.parse_duration(text) == seconds
    assert units.parse_duration(units.format_duration(seconds)) == seconds


@pytest.mark.parametrize("text", ["", "5", "s", "-1s", "5 seconds", "1d", 5, None, True])
def test_durations_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="a duration is a number with a unit"):
        units.parse_duration(text)
