"""How a broken law is reported."""

from typing import Any


def name_of(part: Any) -> str:
    """What messages call the part."""
    return f"`{type(part).__name__}`"


def require(holds: Any, part: Any, law: str, found: str) -> None:
    """Raises `AssertionError` unless the law holds. `found` says what the part does, with numbers and the input that shows it."""
    if not bool(holds):
        raise AssertionError(f"{name_of(part)} breaks the law: {law}. Found: {found}")


def check_false_alarm(call: str, false_alarm: float) -> float:
    """A probability that can be promised."""
    if not 0 < false_alarm < 1:
        raise ValueError(f"`{call}(false_alarm=...)` must be between 0 and 1, such as 1e-6; got {false_alarm}.")
    return float(false_alarm)
