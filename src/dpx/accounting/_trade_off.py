"""The trade-off curve: what an attacker can reach at best."""

import equinox as eqx
import numpy as np


class TradeOffCurve(eqx.Module):
    r"""A lower bound on the error of every attacker who has to tell two neighbouring data sets apart.

    At false-positive rate $\alpha$ no test has a false-negative rate below `false_negative_rate(alpha)`.

    **Arguments:**

    - `epsilons`: $\varepsilon$ at which $\delta(\varepsilon)$ is known, ascending, from 0.
    - `deltas`: upper bounds $\delta(\varepsilon)$.

    ??? cite "Reference"

        Dong, Roth and Su, *Gaussian differential privacy*, 2022, proposition 2.12.
    """

    epsilons: tuple[float, ...] = eqx.field(static=True)
    deltas: tuple[float, ...] = eqx.field(static=True)

    def false_negative_rate(self, false_positive_rate: float | np.ndarray) -> np.ndarray:
        r"""$\max_\varepsilon \max(0, 1 - \delta - e^\varepsilon \alpha, e^{-\varepsilon} (1 - \delta - \alpha))$; shape of the argument."""
        alpha = np.asarray(false_positive_rate, np.float64)
        if not np.all((alpha >= 0) & (alpha <= 1)):
            raise ValueError(f"A false-positive rate must lie in [0, 1]; got {false_positive_rate}.")
        grow = np.exp(np.minimum(np.asarray(self.epsilons), 700.0))
        room = 1 - np.asarray(self.deltas)
        steep = room - grow * alpha[..., None]
        flat = (room - alpha[..., None]) / grow
        return np.asarray(np.maximum(0.0, np.maximum(steep, flat).max(-1)))

    def true_positive_rate(self, false_positive_rate: float | np.ndarray) -> np.ndarray:
        """The most power that any attack has at a false-positive rate."""
        return np.asarray(1 - self.false_negative_rate(false_positive_rate))

    @property
    def advantage(self) -> float:
        r"""The largest difference between true-positive and false-positive rate of any attack, $\delta(0)$."""
        return self.deltas[0]
