from __future__ import annotations

import math

import pytest

from mdl.ledger import Interval
from mdl.report.figures import count, fidelity_text, human, interval_text, percent, with_error


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.0533, "0.0533"),
        (1.5, "1.50"),
        (104.2, "104"),
        (999.6, "1.00k"),
        (1234, "1.23k"),
        (1.236e6, "1.24M"),
        (9.9999e9, "10.0G"),
        (-66.14, "−66.1"),
        (-1e-9, "−1.0e-9"),
        (0.00012, "1.2e-4"),
        (0.0012, "0.00120"),
        (1.2e-5, "1.2e-5"),
        (math.inf, "∞"),
        (math.nan, "–"),
    ],
)
def test_human_keeps_three_significant_digits(value, text):
    assert human(value) == text


def test_human_never_grows_beyond_its_column():
    for power in range(-3, 15):
        for mantissa in (1.0, 9.994, 9.996, 5.5):
            assert len(human(mantissa * 10.0**power).lstrip("−")) <= 7


@pytest.mark.parametrize(
    ("value", "text"), [(1, "1"), (10, "10"), (1000, "1k"), (1.2e6, "1.2M"), (780, "780"), (0, "0")]
)
def test_count_drops_idle_zeros(value, text):
    assert count(value) == text


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (103.94, 0.81, "103.9 ±0.8"),
        (157.2, 1.4, "157 ±1"),
        (0.0718, 0.0007, "0.0718 ±0.0007"),
        (12.3, 0.0001, "12.30 ±<0.01"),
        (0.0, 0.0, "0"),
        (0.0, 0.5, "0.0 ±0.5"),
        (62.1, math.inf, "62.1 ±?"),
        (4321.0, 25.0, "4321 ±25"),
    ],
)
def test_errors_set_the_digits(value, error, text):
    assert with_error(value, error) == text


def test_percentages_and_intervals():
    assert percent(0.312) == "31.2%"
    assert percent(-0.0405) == "−4.05%"
    assert percent(-0.0) == "0.00%"
    assert percent(-10.19) == "−1019%"
    assert fidelity_text(0.001) == "0.1 %"
    assert interval_text(Interval(780.0, 720.0, math.inf)) == "[720–∞]"
