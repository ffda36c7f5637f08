"""What is known of each event: the registry that all questions look up."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from .._checks import described
from ..events import parts
from .losses._distribution import LossDistribution
from .losses._foreign import their_divergences, their_loss
from .losses._pair import NOTHING, Attacks

if TYPE_CHECKING:
    from dp_accounting import DpEvent

_Loss = TypeVar("_Loss", bound=Callable[..., LossDistribution])
_MISSING = 1e-9  # of the mass that somebody's rule may have lost to rounding

MSG_NO_FORMULA = (
    "Rényi accounting does not know {event}: its divergences have a formula in one direction only, and privacy losses are computed to within "
    "less than Rényi accounting would give away. Use `accountant='pld'`."
)
_MSG_PRESENCE = (
    "{name} can be accounted for only where one unit is added, removed or emptied: the pair of distributions that dominates it is known for "
    "`adjacency='add_or_remove_one'` and `'replace_special'`, not for {adjacency!r}."
)
_MSG_MISSING = (
    "Nobody knows what `{name}` costs: it has no loss rule. Give it one, next to the class: `@dpx.accounting.loss_rule({name})` above a function "
    "from an event, an adjacency and the width of a grid to its privacy loss."
)
_MSG_SIDE_QUERIES = (
    "Nobody can account for adaptive clipping or metrics next to correlated noise under `{name}`: its loss rule has no `with_side_queries`. Use "
    "independent noise, or a clip norm that is fixed and no metrics."
)


_MSG_NOT_OWN = (
    "`loss_rule({name})`: `{name}` is or derives from `{base}`, which is taken apart or accounted for as what it is wherever it stands, so that this "
    "rule would not always be asked. Derive the event from `dp_accounting.DpEvent` alone."
)
_MSG_NO_LOSS = "The loss rule of `{name}` gives no privacy loss: {what}. Nothing can be said about what rests on it."


class LossRule(NamedTuple):
    """What is known of an event; see `loss_rule`."""

    loss: Callable[..., LossDistribution]
    scale: Callable[[Any, str], tuple[float, float]] | None = None
    pure: Callable[[Any, str], float] | None = None
    guess: Callable[[Any], Any] | None = None
    renyi: Callable[[Any, str, np.ndarray], np.ndarray] | None = None
    attacks: Callable[[Any, str], Attacks] | None = None
    attained: Callable[[Any, int, str, float], float | None] | None = None
    wraps: Callable[[Any], Any] | None = None
    with_side_queries: Callable[[Any, float, float], Any] | None = None
    only_presence: str | None = None
    is_simulated: bool = False


def unchanged(event: Any, noise_multiplier: float, side_precision: float) -> Any:
    """`with_side_queries` of an event whose noise multiplier counts further queries already."""
    del noise_multiplier, side_precision
    return event


_RULES: dict[tuple[type, type | None], LossRule] = {}
_FOREIGN = LossRule(their_loss, renyi=their_divergences, with_side_queries=unchanged)


def loss_rule(
    event_class: type["DpEvent"],
    *,
    of: type["DpEvent"] | None = None,
    scale: Callable[[Any, str], tuple[float, float]] | None = None,
    pure: Callable[[Any, str], float] | None = None,
    guess: Callable[[Any], Any] | None = None,
    renyi: Callable[[Any, str, np.ndarray], np.ndarray] | None = None,
    attacks: Callable[[Any, str], Attacks] | None = None,
    attained: Callable[[Any, int, str, float], float | None] | None = None,
    wraps: Callable[[Any], Any] | None = None,
    with_side_queries: Callable[[Any, float, float], Any] | None = None,
    only_presence: str | None = None,
    is_simulated: bool = False,
) -> Callable[[_Loss], _Loss]:
    r"""Says what an event costs, so that a sampler with an event of its own can be accounted for: decorates its privacy loss.

    ```python
    @attr.frozen
    class TwiceSampledDpEvent(DpEvent):
        noise_multiplier: float
        sampling_probability: float


    @dpx.accounting.loss_rule(TwiceSampledDpEvent)
    def loss(event, adjacency, interval):
        one = PoissonSampledDpEvent(event.sampling_probability, GaussianDpEvent(event.noise_multiplier))
        return dpx.accounting.loss_distribution(SelfComposedDpEvent(one, 2), adjacency, interval=interval)
    ```

    The decorated function is `loss(event, adjacency, interval)`. It gives a `LossDistribution` on multiples of `interval` whose
    hockey-stick divergences are, in each direction, at least those between ANY two neighbours, at every real order; it raises `ValueError` where
    none is known, as under an adjacency. Composition with itself and with all other events follows, since pairs that dominate compose,
    adaptively. Nobody checks the bound: whatever rests on the event is as right as its rule.

    An event class is an `attr` class that derives from `dp_accounting.DpEvent`, whose fields are annotated as numbers of at least 0, events, or
    tuples of such. It may have `check()`, which raises `ValueError` if there is no such mechanism, and `reduced()`, which gives an event that
    costs the same without what is degenerate: no noise, nobody sampled.

    **Arguments:**

    - `event_class`: whose rule this is, subclasses included.
    - `of`: only where the field `event` is of this class: the rule of a sampled mechanism, by what is sampled.
    - `scale`: `(event, adjacency)` to standard deviation and extent of the loss, of which the grid is made; by default the loss is measured on
        finer and finer grids.
    - `pure`: `(event, adjacency)` to the $\varepsilon$ of pure differential privacy; by default there is none.
    - `guess`: `event` to one that costs about as much and is quick, by which answers are looked for; by default itself.
    - `renyi`: `(event, adjacency, orders)` to upper bounds on the Rényi divergences in both directions; by default unknown.
    - `attacks`: `(event, adjacency)` to pairs that some data sets reach, for lower bounds; by default none.
    - `attained`: `(event, count, adjacency, delta)` to a lower bound on $\varepsilon$ where nothing else is composed, or None.
    - `wraps`: `event` to the one whose losses it has, but for what a coupling adds.
    - `with_side_queries`: `(event, noise_multiplier, side_precision)` to the event with the gradient's own noise multiplier, and further Gaussian
        queries of every batch, whose squared inverse noise multipliers sum to `side_precision`: asked for where noise is correlated. By default
        such queries are refused.
    - `only_presence`: the mechanism's name, if the rule holds only where a unit is added, removed or emptied, not replaced: then it is not asked.
    - `is_simulated`: the loss takes how many samples to draw as a fourth argument; then there must be a `guess`.

    **Returns:** a decorator, which leaves the function as it is.

    **Raises:** `ValueError` if the event has a rule, is no event, or derives from one of dp_accounting's or dpx's: those are taken apart, and a rule
    of a subclass would not be asked. What it costs to sample an event of yours may have a rule: `PoissonSampledDpEvent`, `of` your class.
    """
    from dp_accounting import DpEvent

    for call, kind in (("loss_rule(event_class=...)", event_class), ("loss_rule(of=...)", of)):
        if kind is not None and not (isinstance(kind, type) and issubclass(kind, DpEvent)):
            raise ValueError(
                f"`{call}` must be a class that derives from `dp_accounting.DpEvent`; got {described(kind)}."
            )
    rule = (scale, pure, guess, renyi, attacks, attained, wraps, with_side_queries, only_presence, is_simulated)
    if is_simulated and guess is None:
        raise ValueError(f"`loss_rule({event_class.__name__}, is_simulated=True)` needs a `guess`.")

    def register(loss: _Loss) -> _Loss:
        if not _is_ours(loss):
            _load()  # so that nobody takes the place of one of ours
        if (event_class, of) in _RULES:
            raise ValueError(f"`{event_class.__name__}` has a loss rule, which cannot be replaced.")
        if not _is_ours(loss):
            _check_own(event_class, of)
        _RULES[event_class, of] = LossRule(loss, *rule)
        return loss

    return register


def rule_of(event: Any) -> LossRule:
    """What is known of an event that composes no others; raises `ValueError` if it has no rule."""
    _load()
    ancestors = type(event).__mro__[:-1]
    kinds = (*type(getattr(event, "event", None)).__mro__[:-1], None)
    for key in ((cls, kind) for cls in ancestors for kind in kinds):
        if (rule := _RULES.get(key)) is not None:
            return rule
    if any(cls.__module__.startswith("dp_accounting.") and cls.__name__ != "DpEvent" for cls in ancestors):
        return _FOREIGN
    raise ValueError(_MSG_MISSING.format(name=type(event).__name__))


def loss_of(event: Any, adjacency: str, interval: float, samples: int | None) -> LossDistribution:
    """The privacy loss of an event that composes no others, by its rule."""
    rule = rule_of(event)
    if not _holds(rule, adjacency):
        raise ValueError(_MSG_PRESENCE.format(name=rule.only_presence, adjacency=adjacency))
    options = (samples,) if rule.is_simulated or rule.wraps is not None else ()
    found = rule.loss(event, adjacency, interval, *options)
    if not _is_ours(rule.loss):
        _check_loss(type(event).__name__, found)
    return found


def pure_of(event: Any, adjacency: str) -> float:
    """The epsilon of pure differential privacy of an event that composes no others, by its rule; infinite where it has none."""
    rule = rule_of(event)
    if rule.pure is None or not _holds(rule, adjacency):
        return math.inf
    found = float(rule.pure(event, adjacency))
    if not found >= 0:
        raise ValueError(_MSG_NO_LOSS.format(name=type(event).__name__, what=f"its `pure` epsilon is {found:g}"))
    return found


def renyi_of(event: Any, adjacency: str, orders: np.ndarray) -> np.ndarray:
    """The Rényi divergences of an event that composes no others, by its rule; infinite where that gives no number of at least 0."""
    rule = rule_of(event)
    if rule.renyi is None:
        raise ValueError(MSG_NO_FORMULA.format(event=type(event).__name__))
    if not _holds(rule, adjacency):
        raise ValueError(_MSG_PRESENCE.format(name=rule.only_presence, adjacency=adjacency))
    found = np.asarray(rule.renyi(event, adjacency, orders), np.float64)
    return np.where(found >= 0, found, np.inf)


def _is_ours(loss: Callable[..., Any]) -> bool:
    return loss.__module__.startswith(f"{__package__}.losses.")


def _check_own(event_class: type, of: type | None) -> None:
    """Raises unless a rule of somebody else's is of an event class of their own, or of sampling one."""
    from dp_accounting import PoissonSampledDpEvent

    theirs = of if event_class is PoissonSampledDpEvent and of is not None else event_class
    for cls in theirs.__mro__:
        if cls.__module__.split(".")[0] in ("dp_accounting", "dpx") and (cls.__name__ != "DpEvent" or cls is theirs):
            raise ValueError(_MSG_NOT_OWN.format(name=theirs.__name__, base=cls.__name__))


