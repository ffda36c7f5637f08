"""Inputs at which bounds break: numbers, examples, norms."""

from typing import Any

import jax.numpy as jnp
import numpy as np

FLOATS = ("float32", "bfloat16", "float16")


def hostile_numbers(dtype: Any) -> np.ndarray:
    """Numbers of a floating-point type where arithmetic changes: zeros, subnormal, smallest, largest, those whose squares under- or overflow,
    and all that is not finite; as float64."""
    info = jnp.finfo(dtype)
    largest, tiny, eps = (float(x) for x in (info.max, info.tiny, info.eps))
    subnormal = float(info.smallest_subnormal)
    finite = [
        subnormal, 3 * subnormal, tiny, tiny * (1 - eps), 1e-8, 1 - eps / 2, 1.0, 1 + eps, 0.0173, 0.7, 1.1, np.sqrt(tiny), np.sqrt(largest),
        1e4, 6e4, 1e12, 1e13, 1e19, 1e30, largest / 2, largest,
    ]  # fmt: skip
    signed = [sign * x for x in finite if x <= largest for sign in (1.0, -1.0)]
    return np.array([0.0, -0.0, *signed, np.inf, -np.inf, np.nan])


def hostile_vectors(size: int, dtype: Any, scale: float, rng: np.random.Generator, number: int = 96) -> np.ndarray:
    """Vectors of float64 numbers, some beyond the range of the type: constant, with one entry or one half that is far larger than the rest, of random
    magnitudes, and of norms about `scale`, where clipping sets in."""
    numbers = hostile_numbers(dtype)
    constant = np.repeat(numbers[:, None], size, axis=1)
    single = np.zeros((len(numbers), size))
    single[np.arange(len(numbers)), np.arange(len(numbers)) % size] = numbers
    halves = rng.choice(numbers[np.isfinite(numbers)], (number, 2))
    split = np.where(np.arange(size) < rng.integers(1, size + 1, number)[:, None], halves[:, :1], halves[:, 1:])
    low, high = np.log10(float(jnp.finfo(dtype).smallest_subnormal)), np.log10(float(jnp.finfo(dtype).max))
    magnitudes = 10 ** rng.uniform(low, high, (number, size)) * rng.choice([-1.0, 1.0], (number, size))
    mixed = rng.choice(numbers, (number, size))
    directions = rng.normal(size=(4 * number, size))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    near = np.concatenate([
        1 + rng.uniform(-1, 1, 2 * number) * 2.0 ** -rng.integers(1, 24, 2 * number),
        10 ** rng.uniform(-3, 3, number), 10 ** rng.uniform(8, 38, number),
    ])  # fmt: skip
    return np.concatenate([constant, single, split, magnitudes, mixed, directions * near[:, None] * scale])
