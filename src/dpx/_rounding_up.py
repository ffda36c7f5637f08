"""The one rounding up of what is computed in float32: what is accounted for must not be less than what runs.

A float32 operation errs by at most a relative 2**-24. Whoever states a bound counts the operations in which it may have been rounded down, and
multiplies by one of these.
"""

import numpy as np


def _room(operations: int) -> float:
    """More than the relative error of so many operations in a row, as a power of two, so that 1 + room is a float32."""
    return 2.0 ** (operations.bit_length() - 24)


# a standard deviation: the product of up to four numbers
PRODUCT_UP = 1 + _room(3)
# the root of a sum of squares, over the largest: a quotient, a square, sums, a root, a product
ROOT_UP = 1 + _room(7)
# a scale that pays for side queries: of a difference of nearly equal numbers the error is amplified, but then the noise is huge
JOINT_UP = 1 + _room(15)
# a norm of which factors are made: the squares of up to a million leaves added up by halves, the factor, its product with the gradient;
# docs/ghost.md has the account
NORM_UP = 1 + _room(31)
# norms, factors and products together, before they are rounded to integers
ALL_ERRORS = _room(63)


def rounded_up(number: float) -> np.float32:
    """The least float32 that is not below `number`."""
    with np.errstate(over="ignore"):
        rounded = np.float32(number)
    return np.nextafter(rounded, np.float32(np.inf)) if float(rounded) < number else rounded
