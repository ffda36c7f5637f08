"""What shuffled batches cost at least, for whoever is tempted to account for them as if they were Poisson-sampled."""

import math

from .._checks import at_least_zero, positive_float, positive_int


def shuffling_lower_bound(noise_multiplier: float, steps: int, epsilon: float) -> float:
    r"""A LOWER bound on the $\delta$ at `epsilon` of one epoch of `steps` shuffled batches.

    ```python
    dpx.accounting.shuffling_lower_bound(0.4, 10_000, 4.0)  # 0.226, where Poisson sampling has 1.2e-5
    ```

    The loss of one example is that of the worst data set of Chua et al.: all other gradients point one way, and one points the other, which
    the attacker sees in the largest of the noisy sums,
    $\delta \ge \max_C\, (1 - \Phi(\frac{C - 2}{\sigma}) \Phi(\frac C \sigma)^{T - 1}) - e^\varepsilon
    (1 - \Phi(\frac{C - 1}{\sigma}) \Phi(\frac C \sigma)^{T - 1})$.

    **Arguments:**

    - `noise_multiplier`: $\sigma$.
    - `steps`: $T$, the number of batches in the epoch.
    - `epsilon`: $\varepsilon \ge 0$.

    **Returns:**

    A delta that no guarantee for shuffled batches can be below. dpx accounts for them without amplification, which is above.

    ??? cite "Reference"

        Chua et al., *How private are DP-SGD implementations?*, ICML 2024.
    """
    import numpy as np
    from scipy.special import log_ndtr

    sigma = positive_float("shuffling_lower_bound(noise_multiplier=...)", noise_multiplier)
    steps = positive_int("shuffling_lower_bound(steps=...)", steps)
    epsilon = at_least_zero("shuffling_lower_bound(epsilon=...)", epsilon)

    def gap(threshold):
        others = (steps - 1) * log_ndtr(threshold / sigma)
        present = -np.expm1(log_ndtr((threshold - 2) / sigma) + others)
        replaced = -np.expm1(log_ndtr((threshold - 1) / sigma) + others)
        return present - math.exp(min(epsilon, 700.0)) * replaced

    thresholds = np.linspace(-10 * sigma, 2 + 12 * sigma + 2 * sigma * math.sqrt(2 * math.log(steps + 1)), 20_001)
    return min(1.0, max(0.0, float(gap(thresholds).max())))
