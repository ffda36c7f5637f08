"""The privacy filter: a budget that holds although every next step is chosen after looking at the last."""

import dataclasses
import functools
import math
from typing import Any, Literal, get_args

import equinox as eqx
import numpy as np

from .._checks import at_least_zero, choice, nonempty_text, positive_float, positive_int, probability
from .._types import RealScalarLike
from ..events import canonical, parts
from ._neighbours import Adjacency, check_adjacency
from ._renyi import ORDERS, renyi_divergences

FilterAccountant = Literal["rdp", "gdp"]

_MSG_FULL = (
    "This step does not fit into the privacy budget: it costs {cost:.6g} of {budget:.6g}, of which {spent:.6g} are spent (epsilon {epsilon:g} at "
    "delta {delta:g}). Do not run it. A cheaper one may fit: `can_spend(event)` and `room_for(event)` tell.{hint}"
)


_MSG_ORDER = (
    " What fits depends on the Rényi order, {order}, which cannot change once something is spent: give a new filter `hint=` an event or plan like "
    "those to come, or `order=`."
)


class PrivacyFilter(eqx.Module):
    r"""Lets steps through until the next one would exceed a budget, where steps are chosen by looking at earlier results.

    ```python
    budget = dpx.accounting.PrivacyFilter(epsilon=2.0, delta=1e-6, hint=event)
    while not happy and budget.can_spend(event):
        budget = budget.spend(event)  # before it runs
        result = run(event)
        happy, event = look_at(result)  # the next mechanism may be any other
    ```

    Composition theorems assume that the cost of every step is fixed in advance. Whoever trains until the loss is low enough, or tunes the
    noise on the way, needs a filter. One quantity that adds up is chosen in advance, and its sum kept below what $(\varepsilon, \delta)$
    allows:

    - `"rdp"`: the Rényi divergence of ONE order $\alpha$, fixed at construction. With
        $\sum_t \rho_t(\alpha) \le \varepsilon - \log(1 - 1/\alpha) + \log(\alpha \delta) / (\alpha - 1)$ everything together is
        $(\varepsilon, \delta)$-DP. (Watching many orders and stopping when the last of them is used up is not known to be: which one
        survives depends on the data.)
    - `"gdp"`: $\mu^2 = 1 / \sigma^2$ of Gaussian mechanisms that are not sampled, up to the $\mu$ whose Gaussian is exactly
        $(\varepsilon, \delta)$-DP. Nothing is lost to adaptivity.

    !!! success "Guarantee"

        All steps let through are together $(\varepsilon, \delta)$-DP, whichever way events, and their number, depend on what was
        published before. `spend` raises rather than exceed the budget.

    *The order* is fixed before anything is let through. If nobody chose it, by `hint` or `order`, it is that of unsampled Gaussian mechanisms, and
    the first step to be spent, if it does not fit, may still choose another: the event of that step is known before it runs, and whatever it was
    chosen by was published earlier and is not this filter's. Given that, the order is a constant for all steps, the first included, as the
    theorem asks.

    **Arguments:**

    - `epsilon`, `delta`: the budget.
    - `adjacency`, `unit`: who is protected. Under `"replace_one"` only `"gdp"` is proven.
    - `accountant`: `"rdp"` or `"gdp"`.
    - `hint`: an event or plan like those to come, to choose the order by; it changes how much fits, by a lot, and no guarantee.
    - `order`: $\alpha$, an integer above 1, if you would rather choose it yourself. It must not depend on the data.
    - `spent`: what is spent already, to go on after a restart with the same `epsilon`, `delta` and `order`.

    ??? cite "Reference"

        Feldman and Zrnic, *Individual privacy accounting via a Rényi filter*, NeurIPS 2021; Lécuyer, *Practical privacy filters and
        odometers with Rényi differential privacy*, 2021. Conversion: Canonne, Kamath and Steinke 2020, proposition 12. Gaussian: Smith and
        Thakurta, *Fully adaptive composition for Gaussian differential privacy*, 2022.
    """

    epsilon: float = eqx.field(static=True)
    delta: float = eqx.field(static=True)
    adjacency: Adjacency = eqx.field(static=True)
    unit: str = eqx.field(static=True)
    accountant: FilterAccountant = eqx.field(static=True)
    order: int | None = eqx.field(static=True)
    spent: float = eqx.field(static=True)
    is_order_open: bool = eqx.field(static=True, init=False)

    def __init__(
        self,
        epsilon: RealScalarLike,
        delta: RealScalarLike,
        adjacency: str = "add_or_remove_one",
        *,
        unit: str = "example",
        accountant: str = "rdp",
        hint: Any = None,
        order: Any = None,
        spent: RealScalarLike = 0.0,
    ):
        self.epsilon = positive_float("PrivacyFilter(epsilon=...)", epsilon)
        self.delta = probability("PrivacyFilter(delta=...)", delta)
        check_adjacency(adjacency)
        choice("PrivacyFilter(accountant=...)", accountant, get_args(FilterAccountant))
        if accountant == "rdp" and adjacency == "replace_one":
            raise ValueError(
                "`PrivacyFilter(accountant='rdp', adjacency='replace_one')`: no Rényi bound of dp_accounting is right under replacement. Use "
                "`accountant='gdp'`, or another adjacency."
            )
        self.adjacency = adjacency  # pyright: ignore[reportAttributeAccessIssue]
        self.unit = nonempty_text("PrivacyFilter(unit=...)", unit)
        self.accountant = accountant  # pyright: ignore[reportAttributeAccessIssue]
        if hint is not None and not hasattr(hint, "adjacency"):
            canonical(hint, "PrivacyFilter(hint=...)")  # raises for what is no event
        self.is_order_open = (
            accountant == "rdp"
            and hint is None
            and order is None
            and at_least_zero("PrivacyFilter(spent=...)", spent) == 0
        )
        if accountant == "gdp":
            if order is not None:
                raise ValueError("`PrivacyFilter(accountant='gdp', order=...)`: only `'rdp'` has an order.")
            self.order = None
        elif order is not None:
            self.order = positive_int("PrivacyFilter(order=...)", order)
        else:
            self.order = self._best_order(hint)
        self.spent = at_least_zero("PrivacyFilter(spent=...)", spent)
        if not self.budget > 0:
            raise ValueError(
                f"`PrivacyFilter(epsilon={self.epsilon:g}, delta={self.delta:g}, order={self.order})`: at this order nothing fits into the budget. "
                f"{'Leave `order` out.' if order is not None else 'Use a larger epsilon or delta.'}"
            )

    @property
    def budget(self) -> float:
        r"""What the costs of all steps may add up to: $\rho(\alpha)$ or $\mu^2$."""
        # a hair less than is proven, for the rounding of millions of additions
        if self.order is None:
            from dp_accounting import get_sigma_gaussian

            return float(get_sigma_gaussian(self.epsilon, self.delta)) ** -2 * (1 - 1e-8)
        return _renyi_budget(self.order, self.epsilon, self.delta) * (1 - 1e-9)

    @property
    def fraction_spent(self) -> float:
        """How much of the budget is gone, from 0 to 1."""
        return self.spent / self.budget

    def cost(self, event_or_plan: Any) -> float:
        """What one such step adds to `spent`. Raises `ValueError` if it is not known, or holds for other neighbours."""
        event = self._event(event_or_plan)
        if self.order is not None:
            return _divergence(event, self.adjacency, self.order)
        import dp_accounting as da

        total = 0.0
        for e, n in parts(event):
            if not isinstance(e, da.GaussianDpEvent):
                raise ValueError(
                    f"`PrivacyFilter(accountant='gdp')` takes Gaussian mechanisms without sampling; got {e}. Use `accountant='rdp'`."
                )
            sensitivity = 2.0 if self.adjacency == "replace_one" else 1.0
            total += n * (sensitivity / e.noise_multiplier) ** 2 if e.noise_multiplier > 0 else math.inf
        return total

    def can_spend(self, event_or_plan: Any, count: Any = 1) -> bool:
        """Whether `count` more of these steps fit."""
        count = positive_int("PrivacyFilter.can_spend(count=...)", count)
        ready = self._ready_for(event_or_plan, count)
        return ready.spent + count * ready.cost(event_or_plan) <= ready.budget

    def room_for(self, event_or_plan: Any) -> int:
        """How many more of these steps fit, if nothing else comes and the order stays as it is."""
        cost = self.cost(event_or_plan)
        if cost == 0:
            raise ValueError(f"Any number of {event_or_plan} fits: it costs nothing.")
        count = int(max(0.0, self.budget - self.spent) / cost)
        while count and self.spent + count * cost > self.budget:
            count -= 1
        return count

    def spend(self, event_or_plan: Any, count: Any = 1) -> "PrivacyFilter":
        """The filter after these steps: go on with it, and run them only now.

        **Raises:** `RuntimeError` if they do not fit, in which case they must not run. `ValueError` if their cost is not known.
        """
        count = positive_int("PrivacyFilter.spend(count=...)", count)
        ready = self._ready_for(event_or_plan, count)
        cost = count * ready.cost(event_or_plan)
        if not ready.spent + cost <= ready.budget:
            hint = "" if ready.order is None else _MSG_ORDER.format(order=ready.order)
            raise RuntimeError(
                _MSG_FULL.format(
                    cost=cost, budget=ready.budget, spent=ready.spent, epsilon=self.epsilon, delta=self.delta, hint=hint
                )
            )
        return dataclasses.replace(ready, spent=ready.spent + cost)

    def _ready_for(self, event_or_plan: Any, count: int) -> "PrivacyFilter":
        """This filter, or before the first step the same at another order, if nobody chose one and only another has room for these."""
        if not self.is_order_open or count * self.cost(event_or_plan) <= self.budget:
            return self
        return dataclasses.replace(self, order=self._best_order(event_or_plan))

    def _event(self, event_or_plan: Any) -> Any:
        if hasattr(event_or_plan, "adjacency"):
            for name in ("adjacency", "unit"):
                theirs, ours = getattr(event_or_plan, name, None), getattr(self, name)
                if theirs != ours:
                    raise ValueError(
                        f"The filter's `{name}` is {ours!r} and that of the step {theirs!r}; they must agree."
                    )
            return canonical(event_or_plan.event)
        return canonical(event_or_plan)

    def _best_order(self, hint: Any) -> int:
        """The order at which most steps like the hint fit; without one, most Gaussian mechanisms that are not sampled."""
        budgets = np.array([_renyi_budget(a, self.epsilon, self.delta) for a in ORDERS])
        costs = (
            np.array(ORDERS, np.float64)
            if hint is None
            else renyi_divergences(self._event(hint), self.adjacency, ORDERS)
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            return ORDERS[int(np.nanargmax(np.where(budgets > 0, budgets / costs, budgets)))]


@functools.lru_cache(maxsize=64)
def _divergence(event: Any, adjacency: str, order: int) -> float:
    orders = tuple(sorted({*ORDERS, order}))  # bounds on random repetition at one order draw on the others
    return float(renyi_divergences(event, adjacency, orders)[orders.index(order)])


def _renyi_budget(order: int, epsilon: float, delta: float) -> float:
    r"""The largest $\rho$ at which $(\alpha, \rho)$-Rényi DP implies $(\varepsilon, \delta)$-DP, by Canonne, Kamath and Steinke."""
    if order <= 1:
        return -math.inf
    return epsilon - math.log1p(-1 / order) + math.log(order * delta) / (order - 1)
