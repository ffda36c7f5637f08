"""The laws of `dpx.testing` refute parts that are unsound, and say what is wrong with them."""

# equinox puts fields in the place of abstract variables, which pyright takes for fields of the base
# pyright: reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false

# pyright: reportIncompatibleMethodOverride=false

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import dp_accounting as da
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import Phase, given, settings, strategies as st

import dpx
from conftest import ENVIRONMENT, loss, make_batch, make_model
from dpx import metrics, testing
from dpx.clipping import AbstractOneGroupClipping
from dpx.testing._noise import signed_patterns
from dpx.testing._statistics import at_least, at_most, log_evidence

few = settings(max_examples=10, deadline=None, phases=[Phase.explicit, Phase.generate])


# --- clipping -----------------------------------------------------------------------------------------------------------


class Unsound(AbstractOneGroupClipping):
    """Flat clipping to norm 0.3, with something wrong in its factors or its state."""

    wrong: Callable[[Any, Any, Any], Any] = eqx.field(static=True)
    state_of: Callable[[Any], Any] = eqx.field(static=True, default=lambda params: ())
    order: int = eqx.field(static=True, default=2)

    @property
    def sensitivity(self):
        return jnp.float32(0.3)

    def init(self, params):
        return self.state_of(params)

    def factors(self, norms, state):
        right = jnp.minimum(1.0, 0.3 / jnp.where(norms > 0, norms, 1.0))
        return self.wrong(norms, right, state)


class Plain(AbstractOneGroupClipping):
    """The same, and nothing is wrong."""

    order: int = eqx.field(static=True, default=2)

    @property
    def sensitivity(self):
        return jnp.float32(0.3)

    def factors(self, norms, state):
        return jnp.minimum(1.0, 0.3 / jnp.where(norms > 0, norms, 1.0))


def in_params_dtype(params):
    # 0.3 rounds up in bfloat16
    return jnp.asarray(0.3, jax.tree.leaves(params)[0].dtype).astype(jnp.float32)


class Filling(dpx.clipping.AbstractSlackClipping):
    """Flat clipping; `fill` makes slack of the share of the clip norm that a gradient leaves."""

    fill: Any = eqx.field(static=True)
    order: int = eqx.field(static=True, default=2)
    slack_size = 1
    sensitivity = property(lambda self: jnp.float32(0.3))

    def init(self, params):
        return ()

    def labels(self, params):
        return (0,) * len(jax.tree.leaves(params))

    def factors(self, norms, state):
        return 0.3 / jnp.maximum(norms, 0.3)

    def rescale(self, state):
        return None

    def slack(self, norms, state):
        return 0.3 * self.fill(1 - jnp.minimum(norms / 0.3, 1))[:, None]

    def learn(self, state, released, expected_batch_size):
        return state


def test_slack_that_fits_passes():
    testing.check_clipping(Filling(jnp.sqrt))


@pytest.mark.parametrize(
    ("fill", "order"),
    [
        (lambda u: 1.001 * jnp.sqrt(u), 2),  # too long for no gradient
        (lambda u: u**0.25, 2),  # too long in the middle alone
        (jnp.ones_like, 2),
        (jnp.sqrt, 1),  # which fits in the l2 norm
    ],
    ids=["a-tenth-of-a-percent", "middle", "everybody", "l1"],
)
def test_slack_that_is_longer_than_what_is_left_is_refuted(fill, order):
    with pytest.raises(AssertionError, match="breaks the law: .*its slack included"):
        testing.check_clipping(Filling(fill, order))


def test_a_sound_clipping_of_ones_own_passes():
    testing.check_clipping(Plain())