def _check_loss(name: str, found: Any) -> None:
    """Raises for numbers that are no masses of probability: NaN would pass for perfect privacy, and what is missing for none at all."""
    if not isinstance(found, LossDistribution):
        raise ValueError(_MSG_NO_LOSS.format(name=name, what=f"got {described(found)} and no `LossDistribution`"))
    for pmf in (found.remove, found.add):
        total = float(np.sum(pmf.mass)) + pmf.infinity
        # a sum is NaN or infinite where a mass is
        if not (total >= 1 - _MISSING and total < np.inf and np.min(pmf.mass, initial=pmf.infinity) >= 0):
            raise ValueError(
                _MSG_NO_LOSS.format(name=name, what=f"its masses, of at least 0, must sum to 1; got {total:g}")
            )
    if not found.coupling >= 0:
        raise ValueError(_MSG_NO_LOSS.format(name=name, what=f"its coupling is {found.coupling:g}"))
    if found.other is not None:
        _check_loss(name, found.other)


def attacks_of(event: Any, adjacency: str) -> Attacks:
    """The pairs that some data sets reach, by the rule of the event; none where the rule does not hold."""
    rule = rule_of(event)
    return NOTHING if rule.attacks is None or not _holds(rule, adjacency) else rule.attacks(event, adjacency)


