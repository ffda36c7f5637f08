"""The one rounding of numbers that are printed: against whoever prints them, so that what is read is still a bound."""

import decimal
import math

import numpy as np


def round_up(value: float, digits: int = 6) -> str:
    """The shortest decimal of at most `digits` significant digits that is not below `value`, when it is read back as a float."""
    return _rounded(float(value), digits, decimal.ROUND_CEILING)


def round_down(value: float, digits: int = 6) -> str:
    """The same, not above `value`: for lower bounds."""
    return _rounded(float(value), digits, decimal.ROUND_FLOOR)


def round_epsilon(value: float) -> str:
    """Four decimals, or four significant digits where those are finer, never below `value`."""
    value = float(value)
    if not math.isfinite(value):
        return "infinity" if value > 0 else str(value)
    if 0 < value < 0.1 or value > 1e9:
        return round_up(value, 4 if value < 1 else 15)
    number = decimal.Decimal(value).quantize(decimal.Decimal("0.0001"), decimal.ROUND_CEILING)
    nearest = f"{value:.4f}"
    return nearest if float(nearest) >= value else f"{number:f}"


def exactly(value: float) -> str:
    """The shortest decimal that is read back as the same float32, which is what devices compute with; else as the same float."""
    value = float(value)
    with np.errstate(over="ignore"):
        single = np.float32(value)
    return (str(single) if float(single) == value else repr(value)).removesuffix(".0")


def _rounded(value: float, digits: int, rounding: str) -> str:
    nearest = f"{value:.{digits}g}"
    if not math.isfinite(value):
        return nearest
    is_bound = float(nearest) >= value if rounding == decimal.ROUND_CEILING else float(nearest) <= value
    if is_bound:
        return nearest
    # exact: a float is a decimal fraction
    number = decimal.Context(prec=digits, rounding=rounding).create_decimal(decimal.Decimal(value))
    return f"{float(number):.{digits}g}"