@pytest.mark.parametrize(
    ("clipping", "match"),
    [
        (
            lambda: Unsound(lambda n, right, s: jnp.where(n > 1e12, 1.0, right)),
            "at most the sensitivity.*e\\+1[0-9] times the sens",
        ),
        (lambda: Unsound(lambda n, right, s: right * n / n), "factors \\[nan\\] for norms \\[0"),
        (
            lambda: Unsound(lambda n, right, s: right.astype(jnp.bfloat16).astype(jnp.float32)),
            "at most the sensitivity",
        ),
        (
            lambda: Unsound(lambda n, right, s: jnp.minimum(1.0, s / jnp.where(n > 0, n, 1.0)), in_params_dtype),
            "at most the sensitivity.*bfloat16",
        ),
        (lambda: Unsound(lambda n, right, s: jnp.minimum(right, 0.3 / jnp.max(n))), "depend on other examples"),
        (lambda: Unsound(lambda n, right, s: 0.5 * right), "some example contributes at least 0.999"),
        (dpx.NoClipping, "sensitivity is a positive number"),
    ],
    ids=["one-above-1e12", "nan-at-zero", "rounds-factors", "wrong-in-bfloat16", "looks-at-others", "loose", "none"],
)
def test_unsound_clippings_are_refuted(clipping, match):
    with pytest.raises(AssertionError, match=f"breaks the law: .*{match}"):
        testing.check_clipping(clipping())


def test_counts_that_are_noisier_on_paper_are_refuted():
    # what is spent is that of count multiplier 2, and what is stated ten times as much
    class Cheap(dpx.AbstractClipping):
        inner: Any
        order: int = eqx.field(static=True, default=2)
        sensitivity = property(lambda self: self.inner.sensitivity)
        side_noise_multipliers = property(lambda self: tuple(10 * s for s in self.inner.side_noise_multipliers))

        def init(self, params):
            return self.inner.init(params)

        def labels(self, params):
            return self.inner.labels(params)

        def factors(self, norms, state):
            return self.inner.factors(norms, state)

        def rescale(self, state):
            return self.inner.rescale(state)

        def update(self, state, norms, mask, expected_batch_size, key):
            return self.inner.update(state, norms, mask, expected_batch_size, key)

    with pytest.raises(AssertionError, match="paid for by `side_noise_multipliers`"):
        testing.check_clipping(Cheap(dpx.AdaptiveClipping(0.5, count_noise_multiplier=2.0)))


# --- noise --------------------------------------------------------------------------------------------------------------


class Noise(dpx.AbstractNoise):
    """Gaussian noise in terms of what may be wrong with it."""

    noise_multiplier: Any
    claim: float = eqx.field(static=True, default=1.0)
    fold: Callable[[Any, Any], Any] = eqx.field(static=True, default=jr.fold_in)
    alike: bool = eqx.field(static=True, default=False)
    stated: float = eqx.field(static=True, default=1.0)
    order: ClassVar[int] = 2
    bands = property(lambda self: 1)
    description = property(lambda self: "noise")
    horizon = property(lambda self: None)

    def event(self, noise_multiplier):
        return da.GaussianDpEvent(noise_multiplier * self.claim)

    def scale(self, sensitivity, steps, participation):
        return self.noise_multiplier * sensitivity

    def variance(self, scale, steps, step):
        return self.stated * scale**2

    def error(self, steps, participation, workload, kind):
        return dpx.Identity().error(steps, workload, kind)

    def init(self, struct):
        return ()

    def step(self, total, scale, key, step, buffers):
        key = self.fold(key, step)
        leaves, treedef = jax.tree.flatten(total)
        keys = [key] * len(leaves) if self.alike else jr.split(key, len(leaves))
        return treedef.unflatten([x + scale * jr.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]), ()


def test_sound_noise_of_ones_own_passes():
    testing.check_noise(Noise(jnp.float32(1.5)), steps=3)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"claim": 10.0}, "`event` costs no less than what `step` does.*GaussianDpEvent\\(noise_multiplier=15.0\\)"),
        ({"claim": 1.02}, "`event` costs no less than what `step` does"),
        ({"fold": lambda key, step: key}, "no noise is used twice.*step 0.*step 1.*same noise in 100%"),
        ({"alike": True}, "no noise is used twice.*leaf 'a'.*leaf 'b'.*same noise in 100%"),
        ({"fold": lambda key, step: jr.key(0)}, "no noise is used twice"),
        ({"stated": 1.1}, "`variance` is the variance of what `step` adds"),
    ],
    ids=["ten-times", "two-per-cent", "one-key", "same-in-leaves", "ignores-key", "variance"],
)
def test_unsound_noises_are_refuted(wrong, match):
    with pytest.raises(AssertionError, match=match):
        testing.check_noise(Noise(jnp.float32(1.5), **wrong), steps=3)


