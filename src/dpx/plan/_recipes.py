"""The two front doors: DP-SGD and DP-FTRL by matrix factorization."""

import math
import operator
from fractions import Fraction
from typing import Any

import numpy as np

from .._checks import (
    flag,
    instance,
    nonempty_text,
    positive_float,
    positive_int,
    positive_scalar,
    probability,
    real_number,
)
from .._types import Integer, RealScalarLike, Unchecked
from ..accounting import AccountantName, Neighbours, check_accountant, check_adjacency
from ..clipping import AbstractClipping, FlatClipping, as_clipping
from ..noise import AbstractNoise, CorrelatedGaussian, IndependentGaussian
from ..sampling import AbstractSampler, CyclicPoissonSampler, PoissonSampler, ShuffleSampler
from ..strategies import AbstractStrategy, BandedToeplitz, SquareRootToeplitz
from ._plan import PrivacyPlan


def dp_sgd(
    num_examples: Integer,
    batch_size: Integer,
    steps: Integer | None = None,
    *,
    epochs: RealScalarLike | None = None,
    epsilon: RealScalarLike | None = None,
    delta: RealScalarLike | None = None,
    noise_multiplier: RealScalarLike | None = None,
    clipping: AbstractClipping | RealScalarLike | None = None,
    max_batch_size: Integer | None = None,
    truncated_batch_size: Integer | None = None,
    adjacency: Neighbours = "add_or_remove_one",
    unit: str | None = None,
    accountant: Unchecked[AccountantName] = "pld",
) -> PrivacyPlan:
    r"""The plan of DP-SGD: Poisson sampling, clipping, independent Gaussian noise.

    ```python
    plan = dpx.dp_sgd(num_examples=60_000, batch_size=256, steps=5_000, epsilon=1.0, delta=1e-5)
    ```

    **Arguments:**

    - `num_examples`, `batch_size`, `steps`, `max_batch_size`, `truncated_batch_size`: as for `PoissonSampler`.
    - `epochs`: instead of `steps`: $\lceil$ `epochs` $\cdot$ `num_examples` / `batch_size` $\rceil$ of them, in exact
        arithmetic on the number as it is typed (1.1 is 11/10); so the data is seen that often on average, or a part of a step more.
    - `epsilon`, `delta`: the budget that the noise is calibrated to, or
    - `noise_multiplier`: the noise itself.
    - `clipping`: how much one example may contribute: a clip norm, or a clipping; by default `FlatClipping(1.0)`.
    - `adjacency`, `unit`, `accountant`: as for `PrivacyPlan`.

    **Raises:** `ValueError` unless exactly one of the budget and the noise multiplier is given (neither with `NoClipping()`).

    ??? cite "Reference"

        Abadi et al., *Deep learning with differential privacy*, CCS 2016.
    """
    steps = _steps("dp_sgd", num_examples, batch_size, steps, epochs)
    if max_batch_size is not None:
        positive_int("dp_sgd(max_batch_size=...)", max_batch_size)
    if truncated_batch_size is not None:
        positive_int("dp_sgd(truncated_batch_size=...)", truncated_batch_size)
    _check("dp_sgd", noise_multiplier, adjacency, unit, accountant)
    sampler = PoissonSampler(num_examples, batch_size, steps, max_batch_size, truncated_batch_size=truncated_batch_size)
    noise = IndependentGaussian(noise_multiplier)
    return _finished(
        "dp_sgd", sampler, clipping, noise, epsilon, delta, adjacency=adjacency, unit=unit, accountant=accountant
    )


