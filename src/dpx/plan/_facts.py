"""What a plan knows of itself, as one record."""

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import accounting
from .._round import exactly, round_up
from ..accounting import NEIGHBOURS, Adjacency, TradeOffCurve, is_monte_carlo
from ..clipping import (
    AbstractClipping,
    AdaptiveClipping,
    FlatClipping,
    GroupClipping,
    HardThresholdClipping,
    SlackClipping,
)
from ..mechanism import Mechanism
from ..metrics import AbstractMetric
from ..noise import IndependentGaussian
from ..sampling import AbstractSampler, ShuffleSampler
from ._settings import described, in_words, settings

if TYPE_CHECKING:
    from dp_accounting import DpEvent

_UNCHOSEN = "the clip norm is not chosen yet; privacy does not depend on it"
_TOOLS = {"pld": "privacy loss distributions", "rdp": "Rényi differential privacy"}
_RATES = np.array([1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 0.5])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """All that a plan says of itself, computed once: text, data and plot are readings of it, and cannot differ.

    **Arguments:**

    - `epsilon`, `delta`, `adjacency`, `unit`, `accountant`: as the plan has them.
    - `neighbours`, `tool`: adjacency, and how epsilon was bounded, in words.
    - `mechanism`: the noise in words; `event`: the DP event as it prints.
    - `clipping`, `noise`, `metrics`, `sampling`: each part as JSON-serialisable data.
    - `clipping_text`, `metrics_text`: two of them in words; the second is empty without metrics.
    - `gradient_noise_multiplier`: that of the gradient alone, where the clipping's questions take a part of the budget.
    - `is_exact`: whether noise is drawn exactly, as integers.
    - `shuffling_gap`: what would be claimed wrongly of shuffled batches, if anything.
    - `curve`: what attacks reach.
    - `epsilon_after_steps`: pairs of a number of steps and what they have spent.
    - `versions`: of what the numbers rest on.
    """

    epsilon: float
    delta: float
    adjacency: str
    unit: str
    accountant: str
    neighbours: str
    tool: str
    mechanism: str
    event: str
    clipping: dict[str, Any]
    clipping_text: str
    noise: dict[str, Any]
    gradient_noise_multiplier: float | None
    is_exact: bool
    metrics: dict[str, str]
    metrics_text: str
    sampling: dict[str, Any]
    shuffling_gap: dict[str, float] | None
    curve: TradeOffCurve
    epsilon_after_steps: tuple[tuple[int, float], ...]
    versions: dict[str, str]


def facts_of(
    sampler: AbstractSampler,
    mechanism: Mechanism,
    *,
    steps: int,
    epsilon: float,
    delta: float,
    adjacency: Adjacency,
    unit: str,
    accountant: str,
    event: "DpEvent",
    curve: TradeOffCurve,
    epsilon_after_steps: tuple[tuple[int, float], ...] = (),
    in_clip_norms: bool = False,
) -> Facts:
    """The facts of a private plan, from its parts and from what its accountant answered."""
    clipping, noise = mechanism.clipping, mechanism.noise
    scale, sensitivity = float(mechanism.scale()), float(mechanism.sensitivity)
    clipping_data = {
        "kind": type(clipping).__name__,
        "order": clipping.order,
        "sensitivity": None if in_clip_norms else sensitivity,
        "settings": None if in_clip_norms else settings(clipping),
        "description": _UNCHOSEN if in_clip_norms else described(clipping),
    }
    noise_data = {
        "kind": type(noise).__name__,
        "noise_multiplier": mechanism.noise_multiplier,
        "scale": scale / sensitivity if in_clip_norms else scale,
        "scale_is_in_clip_norms": in_clip_norms,
        "bands": noise.bands,
    }
    sampling = {
        "kind": type(sampler).__name__,
        "num_examples": sampler.num_examples,
        "expected_batch_size": sampler.batch_size,
        "steps": steps,
        "planned_steps": sampler.steps,
        "assumption": _sampling_text(sampler, unit),
        "min_separation": sampler.participation.min_separation,
        "max_participations": sampler.participation.max_participations,
    }
    metrics = mechanism.metrics
    return Facts(
        epsilon=epsilon,
        delta=delta,
        adjacency=adjacency,
        unit=unit,
        accountant=accountant,
        neighbours=NEIGHBOURS[adjacency].format(unit=unit),
        tool=_tool(sampler, mechanism, accountant, event),
        mechanism=noise.description,
        event=repr(event),
        clipping=clipping_data,
        clipping_text=_UNCHOSEN if in_clip_norms else _clipping_text(clipping, unit),
        noise=noise_data,
        gradient_noise_multiplier=mechanism.raised_noise_multiplier if clipping.side_noise_multipliers else None,
        is_exact=noise.is_integer,
        metrics={name: described(metric) for name, metric in metrics.items()},
        metrics_text=", ".join(_metric_text(name, metric) for name, metric in metrics.items()),
        sampling=sampling,
        shuffling_gap=_shuffling_gap(sampler, mechanism, delta, steps),
        curve=curve,
        epsilon_after_steps=epsilon_after_steps,
        versions=versions(),
    )


