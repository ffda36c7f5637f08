"""What a plan tells the world: the privacy statement, a report as data, and plots."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import numpy as np

from .. import accounting
from .._files import write_atomically
from .._round import exactly, round_down, round_epsilon, round_up
from ..accounting import NEIGHBOURS, is_monte_carlo
from ..clipping import AdaptiveClipping, FlatClipping, GroupClipping, HardThresholdClipping, NoClipping
from ..noise import AbstractIntegerNoise, IndependentGaussian
from ..sampling import ShuffleSampler

if TYPE_CHECKING:
    from ._plan import PrivacyPlan

_NOT_PRIVATE = (
    "This run is NOT differentially private: contributions are not clipped and no noise is added (epsilon is infinite). Nothing "
    "that depends on its result may be published as private."
)
_UNCHOSEN = "the clip norm is not chosen yet; privacy does not depend on it"
_TOOLS = {"pld": "privacy loss distributions", "rdp": "Rényi differential privacy"}


def statement(plan: "PrivacyPlan", delta: float, in_clip_norms: bool = False) -> str:
    """The privacy statement, in plain English. Numbers are rounded against us: what is read is still a bound, and a run with them keeps it."""
    if isinstance(plan.clipping, NoClipping):
        return _NOT_PRIVATE
    epsilon, unit = plan.epsilon(delta), plan.unit
    advantage = plan.trade_off().advantage
    neighbours = NEIGHBOURS[plan.adjacency].format(unit=unit)
    is_exact = isinstance(plan.noise, AbstractIntegerNoise)
    ideal = "floating-point noise behaves like real-valued noise"
    if is_exact:
        ideal = "the bits of its key's stream are random"
    row = f"one row of the data is one {unit}"
    if plan.unit == "user":
        row = "each user's examples are told apart correctly"
    lines = [
        f"This run is ({round_epsilon(epsilon)}, {round_up(delta)})-differentially private for one {unit}.",
        "",
        f"- Neighbouring data sets: {neighbours} (adjacency `{plan.adjacency}`).",
        f"- Mechanism: {plan.noise.description}, on sums of clipped per-{unit} gradients.",
        f"- Clipping: {_UNCHOSEN if in_clip_norms else clipping_text(plan)}.",
        f"- Noise multiplier: {round_up(plan.noise_multiplier, 9)}; noise of scale {round_up(noise_scale(plan, in_clip_norms))}"
        f"{' clip norms' if in_clip_norms else ''} in every coordinate of the sum"
        f"{' before it is correlated' if plan.noise.bands != 1 else ''}.",
        *_side_lines(plan),
        f"- Sampling: {sampling_text(plan)}.",
        *_shuffling_lines(plan, delta),
        f"- Steps: {plan.steps}. All intermediate models may be published.",
        f"- Epsilon: {round_epsilon(epsilon)} at delta {round_up(delta)}, an upper bound computed with {tool(plan)} (dp_accounting "
        f"{_version('dp-accounting')}).",
        f"- Attack advantage: whoever knows everything but one {unit} tells with true-positive rate minus false-positive rate at most "
        f"{round_epsilon(advantage)} whether that one was used.",
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
    # as it is printed, so that the bound from below holds for the number that is read
    epsilon = float(round_up(accounting.epsilon(da.SelfComposedDpEvent(step, batches), delta)))
    at_least = accounting.shuffling_lower_bound(plan.noise_multiplier, batches, epsilon)
    return {"epsilon": epsilon, "delta": delta, "delta_at_least": at_least}


def _shuffling_lines(plan: "PrivacyPlan", delta: float) -> list[str]:
    gap = shuffling_gap(plan, delta)
    if gap is None or gap["delta_at_least"] <= delta:
        return []
    return [
        f"- Why no amplification is claimed: one epoch of Poisson samples would have epsilon {round_up(gap['epsilon'])} at delta "
        f"{round_up(delta)}; of shuffled batches delta at that epsilon is at least {round_down(gap['delta_at_least'], 3)} (Chua et al. 2024)."
    ]


def tool(plan: "PrivacyPlan") -> str:
    """How epsilon was bounded, in words."""
    if is_monte_carlo(plan.event):
        return "a simulation of the privacy loss, whose probability of failure is counted in delta,"
    if isinstance(plan.noise, AbstractIntegerNoise) and "Poisson" in plan.sampler.assumption:
        return f"{_TOOLS[plan.accountant]} and the general bound of Zhu and Wang (2019) for Poisson sampling"
    return _TOOLS[plan.accountant]


def sampling_text(plan: "PrivacyPlan") -> str:
    """Who is in a batch, said of the unit that is protected."""
    text = plan.sampler.assumption
    if plan.sampler.unit != "example" or plan.unit == "example":
        return text
    return text.replace("examples", f"{plan.unit}s").replace("example", plan.unit)


def clipping_text(plan: "PrivacyPlan") -> str:
    """How contributions are bounded, with the numbers that were chosen, and by how much."""
    clipping, unit = plan.clipping, plan.unit
    norm = f"l{clipping.order}"
    values = {name: _in_words(value) for name, value in settings(clipping).items()}
    match clipping:
        case FlatClipping():
            how = f"{norm} clip norm {values['norm']}{', divided by it' if clipping.unit_norm else ''}"
        case GroupClipping():
            scaled = ", divided by their root sum of squares" if clipping.unit_norm else ""
            how = f"{norm} clip norms {values['norms']} of groups of parameters{scaled} ({clipping.allocation} allocation of noise)"
        case AdaptiveClipping():
            how = (
                f"{norm} clip norm {values['initial_norms']} at first, which follows quantile {values['quantile']} of the gradients' norms "
                f"(learning rate {values['learning_rate']}, counts of noise multiplier {values['count_noise_multiplier']}); in units of the first"
            )
        case HardThresholdClipping():
            how = f"gradients of {norm} norm above {values['threshold']} are left out, others multiplied by {values['norm']} / {values['threshold']}"
        case _:
            how = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items() if name != "order")
    return f"`{type(clipping).__name__}`: {how}; one {unit} contributes at most {exactly(float(clipping.sensitivity))} in the {norm} norm"


def settings(part: eqx.Module) -> dict[str, Any]:
    """The fields of a part as JSON-serialisable values: numbers as they were typed, not the shapes of their arrays."""
    return {field.name: _plain(getattr(part, field.name)) for field in dataclasses.fields(part)}


def described(part: eqx.Module) -> str:
    """A part as somebody would type it, with its numbers."""
    return f"{type(part).__name__}({', '.join(f'{name}={value!r}' for name, value in settings(part).items())})"


def _plain(value: Any) -> Any:
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        value = np.asarray(value)
        if value.dtype.kind != "f":
            return value.tolist()
        return float(exactly(float(value))) if value.ndim == 0 else [_plain(x) for x in value]
    if hasattr(value, "prefixes") and hasattr(value, "groups"):  # which path belongs to which group
        paths = [jax.tree_util.keystr(path) for path in value.prefixes]
        return dict(zip(paths, value.groups, strict=True))
    if isinstance(value, eqx.Module):
        return settings(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return getattr(value, "__qualname__", None) or repr(value)


def _in_words(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_in_words, value))
    return exactly(value) if isinstance(value, float) else str(value)


def _side_lines(plan: "PrivacyPlan") -> list[str]:
    lines = []
    if plan.clipping.side_noise_multipliers:
        lines.append(
            f"- The clip norm is adapted by private counts, whose noise is part of the noise multiplier: the gradient alone gets "
            f"{round_up(noise_scale(plan) / plain_scale(plan) * plan.noise_multiplier)}."
        )
    if plan.metrics:
        named = ", ".join(
            f"{name} (`{type(m).__name__}`, noise multiplier {round_up(float(m.noise_multiplier))})"
            for name, m in plan.metrics.items()
        )
        lines.append(f"- Also released at every step, and part of epsilon: {named}.")
    return lines


def noise_scale(plan: "PrivacyPlan", in_clip_norms: bool = False) -> float:
    """The scale of the gradient's noise in units of the clipped sum, or of the norm that one contribution has at most."""
    scale = float(plan.mechanism.scale())
    return scale / float(plan.clipping.sensitivity) if in_clip_norms else scale