def test_a_scale_that_forgets_the_strategy_is_refuted():
    class Forgets(dpx.AbstractNoise):
        inner: dpx.CorrelatedGaussian
        noise_multiplier: Any
        order: ClassVar[int] = 2
        bands = property(lambda self: self.inner.bands)
        description = property(lambda self: "noise")
        horizon = property(lambda self: None)

        def event(self, noise_multiplier):
            return da.GaussianDpEvent(noise_multiplier)

        def scale(self, sensitivity, steps, participation):
            return self.noise_multiplier * sensitivity  # and not the strategy's

        def variance(self, scale, steps, step):
            return self.inner.variance(scale, steps, step)

        def error(self, steps, participation, workload, kind):
            return self.inner.error(steps, participation, workload, kind)

        def init(self, struct):
            return self.inner.init(struct)

        def step(self, total, scale, key, step, buffers):
            return self.inner.step(total, scale, key, step, buffers)

    inner = dpx.CorrelatedGaussian(dpx.BandedToeplitz([1.0, 0.5]), 1.0)
    with pytest.raises(AssertionError, match="participations .* move the noisy sums by"):
        testing.check_noise(Forgets(inner, jnp.float32(2.0)), steps=4, samples=2**14)


# --- strategies ---------------------------------------------------------------------------------------------------------


class Strategy(dpx.AbstractStrategy):
    """A strategy, by default banded, with something wrong."""

    inner: Any
    factor: float = eqx.field(static=True, default=1.0)
    bands: int | None = eqx.field(static=True, default=3)
    late: float = eqx.field(static=True, default=0.0)
    steps: int | None = eqx.field(static=True, default=None)
    replay_depth: int | None = eqx.field(static=True, default=None)
    claim: Callable[..., float] | None = eqx.field(static=True, default=None)

    def materialize(self, steps):
        return self.inner.materialize(steps)

    def init(self, struct):
        return self.inner.init(struct)

    def step(self, z, buffers):
        x, buffers = self.inner.step(z, buffers)
        return jax.tree.map(lambda a, b: a + jnp.asarray(self.late, a.dtype) * b, x, z), buffers

    def replay(self, regenerate, step):
        raise ValueError

    def sensitivity(self, steps, min_separation=1, max_participations=1):
        claim = self.inner.sensitivity if self.claim is None else self.claim
        return self.factor * claim(steps, min_separation, max_participations)

    def inverse_row_power(self, steps):
        return self.inner.inverse_row_power(steps)

    def error(self, steps, workload="prefix", kind="mean", *, min_separation=1, max_participations=1):
        options: Any = {"min_separation": min_separation, "max_participations": max_participations}
        return self.factor * self.inner.error(steps, workload, kind, **options)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"factor": 0.9}, "`sensitivity` is at least what some gradients.*min_separation=1, max_participations=1"),
        ({"factor": 1.1}, "`sensitivity` is no more than gradients reach"),
        ({"bands": 2}, "`bands` is the number of bands.*2 declared"),
        ({"late": 1e-3}, "is the inverse of `materialize`"),
    ],
)
def test_unsound_strategies_are_refuted(wrong, match):
    strategy = Strategy(dpx.BandedToeplitz([1.0, 0.5, 0.25]))
    testing.check_strategy(strategy, 6)
    with pytest.raises(AssertionError, match=match):
        testing.check_strategy(dataclasses.replace(strategy, **wrong), 6)


