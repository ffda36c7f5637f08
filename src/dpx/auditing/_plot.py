"""The figure of an audit."""

from pathlib import Path
from typing import Any

from .._files import write_atomically
from ._report import AuditReport


def plot(report: AuditReport, path: Any) -> Path:
    """The plan's trade-off curve, and the points that the attack reached, with intervals, both axes logarithmic."""
    evidence = report.evidence
    if evidence is None:
        raise ValueError("`AuditReport.plot(path)`: only the report of `audit_plan` has operating points to draw.")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("`AuditReport.plot` needs matplotlib. Install it with `pip install matplotlib`.") from None
    path = Path(path)
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    rates, allowed = evidence.curve
    axes.plot(rates, allowed, "C0-", label="what the plan allows")
    axes.plot(rates, rates, "C7:", label="guessing")
    for number, ((fl, fp, fu), (tl, tp, tu)) in enumerate(
        zip(evidence.false_positive, evidence.true_positive, strict=True)
    ):
        x, y = max(fp, 1e-5), max(tp, 1e-5)
        axes.errorbar(
            [x], [y], xerr=[[x - min(x, max(fl, 1e-5))], [max(fu, x) - x]], yerr=[[y - min(y, max(tl, 1e-5))], [max(tu, y) - y]],
            fmt="C1o", markersize=4, capsize=2, label=f"attack, {100 * evidence.confidence:g} % intervals" if number == 0 else None,
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlim=(1e-5, 1), ylim=(1e-5, 1.2))
    axes.set(xlabel="false-positive rate", ylabel="true-positive rate", title=report.title)
    axes.title.set_fontsize(9)
    axes.legend(loc="lower right", fontsize=8)
    kind = path.suffix.removeprefix(".") or "png"
    write_atomically(path, lambda file: figure.savefig(file, format=kind, dpi=150))
    return path
