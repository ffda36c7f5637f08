"""The interface of metrics: private numbers about single examples, with a budget of their own."""

import abc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from .._checks import as_array, described, instance, is_traced, positive_scalar, real_number, usable
from .._sensitive import Sensitive
from .._types import RealScalarLike
from ..random import check_key, fresh_key
from ._noisy_sum import LARGEST_MULTIPLIER, noisy_sum

if TYPE_CHECKING:
    from dp_accounting import DpEvent

Values = str | Callable[[Any], Any] | None

_MSG_NO_BUDGET = (
    "`metrics.{name}(noise_multiplier=None)` has no budget: what it says about the training data must be paid for. Give "
    "`noise_multiplier=...`, the ratio of its noise to what one example can change. Public evaluation data need no metric of "
    "`dpx.metrics`: compute the number itself."
)
_MSG_EXPECTED = (
    "`metrics.{name}.release(expected_size=...)` must be given: what is divided by has to be public, and how many examples there are is "
    "not, where one may be added or removed. Give a size that you would tell anybody."
)


class AbstractMetric(eqx.Module):
    r"""A number, or several, about the examples of a batch, made private.

    A metric reads one value of every example, bounds what it may contribute, adds up, and adds noise: at every step of a run that it
    is part of (`init`, `update`, `value`), or once (`release`).

    Everything that one step releases is at most as revealing as ONE Gaussian query of sensitivity 1 with noise of standard deviation
    `noise_multiplier`, when an example is added or removed; to replace an example is to remove one and add one, and counts twice. That
    number is all that accounting knows.

    Evaluation data that are public need none of this.
    """

    noise_multiplier: eqx.AbstractVar[Float[Array, ""]]
    """Of one Gaussian query of sensitivity 1 that covers all that is released at one step."""
    values: eqx.AbstractVar[Values]
    """Where a step's diagnostics have the value of each example."""
    takes_all: ClassVar[bool] = False
    """Whether values that are not finite are measured too. Elsewhere they are left out, and read zero."""

    @abc.abstractmethod
    def init(self) -> PyTree:
        """The state before the first step."""

    @abc.abstractmethod
    def measure(
        self,
        state: PyTree,
        values: Float[Array, " batch"],
        keep: Bool[Array, " batch"],
        expected_size: Float[Array, ""],
        key: Key[Array, ""],
    ) -> PyTree:
        """The state after a step whose examples have these values; those that are not kept contribute zero."""

    @abc.abstractmethod
    def value(self, state: PyTree) -> Float[Array, "..."]:
        """What the last step released. It is private: publish it at will."""

    @abc.abstractmethod
    def answer(
        self,
        values: Float[Array, " batch"],
        keep: Bool[Array, " batch"],
        expected_size: Float[Array, ""] | None,
        key: Key[Array, ""],
    ) -> Float[Array, "..."]:
        """One release on its own, at the whole of `noise_multiplier`."""

    @property
    def event(self) -> "DpEvent":
        """The DP event of one step without sampling, or of one `release`, for a ledger or an accountant."""
        from dp_accounting import GaussianDpEvent

        return GaussianDpEvent(float(self.noise_multiplier))

    def update(
        self,
        state: PyTree,
        diagnostics: Any,
        mask: Bool[Array, " batch"],
        expected_batch_size: Float[Array, ""],
        key: Key[Array, ""],
    ) -> PyTree:
        """The state after a private step.

        **Arguments:**

        - `diagnostics`: the step's, with a leading axis of examples.
        - `mask`: which examples are real.
        - `expected_batch_size`: a public number; never how many are real.
        - `key`: for the noise; used for nothing else.
        """
        values, is_known = _known(_read(self.values, diagnostics, mask), self.takes_all)
        return self.measure(state, values, is_known & mask, expected_batch_size, key)

    def release(
        self, values: Any, *, mask: Any = None, expected_size: RealScalarLike | None = None, key: Any = None
    ) -> Float[Array, "..."]:
        """One private release, outside any plan. It costs `event`; that is yours to add up.

        **Arguments:**

        - `values`: one number of each example, shape `(batch,)`; an array, or one in `Sensitive`.
        - `mask`: which examples are real, shape `(batch,)`; by default all.
        - `expected_size`: a PUBLIC number that stands for how many there are, where the metric divides by one.
        - `key`: for the noise; by default fresh entropy from the operating system. Never use one twice.

        **Raises:** `ValueError` if the values are not one real number an example, or a public size is needed and missing.
        """
        call = f"metrics.{type(self).__name__}.release"
        values = values.reveal() if isinstance(values, Sensitive) else values
        array = as_array(f"{call}(values=...)", values, "one real number an example, of shape (batch,)")
        if array.ndim != 1 or jnp.iscomplexobj(array):
            raise ValueError(
                f"`{call}(values=...)` must be one real number an example, of shape (batch,); got {array.dtype}{list(array.shape)}."
            )
        mask = jnp.ones(array.shape, bool) if mask is None else mask
        mask = as_array(f"{call}(mask=...)", mask, f"booleans of shape {array.shape}")
        if mask.shape != array.shape or mask.dtype != bool:
            raise ValueError(
                f"`{call}(mask=...)` must be booleans of shape {array.shape}; got {mask.dtype}{list(mask.shape)}."
            )
        if key is None:
            key = fresh_key()
        check_key(f"{call}(key=...)", key)
        size = None if expected_size is None else positive_scalar(f"{call}(expected_size=...)", expected_size)
        array, is_known = _known(array, self.takes_all)
        return self.answer(array, is_known & mask, size, key)


