"""What goes with what in a plan, and what nobody can account for."""

from typing import TYPE_CHECKING, Any

from .. import accounting
from .._checks import nonempty_text
from ..clipping import AbstractClipping
from ..mechanism import Mechanism
from ..noise import AbstractNoise
from ..sampling import AbstractSampler

if TYPE_CHECKING:
    from dp_accounting import DpEvent


def mechanism_of(
    sampler: AbstractSampler, clipping: AbstractClipping, noise: AbstractNoise, metrics: dict[str, Any]
) -> Mechanism:
    """The mechanism of a run with that sampler; raises if the noise is of another run."""
    if noise.horizon is not None and noise.horizon != sampler.steps:
        raise ValueError(
            f"The noise was made for {noise.horizon} steps and the sampler for {sampler.steps}; they must agree."
        )
    return Mechanism(clipping, noise, metrics, sampler.steps, sampler.participation_per_event)


def check_accountable(sampler: AbstractSampler, mechanism: Mechanism, adjacency: str, accountant: str) -> None:
    """Raises for an adjacency and an accountant under which nothing is known of the sampler and the noise."""
    noise = mechanism.noise
    if noise.is_integer:
        if adjacency == "replace_one":
            raise ValueError(
                f"Nobody can account for `{type(noise).__name__}` under `adjacency='replace_one'`. Use 'add_or_remove_one' or "
                "'replace_special', or `IndependentGaussian`."
            )
        if accountant != "rdp" and mechanism.is_private:
            raise ValueError(
                f"`{type(noise).__name__}` in many dimensions has no privacy loss distribution: give `PrivacyPlan(..., accountant='rdp')`."
            )
    # which events hold under replacement too, Rényi accounting decides itself
    holds = adjacency if "add_or_remove_one" in sampler.adjacencies else "replace_special"
    accounting.check_accountant(accountant, holds)
    if adjacency not in sampler.adjacencies:
        reason = "the batches of everybody depend on how many examples there are, so none can be added or removed"
        if adjacency == "replace_one":
            reason = "what dominates it is known only for an example that is there or contributes nothing"
        raise ValueError(
            f"`{type(sampler).__name__}` needs `adjacency` to be one of {', '.join(map(repr, sampler.adjacencies))}: {reason}; got {adjacency!r}."
        )


def protected_unit(sampler: AbstractSampler, unit: Any) -> str:
    """What is protected, by default what the sampler draws."""
    unit = sampler.unit if unit is None else nonempty_text("PrivacyPlan(unit=...)", unit)
    if sampler.unit != "example" and unit != sampler.unit:
        raise ValueError(
            f"`{type(sampler).__name__}` draws {sampler.unit}s, so `PrivacyPlan(unit=...)` must be {sampler.unit!r}; got {unit!r}."
        )
    return unit


def with_side_queries(event: "DpEvent", mechanism: Mechanism) -> "DpEvent":
    """The event of a run, where what is seen beside the gradient is not covered by it yet.

    Queries of a banded matrix and of single steps are not one Gaussian mechanism if who takes part is drawn.
    """
    is_covered = not mechanism.is_private or mechanism.noise.bands == 1
    if is_covered or not (mechanism.metrics or mechanism.clipping.side_noise_multipliers):
        return event
    return accounting.with_side_queries(event, mechanism.gradient_noise_multiplier, mechanism.side_precision)
