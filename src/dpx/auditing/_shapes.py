"""Which mechanisms are Gaussian ones."""

from ..plan import PrivacyPlan
from ..sampling import ShuffleSampler


def why_not_gaussian(plan: PrivacyPlan) -> str:
    r"""Why a plan's run is not one Gaussian mechanism, for which $\mu$ says everything; empty if it is."""
    import dp_accounting as da

    if not plan.mechanism.is_private:
        return "it has no clipping"
    event = plan.event
    while isinstance(event, da.SelfComposedDpEvent):
        event = event.event
    if isinstance(event, da.GaussianDpEvent):
        return ""
    if isinstance(event, da.ComposedDpEvent) and all(_is_gaussian(part) for part in event.events):
        return ""
    kind = type(plan.sampler).__name__ if not isinstance(plan.sampler, ShuffleSampler) else type(plan.noise).__name__
    return f"`{kind}`: its event is {type(event).__name__}"


def _is_gaussian(event: object) -> bool:
    import dp_accounting as da

    while isinstance(event, da.SelfComposedDpEvent):
        event = event.event
    return isinstance(event, da.GaussianDpEvent)