class Released(eqx.Module):
    """What a metric has released so far.

    **Arguments:**

    - `last`: what the last step released.
    - `steps`: number of steps.
    """

    last: Float[Array, "..."]
    steps: Int[Array, ""]


class AbstractQuery(AbstractMetric):
    """A metric that is one noisy sum of bounded contributions, and remembers nothing but what it released last (NaN before that)."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of what is released."""

    @abc.abstractmethod
    def contributions(self, values: Float[Array, " batch"]) -> Float[Array, "batch *shape"]:
        r"""What each example contributes, of $\ell_2$ norm at most 1."""

    @abc.abstractmethod
    def from_sum(self, total: Float[Array, "*shape"], expected_size: Float[Array, ""] | None) -> Float[Array, "*shape"]:
        """What is released, from the noisy sum of contributions."""

    def init(self) -> Released:
        # not NaN, which would make a state look broken
        return Released(jnp.zeros(self.shape), jnp.zeros((), jnp.int32))

    def measure(
        self,
        state: Released,
        values: Float[Array, " batch"],
        keep: Bool[Array, " batch"],
        expected_size: Float[Array, ""],
        key: Key[Array, ""],
    ) -> Released:
        return Released(self.answer(values, keep, expected_size, key), state.steps + 1)

    def value(self, state: Released) -> Float[Array, "..."]:
        return jnp.where(state.steps > 0, state.last, jnp.nan)

    def answer(
        self,
        values: Float[Array, " batch"],
        keep: Bool[Array, " batch"],
        expected_size: Float[Array, ""] | None,
        key: Key[Array, ""],
    ) -> Float[Array, "..."]:
        return self.from_sum(noisy_sum(self.contributions(values), keep, self.noise_multiplier, key), expected_size)


def check_multiplier(name: str, noise_multiplier: Any) -> Float[Array, ""]:
    """A metric's noise multiplier, rounded up to float32."""
    if noise_multiplier is None:
        raise ValueError(_MSG_NO_BUDGET.format(name=name))
    number = positive_scalar(f"metrics.{name}(noise_multiplier=...)", noise_multiplier)
    if is_traced(noise_multiplier):
        return usable(number, number <= LARGEST_MULTIPLIER)
    if float(np.asarray(noise_multiplier)) > LARGEST_MULTIPLIER:
        raise ValueError(
            f"`metrics.{name}(noise_multiplier=...)` must be at most {LARGEST_MULTIPLIER:g}, where nothing is left to be seen; got "
            f"{float(np.asarray(noise_multiplier)):g}."
        )
    return number


