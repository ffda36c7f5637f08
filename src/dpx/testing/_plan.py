"""The laws of plans."""

import json
import math
from typing import Any

from .._checks import instance
from ..accounting import PrivacyLedger
from ..plan import PrivacyPlan
from ._report import check_false_alarm, require


def check_plan(plan: PrivacyPlan, *, delta: float = 1e-6, seed: int = 0, false_alarm: float = 1e-6) -> None:
    r"""Checks that what a plan says about its privacy does not contradict itself.

    !!! success "Laws"

        - `epsilon_bracket` has its lower bound below its upper one, which is `epsilon`.
        - $\varepsilon$ falls as $\delta$ grows, and grows with the steps; a prefix costs no more than the whole; `delta(epsilon(delta)) <= delta`.
        - The event comes back from JSON as it was, and costs the same then.
        - `report` can be written as JSON and has the $\varepsilon$ of `epsilon`, rounded up; so has the statement.

    **Arguments:**

    - `plan`: a plan whose noise multiplier is known.
    - `delta`: about which it is asked, below 1 / `num_examples`.
    - `seed`: as elsewhere; nothing here is drawn.
    - `false_alarm`: as elsewhere; 1e-8 where the lower bound of the bracket is from samples.

    **Raises:** `AssertionError` that names the law, with the numbers.
    """
    del seed
    instance("check_plan(plan=...)", plan, PrivacyPlan, "dpx.dp_sgd(1000, 10, 5, noise_multiplier=1.0)")
    check_false_alarm("check_plan", false_alarm)
    epsilon = plan.epsilon(delta)
    require(
        not math.isnan(epsilon) and epsilon >= 0,
        plan,
        "epsilon is a number, at least zero",
        f"{epsilon} at delta {delta:g}",
    )
    lower, upper = plan.epsilon_bracket(delta)
    require(
        0 <= lower <= upper,
        plan,
        "`epsilon_bracket` is a lower and an upper bound",
        f"{lower} and {upper} at delta {delta:g}",
    )
    require(upper == epsilon, plan, "the upper bound of `epsilon_bracket` is `epsilon`", f"{upper} and {epsilon}")

    less = plan.epsilon(delta / 10)
    require(
        less >= epsilon * (1 - 1e-9),
        plan,
        "epsilon falls as delta grows",
        f"{less} at delta {delta / 10:g}, and {epsilon} at {delta:g}",
    )
    if math.isfinite(epsilon):
        back = plan.delta(epsilon)
        require(
            back <= delta * (1 + 1e-3),
            plan,
            "`delta(epsilon(delta))` is at most delta",
            f"{back:.6g} at epsilon {epsilon:.6g}, for delta {delta:g}",
        )

    spent, before = 0.0, 0
    for steps in sorted({1, max(1, plan.steps // 2), plan.steps}):
        prefix = plan.epsilon(delta, steps=steps)
        require(
            prefix >= spent * (1 - 1e-6),
            plan,
            "a longer run costs no less",
            f"{prefix} after {steps} steps, and {spent} after {before}",
        )
        require(
            prefix <= epsilon * (1 + 1e-6),
            plan,
            "a prefix costs no more than the whole",
            f"{prefix} after {steps} steps, and {epsilon} in all",
        )
        spent, before = prefix, steps
    require(plan.epsilon(delta, steps=0) == 0, plan, "no steps cost nothing", f"{plan.epsilon(delta, steps=0)}")

    _check_texts(plan, delta, epsilon)


def _check_texts(plan: PrivacyPlan, delta: float, epsilon: float) -> None:
    report: dict[str, Any] = plan.report(delta)
    text = json.dumps(report, allow_nan=False)
    require(
        json.loads(text) == json.loads(json.dumps(report)),
        plan,
        "the report can be written as JSON",
        "another report when it is read again",
    )
    stated = report["epsilon"]
    if math.isfinite(epsilon):
        require(
            epsilon <= stated * (1 + 1e-12) and stated <= epsilon * 1.01 + 1e-6,
            plan,
            "the report's epsilon is `epsilon`, rounded up",
            f"{stated} reported, and {epsilon}",
        )
        ledger = PrivacyLedger(plan.adjacency, plan.unit)
        ledger.spend(plan)
        again = PrivacyLedger.from_json(ledger.to_json())
        require(
            again.event == ledger.event,
            plan,
            "the event comes back from JSON as it was",
            f"{again.event} for {ledger.event}",
        )
    statement = plan.statement(delta)
    require(statement == plan.statement(delta), plan, "the statement is always the same", "two statements")
    require(f"{delta:g}" in statement, plan, "the statement states delta", statement[:200])
