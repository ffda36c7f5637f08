"""An audit that may stop at any time: betting against the claim, pair of runs by pair of runs."""

import math
from typing import Any

import equinox as eqx
import numpy as np

from .._checks import at_least_zero, described, real_array
from .._types import RealScalarLike
from ._inputs import delta_of, failure


class SequentialTest(eqx.Module):
    r"""What pairs of runs say about a claim of $(\varepsilon, \delta)$-DP, so far.

    **Arguments:**

    - `log_wealth`: log of the capital before each pair and after the last: `log_wealth[t]` has seen `t` pairs.
    - `p_value`: one over the largest capital so far: valid at whatever time one looks.
    - `confidence`: at which the claim is given up.
    - `rejected_at`: number of pairs after which it was; None if it was not.
    """

    log_wealth: tuple[float, ...] = eqx.field(static=True)
    p_value: float = eqx.field(static=True)
    confidence: float = eqx.field(static=True)
    rejected_at: int | None = eqx.field(static=True)

    def __str__(self) -> str:
        verdict = "the claim stands" if self.rejected_at is None else f"refuted after {self.rejected_at} pairs"
        return f"{verdict}; p-value {self.p_value:.3g} after {len(self.log_wealth) - 1} pairs of independent runs"


def sequential_test(
    with_canary: Any,
    without: Any,
    *,
    epsilon: RealScalarLike,
    delta: RealScalarLike,
    confidence: RealScalarLike = 0.95,
) -> SequentialTest:
    r"""Tests a claim of $(\varepsilon, \delta)$-DP with pairs of independent runs, and may be looked at after each of them.

    Under the claim $E[a - e^\varepsilon b - \delta] \le 0$ for what an attack, with values in [0, 1], says of a run with ($a$) and without ($b$) the
    canary.
    A capital of 1 is bet on $a_t - e^\varepsilon b_t - \delta$ being positive, with stakes chosen from the past; if the claim is true it ever
    exceeds $1 / \alpha$ with probability $\alpha$ at most (Ville's inequality).

    !!! success "Guarantee"

        A true claim is given up at ANY time with probability at most `1 - confidence`: nobody need say beforehand when they will stop.

    **Arguments:**

    - `with_canary`, `without`: what the attack says, pair by pair, in [0, 1]: 1 for "in".
    - `epsilon`, `delta`: the claim.
    - `confidence`: at which it is given up.

    ??? cite "Reference"

        Waudby-Smith and Ramdas, *Estimating means of bounded random variables by betting*, JRSS B 2024; Gonzalez et al. 2025 (arXiv:2509.07055).
    """
    a, b = _answers("with_canary", with_canary), _answers("without", without)
    if len(a) != len(b):
        raise ValueError(f"`sequential_test(with_canary, without)` are pairs; got {len(a)} and {len(b)}.")
    epsilon = at_least_zero("sequential_test(epsilon=...)", epsilon)
    delta = delta_of("sequential_test(delta=...)", delta)
    alpha = failure("sequential_test(confidence=...)", confidence)
    if epsilon > 700:
        raise ValueError("`sequential_test(epsilon=...)` beyond 700 is a claim that nothing refutes.")
    gains = a - math.exp(epsilon) * b - delta
    most = 0.5 / (math.exp(epsilon) + delta)  # of the capital: a loss never takes more than half
    wealth, total, squares = [0.0], 0.0, 0.0
    for gain in gains.tolist():
        stake = min(max(total / (squares + 1), 0.0), most)
        wealth.append(wealth[-1] + math.log1p(stake * gain))
        total, squares = total + gain, squares + gain * gain
    reached = np.asarray(wealth) >= -math.log(alpha)
    return SequentialTest(
        tuple(wealth),
        min(1.0, math.exp(-max(wealth))),
        1 - alpha,
        int(np.argmax(reached)) if reached.any() else None,
    )


def _answers(name: str, value: Any) -> np.ndarray:
    array = real_array(f"sequential_test({name}=...)", np.asarray(value) * 1.0, "a vector of numbers in [0, 1]")
    if array.ndim != 1 or not np.all((array >= 0) & (array <= 1)):
        raise ValueError(
            f"`sequential_test({name}=...)` must be a vector of numbers in [0, 1]; got {described(value)}."
        )
    return array