def dp_mf(
    num_examples: Integer,
    batch_size: Integer,
    steps: Integer | None = None,
    *,
    epochs: RealScalarLike | None = None,
    strategy: AbstractStrategy | None = None,
    bands: Integer | None = None,
    amplified: bool | None = None,
    replay: bool = False,
    epsilon: RealScalarLike | None = None,
    delta: RealScalarLike | None = None,
    noise_multiplier: RealScalarLike | None = None,
    clipping: AbstractClipping | RealScalarLike | None = None,
    adjacency: Neighbours | None = None,
    unit: str | None = None,
    accountant: Unchecked[AccountantName] = "pld",
) -> PrivacyPlan:
    r"""The plan of DP-FTRL by matrix factorization: clipping, and Gaussian noise that is correlated between steps.

    ```python
    plan = dpx.dp_mf(num_examples=60_000, batch_size=500, steps=1_000, bands=16, epsilon=1.0, delta=1e-6)
    ```

    Amplified, the data is dealt into as many groups as there are bands, which take turns and are Poisson-sampled; not amplified, the data
    passes in one fixed order, once or for several epochs, and the noise is scaled to the participations.

    **Arguments:**

    - `num_examples`, `batch_size`, `steps` or `epochs`: of the run, as for `dp_sgd`.
    - `strategy`: the matrix, from `dpx.strategies`; by default the optimal banded Toeplitz matrix with `bands` bands.
    - `bands`: its number of bands.
    - `amplified`: whether to sample; by default if the strategy is banded and there is room for that many groups.
    - `replay`: as for `CorrelatedGaussian`.
    - `epsilon`, `delta` or `noise_multiplier`, `clipping`, `unit`, `accountant`: as for `dp_sgd`.
    - `adjacency`: by default `"add_or_remove_one"` amplified, else `"replace_special"`.

    **Raises:** `ValueError` where strategy and sampling do not fit.

    ??? cite "Reference"

        Denisov et al. 2022; Choquette-Choo et al., *(Amplified) banded matrix factorization*, NeurIPS 2023.
    """
    steps = _steps("dp_mf", num_examples, batch_size, steps, epochs)
    replay = flag("dp_mf(replay=...)", replay)
    _check("dp_mf", noise_multiplier, adjacency, unit, accountant)
    width = None if bands is None else positive_int("dp_mf(bands=...)", bands)
    if (strategy is None) == (bands is None):
        raise ValueError(
            "`dp_mf` needs a `strategy=`, or the number of `bands=` of one to optimise; got both or neither."
        )
    if strategy is not None:
        instance("dp_mf(strategy=...)", strategy, AbstractStrategy, "BandedToeplitz.square_root(4)")
    if amplified is not None:
        amplified = flag("dp_mf(amplified=...)", amplified)
    if strategy is None:
        strategy = BandedToeplitz.optimize(steps, width)
    if isinstance(strategy, SquareRootToeplitz) and strategy.steps is None:
        strategy = SquareRootToeplitz(steps)  # its buffers are one for each step
    room = operator.index(num_examples) // operator.index(batch_size)
    if amplified is None:
        amplified = strategy.bands is not None and 1 <= strategy.bands <= room
    if amplified and strategy.bands is None:
        raise ValueError(
            f"`dp_mf(amplified=True)` needs a banded strategy; `{type(strategy).__name__}` is not. Use `bands=`, or `amplified=False`."
        )
    if amplified:
        groups: Any = strategy.bands
        sampler = CyclicPoissonSampler(num_examples, batch_size, steps, groups)
    else:
        sampler = ShuffleSampler(num_examples, batch_size, steps)
    if adjacency is None:
        adjacency = sampler.adjacencies[0] if amplified else "replace_special"
    noise = CorrelatedGaussian(strategy, noise_multiplier, replay)
    return _finished(
        "dp_mf", sampler, clipping, noise, epsilon, delta, adjacency=adjacency, unit=unit, accountant=accountant
    )


def _finished(
    name: str,
    sampler: AbstractSampler,
    clipping: AbstractClipping | RealScalarLike | None,
    noise: AbstractNoise,
    epsilon: RealScalarLike | None,
    delta: RealScalarLike | None,
    **options: Any,
) -> PrivacyPlan:
    """A plan with a given noise multiplier, or calibrated to a given budget: one of the two."""
    # not a default argument: importing dpx must not start JAX's devices
    clipping = FlatClipping(1.0) if clipping is None else as_clipping(f"{name}(clipping=...)", clipping)
    plan = PrivacyPlan(sampler, clipping, noise, **options)
    if epsilon is None:
        if delta is not None:
            probability(f"{name}(delta=...)", delta)
        if not plan.is_calibrated:
            raise ValueError(
                f"`{name}` needs a budget, `epsilon=` and `delta=`, or a `noise_multiplier=`; got neither."
            )
        return plan
    if real_number(f"{name}(epsilon=...)", epsilon) == math.inf:
        raise ValueError(
            f"`{name}(epsilon=inf)` is a run without privacy, which needs no noise: use `clipping=NoClipping()` and leave the budget out."
        )
    positive_float(f"{name}(epsilon=...)", epsilon)
    if noise.noise_multiplier is not None:
        raise ValueError(f"`{name}` takes a budget, `epsilon=` and `delta=`, or a `noise_multiplier=`, not both.")
    if delta is None:
        raise ValueError(
            f"`{name}(epsilon={epsilon})` needs a `delta=` too, well below 1 / num_examples = {1 / sampler.num_examples:g}."
        )
    probability(f"{name}(delta=...)", delta)
    return plan.calibrate(epsilon, delta)


def _steps(name: str, num_examples: Integer, batch_size: Integer, steps: Any, epochs: Any) -> int:
    """Steps as given, or those that so many epochs take."""
    if (steps is None) == (epochs is None):
        raise ValueError(
            f"`{name}` needs the number of `steps`, or of `epochs=`; got {'neither' if steps is None else 'both'}."
        )
    examples = positive_int(f"{name}(num_examples=...)", num_examples)
    batch = positive_int(f"{name}(batch_size=...)", batch_size)
    if epochs is None:
        return positive_int(f"{name}(steps=...)", steps)
    positive_float(f"{name}(epochs=...)", epochs)
    # by its digits: the float 1.1 is a little more than 11/10, and would make one step more
    exact = epochs if isinstance(epochs, int | Fraction) else Fraction(str(np.asarray(epochs)[()]))
    return positive_int(f"{name}(epochs=...)", math.ceil(exact * examples / batch))


def _check(name: str, noise_multiplier: Any, adjacency: Any, unit: Any, accountant: Any) -> None:
    """What the parts would refuse too, by the name of the call that was typed."""
    if noise_multiplier is not None:
        positive_scalar(
            f"{name}(noise_multiplier=...)", noise_multiplier, "For a non-private baseline use `clipping=NoClipping()`."
        )
    if adjacency is not None:
        check_adjacency(adjacency, name)
    if unit is not None:
        nonempty_text(f"{name}(unit=...)", unit)
    check_accountant(accountant, "replace_special", name)
