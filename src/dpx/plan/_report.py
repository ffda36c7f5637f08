"""What a plan tells the world: the privacy statement, a report as data, and plots."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import accounting
from .._files import write_atomically
from ..accounting import NEIGHBOURS, is_monte_carlo
from ..clipping import NoClipping
from ..noise import AbstractIntegerNoise, IndependentGaussian, joint_scale
from ..sampling import ShuffleSampler

if TYPE_CHECKING:
    from ._plan import PrivacyPlan

_NOT_PRIVATE = (
    "This run is NOT differentially private: contributions are not clipped and no noise is added (epsilon is infinite). Nothing "
    "that depends on its result may be published as private."
)
_TOOLS = {"pld": "privacy loss distributions", "rdp": "Rényi differential privacy"}


def statement(plan: "PrivacyPlan", delta: float) -> str:
    """The privacy statement, in plain English."""
    if isinstance(plan.clipping, NoClipping):
        return _NOT_PRIVATE
    epsilon, unit = plan.epsilon(delta), plan.unit
    advantage = plan.trade_off().advantage
    neighbours = NEIGHBOURS[plan.adjacency].format(unit=unit)
    is_exact = isinstance(plan.noise, AbstractIntegerNoise)
    unclaimed = ""
    if is_exact and "claimed" not in plan.sampler.assumption:
        unclaimed = "; no amplification by sampling is claimed"
    ideal = "floating-point noise behaves like real-valued noise"
    if is_exact:
        ideal = "the bits of its key's stream are random"
    row = f"one row of the data is one {unit}"
    if plan.unit == "user":
        row = "each user's examples are told apart correctly"
    lines = [
        f"This run is ({rounded_up(epsilon)}, {delta:g})-differentially private for one {unit}.",
        "",
        f"- Neighbouring data sets: {neighbours} (adjacency `{plan.adjacency}`).",
        f"- Mechanism: {plan.noise.description}, on sums of clipped per-{unit} gradients.",
        f"- Clipping: `{type(plan.clipping).__name__}`, l{plan.clipping.order} clip norm {float(plan.clipping.sensitivity):.6g}.",
        f"- Noise multiplier: {plan.noise_multiplier:.6g}; noise of scale {noise_scale(plan):.6g} in every coordinate of the sum"
        f"{' before it is correlated' if plan.noise.bands != 1 else ''}.",
        *_side_lines(plan),
        f"- Sampling: {plan.sampler.assumption}{unclaimed}.",
        *_shuffling_lines(plan, delta),
        f"- Steps: {plan.steps}. All intermediate models may be published.",
        f"- Epsilon: {rounded_up(epsilon)} at delta {delta:g}, an upper bound computed with {tool(plan)} (dp_accounting "
        f"{_version('dp-accounting')}).",
        f"- Attack advantage: whoever knows all other {unit}s tells with true-positive rate minus false-positive rate at most "
        f"{math.ceil(advantage * 1e4) / 1e4:.4f} whether one was used.",
        f"- Assumed: batches are drawn as stated, with a secret seed; {row} and the loss sees one at "
        "a time; the noise key is secret and used once; choices made by looking at the data (architecture, hyperparameters, "
        f"preprocessing) are not counted; and {ideal}.",
    ]
    return "\n".join(lines)


def shuffling_gap(plan: "PrivacyPlan", delta: float) -> dict[str, float] | None:
    r"""What a Poisson accountant would claim for one epoch of shuffled batches at `delta`, and what is known to be true.

    At the `epsilon` that Poisson sampling would have, shuffled batches have a delta of at least `delta_at_least` (Chua et al. 2024). None where no
    whole epoch is shuffled, or noise is correlated.
    """
    sampler = plan.sampler
    if not isinstance(sampler, ShuffleSampler) or not isinstance(plan.noise, IndependentGaussian):
        return None
    batches = sampler.num_examples // sampler.batch_size
    if plan.steps < batches or batches < 2:
        return None
    import dp_accounting as da

    step = da.PoissonSampledDpEvent(1 / batches, da.GaussianDpEvent(plan.noise_multiplier))
    epsilon = accounting.epsilon(da.SelfComposedDpEvent(step, batches), delta)
    at_least = accounting.shuffling_lower_bound(plan.noise_multiplier, batches, epsilon)
    return {"epsilon": epsilon, "delta": delta, "delta_at_least": at_least}


def _shuffling_lines(plan: "PrivacyPlan", delta: float) -> list[str]:
    gap = shuffling_gap(plan, delta)
    if gap is None or gap["delta_at_least"] <= delta:
        return []
    return [
        f"- Why no amplification is claimed: one epoch of Poisson samples would have epsilon {gap['epsilon']:.4g} at delta {delta:g}; of "
        f"shuffled batches delta at that epsilon is known to be at least {gap['delta_at_least']:.3g} (Chua et al. 2024)."
    ]


def tool(plan: "PrivacyPlan") -> str:
    """How epsilon was bounded, in words."""
    if is_monte_carlo(plan.event):
        return "a simulation of the privacy loss, whose probability of failure is counted in delta,"
    return _TOOLS[plan.accountant]


def _side_lines(plan: "PrivacyPlan") -> list[str]:
    lines = []
    if plan.clipping.side_noise_multipliers:
        lines.append(
            f"- The clip norm is adapted by private counts, whose noise is part of the noise multiplier: the gradient alone gets "
            f"{noise_scale(plan) / plain_scale(plan) * plan.noise_multiplier:.6g}."
        )
    if plan.metrics:
        named = ", ".join(
            f"{name} (`{type(m).__name__}`, noise multiplier {float(m.noise_multiplier):.6g})"
            for name, m in plan.metrics.items()
        )
        lines.append(f"- Also released at every step, and part of epsilon: {named}.")
    return lines


def noise_scale(plan: "PrivacyPlan") -> float:
    """The scale of the gradient's noise in units of the clipped sum."""
    return float(joint_scale(plan.clipping, plan.noise, plan.steps, plan.sampler.participation_per_event))


