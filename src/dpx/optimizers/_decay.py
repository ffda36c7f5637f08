"""The decay of a moving average."""

from typing import Any

import numpy as np


def check_decay(call: str, value: Any) -> float:
    """A number in [0, 1)."""
    number = float(np.asarray(value))
    if not 0 <= number < 1:
        raise ValueError(f"`{call}` must lie in [0, 1); got {number}.")
    return number
