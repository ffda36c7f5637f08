"""What it costs to publish the best of several runs."""

import functools
import math
from typing import Any

import numpy as np

from .._checks import at_least_zero, positive_int, probability, real_number
from .._types import RealScalarLike
from ..events import canonical
from ..random import Domain, check_seed, fresh_seed, generator
from ._accountable import Release
from ._group_privacy import event_and_adjacency
from ._neighbours import Adjacency
from ._questions import delta as delta_of, epsilon as epsilon_of

_SHAPES = {"logarithmic": 0.0, "geometric": 1.0, "poisson": math.inf}


def search_event(event_or_plan: Any, mean_runs: RealScalarLike, shape: Any = "logarithmic") -> Any:
    """The DP event of publishing the best of `number_of_runs(mean_runs, shape)` runs, for a ledger or filter. Rényi accounting knows it.

    Arguments as for `search_epsilon`.

    **Returns:**

    Of a bare event an event; of a plan (or whatever has an adjacency and a unit) a `Release`, which keeps both, so that a ledger for other
    neighbours refuses it.
    """
    import dp_accounting as da

    mean, shape = _distribution(mean_runs, shape)
    has_neighbours = hasattr(event_or_plan, "adjacency")
    event = canonical(event_or_plan.event if has_neighbours else event_or_plan)
    if mean > 1 or math.isinf(shape):  # else exactly one run
        event = da.dp_event.RepeatAndSelectDpEvent(event, mean, shape)
    return Release(event, event_or_plan.adjacency, event_or_plan.unit) if has_neighbours else event


def search_epsilon(
    event_or_plan: Any,
    delta: RealScalarLike,
    mean_runs: RealScalarLike,
    shape: Any = "logarithmic",
    *,
    adjacency: str | None = None,
) -> float:
    r"""$\varepsilon$ of publishing the best of a RANDOM number of runs: at most two or three times that of one, and a little for how many.

    ```python
    count = dpx.accounting.number_of_runs(mean_runs=20)  # secret; draw it once
    runs = [train(rng.choice(candidates)) for _ in range(count)]  # each candidate drawn afresh
    epsilon = dpx.accounting.search_epsilon(plan, delta=1e-6, mean_runs=20)
    ```

    What it rests on: the number of runs comes from `number_of_runs` with the same mean and shape and is not published. Each run, from the
    choice of its hyperparameters (drawn at random, independently of other runs) to its score, is one mechanism that the plan accounts for: the
    score is computed from the run's result and public data, or by a private metric inside the plan. Only the best run and its score are
    published; nothing of the others, not even how many there were.

    The least of two bounds, for one run of which $\delta_1(\varepsilon_1)$ is the curve:

    - **Rényi**, for events that Rényi accounting knows.
    - **Privacy profiles**: the best run is better than another data set's best in proportion to how many runs it beats. With a
        stopping parameter $\gamma$ and shape $\eta$, for any $\varepsilon_1$ and $\hat\varepsilon$,
        $$\varepsilon = \varepsilon_1 + (1 + \eta) \log(e^{\hat\varepsilon} + \tfrac{1 - \gamma}{\gamma} \delta_1(\hat\varepsilon)), \qquad
        \delta = \operatorname{E}[K]\, \delta_1(\varepsilon_1);$$
        so pure $\varepsilon_1$-DP becomes $(2 + \eta) \varepsilon_1$. For the Poisson distribution,
        $\varepsilon = \varepsilon_1 + \operatorname{E}[K]\, \delta_1(0)$.

    **Arguments:**

    - `event_or_plan`: one run: a DP event, or anything with an `event` and an `adjacency`.
    - `delta`: $\delta$ of the answer.
    - `mean_runs`: $\operatorname{E}[K] \ge 1$.
    - `shape`: the law of $K$: `"logarithmic"` ($\eta = 0$, the cheapest, with many single runs and a long tail), `"geometric"` ($\eta = 1$),
        any $\eta \ge 0$ (truncated negative binomial), or `"poisson"` (concentrated; may be 0, in which case nothing is published).
    - `adjacency`: of a bare event; by default `"add_or_remove_one"`.

    **Returns:**

    An upper bound on $\varepsilon$. For a FIXED number of runs see `fixed_search_epsilon`.

    ??? cite "Reference"

        Liu and Talwar, *Private selection from private candidates*, STOC 2019; Papernot and Steinke, *Hyperparameter tuning with Rényi
        differential privacy*, ICLR 2022, theorems 2 and 6; Koskela, Redberg and Wang, *Privacy profiles for private selection*, ICML 2024.
    """
    delta = probability("search_epsilon(delta=...)", delta)
    mean, shape = _distribution(mean_runs, shape)
    event, neighbours = event_and_adjacency("search_epsilon", event_or_plan, adjacency)
    if mean == 1 and math.isfinite(shape):
        return epsilon_of(event, delta, adjacency=neighbours)
    bounds, reasons = [], []
    try:
        bounds.append(epsilon_of(search_event(event, mean, shape), delta, adjacency=neighbours, accountant="rdp"))
    except ValueError as error:
        reasons.append(str(error))
    try:
        bounds.append(_from_profile(event, delta, mean, shape, neighbours))
    except ValueError as error:
        reasons.append(str(error))
    if not bounds:
        raise ValueError(
            f"`search_epsilon(...)`: no bound is known for the best of several such runs. {' '.join(reasons)}"
        )
    return min(bounds)


