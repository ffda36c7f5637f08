"""What is left of a guarantee for groups of units."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from .._checks import positive_int, probability
from .._types import RealScalarLike
from ..events import Parts, canonical, composed, parts
from ..sampling import PoissonSampler
from ._neighbours import Adjacency, check_adjacency
from ._questions import delta as delta_of, epsilon as epsilon_of
from .losses._distribution import LossDistribution, nothing

# groups of which every number that may take part is looked at, and how many entries a matrix of them and the losses may have
_LARGEST_MIXTURE, _MOST_ENTRIES = 4096, 2**26
_FINEST = 1e-4  # width of the grid of privacy losses


def event_and_adjacency(call: str, event_or_plan: Any, adjacency: Any) -> tuple[Any, Adjacency]:
    """The canonical event of an event or plan, and the adjacency under which it is asked about."""
    if hasattr(event_or_plan, "adjacency"):
        if adjacency is not None:
            check_adjacency(adjacency)
        if adjacency not in (None, event_or_plan.adjacency):
            raise ValueError(
                f"`{call}(adjacency={adjacency!r})`: the plan is for {event_or_plan.adjacency!r}. Leave `adjacency` out, or make another plan."
            )
        return canonical(event_or_plan.event), event_or_plan.adjacency
    adjacency = "add_or_remove_one" if adjacency is None else adjacency
    check_adjacency(adjacency)
    return canonical(event_or_plan), adjacency


def first_feasible(excess: Callable[[float], float], start: float, largest: float) -> float:
    r"""An $\varepsilon$ between `start` and `largest` with `excess` <= 0, about the smallest; infinite if a scan finds none.

    `excess` need not be monotone. Wherever the answer is finite it has been evaluated there.
    """
    low, high = None, max(start, 1e-6)
    while not excess(high) <= 0:
        low, high = high, 1.05 * high
        if high > largest:
            return math.inf
    for _ in range(12 if low is not None else 0):
        assert low is not None
        middle = (low + high) / 2
        if excess(middle) <= 0:
            high = middle
        else:
            low = middle
    return high


def group_epsilon(
    event_or_plan: Any,
    delta: RealScalarLike,
    sizes: Iterable[Any] = (1, 2, 4, 8),
    *,
    adjacency: str | None = None,
) -> dict[int, float]:
    r"""$\varepsilon$ for groups of units, such as all examples of one person, at the same `delta`.

    The least of the bounds that are proven for the event at hand:

    - Gaussian mechanisms without sampling: a group of $K$ is one unit with noise multiplier $\sigma / K$, exactly.
    - Poisson-sampled Gaussian mechanisms, of a bare event or of a plan with `PoissonSampler`: of a group that is added or removed (or
        emptied) as a whole, a binomial number takes part in each step, which makes a mixture of Gaussians.
    - Everything else, and always as an alternative: from $(\varepsilon, \delta)$ for one follows
        $(K \varepsilon, \delta (e^{K\varepsilon} - 1) / (e^\varepsilon - 1))$ for $K$, minimised over the whole curve $\delta(\varepsilon)$.

    ```python
    plan = dpx.dp_sgd(num_examples=60_000, batch_size=256, steps=5_000, epsilon=1.0, delta=1e-6)
    print(dpx.accounting.group_epsilon(plan, delta=1e-6, sizes=(1, 2, 5)))
    ```

    **Arguments:**

    - `event_or_plan`: a DP event, or anything with an `event` and an `adjacency`.
    - `delta`: $\delta$, strictly between 0 and 1.
    - `sizes`: group sizes $K$, at most the number of units where that is known.
    - `adjacency`: of a bare event; by default `"add_or_remove_one"`.

    **Returns:**

    A dictionary from $K$ to an upper bound on $\varepsilon$, non-decreasing; infinite where none is found.

    ??? cite "Reference"

        Mixtures of Gaussians: Ganesh, *Tight group-level DP guarantees for DP-SGD with sampling via mixture of Gaussians mechanisms*, 2024
        (arXiv:2401.10294). Conversion: Vadhan, *The complexity of differential privacy*, 2017, lemma 2.2.
    """
    delta = probability("group_epsilon(delta=...)", delta)
    try:
        listed = None if isinstance(sizes, str | bytes | dict) or getattr(sizes, "ndim", 1) != 1 else list(sizes)
    except TypeError:
        listed = None
    if listed is None:
        raise ValueError("`group_epsilon(sizes=...)` must be group sizes, such as `(1, 2, 4)`.")
    numbers = sorted({positive_int("group_epsilon(sizes=...)", size) for size in listed})
    event, neighbours = event_and_adjacency("group_epsilon", event_or_plan, adjacency)
    pairs = parts(event)
    known = _units(event_or_plan, pairs)
    if numbers and known is not None and numbers[-1] > known:
        raise ValueError(
            f"`group_epsilon(sizes=...)` must be at most the number of units, {known}: there is no larger group; got {numbers[-1]}."
        )
    found: dict[int, float] = {}
    for size in numbers:
        found[size] = _one_size(event, pairs, delta, size, neighbours, _samples_afresh(event_or_plan))
    # a group has all smaller ones in it, so a bound for it is one for them
    least = math.inf
    for size in reversed(numbers):
        least = found[size] = min(least, found[size])
    return {size: found[size] for size in numbers}


def _one_size(event: Any, pairs: Parts, delta: float, size: int, adjacency: Adjacency, is_fresh: bool) -> float:
    import dp_accounting as da

    if not pairs:
        return 0.0
    if all(isinstance(e, da.GaussianDpEvent) for e, _ in pairs):
        scaled = composed(tuple((da.GaussianDpEvent(e.noise_multiplier / size), n) for e, n in pairs))
        return epsilon_of(scaled, delta, adjacency=adjacency)
    if size == 1:
        return epsilon_of(event, delta, adjacency=adjacency)
    bounds = [_converted(event, delta, size, adjacency)]
    if is_fresh and adjacency != "replace_one" and delta >= 1e-12 and all(_is_sampled_gaussian(e) for e, _ in pairs):
        # sampling, a mixture, never costs more than if all of the group took part surely
        sure = tuple((da.GaussianDpEvent(getattr(e, "event", e).noise_multiplier / size), n) for e, n in pairs)
        bounds.append(epsilon_of(composed(sure), delta, adjacency=adjacency))
        if size > _LARGEST_MIXTURE:
            return float(min(bounds))
        guess = min(bounds[0], 2 * size * epsilon_of(event, delta, adjacency=adjacency), 1e3)
        sigma = min(getattr(e, "event", e).noise_multiplier for e, _ in pairs)
        reach = size * (size + 18 * sigma) / (2 * sigma**2)  # no loss that counts is larger
        interval = max(_FINEST, 2e-4 * guess, size * reach / _MOST_ENTRIES)
        bounds.append(_mixed_loss(pairs, size, interval).get_epsilon(delta))
    return float(min(bounds))


def _units(event_or_plan: Any, pairs: Parts) -> int | None:
    """How many units there are, where the plan or an event says so."""
    known = [getattr(getattr(event_or_plan, "sampler", None), "num_examples", None)]
    known += [
        getattr(e, name, None) for e, _ in pairs for name in ("num_examples", "dataset_size", "source_dataset_size")
    ]
    found = [int(number) for number in known if number is not None]
    return min(found) if found else None


def _is_sampled_gaussian(event: Any) -> bool:
    import dp_accounting as da

    if isinstance(event, da.PoissonSampledDpEvent):
        return event.sampling_probability > 0 and _is_sampled_gaussian(event.event)
    return isinstance(event, da.GaussianDpEvent) and event.noise_multiplier > 0


def _binomial_gaussian(
    noise_multiplier: float, sampling_probability: float, size: int, interval: float
) -> LossDistribution:
    r"""$\sum_k \binom{K}{k} q^k (1 - q)^{K - k} N(k, \sigma^2)$ against $N(0, \sigma^2)$: a group of $K$, each sampled with probability $q$."""
    from scipy.stats import binom

    from .losses._mixture import mixture_gaussian  # imports dp_accounting

    present = np.arange(size + 1.0)
    log_weights = np.asarray(binom.logpmf(present, size, sampling_probability))
    return mixture_gaussian(noise_multiplier, present, log_weights, interval)


def _mixed_loss(pairs: Parts, size: int, interval: float) -> LossDistribution:
    """The loss of a group of which each member is sampled by itself."""
    total = nothing(interval)
    for e, n in pairs:
        q, gaussian = getattr(e, "sampling_probability", 1.0), getattr(e, "event", e)
        total = total.compose(_binomial_gaussian(gaussian.noise_multiplier, q, size, interval).self_compose(n))
    return total


def _converted(event: Any, delta: float, size: int, adjacency: Adjacency) -> float:
    def excess(epsilon: float) -> float:
        one = delta_of(event, epsilon, adjacency=adjacency)
        if one <= 0:
            return -math.inf
        logarithm = (
            math.log(one) + size * epsilon + math.log(-math.expm1(-size * epsilon)) - math.log(math.expm1(epsilon))
        )
        return logarithm - math.log(delta)

    start = epsilon_of(event, delta, adjacency=adjacency)  # nothing below what one unit loses can do
    return size * first_feasible(excess, start, 500.0 / size) if math.isfinite(start) else math.inf


def _samples_afresh(event_or_plan: Any) -> bool:
    """Whether every member is sampled by itself at every step, as a bare event says; a plan's event may stand for less.

    Groups that take turns, for one, are accounted for as one sampled mechanism a turn; that bounds what one unit loses, and not a group
    whose members are in different turns.
    """
    return not hasattr(event_or_plan, "adjacency") or isinstance(
        getattr(event_or_plan, "sampler", None), PoissonSampler
    )
