"""Numbers as people read them."""

from __future__ import annotations

from settings.formatting import (
    format_bytes,
    format_count,
    format_duration,
    format_plural,
    format_si,
)


def test_numbers_have_three_digits_and_a_unit() -> None:
    counts = (0, 950, 999.7, 12_345, 999_999, 25_296_896, 1.24e9, 3e15)
    texts = ["0", "950", "1 k", "12.3 k", "1 M", "25.3 M", "1.24 B", "3e+03 T"]
    assert [format_count(number) for number in counts] == texts
    assert [format_bytes(n) for n in (950, 25_296_896, 1.24e9)] == ["950 B", "25.3 MB", "1.24 GB"]
    assert format_si(1.5e10, "FLOP/s") == "15 GFLOP/s"
    assert [format_plural(n, "save") for n in (0, 1, 1200)] == ["0 saves", "1 save", "1,200 saves"]


def test_durations_have_two_units() -> None:
    texts = ["7s", "4m03s", "2h05m", "3d04h"]
    assert [format_duration(seconds) for seconds in (7, 243, 7500, 273600)] == texts