def test_gradients_of_other_directions_are_looked_at():
    # three columns at 120 degrees: equal and opposite gradients reach 2, and others 3 / sqrt(2)
    gram = 1.51 * np.eye(3) - 0.5
    matrix = np.linalg.cholesky(gram[::-1, ::-1])[::-1, ::-1].T

    def of_signs(steps, min_separation=1, max_participations=1):
        rows = signed_patterns(steps, min_separation, max_participations)
        return float(np.linalg.norm(rows @ matrix.T, axis=1).max())

    strategy = Strategy(dpx.DenseStrategy(matrix), bands=None, steps=3, claim=of_signs)
    with pytest.raises(AssertionError, match="gradients of different directions reach"):
        testing.check_strategy(strategy, 3)


# --- samplers -----------------------------------------------------------------------------------------------------------


class Sampler(dpx.AbstractSampler):
    """Poisson sampling with something wrong."""

    inner: dpx.PoissonSampler
    claim: float = eqx.field(static=True, default=1.0)
    draw: Callable[[Any, int, int], Any] = eqx.field(
        static=True, default=lambda inner, seed, step: inner.indices(seed, step)
    )
    most: int | None = eqx.field(static=True, default=None)
    unit: ClassVar[str] = "example"
    num_examples = property(lambda self: self.inner.num_examples)
    batch_size = property(lambda self: self.inner.batch_size)
    steps = property(lambda self: self.inner.steps)
    num_rows = property(lambda self: self.inner.num_rows)
    participation_per_event = property(lambda self: self.inner.participation_per_event)
    adjacencies = property(lambda self: self.inner.adjacencies)
    physical_batch_size = property(lambda self: self.inner.physical_batch_size)
    assumption = property(lambda self: self.inner.assumption)

    @property
    def participation(self):
        return dpx.Participation(1, self.most or self.inner.steps)

    def indices(self, seed, step):
        return self.draw(self.inner, seed, step)

    def event(self, mechanism, bands, steps, strategy=None):
        if bands != 1:
            raise ValueError("independent noise only")
        rate = self.inner.sampling_probability * self.claim
        return da.SelfComposedDpEvent(da.PoissonSampledDpEvent(rate, mechanism), steps)


CALLS = []


def impure(inner, seed, step):
    CALLS.append(step)
    return inner.indices(seed + len(CALLS), step)


def repeats(inner, seed, step):
    rows = inner.indices(seed, step)
    return np.sort(np.append(rows[:-1], rows[:1])) if len(rows) > 1 else rows


SMALL = dpx.PoissonSampler(50, 10, 100)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"claim": 0.01}, "`event` costs no less than what `indices` does.*delta is about 0.[0-9]+ at epsilon"),
        ({"draw": impure}, "batch t is a pure function of \\(seed, t\\).*when it is asked for again"),
        ({"draw": repeats}, "nobody is twice in a batch"),
        ({"draw": lambda inner, seed, step: inner.indices(seed, 0)}, "other seeds and steps give other batches"),
        ({"draw": lambda inner, seed, step: inner.indices(seed, step)[::-1]}, "sorted"),
        ({"draw": lambda inner, seed, step: inner.indices(seed, step)[::2]}, "mean size of a batch is `batch_size`"),
        ({"most": 3}, "nobody takes part more often than.*and 3 is the most"),
    ],
    ids=["rate-over-100", "impure", "repeated", "every-step-alike", "unsorted", "half-batches", "too-often"],
)
def test_unsound_samplers_are_refuted(wrong, match):
    with pytest.raises(AssertionError, match=match):
        testing.check_sampler(Sampler(SMALL, **wrong), seeds=60, window=2)


@pytest.mark.slow
def test_a_rate_that_is_two_per_cent_too_small_is_refuted():
    sampler = Sampler(dpx.PoissonSampler(4000, 800, 100))
    testing.check_sampler(sampler, seeds=1500, window=2)
    with pytest.raises(AssertionError, match="`event` costs no less than what `indices` does"):
        testing.check_sampler(dataclasses.replace(sampler, claim=0.98), seeds=1500, window=2)


# --- metrics ------------------------------------------------------------------------------------------------------------


