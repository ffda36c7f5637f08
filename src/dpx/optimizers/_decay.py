"""The decay of a moving average."""

from typing import Any

from .._checks import real_number


def check_decay(call: str, value: Any) -> float:
    """A number in [0, 1)."""
    number = real_number(call, value)
    if not 0 <= number < 1:
        raise ValueError(f"`{call}` must lie in [0, 1); got {number}.")
    return number