def check_values(name: str, values: Any) -> Values:
    """Where a metric finds its values: an attribute of the diagnostics, or a function of one example's."""
    is_name = isinstance(values, str) and values in ("losses", "norms")
    if values is None or is_name or (callable(values) and not isinstance(values, type)):
        return values
    raise ValueError(
        f'`metrics.{name}(values=...)` must be "losses", "norms" or a function of ONE example\'s diagnostics, such as '
        f"`lambda d: d.aux`; got {described(values)}."
    )


def check_range(name: str, low: Any, high: Any) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Two finite numbers as float32, the lower one first."""
    if is_traced(low) or is_traced(high):
        low, high = jnp.asarray(low, jnp.float32), jnp.asarray(high, jnp.float32)
        is_range = (low < high) & jnp.isfinite(high - low)
        return usable(low, is_range), usable(high, is_range)
    low = real_number(f"metrics.{name}(low=...)", low)
    high = real_number(f"metrics.{name}(high=...)", high)
    with np.errstate(over="ignore", invalid="ignore"):
        low, high = np.asarray(low).astype(np.float32), np.asarray(high).astype(np.float32)
        is_range = bool((low < high) & np.isfinite(high - low))
    if not is_range:
        raise ValueError(
            f"`metrics.{name}(low=..., high=...)` must be finite in float32, and `low` below `high`; got {float(low):g} and {float(high):g}. They "
            "must be chosen without looking at the data."
        )
    return jnp.asarray(low), jnp.asarray(high)


def check_expected(name: str, expected_size: Float[Array, ""] | None) -> Float[Array, ""]:
    """The public size, where a metric divides by one."""
    if expected_size is None:
        raise ValueError(_MSG_EXPECTED.format(name=name))
    return expected_size


def _read(values: Values, diagnostics: Any, mask: Bool[Array, " batch"]) -> Array:
    if values is None:
        return jnp.ones(mask.shape)
    if isinstance(values, str):
        array = getattr(diagnostics, values)
    else:
        # example by example: a function of the whole batch could let one example change the values of all
        array = jnp.asarray(jax.vmap(values)(diagnostics))
    if array.shape != mask.shape or jnp.iscomplexobj(array):
        raise ValueError(
            f"The metric's `values` must be one real number an example; got {array.dtype}{list(array.shape[1:])} for each. The function gets ONE "
            "example's diagnostics, without a batch axis, and gives a scalar."
        )
    return array


def _known(values: Array, takes_all: bool) -> tuple[Float[Array, " batch"], Bool[Array, " batch"]]:
    """The values as float32, and which can be measured; zero where not."""
    values = values.astype(jnp.float32)
    if takes_all:
        return values, jnp.ones(values.shape, bool)
    is_finite = jnp.isfinite(values)
    return jnp.where(is_finite, values, 0.0), is_finite


def check_metric(call: str, metric: Any) -> None:
    """Raises unless `metric` is one that has a budget."""
    instance(call, metric, AbstractMetric, 'dpx.metrics.Mean("losses", 0.0, 5.0, noise_multiplier=10.0)')
    if metric.noise_multiplier is None:
        raise ValueError(
            f"`{call}` has no budget: give `{type(metric).__name__}(..., noise_multiplier=...)`, such as ten times that of the gradient."
        )


def check_metrics(call: str, metrics: Any) -> dict[str, AbstractMetric]:
    """Metrics by name; none for None."""
    if metrics is None:
        return {}
    if not isinstance(metrics, dict) or not all(isinstance(name, str) for name in metrics):
        raise ValueError(
            f'`{call}` must be metrics by name, such as `{{"loss": dpx.metrics.Mean(...)}}`; got {described(metrics)}.'
        )
    for name, metric in metrics.items():
        check_metric(call.replace("=...", f"={{{name!r}: ...}}"), metric)
    return dict(metrics)