class Metric(metrics.AbstractMetric):
    """A noisy sum of clipped values, with a number and an order of things that may be wrong."""

    noise_multiplier: Any
    values: Any = eqx.field(static=True, default=None)
    cost: float = eqx.field(static=True, default=1.0)
    forgets: bool = eqx.field(static=True, default=False)
    bound: float = eqx.field(static=True, default=1.0)

    def init(self):
        return jnp.zeros(())

    def measure(self, state, values, keep, expected_size, key):
        return self.answer(values, keep, expected_size, key)

    def value(self, state):
        return state

    def answer(self, values, keep, expected_size, key):
        units = jnp.clip(values, -self.bound, self.bound)
        total = jnp.sum(units if self.forgets else jnp.where(keep, units, 0.0))
        return total + self.noise_multiplier / self.cost * jr.normal(key)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"cost": 1.1}, "costs no more than one Gaussian query"),
        ({"cost": 10.0}, "costs no more than one Gaussian query"),
        ({"bound": 2.0}, "example of value .* is there as well as a Gaussian query"),
        ({"forgets": True}, "a masked example changes nothing"),
        ({"bound": np.inf}, "is finite for all values|costs no more"),
    ],
)
def test_unsound_metrics_are_refuted(wrong, match):
    with pytest.raises(AssertionError, match=match):
        testing.check_metric(Metric(jnp.float32(2.0), **wrong))


def test_a_sound_metric_of_ones_own_passes():
    testing.check_metric(Metric(jnp.float32(2.0)))


# --- gradient methods, losses, plans --------------------------------------------------------------------------------------


class Method(dpx.AbstractGradientMethod):
    """The vectorised method, with something wrong."""

    forgets: bool = False
    double: bool = False
    inner: dpx.Vectorized = dpx.Vectorized()

    def clipped_sum(self, loss, params, examples, mask, labels, order, factors, quantise=None):
        if self.forgets:
            mask = jnp.ones_like(mask)
        if self.double:
            factors = (lambda factors: lambda norms: 2 * factors(norms))(factors)
        return self.inner.clipped_sum(loss, params, examples, mask, labels, order, factors, quantise)

    def explain(self, loss, params, examples):
        return self.inner.explain(loss, params, examples)


@pytest.mark.parametrize(
    ("method", "match"),
    [
        (Method(forgets=True), "not masked.*mask \\[1, 0, 1"),
        (Method(double=True), "the clipped sum is that of a loop over examples"),
    ],
    ids=["forgets-the-mask", "twice"],
)
def test_unsound_gradient_methods_are_refuted(method, match):
    with pytest.raises(AssertionError, match=match):
        testing.check_gradient_method(method, kinds=("list",))


def test_losses_are_checked_on_ones_own_model():
    sound = dpx.PrivateGradient(loss, dpx.FlatClipping(0.5), dpx.IndependentGaussian(1.0))
    testing.check_loss(sound, make_model(), make_batch())
    with pytest.raises(AssertionError, match="at most the sensitivity"):
        testing.check_loss(dataclasses.replace(sound, method=Method(double=True)), make_model(), make_batch())
    with pytest.raises(AssertionError, match="masked examples contribute nothing|at most the sensitivity"):
        testing.check_loss(dataclasses.replace(sound, method=Method(forgets=True)), make_model(), make_batch())
    keyed = lambda model, x, y, *, key: loss(model, x + jr.normal(key, x.shape), y)
    testing.check_loss(dataclasses.replace(sound, loss=keyed), make_model(), make_batch())


def test_plans_are_checked():
    plan = dpx.dp_sgd(num_examples=1000, batch_size=10, steps=50, noise_multiplier=1.0)
    testing.check_plan(plan)

    class Growing(dpx.AbstractSampler):
        """Whose event is cheaper the longer the run is."""

        inner: Any
        unit: ClassVar[str] = "example"
        num_examples = property(lambda self: 1000)
        batch_size = property(lambda self: 10)
        steps = property(lambda self: 50)
        num_rows = property(lambda self: 1000)
        participation = property(lambda self: self.inner.participation)
        participation_per_event = property(lambda self: self.inner.participation_per_event)
        adjacencies = property(lambda self: self.inner.adjacencies)
        physical_batch_size = property(lambda self: self.inner.physical_batch_size)
        assumption = property(lambda self: "whatever")

        def indices(self, seed, step):
            return self.inner.indices(seed, step)

        def event(self, mechanism, bands, steps, strategy=None):
            return self.inner.event(mechanism, bands, 51 - steps)

    with pytest.raises(AssertionError, match="a longer run costs no less|a prefix costs no more"):
        testing.check_plan(dataclasses.replace(plan, sampler=Growing(plan.sampler)))


