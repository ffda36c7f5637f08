"""Timing two or more compiled functions side by side in one process, and figures beside their targets."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def interleaved(functions: dict[str, Callable[[], Any]], repeats: int = 30, warmup: int = 3) -> dict[str, float]:
    """Median seconds of each function; they take turns, so that a drift of the machine's speed falls on all alike."""
    for function in functions.values():
        for _ in range(warmup):
            jax.block_until_ready(function())
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            begin = time.perf_counter()
            jax.block_until_ready(function())
            seconds[name].append(time.perf_counter() - begin)
    return {name: float(np.median(values)) for name, values in seconds.items()}


def target(what: str, figure: float, at_most: float) -> bool:
    """Prints a figure beside the most that is promised, in the words that `run_all.py` looks for."""
    is_met = figure <= at_most
    print(f"TARGET {what}: {figure:.3g} of at most {at_most:g}{'' if is_met else ', MISSED'}", flush=True)
    return is_met


def table(rows: dict[str, float], reference: str, unit: float = 1e3, name: str = "ms") -> None:
    """Prints each figure and its ratio to the reference."""
    width = max(map(len, rows))
    print(f"{'':{width}}  {name:>10}  ratio")
    for label, value in rows.items():
        print(f"{label:{width}}  {value * unit:10.3f}  {value / rows[reference]:5.3f}")
