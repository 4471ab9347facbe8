import math
import re

import pytest

from ssd.checks import check_choice, check_number, check_positive, check_range


def error_of(check, *args, **kwargs):
    """The text of the ValueError, or None."""
    try:
        check("KEY", *args, **kwargs)
    except ValueError as error:
        return str(error)


def test_choices():
    assert error_of(check_choice, "a", ("a", "b")) is None
    assert error_of(check_choice, "c", {"a": 1, "b": 2}) == "KEY must be one of ['a', 'b'], got 'c'"


@pytest.mark.parametrize("value, bounds, expected", [
    (0, {}, None), (1e9, {}, None), (1, {"highest": 1}, None), (0.5, {"lowest": 0.5}, None),
    (-1, {}, "0 or more"), (math.inf, {}, "0 or more"), (math.nan, {}, "0 or more"),
    (1.1, {"highest": 1}, "0 to 1"), (math.nan, {"highest": 1}, "0 to 1"),
    (0.9, {"lowest": 1, "highest": 255}, "1 to 255"),
])  # fmt: skip
def test_numbers(value, bounds, expected):
    text = expected and f"KEY must be {expected}, got {value}"
    assert error_of(check_number, value, **bounds) == text


@pytest.mark.parametrize("value", [(1, 2, 3), (0.6, 0.5), (-0.1, 1), (0, 1.1), (0, math.nan)])
def test_ranges(value):
    assert error_of(check_range, (0, 1), 0, 1) is error_of(check_range, [0.5, 0.5], 0, 1) is None
    text = f"KEY must be two numbers of 0 to 1, lowest first, got {re.escape(str(value))}"
    assert re.fullmatch(text, error_of(check_range, list(value), 0, 1))


@pytest.mark.parametrize("values, expected", [
    ([1], None), ([3, 4], None), ([0], "a positive integer, got 0"),
    ([1.0], "a positive integer, got 1.0"), ([300, -1], "positive integers, got 300, -1"),
])  # fmt: skip
def test_positive_integers(values, expected):
    assert error_of(check_positive, *values) == (expected and f"KEY must be {expected}")