def as_data(facts: Facts) -> dict[str, Any]:
    """The facts as JSON-serialisable data."""
    curve = facts.curve
    return {
        "is_private": True,
        "epsilon": facts.epsilon,
        "delta": facts.delta,
        "adjacency": facts.adjacency,
        "neighbours": facts.neighbours,
        "unit": facts.unit,
        "accountant": facts.accountant,
        "tool": facts.tool,
        "mechanism": facts.mechanism,
        "event": facts.event,
        "clipping": facts.clipping,
        "noise": facts.noise,
        "metrics": facts.metrics,
        "sampling": facts.sampling,
        "shuffling_gap": facts.shuffling_gap,
        "advantage": curve.advantage,
        "true_positive_rate": {f"{rate:g}": float(curve.true_positive_rate(rate)) for rate in _RATES},
        "epsilon_after_steps": {str(n): epsilon for n, epsilon in facts.epsilon_after_steps},
        "delta_of_epsilon": {round_up(e): d for e, d in list(zip(curve.epsilons, curve.deltas, strict=True))[::10]},
    }


def _metric_text(name: str, metric: AbstractMetric) -> str:
    return f"{name} (`{type(metric).__name__}`, noise multiplier {round_up(float(metric.noise_multiplier))})"


def _shuffling_gap(sampler: AbstractSampler, mechanism: Mechanism, delta: float, steps: int) -> dict[str, float] | None:
    r"""What a Poisson accountant would claim for one epoch of shuffled batches at `delta`, and what is known to be true.

    At the `epsilon` that Poisson sampling would have, shuffled batches have a delta of at least `delta_at_least` (Chua et al. 2024). None where no
    whole epoch is shuffled, or noise is correlated.
    """
    if not isinstance(sampler, ShuffleSampler) or not isinstance(mechanism.noise, IndependentGaussian):
        return None
    batches = sampler.num_examples // sampler.batch_size
    if steps < batches or batches < 2:
        return None
    import dp_accounting as da

    step = da.PoissonSampledDpEvent(1 / batches, da.GaussianDpEvent(mechanism.noise_multiplier))
    # as it is printed, so that the bound from below holds for the number that is read
    epsilon = float(round_up(accounting.epsilon(da.SelfComposedDpEvent(step, batches), delta)))
    at_least = accounting.shuffling_lower_bound(mechanism.noise_multiplier, batches, epsilon)
    return {"epsilon": epsilon, "delta": delta, "delta_at_least": at_least}


def _tool(sampler: AbstractSampler, mechanism: Mechanism, accountant: str, event: "DpEvent") -> str:
    """How epsilon was bounded, in words."""
    if is_monte_carlo(event):
        return "a simulation of the privacy loss, whose probability of failure is counted in delta,"
    if mechanism.noise.is_integer and "Poisson" in sampler.assumption:
        return f"{_TOOLS[accountant]} and the general bound of Zhu and Wang (2019) for Poisson sampling"
    return _TOOLS[accountant]


def _sampling_text(sampler: AbstractSampler, unit: str) -> str:
    """Who is in a batch, said of the unit that is protected."""
    text = sampler.assumption
    if sampler.unit != "example" or unit == "example":
        return text
    return text.replace("examples", f"{unit}s").replace("example", unit)


def _clipping_text(clipping: AbstractClipping, unit: str) -> str:
    """How contributions are bounded, with the numbers that were chosen, and by how much."""
    norm = f"l{clipping.order}"
    values = {name: in_words(value) for name, value in settings(clipping).items()}
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
        case SlackClipping():
            how = (
                f"{norm} clip norm {values['initial_norm']} at first, which follows quantile {values['quantile']} of the gradients' norms "
                f"(learning rate {values['learning_rate']}) by what shorter gradients leave unused, in {values['bins']} bins; in units of the first"
            )
        case HardThresholdClipping():
            how = f"gradients of {norm} norm above {values['threshold']} are left out, others multiplied by {values['norm']} / {values['threshold']}"
        case _:
            how = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items() if name != "order")
    return f"`{type(clipping).__name__}`: {how}; one {unit} contributes at most {exactly(float(clipping.sensitivity))} in the {norm} norm"


def milestones(event: "DpEvent", steps: int, number: int, crowded: bool = False) -> list[int]:
    """Steps at which epsilon is reported, evenly spread or `crowded` where it grows fastest: the last alone, where each would need a simulation of
    its own."""
    if is_monte_carlo(event):
        return [steps]
    shares = [(k / number) ** (2 if crowded else 1) for k in range(1, number + 1)]
    return sorted({max(1, round(steps * share)) for share in shares} | ({1} if crowded else set()))


def versions() -> dict[str, str]:
    """The versions of what the numbers rest on."""
    return {name: _version(name) for name in ("dpx", "jax", "equinox", "dp-accounting", "numpy")}


def _version(name: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed as a package"
