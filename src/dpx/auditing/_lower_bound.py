"""`LowerBound`: a number with the confidence it has, the most that it could have been, and what it rests on."""

import math
from typing import Any, Literal

import equinox as eqx

from .._checks import probability
from .._round import round_down, round_up
from ._gaussian import gaussian_epsilon

Quantity = Literal["epsilon", "mu"]

_MSG_NOT_MU = "`LowerBound.epsilon(delta)` translates a bound on mu; this one is a bound on epsilon, of value {value:.6g}, already."
_MSG_SHAPE = (
    "`LowerBound.epsilon(delta)`: only for a mechanism that is a Gaussian one does a bound on mu say something about epsilon, and this plan's is not "
    '({why}). Poisson sampling at rate 0.01 with noise multiplier 0.3 has epsilon 0 at delta 1e-2, where mu >= 0.947 would "certify" 2.15. Use '
    "`epsilon_lower_bound`, or the p-value of the plan's own curve: `one_run(..., curve=plan.trade_off())`."
)
_MSG_NO_DELTA = "`LowerBound.epsilon(delta=...)` is needed: this bound was made without a `delta`."


class LowerBound(eqx.Module):
    r"""A lower bound on $\varepsilon$ or $\mu$, which holds with the stated confidence if its assumption does.

    It prints all of that: `epsilon >= 1.35 (95 %, ceiling 5.78) if ...`. `float(bound)` is its value.

    !!! success "Guarantee"

        Value and ceiling are printed rounded down and up. A bound of 0 says that nothing was found, not that there is nothing.

    **Arguments:**

    - `quantity`: `"epsilon"` or `"mu"`.
    - `value`: the bound.
    - `confidence`: with what probability, over the randomness of the runs, it is not above the truth.
    - `ceiling`: the most that so many scores could have shown, with a perfect attack.
    - `assumption`: what it rests on, in words.
    - `p_value`: of what was claimed, where something was: the probability, if the claim is true, of scores that speak against it as much as these.
    - `delta`: at which it bounds $\varepsilon$; of a bound on $\mu$, where `epsilon()` takes it by default.
    - `not_gaussian`: why $\mu$ may not be translated into $\varepsilon$; empty where it may.
    """

    quantity: str = eqx.field(static=True)
    value: float = eqx.field(static=True)
    confidence: float = eqx.field(static=True)
    ceiling: float = eqx.field(static=True)
    assumption: str = eqx.field(static=True)
    p_value: float | None = eqx.field(static=True, default=None)
    delta: float | None = eqx.field(static=True, default=None)
    not_gaussian: str = eqx.field(static=True, default="")

    def epsilon(self, delta: Any = None) -> float:
        r"""What a bound on $\mu$ says about $\varepsilon$, for a mechanism that is a Gaussian one WITHOUT sampling.

        **Raises:** `ValueError` if the bound is known to be of another mechanism, or of $\varepsilon$ already.
        """
        if self.quantity != "mu":
            raise ValueError(_MSG_NOT_MU.format(value=self.value))
        if self.not_gaussian:
            raise ValueError(_MSG_SHAPE.format(why=self.not_gaussian))
        delta = self.delta if delta is None else delta
        if delta is None:
            raise ValueError(_MSG_NO_DELTA)
        delta = probability("LowerBound.epsilon(delta=...)", delta)
        return gaussian_epsilon(self.value, delta)

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        ceiling = "none" if math.isinf(self.ceiling) else round_up(self.ceiling, 4)
        delta = f" at delta {round_up(self.delta)}" if self.delta is not None and self.quantity == "epsilon" else ""
        confidence = f"{round_down(100 * self.confidence + 1e-12, 8)} %"
        claim = "" if self.p_value is None else f"; p-value of what is claimed {round_up(self.p_value, 3)}"
        bound = f"{self.quantity} >= {round_down(self.value, 4)}{delta} ({confidence}, ceiling {ceiling}{claim})"
        return f"{bound} if {self.assumption}"

    __repr__ = __str__
