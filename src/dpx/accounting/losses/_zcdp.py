"""Mechanisms of which only Rényi divergences are known, such as noise on integers, and Poisson sampling of them."""

from collections.abc import Callable
from typing import Any

import numpy as np
from dp_accounting.dp_event import ZCDpEvent

from .._rules import loss_rule, unchanged
from ._foreign import their_divergences, their_loss
from ._gaussian import sampled_gaussian
from ._pair import NOTHING, Attacks


def sampled_zcdp(event: Any, orders: np.ndarray) -> np.ndarray:
    """Upper bounds on the Rényi divergences of a sampled zCDP mechanism, where one unit is added, removed or emptied."""
    rho, xi = float(event.event.rho), float(event.event.xi)
    return sampled_divergences(float(event.sampling_probability), lambda alpha: xi + rho * alpha, orders)


def sampled_divergences(
    probability: float, divergence: Callable[[np.ndarray], np.ndarray], orders: np.ndarray
) -> np.ndarray:
    r"""$D_\alpha$ in both directions of a mechanism on a Poisson sample, from bounds $\varepsilon(\ell)$ on the mechanism's own.

    For integers $\alpha \ge 2$ and sampling probability $\gamma$, $(\alpha - 1) D_\alpha$ is at most the logarithm of
    $$1 + \binom \alpha 2 \gamma^2 (1 - \gamma)^{\alpha - 2} (e^{\varepsilon(2)} - 1) +
    \sum_{\ell = 3}^\alpha \binom \alpha \ell \gamma^\ell (1 - \gamma)^{\alpha - \ell} (3 e^{(\ell - 1) \varepsilon(\ell)} - 1).$$

    *Conditions and proof.* Neighbours are data sets of which one has a unit more (or a real one for an empty one, which contributes
    nothing); $\varepsilon(\ell)$ bounds both directions of the mechanism on every pair of samples that differ in that unit. Given the rest of
    the sample, the outputs are $p$ without the unit, and $(1 - \gamma) p + \gamma q$ with it; over the rest, moments of ratios are jointly convex,
    so the worst rest bounds them. Removal: $E_p[(1 - \gamma + \gamma q / p)^\alpha]$ is a sum of binomial terms
    $E_p[(q / p)^\ell] \le e^{(\ell - 1) \varepsilon(\ell)}$, of which the first two are 1; a factor of 1 instead of 3 would do. Addition,
    $E_p[(1 - \gamma + \gamma q / p)^{1 - \alpha}]$, is what the factor 3 is for (the general upper bound of Zhu and Wang 2019). The discrete Gaussian
    would not need it: reflection about the middle between two integer shifts exchanges $p$ and $q$, so that addition costs no more than removal
    (Mironov et al. 2019). To sample, a mixture, never costs more than to take part surely, hence the minimum with $\varepsilon(\alpha)$.
    Between integers $(\alpha - 1) D_\alpha$ is convex in $\alpha$, and 0 at 1, so chords lie above it. $\square$

    **Arguments:**

    - `probability`: $\gamma$ in [0, 1].
    - `divergence`: $\varepsilon(\alpha)$ for an array of orders.
    - `orders`: $\alpha > 1$.

    ??? cite "Reference"

        Zhu and Wang, *Poisson subsampled Rényi differential privacy*, ICML 2019; Mironov, Talwar and Zhang, *Rényi differential privacy of the
        sampled Gaussian mechanism*, 2019 (arXiv:1908.10530); Canonne, Kamath and Steinke 2020.
    """
    orders = np.asarray(orders, np.float64)
    own = np.asarray(divergence(orders), np.float64)
    if probability in (0.0, 1.0):
        return own * probability
    low, high = np.floor(orders), np.ceil(orders)
    moments = {1.0: 0.0}
    for alpha in sorted({*low, *high} - {1.0}):
        moments[alpha] = _log_moment(probability, divergence, int(alpha))
    at = lambda whole: np.array([moments[alpha] for alpha in whole])
    share = orders - low
    return np.minimum(own, ((1 - share) * at(low) + share * at(high)) / (orders - 1))


def _log_moment(probability: float, divergence: Callable[[np.ndarray], np.ndarray], alpha: int) -> float:
    from scipy.special import gammaln

    count = np.arange(2, alpha + 1, dtype=np.float64)
    log_weights = gammaln(alpha + 1) - gammaln(count + 1) - gammaln(alpha - count + 1)
    log_weights += count * np.log(probability) + (alpha - count) * np.log1p(-probability)
    exponent = (count - 1) * np.asarray(divergence(count), np.float64)
    factor = np.where(count == 2, 1.0, 3.0)
    with np.errstate(over="ignore"):
        # log of factor * e^exponent - 1, with the digits of small exponents
        log_excess = np.where(
            count == 2,
            exponent + np.log(-np.expm1(-np.maximum(exponent, 1e-300))),
            exponent + np.log(factor - np.exp(-exponent)),
        )
    # a hair more than is computed, for the rounding of the sum and of the logarithms of factorials
    return float(np.logaddexp(0.0, np.logaddexp.reduce(log_weights + log_excess) + 1e-9))


def _attacks(event: Any, adjacency: str) -> Attacks:
    if not event.rho > 0:
        return NOTHING
    # whatever its mechanism is, one of that many Gaussian ones would do
    return sampled_gaussian((2 * event.rho) ** -0.5, 1.0, -1.0 if adjacency == "replace_one" else 0.0)


loss_rule(ZCDpEvent, renyi=their_divergences, attacks=_attacks, with_side_queries=unchanged)(their_loss)
