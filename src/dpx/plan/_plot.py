"""The facts of a plan as one figure."""

from pathlib import Path

import numpy as np

from .._files import write_atomically
from .._round import round_epsilon, round_up
from .._types import FilePath
from ._facts import Facts


def check_matplotlib() -> None:
    """Raises, before anything is computed, where there is nothing to draw with."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ImportError("`PrivacyPlan.plot` needs matplotlib: `pip install matplotlib`.") from None


def plot(facts: Facts, path: FilePath) -> Path:
    """Trade-off curve, epsilon over steps, and epsilon against delta, side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curve = facts.curve
    # not pyplot: no state is shared with the caller's figures, and no display is needed
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    # what is drawn between two points must be a bound too: the value at the worse of them, never a chord of a concave curve
    rates = np.unique(np.concatenate([np.geomspace(1e-6, 1e-2, 100), np.linspace(0, 1, 501)]))
    left.plot(*_stairs(rates, curve.true_positive_rate(rates)), label="bound on every attack")
    left.plot([0, 1], [0, 1], ":", color="gray", label="guessing")
    title = f"advantage ≤ {round_epsilon(curve.advantage)}"
    left.set(xlabel="false-positive rate", ylabel="true-positive rate", title=title)
    left.legend()
    steps, spent = zip((0, 0.0), *facts.epsilon_after_steps, strict=True)
    middle.plot(*_stairs(np.array(steps), np.maximum.accumulate(spent)))
    middle.set(xlabel="step", ylabel="epsilon spent, at most", title=f"delta = {round_up(facts.delta)}")
    known = [(e, d) for e, d in zip(curve.epsilons, curve.deltas, strict=True) if d > 0]
    if known:
        epsilons, deltas = (np.array(x) for x in zip(*known, strict=True))
        right.semilogy(*_stairs(epsilons[::-1], deltas[::-1]))  # delta falls: the value on the left holds
    right.set(xlabel="epsilon", ylabel="delta", title="privacy profile")
    kind = Path(path).suffix.lstrip(".") or "png"
    return write_atomically(path, lambda half: figure.savefig(half, format=kind, dpi=120))


def _stairs(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Corners of the step function that has, between two points, the value at the latter."""
    return np.repeat(x, 2)[:-1], np.repeat(y, 2)[1:]