def plain_scale(plan: "PrivacyPlan") -> float:
    """The same, if the clipping asked nothing of its own."""
    return float(plan.noise.scale(plan.clipping.sensitivity, plan.steps, plan.sampler.participation_per_event))


def report(plan: "PrivacyPlan", delta: float) -> dict[str, Any]:
    """Everything that the statement says, and the curves, as JSON-serialisable data."""
    if isinstance(plan.clipping, NoClipping):
        return {"is_private": False, "statement": _NOT_PRIVATE, "versions": versions()}
    curve = plan.trade_off()
    rates = np.array([1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 0.5])
    steps = _milestones(plan, 8)
    return {
        "is_private": True,
        "epsilon": plan.epsilon(delta),
        "delta": delta,
        "adjacency": plan.adjacency,
        "neighbours": NEIGHBOURS[plan.adjacency].format(unit=plan.unit),
        "unit": plan.unit,
        "accountant": plan.accountant,
        "tool": tool(plan),
        "mechanism": plan.noise.description,
        "event": repr(plan.event),
        "clipping": {
            "kind": type(plan.clipping).__name__,
            "order": plan.clipping.order,
            "sensitivity": float(plan.clipping.sensitivity),
            "description": repr(plan.clipping),
        },
        "noise": {
            "kind": type(plan.noise).__name__,
            "noise_multiplier": plan.noise_multiplier,
            "scale": noise_scale(plan),
            "bands": plan.noise.bands,
        },
        "metrics": {name: repr(metric) for name, metric in plan.metrics.items()},
        "sampling": {
            "kind": type(plan.sampler).__name__,
            "num_examples": plan.sampler.num_examples,
            "expected_batch_size": plan.sampler.batch_size,
            "steps": plan.steps,
            "assumption": plan.sampler.assumption,
            "min_separation": plan.sampler.participation.min_separation,
            "max_participations": plan.sampler.participation.max_participations,
        },
        "shuffling_gap": shuffling_gap(plan, delta),
        "advantage": curve.advantage,
        "true_positive_rate": {f"{rate:g}": float(curve.true_positive_rate(rate)) for rate in rates},
        "epsilon_after_steps": {str(n): plan.epsilon(delta, n) for n in steps},
        "delta_of_epsilon": {f"{e:.6g}": d for e, d in list(zip(curve.epsilons, curve.deltas, strict=True))[::10]},
        "statement": statement(plan, delta),
        "versions": versions(),
    }


def plot(plan: "PrivacyPlan", path: Any, delta: float) -> Path:
    """Trade-off curve, epsilon over steps, and epsilon against delta, side by side."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("`PrivacyPlan.plot` needs matplotlib: `pip install matplotlib`.") from None
    curve = plan.trade_off()
    # not pyplot: no state is shared with the caller's figures, and no display is needed
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    rates = np.linspace(0, 1, 201)
    left.plot(rates, curve.true_positive_rate(rates), label="bound on every attack")
    left.plot([0, 1], [0, 1], ":", color="gray", label="guessing")
    left.set(xlabel="false-positive rate", ylabel="true-positive rate", title=f"advantage ≤ {curve.advantage:.3f}")
    left.legend()
    steps = _milestones(plan, 10)
    middle.plot([0, *steps], [0.0, *(plan.epsilon(delta, n) for n in steps)], "o-", markersize=3)
    middle.set(xlabel="step", ylabel="epsilon spent", title=f"delta = {delta:g}")
    known = [(e, d) for e, d in zip(curve.epsilons, curve.deltas, strict=True) if d > 0]
    right.semilogy([e for e, _ in known], [d for _, d in known])
    right.set(xlabel="epsilon", ylabel="delta", title="privacy profile")
    kind = Path(path).suffix.lstrip(".") or "png"
    return write_atomically(path, lambda half: figure.savefig(half, format=kind, dpi=120))


def _milestones(plan: "PrivacyPlan", number: int) -> list[int]:
    """Steps at which epsilon is reported: the last alone, where each would need a simulation of its own."""
    if is_monte_carlo(plan.event):
        return [plan.steps]
    return sorted({max(1, round(plan.steps * k / number)) for k in range(1, number + 1)})


def rounded_up(epsilon: float) -> str:
    """Four decimals, never rounded down: what is stated must be a bound."""
    return f"{math.ceil(epsilon * 1e4) / 1e4:.4f}" if math.isfinite(epsilon) else "infinity"


def versions() -> dict[str, str]:
    """The versions of what the numbers rest on."""
    return {name: _version(name) for name in ("dpx", "jax", "equinox", "dp-accounting", "numpy")}


def _version(name: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed as a package"
