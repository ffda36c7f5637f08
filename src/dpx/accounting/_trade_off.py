"""The trade-off curve: what an attacker can reach at best."""

from collections.abc import Sequence

import equinox as eqx
import numpy as np

from .._checks import described, real_array, real_number

_MSG_CURVE = (
    "`TradeOffCurve(epsilons, deltas)` needs as many of one as of the other, epsilons ascending from 0 and deltas in [0, 1]; got {epsilons} "
    "and {deltas}."
)


class TradeOffCurve(eqx.Module):
    r"""A lower bound on the error of every attacker who has to tell two neighbouring data sets apart.

    At false-positive rate $\alpha$ no test has a false-negative rate below `false_negative_rate(alpha)`.

    !!! success "Guarantee"

        The bounds hold whichever of the two data sets is the null hypothesis (with the example or without it): $(\varepsilon, \delta)$-DP
        speaks of both directions, and the curve is made of nothing else.

    **Arguments:**

    - `epsilons`: $\varepsilon$ at which $\delta(\varepsilon)$ is known, ascending, from 0.
    - `deltas`: upper bounds $\delta(\varepsilon)$, for both directions.

    ??? cite "Reference"

        Dong, Roth and Su, *Gaussian differential privacy*, 2022, proposition 2.12.
    """

    epsilons: tuple[float, ...] = eqx.field(static=True)
    deltas: tuple[float, ...] = eqx.field(static=True)

    def __init__(self, epsilons: Sequence[float] | np.ndarray, deltas: Sequence[float] | np.ndarray):
        xs = real_array("TradeOffCurve(epsilons=...)", epsilons, "a sequence of numbers")
        ys = real_array("TradeOffCurve(deltas=...)", deltas, "a sequence of numbers")
        if xs.ndim != 1 or ys.ndim != 1:
            raise ValueError(_MSG_CURVE.format(epsilons=described(epsilons), deltas=described(deltas)))
        self.epsilons = tuple(xs.tolist())
        self.deltas = tuple(ys.tolist())

    def __check_init__(self):
        epsilons, deltas = np.asarray(self.epsilons), np.asarray(self.deltas)
        is_curve = len(epsilons) == len(deltas) > 0 and epsilons[0] == 0 and np.all(np.diff(epsilons) >= 0)
        if not (is_curve and np.all((deltas >= 0) & (deltas <= 1))):
            raise ValueError(_MSG_CURVE.format(epsilons=self.epsilons, deltas=self.deltas))

    def _lines(self) -> tuple[np.ndarray, np.ndarray]:
        r"""Slopes $s \ge 0$ and intercepts $a$ of the lines $a - s \alpha$ whose maximum, with 0, bounds the false-negative rate."""
        grow = np.exp(np.minimum(np.asarray(self.epsilons), 700.0))
        room = 1 - np.asarray(self.deltas)
        return np.concatenate([grow, 1 / grow, [0.0]]), np.concatenate([room, room / grow, [0.0]])

    def false_negative_rate(self, false_positive_rate: float | np.ndarray) -> np.ndarray:
        r"""$\max_\varepsilon \max(0, 1 - \delta - e^\varepsilon \alpha, e^{-\varepsilon} (1 - \delta - \alpha))$; shape of the argument."""
        alpha = real_array(
            "TradeOffCurve.false_negative_rate(false_positive_rate=...)", false_positive_rate, "numbers in [0, 1]"
        )
        if not np.all((alpha >= 0) & (alpha <= 1)):
            raise ValueError(f"A `false_positive_rate` must lie in [0, 1]; got {false_positive_rate}.")
        slopes, intercepts = self._lines()
        return np.asarray((intercepts - slopes * alpha[..., None]).max(-1))

    def true_positive_rate(self, false_positive_rate: float | np.ndarray) -> np.ndarray:
        """The most power that any attack has at a false-positive rate."""
        return np.asarray(1 - self.false_negative_rate(false_positive_rate))

    @property
    def advantage(self) -> float:
        r"""The largest difference between true-positive and false-positive rate of any attack, $\delta(0)$."""
        return self.deltas[0]

    def bayes_risk(self, prior: float = 0.5) -> float:
        r"""The least probability of error of an attacker who holds, beforehand, that the example was used with probability `prior`.

        $$\min_\alpha \; \pi f(\alpha) + (1 - \pi) \alpha$$

        for the curve $f$: a lower bound on what any attack gets wrong on average. At even odds it is $(1 - \text{advantage}) / 2$. Guessing
        by the prior alone errs with probability $\min(\pi, 1 - \pi)$.

        **Arguments:**

        - `prior`: $\pi$ in [0, 1].
        """
        prior = real_number("TradeOffCurve.bayes_risk(prior=...)", prior)
        if not 0 <= prior <= 1:
            raise ValueError(f"`TradeOffCurve.bayes_risk(prior=...)` must lie in [0, 1]; got {prior}.")
        if prior in (0, 1):
            return 0.0
        # By duality: the largest intercept of a line of slope (1 - prior) / prior below the curve, which is a mean of one that is
        # steeper and one that is flatter. Unlike a search for the least point, it cannot come out too large.
        slopes, intercepts = self._lines()
        wanted = (1 - prior) / prior
        is_steep = slopes >= wanted
        steep, flat = slopes[is_steep, None], slopes[~is_steep]
        high, low = intercepts[is_steep, None], intercepts[~is_steep]
        weight = (wanted - flat) / (steep - flat)
        candidates = [low.max(initial=0.0), (weight * high + (1 - weight) * low).max(initial=0.0)]
        return float(prior * max(candidates))