def attained_by(event: Any, count: int, adjacency: str, delta: float) -> float | None:
    r"""A lower bound on $\varepsilon$ where nothing else is composed, if the rule of the event has one."""
    rule = rule_of(event)
    if rule.attained is None:
        return None
    return rule.attained(event, count, adjacency, delta) if _holds(rule, adjacency) else 0.0


def _holds(rule: LossRule, adjacency: str) -> bool:
    return rule.only_presence is None or adjacency != "replace_one"


def is_monte_carlo(event: Any) -> bool:
    """Whether `event`, or a part of it, is accounted for by simulation."""
    rules = ((part, rule_of(part)) for part, _ in parts(event))
    return any(
        rule.is_simulated or (rule.wraps is not None and is_monte_carlo(rule.wraps(part))) for part, rule in rules
    )


def with_side_queries(event: Any, noise_multiplier: float, side_precision: float) -> Any:
    """The event where simulation must know the gradient's own noise multiplier and what else a participation is seen in; raises where nobody
    knows how to account for that."""
    import attr
    import dp_accounting as da

    match event:
        case da.NoOpDpEvent():
            return event
        case da.SelfComposedDpEvent():
            return attr.evolve(event, event=with_side_queries(event.event, noise_multiplier, side_precision))
        case da.ComposedDpEvent():
            return attr.evolve(
                event, events=[with_side_queries(e, noise_multiplier, side_precision) for e in event.events]
            )
    change = rule_of(event).with_side_queries
    if change is None:
        raise ValueError(_MSG_SIDE_QUERIES.format(name=type(event).__name__))
    return change(event, noise_multiplier, side_precision)


def _load() -> None:
    from .losses import _all  # noqa: F401  # imports dp_accounting