# --- statistics and inputs ------------------------------------------------------------------------------------------------


def test_bounds_hold_as_often_as_they_say():
    rng = np.random.default_rng(0)
    hits = rng.binomial(100, 0.3, 4000)
    assert np.mean([at_least(h, 100, 0.05) > 0.3 for h in hits.tolist()]) < 0.05 + 5 * 0.0035
    assert np.mean([at_most(h, 100, 0.05) < 0.3 for h in hits.tolist()]) < 0.05 + 5 * 0.0035
    assert at_least(0, 10, 0.1) == 0 and at_most(10, 10, 0.1) == 1
    # a bet against the truth is won at most one time in twenty, and one against 2 % less is won
    true = [log_evidence(rng.beta(40, 160, 300), 0.2) > np.log(20) for _ in range(400)]
    assert np.mean(true) < 0.05 + 5 * 0.011
    assert log_evidence(np.full(1000, 0.2), 0.196) > np.log(1e6) > log_evidence(np.full(1000, 0.2), 0.2)
    assert log_evidence(np.array([0.1]), 0.0) == np.inf and log_evidence(np.zeros(3), 0.0) == 0


@few
@given(st.data())
def test_drawn_inputs_fit_their_struct(data):
    dtype = data.draw(st.sampled_from(["float16", "bfloat16", "float32", "float64"]))
    number = data.draw(testing.hostile_floats(dtype))
    assert np.isnan(number) or float(np.asarray(number).astype(jnp.dtype(dtype)).astype(np.float64)) == number
    struct = {"a": jax.ShapeDtypeStruct((2, 3), jnp.bfloat16), "b": jax.ShapeDtypeStruct((), jnp.float32)}
    tree = data.draw(testing.gradients(struct))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), tree) == jax.tree.map(lambda x: (x.shape, x.dtype), struct)
    mask = data.draw(testing.masks(5))
    assert mask.shape == (5,) and mask.dtype == bool
    model, own = data.draw(testing.models())
    batch = data.draw(testing.batches(own, 3))
    assert 1 <= len(batch[0]) <= 3 and all(
        x.shape[1:] == s.shape and x.dtype == s.dtype for x, s in zip(batch, own.example, strict=True)
    )
    assert own(model, *(x[0] for x in batch)).shape == ()


@settings(few, max_examples=4)  # each is accounted for a dozen times
@given(plan=testing.plans())
def test_drawn_plans_are_consistent(plan):
    testing.check_plan(plan)


def test_nothing_but_the_library_is_imported_with_it():
    code = "import sys, dpx, dpx.testing; assert not {'hypothesis', 'pytest', 'scipy.stats', 'dp_accounting'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, check=True)


@pytest.mark.parametrize("false_alarm", [0.0, 1.0, -1.0])
def test_false_alarms_are_probabilities(false_alarm):
    with pytest.raises(ValueError, match=r"check_noise\(false_alarm=\.\.\.\)"):
        testing.check_noise(dpx.IndependentGaussian(1.0), false_alarm=false_alarm)


@pytest.mark.parametrize(
    "name", ["clipping", "noise", "strategy", "sampler", "metric", "gradient_method", "plan", "loss"]
)
def test_what_is_no_part_is_refused_by_name(name):
    check = getattr(testing, f"check_{name}")
    others = {"strategy": (4,), "loss": (None, ())}.get(name, ())
    for wrong in (3, "flat", None, dpx.PoissonSampler if name == "sampler" else dpx.FlatClipping):
        with pytest.raises(ValueError, match=rf"`check_{name}\(\w+=\.\.\.\)` must be"):
            check.__wrapped__(wrong, *others) if hasattr(check, "__wrapped__") else check(wrong, *others)
