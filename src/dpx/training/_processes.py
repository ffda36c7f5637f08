"""What the processes of a run agree on: process 0 decides, the others do as it says; only hashes of secrets are compared."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from ..random import key_of_words, key_words

_MSG_DIFFERENT = (
    "The processes of this run do not agree on {what}: each must build the same plan, model and data, and be given the same arguments. Nothing was "
    "trained."
)


def is_first() -> bool:
    """Whether this process decides and writes."""
    return jax.process_index() == 0


def from_first(value: np.ndarray) -> np.ndarray:
    """What process 0 has; every process must call this, with arrays of one shape and dtype."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.broadcast_one_to_all(value))


def text_from_first(text: str) -> str:
    """The text that process 0 has."""
    if jax.process_count() == 1:
        return text
    words = np.frombuffer(text.encode(), np.uint8)
    size = int(from_first(np.array(len(words), np.int32)))
    sent = np.zeros(size, np.uint8)
    if is_first():
        sent[:] = words
    return from_first(sent).tobytes().decode()


def key_from_first(key: Key[Array, ""]) -> Key[Array, ""]:
    """The key that process 0 has."""
    if jax.process_count() == 1:
        return key
    words, impl = key_words(key)
    return key_of_words(jnp.asarray(from_first(np.asarray(words))), impl)


def check_same(what: str, text: str) -> None:
    """Raises in all processes unless all have the same text, which is compared by its hash and never shown."""
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    mine = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint32)
    all_of_them = np.asarray(multihost_utils.process_allgather(mine))
    if not (all_of_them == all_of_them[0]).all():
        raise ValueError(_MSG_DIFFERENT.format(what=what))


def raise_together(error: BaseException | None) -> None:
    """Raises where process 0 has met an error, in all processes, which would wait for it for ever."""
    message = text_from_first("" if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    if message:
        raise RuntimeError(f"Process 0 has stopped. {message}")


def digest(value: Any) -> str:
    """SHA-256 of a text or of bytes, in hexadecimal digits."""
    return hashlib.sha256(value if isinstance(value, bytes) else str(value).encode()).hexdigest()
