"""The privacy losses of both directions, as one distribution."""

import functools
import math
from collections.abc import Callable

import equinox as eqx
import numpy as np

from ._pmf import PLAIN, Aim, LossPmf


class LossDistribution(eqx.Module):
    r"""The privacy loss of removing one unit and of adding one, and what coupling costs on top.

    **Arguments:**

    - `remove`, `add`: the losses; the same object where the relation is symmetric.
    - `coupling`: probability $\tau$ with which the mechanism differs from the one that the losses are those of; it adds
        $\tau (1 + e^\varepsilon)$ to $\delta$.
    - `other`: the losses for a second kind of neighbours, of which none dominates the first; what holds must hold for both.
    """

    remove: LossPmf
    add: LossPmf
    coupling: float = 0.0
    other: "LossDistribution | None" = None

    @property
    def is_symmetric(self) -> bool:
        """Whether one loss serves both directions."""
        return self.add is self.remove

    def get_delta(self, epsilon: float) -> float:
        r"""An upper bound on $\delta$ at `epsilon`."""
        worst = self.remove.delta(epsilon)
        if not self.is_symmetric:
            worst = max(worst, self.add.delta(epsilon))
        if self.coupling:
            worst += self.coupling * (1 + math.exp(min(epsilon, 700.0)))
        if self.other is not None:
            worst = max(worst, self.other.get_delta(epsilon))
        return min(1.0, max(0.0, worst))

    def get_epsilon(self, delta: float) -> float:
        r"""An upper bound on the least $\varepsilon$ at `delta`; infinite if there is none."""

        def uncoupled(delta: float) -> float:
            if not delta > 0:
                return math.inf
            epsilon = self.remove.epsilon(delta)
            return epsilon if self.is_symmetric else max(epsilon, self.add.epsilon(delta))

        found = with_coupling(uncoupled, delta, self.coupling)
        return found if self.other is None else max(found, self.other.get_epsilon(delta))

    def compose(self, other: "LossDistribution", aim: Aim = PLAIN) -> "LossDistribution":
        """Both mechanisms together."""
        remove = self.remove.compose(other.remove, aim)
        add = remove if self.is_symmetric and other.is_symmetric else self.add.compose(other.add, aim)
        second = None
        if self.other is not None or other.other is not None:
            # the second kind of neighbours is one, for all mechanisms of a run
            second = (self.other or self).compose(other.other or other, aim)
        return LossDistribution(remove, add, self.coupling + other.coupling, second)

    def self_compose(self, count: int, aim: Aim = PLAIN) -> "LossDistribution":
        """`count` such mechanisms together."""
        remove = self.remove.self_compose(count, aim)
        add = remove if self.is_symmetric else self.add.self_compose(count, aim)
        second = None if self.other is None else self.other.self_compose(count, aim)
        return LossDistribution(remove, add, self.coupling * count, second)


def with_coupling(epsilon_of: Callable[[float], float], delta: float, coupling: float) -> float:
    r"""The least $\varepsilon$ with $\delta(\varepsilon) + \tau (1 + e^\varepsilon) \le \delta$, by iteration from below; infinite if none."""
    if not coupling:
        return epsilon_of(delta)
    epsilon = 0.0
    for _ in range(200):
        found = epsilon_of(delta - coupling * (1 + math.exp(min(epsilon, 700.0))))
        if found <= epsilon:
            return epsilon
        epsilon = (
            found * (1 + 1e-7) + 1e-12
        )  # a little beyond, so that the iteration ends at a number that has been checked
    return math.inf


@functools.lru_cache(maxsize=8)
def nothing(interval: float) -> LossDistribution:
    """The loss of a mechanism that says nothing."""
    pmf = LossPmf(interval, 0, np.ones(1), 0.0)
    return LossDistribution(pmf, pmf)


def infinite(interval: float) -> LossDistribution:
    """The loss of a mechanism that says all."""
    pmf = LossPmf(interval, 0, np.zeros(1), 1.0)
    return LossDistribution(pmf, pmf)


def symmetric(distribution: LossDistribution) -> LossDistribution:
    """One loss for both directions."""
    return LossDistribution(distribution.remove, distribution.remove)
