r"""How wrong a workload becomes: $\|A C^{-1}\|$, without the sensitivity. Host, float64."""

import math
from collections.abc import Iterator

import numpy as np

from .._checks import described, positive_int, real_array, real_number

Workload = str | np.ndarray
"""`"prefix"`, the `steps` coefficients of a Toeplitz workload, or a lower-triangular `(steps, steps)` matrix."""

_ROWS = 256  # rows of a dense workload that are filtered at a time


def momentum_workload(
    steps: int, momentum: float = 0.9, weight_decay: float = 0.0, learning_rates: np.ndarray | None = None
) -> np.ndarray:
    r"""What SGD with momentum, weight decay and a learning-rate schedule makes of the gradients, as a workload.

    With heavy-ball $v_t = \beta v_{t-1} + g_t$ and $w_t = (1 - \lambda) w_{t-1} - \eta_t v_t$, the weights are
    $-\sum_j A_{ij} g_j$ with $A_{ij} = \sum_{t=j}^{i} (1 - \lambda)^{i-t} \eta_t \beta^{t-j}$.

    **Arguments:**

    - `steps`: $n$.
    - `momentum`: $0 \le \beta < 1$.
    - `weight_decay`: $0 \le \lambda < 1$, the fraction of the weights that is lost at each step.
    - `learning_rates`: $\eta_t$, of shape `(steps,)`; None for a constant 1.

    **Returns:**

    The `steps` coefficients of a Toeplitz workload, or a `(steps, steps)` matrix if learning rates are given.
    """
    call = "momentum_workload"
    steps = positive_int(f"{call}(steps=...)", steps)
    momentum, weight_decay = check_decays(call, momentum, weight_decay)
    velocity = geometric(momentum, steps)
    kept = geometric(1 - weight_decay, steps)
    if learning_rates is None:
        return divide(velocity, np.array([1.0, weight_decay - 1.0]))
    rates = real_array(f"{call}(learning_rates=...)", learning_rates, f"{steps} numbers")
    if rates.shape != (steps,) or not np.isfinite(rates).all():
        raise ValueError(f"`{call}(learning_rates=...)` must hold {steps} finite numbers; got shape {rates.shape}.")
    from ._sensitivity import toeplitz

    return toeplitz(kept) @ (rates[:, None] * toeplitz(velocity))


def check_decays(call: str, momentum: float, weight_decay: float) -> tuple[float, float]:
    """Momentum and weight decay of a workload, both in [0, 1)."""
    numbers = []
    for name, value in (("momentum", momentum), ("weight_decay", weight_decay)):
        numbers.append(real_number(f"{call}({name}=...)", value))
        if not 0 <= numbers[-1] < 1:
            raise ValueError(f"`{call}({name}=...)` must lie in [0, 1); got {value}.")
    return numbers[0], numbers[1]


def geometric(ratio: float, size: int) -> np.ndarray:
    """`ratio ** arange(size)`."""
    return np.power(float(ratio), np.arange(size))


def resolve_workload(call: str, workload: Workload, steps: int) -> np.ndarray:
    """The coefficients `(steps,)` of a Toeplitz workload, or its matrix `(steps, steps)`."""
    if isinstance(workload, str):
        if workload != "prefix":
            raise ValueError(
                f'`{call}(workload=...)` must be "prefix", the {steps} coefficients of a Toeplitz workload, or a '
                f'({steps}, {steps}) matrix such as `momentum_workload({steps}, 0.9)` gives; got "{workload}".'
            )
        return np.ones(steps)
    array = real_array(
        f"{call}(workload=...)", workload, f'"prefix", {steps} coefficients or a ({steps}, {steps}) matrix'
    )
    if array.shape not in ((steps,), (steps, steps)):
        raise ValueError(
            f"`{call}(workload=...)` must have shape ({steps},) or ({steps}, {steps}), one row a step; got {array.shape}."
        )
    if not np.isfinite(array).all():
        raise ValueError(f"`{call}(workload=...)` must be finite.")
    if array.ndim == 2 and np.triu(array, 1).any():
        raise ValueError(f"`{call}(workload=...)` must be lower triangular: no step can use a later gradient.")
    return array


def is_prefix(queries: np.ndarray) -> bool:
    """Whether a resolved workload is the sums of all gradients so far."""
    return queries.ndim == 1 and bool((queries == 1).all())


def check_kind(call: str, kind: str) -> None:
    if not isinstance(kind, str) or kind not in ("mean", "max"):
        raise ValueError(
            f'`{call}(kind=...)` must be "mean" (root mean squared over the steps) or "max"; got {described(kind)}.'
        )


def divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    r"""The first `len(numerator)` coefficients of the power series $a(x) / c(x)$; along the last axis of `numerator`."""
    from scipy.signal import lfilter

    return np.asarray(lfilter(np.ones(1), np.asarray(denominator, np.float64), numerator, axis=-1))


def inverse_series(coefficients: np.ndarray, size: int) -> np.ndarray:
    r"""The first `size` coefficients of $1 / c(x)$."""
    impulse = np.zeros(size)
    impulse[0] = 1.0
    return divide(impulse, coefficients)


def multiply(left: np.ndarray, right: np.ndarray, size: int) -> np.ndarray:
    """The first `size` coefficients of a product of power series, the shorter one as a filter."""
    from scipy.signal import fftconvolve, lfilter

    short, long = sorted((np.asarray(left)[:size], np.asarray(right)[:size]), key=len)
    long = np.concatenate([long, np.zeros(size - len(long))])
    if len(short) <= 512:
        return np.asarray(lfilter(short, np.ones(1), long))
    return np.asarray(fftconvolve(long, short))[:size]


def squared_rows_error(squares: np.ndarray, kind: str) -> float:
    """The error from the squared norm of each row of $A C^{-1}$."""
    return math.sqrt(float(squares.mean() if kind == "mean" else squares.max()))


def toeplitz_error(coefficients: np.ndarray, workload: np.ndarray, kind: str) -> float:
    r"""$\|A C^{-1}\|$ for the Toeplitz $C$ that begins with `coefficients`, zero after the last of them."""
    steps = len(workload)
    if workload.ndim == 1:
        return squared_rows_error(np.cumsum(np.square(divide(workload, coefficients[:steps]))), kind)
    squares = [np.square(block).sum(1) for block in filtered_rows(workload, coefficients[:steps])]
    return squared_rows_error(np.concatenate(squares), kind)


def filtered_rows(workload: np.ndarray, coefficients: np.ndarray) -> Iterator[np.ndarray]:
    r"""$A C^{-1}$, some rows at a time: $m C = a$ is a filter that runs from the right to the left."""
    for start in range(0, len(workload), _ROWS):
        yield divide(workload[start : start + _ROWS, ::-1], coefficients)[:, ::-1]


def scaled_toeplitz_error(coefficients: np.ndarray, scales: np.ndarray, workload: np.ndarray, kind: str) -> float:
    r"""$\|A D C^{-1}\|$ with $D$ the diagonal of `scales`."""
    steps = len(scales)
    squares = []
    for start in range(0, steps, _ROWS):
        rows = slice(start, min(start + _ROWS, steps))
        if workload.ndim == 2:
            block = workload[rows]
        else:
            lag = np.arange(steps)[rows, None] - np.arange(steps)[None, :]
            block = np.where(lag >= 0, workload[np.clip(lag, 0, None)], 0.0)
        squares.append(np.square(divide((block * scales)[:, ::-1], coefficients[:steps])).sum(1))
    return squared_rows_error(np.concatenate(squares), kind)


def matrix_error(matrix: np.ndarray, workload: np.ndarray, kind: str) -> float:
    r"""$\|A C^{-1}\|$ for a lower-triangular $C$."""
    from scipy.linalg import solve_triangular

    from ._sensitivity import toeplitz

    queries = toeplitz(workload) if workload.ndim == 1 else workload
    decoder = solve_triangular(matrix, queries.T, lower=True, trans=1)
    return squared_rows_error(np.square(decoder).sum(0), kind)


def inverse_error(inverse: np.ndarray, workload: np.ndarray, kind: str) -> float:
    r"""$\|A C^{-1}\|$ for the Toeplitz $C$ whose inverse begins with the coefficients `inverse`, zero after the last of them."""
    if workload.ndim == 1:
        return squared_rows_error(np.cumsum(np.square(multiply(inverse, workload, len(workload)))), kind)
    return squared_rows_error(np.concatenate([np.square(b).sum(1) for b in multiplied_rows(workload, inverse)]), kind)


def multiplied_rows(workload: np.ndarray, inverse: np.ndarray) -> Iterator[np.ndarray]:
    r"""$A C^{-1}$, some rows at a time, from the coefficients of $C^{-1}$."""
    from scipy.signal import fftconvolve

    steps = len(workload)
    kernel = np.asarray(inverse, np.float64)[None, :steps]
    for start in range(0, steps, _ROWS):
        rows = workload[start : start + _ROWS, ::-1]
        yield np.asarray(fftconvolve(rows, kernel, axes=1))[:, :steps][:, ::-1]
