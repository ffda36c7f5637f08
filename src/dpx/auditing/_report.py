"""`AuditReport`: which laws were looked at, which are broken, and what the audit would have seen."""

import math
from typing import Any

import equinox as eqx

from .._round import round_down, round_epsilon, round_up
from ._lower_bound import LowerBound

_PASSED = (
    "Passed: no law is broken that these tests look at, with the power that is stated. An audit bounds from below; it certifies nothing "
    "beyond that."
)


class PrivacyAuditError(AssertionError):
    """Raised where an audit finds a law broken: its text names the law, the leaf and what was found. `report` has all of it.

    **Arguments:**

    - `report`: the `AuditReport`.
    """

    def __init__(self, report: "AuditReport"):
        super().__init__(str(report))
        self.report = report


class AuditedLaw(eqx.Module):
    """One law that an audit looked at.

    **Arguments:**

    - `code`: short name of the test, such as `"N1"` (docs/auditing.md lists them).
    - `law`: what must hold.
    - `passed`: whether it does, as far as the test sees.
    - `found`: what was found, in words, with numbers.
    - `where`: path of the leaf, or the part, that it is about; empty if about all.
    - `p_value`: of a statistical test: the probability, if the law holds, of something as strange; None for what is exact.
    - `power`: what the test would have seen with probability 0.99, in words; empty where there is nothing to say.
    """

    code: str = eqx.field(static=True)
    law: str = eqx.field(static=True)
    passed: bool = eqx.field(static=True)
    found: str = eqx.field(static=True)
    where: str = eqx.field(static=True, default="")
    p_value: float | None = eqx.field(static=True, default=None)
    power: str = eqx.field(static=True, default="")

    def __str__(self) -> str:
        where = f" at {self.where}" if self.where else ""
        p = "" if self.p_value is None else f" (p_value {self.p_value:.3g})"
        return f"{self.code}{where}: {self.law}. Found: {self.found}{p}"


class Evidence(eqx.Module):
    """What a figure of an audit is made of: an attack's operating points, with intervals.

    **Arguments:**

    - `false_positive`, `true_positive`: `(lower, point, upper)` of each point.
    - `curve`: false-positive rates, and the true-positive rates that the plan allows.
    - `confidence`: of each interval.
    """

    false_positive: tuple[tuple[float, float, float], ...] = eqx.field(static=True)
    true_positive: tuple[tuple[float, float, float], ...] = eqx.field(static=True)
    curve: tuple[tuple[float, ...], tuple[float, ...]] = eqx.field(static=True)
    confidence: float = eqx.field(static=True)


class AuditReport(eqx.Module):
    """What an audit looked at, found, and would have found.

    It prints as a table. `raise_if_failed()` turns it into an assertion.

    **Arguments:**

    - `title`: what was audited, and how.
    - `laws`: all that was looked at.
    - `false_alarm`: the probability that sound code fails.
    - `bounds`: lower bounds by name, of `audit_plan`.
    - `epsilon`, `delta`: what the plan states.
    - `p_value`: of the plan's own trade-off curve.
    - `notes`: what could not be looked at, and warnings.
    - `evidence`: of a figure.
    """

    title: str = eqx.field(static=True)
    laws: tuple[AuditedLaw, ...] = eqx.field(static=True)
    false_alarm: float = eqx.field(static=True)
    bounds: dict[str, LowerBound] = eqx.field(default_factory=dict)
    epsilon: float | None = eqx.field(static=True, default=None)
    delta: float | None = eqx.field(static=True, default=None)
    p_value: float | None = eqx.field(static=True, default=None)
    notes: tuple[str, ...] = eqx.field(static=True, default=())
    evidence: Evidence | None = None

    @property
    def failures(self) -> tuple[AuditedLaw, ...]:
        """The laws that are broken."""
        return tuple(law for law in self.laws if not law.passed)

    @property
    def passed(self) -> bool:
        """Whether no law was found broken."""
        return not self.failures

    @property
    def power(self) -> dict[str, str]:
        """What the tests would have seen with probability 0.99, by their names."""
        names = lambda law: f"{law.code} {law.where}".strip()
        return {names(law): law.power for law in self.laws if law.power}

    def raise_if_failed(self) -> None:
        """Raises `PrivacyAuditError`, with the table, if a law is broken."""
        if not self.passed:
            raise PrivacyAuditError(self)

    def table(self) -> str:
        """The laws that were looked at, one a line, in Markdown."""
        rows = ["| | test | law | found | p-value | would have seen |", "|---|---|---|---|---|---|"]
        for law in self.laws:
            p = "" if law.p_value is None else f"{law.p_value:.2g}"
            name = f"{law.code} {law.where}".strip()
            cells = ["ok" if law.passed else "BROKEN", name, law.law, law.found, p, law.power]
            rows.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
        return "\n".join(rows)

    def summary(self) -> str:
        """Stated epsilon, lower bounds and the p-value of the plan's curve, one a line."""
        lines = []
        if self.epsilon is not None:
            at = "" if self.delta is None else f" at delta {round_up(self.delta)}"
            lines.append(f"stated: epsilon <= {round_epsilon(self.epsilon)}{at}")
        lines += [f"{name}: {bound}" for name, bound in self.bounds.items()]
        if self.p_value is not None:
            lines.append(f"p-value of the plan's own trade-off curve: {round_up(self.p_value, 3)}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON-serialisable data."""
        number = lambda x: x if x is None or math.isfinite(x) else str(x)
        bound = lambda b: {
            "quantity": b.quantity, "value": number(b.value), "confidence": b.confidence, "ceiling": number(b.ceiling),
            "assumption": b.assumption, "p_value": b.p_value, "delta": b.delta,
        }  # fmt: skip
        return {
            "title": self.title,
            "passed": self.passed,
            "false_alarm": self.false_alarm,
            "epsilon": None if self.epsilon is None else number(self.epsilon),
            "delta": self.delta,
            "p_value": self.p_value,
            "bounds": {name: bound(b) for name, b in self.bounds.items()},
            "laws": [
                {"code": w.code, "law": w.law, "passed": w.passed, "found": w.found, "where": w.where, "p_value": w.p_value, "power": w.power}
                for w in self.laws
            ],
            "notes": list(self.notes),
        }  # fmt: skip

    def plot(self, path: Any) -> Any:
        """Writes the plan's trade-off curve and what the audit reached, with intervals, on logarithmic axes.

        **Arguments:**

        - `path`: of the image; its suffix says the format (`.png`, `.pdf`, `.svg`).

        **Returns:** the path. Needs matplotlib, and a report of `audit_plan`.
        """
        from ._plot import plot

        return plot(self, path)

    def __str__(self) -> str:
        lines = [self.title, f"{len(self.laws)} laws looked at, false alarm at most {round_up(self.false_alarm, 3)}"]
        if self.failures:
            lines.append(f"BROKEN ({len(self.failures)}):")
            lines += [f"  {law}" for law in self.failures]
        if text := self.summary():
            lines.append(text)
        lines += [f"note: {note}" for note in self.notes]
        lines.append(self.table())
        if self.passed:
            lines.append(_PASSED)
        return "\n".join(lines)

    __repr__ = __str__


def percent(share: float) -> str:
    """A share in per cent, for sentences."""
    return f"{round_down(100 * share, 3)} %"