def plain_scale(plan: "PrivacyPlan") -> float:
    """The same, if the clipping asked nothing of its own."""
    return float(plan.noise.scale(plan.clipping.sensitivity, plan.steps, plan.sampler.participation_per_event))


def report(plan: "PrivacyPlan", delta: float, in_clip_norms: bool = False) -> dict[str, Any]:
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
            "sensitivity": None if in_clip_norms else float(plan.clipping.sensitivity),
            "settings": None if in_clip_norms else settings(plan.clipping),
            "description": _UNCHOSEN if in_clip_norms else described(plan.clipping),
        },
        "noise": {
            "kind": type(plan.noise).__name__,
            "noise_multiplier": plan.noise_multiplier,
            "scale": noise_scale(plan, in_clip_norms),
            "scale_is_in_clip_norms": in_clip_norms,
            "bands": plan.noise.bands,
        },
        "metrics": {name: described(metric) for name, metric in plan.metrics.items()},
        "sampling": {
            "kind": type(plan.sampler).__name__,
            "num_examples": plan.sampler.num_examples,
            "expected_batch_size": plan.sampler.batch_size,
            "steps": plan.steps,
            "assumption": sampling_text(plan),
            "min_separation": plan.sampler.participation.min_separation,
            "max_participations": plan.sampler.participation.max_participations,
        },
        "shuffling_gap": shuffling_gap(plan, delta),
        "advantage": curve.advantage,
        "true_positive_rate": {f"{rate:g}": float(curve.true_positive_rate(rate)) for rate in rates},
        "epsilon_after_steps": {str(n): plan.epsilon(delta, n) for n in steps},
        "delta_of_epsilon": {round_up(e): d for e, d in list(zip(curve.epsilons, curve.deltas, strict=True))[::10]},
        "statement": statement(plan, delta, in_clip_norms),
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
    # what is drawn between two points must be a bound too: the value at the worse of them, never a chord of a concave curve
    rates = np.unique(np.concatenate([np.geomspace(1e-6, 1e-2, 100), np.linspace(0, 1, 501)]))
    left.plot(*_stairs(rates, curve.true_positive_rate(rates)), label="bound on every attack")
    left.plot([0, 1], [0, 1], ":", color="gray", label="guessing")
    title = f"advantage ≤ {round_epsilon(curve.advantage)}"
    left.set(xlabel="false-positive rate", ylabel="true-positive rate", title=title)
    left.legend()
    steps = _milestones(plan, 20, crowded=True)
    spent = np.maximum.accumulate([0.0, *(plan.epsilon(delta, n) for n in steps)])
    middle.plot(*_stairs(np.array([0, *steps]), spent))
    middle.set(xlabel="step", ylabel="epsilon spent, at most", title=f"delta = {round_up(delta)}")
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


def _milestones(plan: "PrivacyPlan", number: int, crowded: bool = False) -> list[int]:
    """Steps at which epsilon is reported, evenly spread or `crowded` where it grows fastest: the last alone, where each would need a simulation of
    its own."""
    if is_monte_carlo(plan.event):
        return [plan.steps]
    shares = [(k / number) ** (2 if crowded else 1) for k in range(1, number + 1)]
    return sorted({max(1, round(plan.steps * share)) for share in shares} | ({1} if crowded else set()))


def versions() -> dict[str, str]:
    """The versions of what the numbers rest on."""
    return {name: _version(name) for name in ("dpx", "jax", "equinox", "dp-accounting", "numpy")}


def _version(name: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed as a package"