def fixed_search_epsilon(
    event_or_plan: Any, delta: RealScalarLike, runs: Any, *, adjacency: str | None = None
) -> float:
    r"""$\varepsilon$ of a FIXED number of runs, all of which may be published: plain composition.

    To publish only the best of a fixed number is not known to be cheaper in general, and for pure DP it is not (Papernot and Steinke 2022): so
    every run counts. A random number of runs, kept secret, costs far less: `search_epsilon`.
    """
    import dp_accounting as da

    delta = probability("fixed_search_epsilon(delta=...)", delta)
    runs = positive_int("fixed_search_epsilon(runs=...)", runs)
    event, neighbours = event_and_adjacency("fixed_search_epsilon", event_or_plan, adjacency)
    return epsilon_of(da.SelfComposedDpEvent(event, runs), delta, adjacency=neighbours)


def number_of_runs(mean_runs: RealScalarLike, shape: Any = "logarithmic", *, seed: Any = None) -> int:
    """Draws the number of runs that `search_epsilon` accounts for: a secret, to be drawn once and not published.

    **Arguments:**

    - `mean_runs`, `shape`: as for `search_epsilon`.
    - `seed`: up to 128 secret bits; by default from the operating system. Give it only to go on with a search that was interrupted.
    """
    mean, shape = _distribution(mean_runs, shape)
    seed = fresh_seed() if seed is None else check_seed("number_of_runs(seed=...)", seed)
    rng = generator(seed, 0, Domain.NUMBER_OF_RUNS)
    if math.isinf(shape):
        return int(rng.poisson(mean))
    if mean == 1:
        return 1
    gamma = _stopping_probability(mean, shape)
    if shape == 0:
        return int(rng.logseries(1 - gamma))
    if shape == 1:
        return int(rng.geometric(gamma))
    # the rest by inverting the distribution function, probability by probability
    target, count = rng.random(), 1
    mass = total = shape * (1 - gamma) / math.expm1(-shape * math.log(gamma))
    while total < target and mass > 0:
        mass *= (1 - gamma) * (count + shape) / (count + 1)
        total += mass
        count += 1
    return count


def _distribution(mean_runs: Any, shape: Any) -> tuple[float, float]:
    mean = real_number("mean_runs", mean_runs)
    if not (math.isfinite(mean) and mean >= 1):
        raise ValueError(f"`mean_runs` must be at least 1; got {mean}.")
    if isinstance(shape, str):
        if shape not in _SHAPES:
            raise ValueError(f"`shape` must be one of {', '.join(map(repr, _SHAPES))}, or a number; got {shape!r}.")
        return mean, _SHAPES[shape]
    return mean, at_least_zero("shape", shape)


def _mean(gamma: float, shape: float) -> float:
    """Mean of the truncated negative binomial distribution, Papernot and Steinke 2022, definition 1."""
    if shape == 0:
        return (1 - gamma) / (gamma * -math.log(gamma))
    return shape * (1 - gamma) / (gamma * -math.expm1(shape * math.log(gamma)))


@functools.lru_cache(maxsize=16)
def _stopping_probability(mean: float, shape: float) -> float:
    """The parameter at which the mean is `mean`, or a hair less: what is accounted for is the mean."""
    low, high = -700.0, -1e-12  # logarithms
    for _ in range(200):
        middle = (low + high) / 2
        if _mean(math.exp(middle), shape) > mean:
            low = middle
        else:
            high = middle
    return math.exp(high)


def _from_profile(event: Any, delta: float, mean: float, shape: float, adjacency: Adjacency) -> float:
    r"""The bound from $\delta_1(\varepsilon)$.

    Where $q$ is the probability that a run is no better than $y$, the best of $K$ runs has density $q'(y) f'(q)$ at $y$, with $f$ the
    generating function of $K$, and $f' \le f'(1) = E[K]$. So a hockey-stick divergence of the best is at most $E[K]$ times that of a run,
    shifted by the largest $\log (f'(q_1) / f'(q_2))$ for the two data sets.
    """
    one = lambda epsilon: delta_of(event, epsilon, adjacency=adjacency)
    first = epsilon_of(event, delta / mean, adjacency=adjacency)
    if not math.isfinite(first):
        return math.inf
    if math.isinf(shape):
        return first + mean * one(0.0)  # no event's probability changes by more
    gamma = _stopping_probability(mean, shape)
    shift = lambda epsilon: float(np.logaddexp(epsilon, math.log((1 - gamma) / gamma) + _log(one(epsilon))))
    # whatever is found is a bound; the second pass looks closer where the first found least
    grid = np.linspace(0.0, first, 17)
    least = grid[int(np.argmin([shift(x) for x in grid]))]
    close = np.linspace(max(0.0, least - grid[1]), least + grid[1], 17)
    return first + (1 + shape) * min(shift(float(x)) for x in close)


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf
