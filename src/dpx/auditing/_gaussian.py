r"""Gaussian shapes: $\mu$ and epsilon, and bounds for scores that are normal."""

import math
from typing import Any

import numpy as np

from .._checks import positive_float, probability, real_number
from ._roots import largest_refuted


def gaussian_delta(epsilon: float, mu: float) -> float:
    r"""The least $\delta$ at which $\mu$-GDP is $(\varepsilon, \delta)$-DP: $\Phi(\mu/2 - \varepsilon/\mu) - e^\varepsilon \Phi(-\mu/2 -
    \varepsilon/\mu)$."""
    from scipy import special

    epsilon, mu = real_number("gaussian_delta(epsilon=...)", epsilon), real_number("gaussian_delta(mu=...)", mu)
    if mu <= 0:
        return max(0.0, -math.expm1(epsilon))
    if math.isinf(mu):
        return 1.0
    first = float(special.log_ndtr(mu / 2 - epsilon / mu))
    second = epsilon + float(special.log_ndtr(-mu / 2 - epsilon / mu))
    return max(0.0, -math.exp(first) * math.expm1(min(0.0, second - first)))


def gaussian_epsilon(mu: float, delta: float) -> float:
    r"""The least $\varepsilon \ge 0$ at which $\mu$-GDP is $(\varepsilon, \delta)$-DP, never rounded up."""
    mu, delta = real_number("gaussian_epsilon(mu=...)", mu), probability("gaussian_epsilon(delta=...)", delta)
    if mu <= 0 or gaussian_delta(0.0, mu) <= delta:
        return 0.0
    if math.isinf(mu):
        return math.inf
    low, high = 0.0, 1.0
    while gaussian_delta(high, mu) > delta:
        low, high = high, 2 * high
    while high - low > 1e-13 * high:
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if gaussian_delta(middle, mu) > delta else (low, middle)
    return low


def noncentral_t_bound(inside: np.ndarray, outside: np.ndarray, failure: float) -> float:
    r"""The largest $\mu$ that is refuted: $c$ times the $d$ with $P(t_{n_1 + n_0 - 2}(d) \ge t) = \alpha$; 0 if none is."""
    t, degrees, c = _statistic(inside, outside)
    if t is None or not t > 0:
        return 0.0
    if math.isinf(t):
        return math.inf
    return c * largest_refuted(lambda d: _tail_of_t(t, degrees, d), failure, 1e18)


def noncentral_t_p_value(inside: np.ndarray, outside: np.ndarray, mu: float) -> float:
    r"""$P(t(\mu / c) \ge t)$: how likely scores that far apart are if the mechanism is $\mu$-GDP."""
    t, degrees, c = _statistic(inside, outside)
    if t is None:
        return 1.0
    if math.isinf(t):
        return 0.0 if t > 0 else 1.0
    return _tail_of_t(t, degrees, mu / c)


_LARGE = 100.0  # beyond which the series of the noncentral t fail


def _tail_of_t(t: float, degrees: int, d: float) -> float:
    r"""$P(T \ge t)$ for noncentral $T = (Z + d) / \sqrt{V / n}$ of $n$ degrees of freedom."""
    from scipy import special, stats

    if d <= 0:
        return float(stats.t.sf(t, degrees))
    if abs(t) <= _LARGE and d <= _LARGE:
        return min(1.0, max(0.0, float(stats.nct.sf(t, degrees, d))))
    if t <= 0:
        return 1.0
    width = 1 / math.sqrt(2 * degrees)
    if t * width > 500:  # Z is nothing beside t
        return float(stats.chi2.cdf(degrees * min(d / t, 1e100) ** 2, degrees))
    s = np.linspace(max(1e-12, 1 - 14 * width), 1 + 14 * width, 200_001)
    log = stats.chi2.logpdf(degrees * s * s, degrees) + np.log(2 * degrees * s) + special.log_ndtr(d - t * s)
    return min(1.0, float(np.trapezoid(np.exp(log), s)))


def _statistic(inside: np.ndarray, outside: np.ndarray) -> tuple[float | None, int, float]:
    n1, n0 = len(inside), len(outside)
    degrees, c = n1 + n0 - 2, math.sqrt(1 / n1 + 1 / n0)
    if degrees < 1:
        return None, degrees, c
    size = max(float(np.max(np.abs(inside))), float(np.max(np.abs(outside))), 1e-300)
    inside, outside = inside / size, outside / size  # squares of what a missing noise leaves may overflow
    squares = np.sum((inside - inside.mean()) ** 2) + np.sum((outside - outside.mean()) ** 2)
    spread = math.sqrt(float(squares) / degrees)
    gap = float(inside.mean() - outside.mean())
    if spread <= 1e-15:
        return (math.inf if gap > 1e-15 else None), degrees, c
    return gap / (spread * c), degrees, c


def two_gaussians_epsilon(
    in_mean: float, in_deviation: float, out_mean: float, out_deviation: float, delta: float
) -> float:
    r"""$\varepsilon(\delta)$ of two normal distributions, the worse of both directions. An ESTIMATE where they were fitted to scores: it has no
    confidence, and unequal fitted deviations dominate it.

    ??? cite "Reference"

        Andrew et al., *One-shot empirical privacy estimation for federated learning*, ICLR 2024 (arXiv:2302.03098).
    """
    in_deviation = positive_float("two_gaussians_epsilon(in_deviation=...)", in_deviation)
    out_deviation = positive_float("two_gaussians_epsilon(out_deviation=...)", out_deviation)
    delta = probability("two_gaussians_epsilon(delta=...)", delta)
    first = (real_number("two_gaussians_epsilon(in_mean=...)", in_mean), in_deviation)
    second = (real_number("two_gaussians_epsilon(out_mean=...)", out_mean), out_deviation)
    return max(_one_direction(first, second, delta), _one_direction(second, first, delta))


def _one_direction(p: tuple[float, float], q: tuple[float, float], delta: float) -> float:
    divergence = lambda epsilon: _hockey_stick(p, q, epsilon)
    if divergence(0.0) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while divergence(high) > delta:
        low, high = high, 2 * high
        if high > 1e8:
            return low
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if divergence(middle) > delta else (low, middle)
    return low


def _hockey_stick(p: tuple[float, float], q: tuple[float, float], epsilon: float) -> float:
    r"""$P(A) - e^\varepsilon Q(A)$ for $A$ where the log ratio, which is quadratic, exceeds $\varepsilon$."""
    (m1, s1), (m0, s0) = p, q
    a = 0.5 * (1 / s0**2 - 1 / s1**2)
    b = m1 / s1**2 - m0 / s0**2
    c = 0.5 * (m0**2 / s0**2 - m1**2 / s1**2) + math.log(s0 / s1) - epsilon
    above = lambda edge, sign, law: _tail(sign * (edge - law[0]) / law[1])
    weigh = lambda mass: max(0.0, mass(p) - _times(epsilon, mass(q)))
    if abs(a) < 1e-14:
        if b == 0:
            return max(0.0, -math.expm1(epsilon)) if c > 0 else 0.0
        return weigh(lambda law: above(-c / b, math.copysign(1.0, b), law))
    square = b * b - 4 * a * c
    if square <= 0:
        return max(0.0, 1 - math.exp(min(epsilon, 700.0))) if a > 0 else 0.0
    q_root = -(b + math.copysign(math.sqrt(square), b)) / 2
    low, high = sorted((q_root / a, c / q_root)) if q_root != 0 else (0.0, 0.0)
    if a > 0:  # outside of both roots
        return weigh(lambda law: above(high, 1.0, law) + above(low, -1.0, law))
    return weigh(lambda law: max(0.0, above(low, 1.0, law) - above(high, 1.0, law)))


def _times(epsilon: float, mass: float) -> float:
    return math.exp(epsilon + math.log(mass)) if mass > 0 else 0.0


def _tail(x: float) -> float:
    from scipy import special

    return float(special.ndtr(-x))


def mu_of_rates(true_positive: Any, false_positive: Any) -> Any:
    r"""$\Phi^{-1}(\text{TPR}) - \Phi^{-1}(\text{FPR})$, and never its absolute value; 0 where it is negative."""
    from scipy import special

    gap = special.ndtri(np.asarray(true_positive)) - special.ndtri(np.asarray(false_positive))
    gap = np.maximum(np.where(np.isnan(gap), 0.0, gap), 0.0)
    return float(gap) if gap.ndim == 0 else gap


def auc_ceiling(*, epsilon: float | None = None, mu: float | None = None) -> float:
    r"""The largest AUC that any attack reaches: $e^\varepsilon / (1 + e^\varepsilon)$ under $(\varepsilon, 0)$-DP, $\Phi(\mu / \sqrt 2)$ under
    $\mu$-GDP."""
    from scipy import special

    if (epsilon is None) == (mu is None):
        raise ValueError("`auc_ceiling` takes one of `epsilon=...` and `mu=...`.")
    if epsilon is not None:
        return float(special.expit(real_number("auc_ceiling(epsilon=...)", epsilon)))
    return float(special.ndtr(real_number("auc_ceiling(mu=...)", mu) / math.sqrt(2)))
