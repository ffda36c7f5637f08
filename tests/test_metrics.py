"""Private metrics: contributions are bounded for all inputs, noise has the stated scale, quantiles are found."""

import math
from types import SimpleNamespace
from typing import Any

import dp_accounting as da
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats

import dpx
from dpx import metrics
from dpx.metrics._noisy_sum import exact_sum, noisy_sum

SIZE = 5
GRID = 2.0**-20

# a new query adds a line here: the metric, and its exact statistic by the definition, in units of the sensitivity
QUERIES: dict[str, metrics.AbstractQuery] = {
    "mean": metrics.Mean("losses", -1.0, 3.0, 2.0),
    "mean-narrow": metrics.Mean("losses", 1e-6, 1.1e-6, 2.0),
    "mean-wide": metrics.Mean("losses", -1e38, 1e38, 2.0),
    "sum": metrics.Sum("losses", -1.0, 3.0, 2.0),
    "sum-negative": metrics.Sum("losses", -7.0, -2.0, 2.0),
    "count": metrics.Count("losses", 2.0),
    "histogram": metrics.Histogram("losses", [-1.0, 0.0, 0.5, 4.0], 2.0),
}
DEFINITIONS: dict[str, Any] = {
    "mean": lambda v: (min(max(v, -1.0), 3.0) - 1.0) / 2,
    "sum": lambda v: min(max(v, -1.0), 3.0) / 3,
    "sum-negative": lambda v: min(max(v, -7.0), -2.0) / 7,
    "count": lambda v: float(v != 0),
    "histogram": lambda v: np.eye(3)[int(v >= 0.0) + int(v >= 0.5)],
}
each_query = pytest.mark.parametrize("name", QUERIES)
anything = st.lists(
    st.one_of(
        st.floats(width=32),
        st.floats(-5, 5, width=32),
        st.sampled_from([0.0, math.inf, -math.inf, math.nan, 3e38, -3e38]),
    ),
    min_size=SIZE,
    max_size=SIZE,
)


@eqx.filter_jit
def statistic(metric, values, mask):
    """The un-noised sum, as the two integers that it is added up in."""
    return exact_sum(metric.contributions(values), mask & jnp.isfinite(values))


def as_float64(pair):
    high, low = (np.asarray(x, np.float64) for x in pair)
    return (high * 1024 + low) * GRID


@each_query
@settings(max_examples=60, deadline=None)
@given(values=anything, mask=st.lists(st.booleans(), min_size=SIZE, max_size=SIZE), other=st.floats(width=32))
def test_guarantee_one_example_moves_the_sum_by_at_most_the_sensitivity(name, values, mask, other):
    metric = QUERIES[name]
    values, mask = np.asarray(values, np.float32), np.asarray(mask)
    mask[0] = True
    total = as_float64(statistic(metric, values, mask))
    removed = as_float64(statistic(metric, values, mask & (np.arange(SIZE) > 0)))
    assert np.linalg.norm(total - removed) <= 1.0
    replaced = as_float64(statistic(metric, np.where(np.arange(SIZE) == 0, np.float32(other), values), mask))
    assert np.linalg.norm(total - replaced) <= 2.0
    if not np.isfinite(values[0]):
        np.testing.assert_array_equal(total, removed)
    masked = as_float64(statistic(metric, np.where(mask, values, np.float32(other)), mask))
    np.testing.assert_array_equal(total, masked)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_sums_are_those_of_the_definition(name):
    values = np.array([0.3, -2.0, 0.0, 5.0, 3.0, -1.0, 0.5, 1e30], np.float32)
    mask = np.arange(8) != 4
    expected = sum(DEFINITIONS[name](float(v)) for v, m in zip(values, mask, strict=True) if m)
    np.testing.assert_allclose(as_float64(statistic(QUERIES[name], values, mask)), expected, atol=8 * GRID)


def test_the_bound_is_attained():
    # the stated sensitivity is not loose: a test that only sees zeros would pass above
    for name, low, high in (("mean", -9.0, 9.0), ("sum", 3.0, 0.0), ("count", 1.0, 0.0), ("histogram", 1.0, np.nan)):
        metric, mask = QUERIES[name], np.ones(1, bool)
        ends = [as_float64(statistic(metric, np.array([v], np.float32), mask)) for v in (low, high)]
        assert np.linalg.norm(ends[0] - ends[1]) == (2.0 if name == "mean" else 1.0)


def test_large_sums_are_exact():
    # a million ones in float32 would be off by more than an example
    values = np.full(2**20, 3.0, np.float32)
    values[7] = -1.0
    total = statistic(QUERIES["mean"], values, np.ones(2**20, bool))
    assert as_float64(total) == 2**20 - 2
    with pytest.raises(ValueError, match="at a time"):
        exact_sum(jnp.zeros(2**20 + 1), jnp.ones(2**20 + 1, bool))


@eqx.filter_jit
def releases(metric, values, size, keys):
    return jax.vmap(lambda key: metric.release(values, expected_size=size, key=key))(keys)


SCALES = {
    # mean and standard deviation of what 3 examples of value 1 give where 4 were expected
    "mean": (1.0, 2.0 * 2.0 / 4),
    "sum": (3.0, 2.0 * 3.0),
    "sum-negative": (-6.0, 2.0 * 7.0),
    "count": (3.0, 2.0),
    "histogram": (np.array([0.0, 0.0, 3.0]), 2.0),
}


@pytest.mark.parametrize("name", SCALES)
def test_noise_has_the_stated_scale(name):
    number = 40_000
    out = np.asarray(releases(QUERIES[name], np.ones(3, np.float32), 4.0, jr.split(jr.key(5), number)), np.float64)
    mean, deviation = SCALES[name]
    # 6 standard errors: passed once in 5e8
    assert np.abs(out.mean(0) - mean).max() < 6 * deviation / math.sqrt(number)
    assert np.abs(out.std(0) / deviation - 1).max() < 6 / math.sqrt(2 * number)
    if out.ndim > 1:
        assert np.abs(np.corrcoef(out.T) - np.eye(3)).max() < 6 / math.sqrt(number)
    # and it is Gaussian: the Kolmogorov-Smirnov distance exceeds 2.7 / sqrt(n) once in 2e6
    from scipy.stats import kstest

    standard = ((out - mean) / deviation).reshape(number, -1)[:, 0]
    assert kstest(standard, "norm").statistic < 2.7 / math.sqrt(number)


def test_a_mean_is_drawn_to_the_middle_by_missing_examples():
    metric = metrics.Mean(None, 0.0, 1.0, 1e-6)
    release = eqx.filter_jit(lambda values, size: metric.release(values, expected_size=size, key=jr.key(0)))
    one = lambda values, size: float(release(np.float32(values), jnp.float32(size)))
    assert one([1.0, 1.0, np.nan, np.inf], 2) == pytest.approx(1.0, abs=1e-5)
    assert one([1.0, 1.0, np.nan, np.inf], 4) == pytest.approx(0.75, abs=1e-5)
    assert one([], 4) == pytest.approx(0.5, abs=1e-5)


# Andrew et al. show such streams; the fourth is narrow in its range, the last one drifts
STREAMS: dict[str, Any] = {
    "median": (0.5, -20.0, 20.0, 3.0, 2.0, 0.0),
    "tail": (0.9, -20.0, 20.0, 3.0, 2.0, 0.0),
    "narrow": (0.1, -50.0, 50.0, 3.0, 0.02, 0.0),
    "drift": (0.5, -20.0, 20.0, 3.0, 2.0, 0.01),
    "norms": (0.75, 1e-3, 1e3, -3.0, 0.7, 0.0),
}


@eqx.filter_jit
def follow(metric, mean, deviation, drift, is_log, key, steps=100, batch=200):
    def body(state, t):
        values = (
            mean + drift * t.astype(jnp.float32) + deviation * jr.normal(jr.fold_in(jr.fold_in(key, 0), t), (batch,))
        )
        values = jnp.where(is_log, jnp.exp(values), values).at[:2].set(jnp.nan)
        diagnostics = SimpleNamespace(losses=values)
        mask = jnp.arange(batch) < batch - 3
        state = metric.update(state, diagnostics, mask, jnp.float32(batch), jr.fold_in(jr.fold_in(key, 1), t))
        return state, metric.value(state)

    values = jax.lax.scan(body, metric.init(), jnp.arange(steps))[1]
    value = jnp.where(is_log, jnp.log(values[-1]), values[-1])
    return jax.scipy.stats.norm.cdf((value - mean - drift * (steps - 1)) / deviation)


@pytest.mark.parametrize("name", STREAMS)
def test_a_quantile_is_followed_within_a_twentieth(name):
    quantile, low, high, mean, deviation, drift = STREAMS[name]
    metric = metrics.Quantile("losses", quantile, low, high, noise_multiplier=5.0)
    mean, deviation, drift = (jnp.float32(x) for x in (mean, deviation, drift))
    is_log = jnp.asarray(name == "norms")
    ranks = jax.vmap(lambda key: follow(metric, mean, deviation, drift, is_log, key))(jr.split(jr.key(0), 100))
    # one run in four of the drifting stream ends further off; the root mean square of 100 is 0.042 +- 0.002 there, elsewhere 0.01
    assert np.sqrt(np.mean((np.asarray(ranks) - quantile) ** 2)) < 0.055


def test_a_quantile_is_released_at_once():
    values = np.random.default_rng(0).lognormal(-2.0, 1.0, 2000).astype(np.float32)
    metric = metrics.Quantile(None, 0.3, 1e-4, 1e4, noise_multiplier=2.0)
    run = eqx.filter_jit(lambda key: metric.release(dpx.Sensitive(values), expected_size=2000, key=key))
    ranks = np.array([(values <= float(run(jr.key(seed)))).mean() for seed in range(20)])
    # each of the 16 rounds is off by 4 * 2 / 2 / 2000 = 0.002
    assert 1e-4 < ranks.std() and np.abs(ranks - 0.3).max() < 0.015
    assert 1e-4 <= run(jr.key(0)) <= 1e4


def test_the_rounds_of_a_search_share_the_budget(monkeypatch):
    import dpx.metrics._quantile as module

    seen = []
    original = module.noisy_sum
    monkeypatch.setattr(module, "noisy_sum", lambda u, k, m, key: (seen.append(m), original(u, k, m, key))[1])
    metric = metrics.Quantile(None, 0.5, 0.0, 1.0, noise_multiplier=3.0)
    metric.release(np.zeros(4, np.float32), expected_size=4, key=jr.key(0))
    assert set(map(float, seen)) == {12.0}  # traced once, for 16 rounds
    total = da.SelfComposedDpEvent(da.GaussianDpEvent(12.0), 16)
    epsilons = [da.pld.PLDAccountant().compose(e).get_epsilon(1e-5) for e in (total, metric.event)]
    assert epsilons[0] == pytest.approx(epsilons[1], rel=1e-3)


def diagnostics_of(size=4):
    rows = jnp.arange(size, dtype=jnp.float32)
    aux = {"is_correct": rows < 2, "logits": jnp.stack([rows, -rows], axis=1)}
    return SimpleNamespace(losses=rows, norms=2 * rows, group_norms=rows[:, None], aux=aux, mask=jnp.ones(size, bool))


class Diagnostics(eqx.Module):
    losses: Any
    norms: Any
    aux: Any
    mask: Any


def step_of(metric, size=4, mask=None):
    d = diagnostics_of(size)
    mask = d.mask if mask is None else mask
    d = Diagnostics(d.losses, d.norms, d.aux, mask)
    state = metric.init()
    update = eqx.filter_jit(lambda state, d: metric.update(state, d, mask, jnp.float32(4), jr.key(1)))
    return metric.value(state), metric.value(update(state, d))


def test_values_are_read_one_example_at_a_time():
    tiny = 1e-6
    before, norms = step_of(metrics.Mean("norms", 0.0, 10.0, tiny))
    assert math.isnan(before) and norms == pytest.approx(3.0, abs=1e-4)
    assert step_of(metrics.Mean(lambda d: d.aux["is_correct"], 0.0, 1.0, tiny))[1] == pytest.approx(0.5, abs=1e-4)
    largest = metrics.Sum(lambda d: jnp.max(d.aux["logits"]), 0.0, 10.0, tiny)
    assert step_of(largest)[1] == pytest.approx(6.0, abs=1e-3)
    half = jnp.arange(4) < 2
    assert step_of(metrics.Count(None, tiny), mask=half)[1] == pytest.approx(2.0, abs=1e-4)
    assert step_of(metrics.Count(None, tiny), size=0)[1] == pytest.approx(0.0, abs=1e-4)
    assert step_of(metrics.Sum(lambda d: jnp.max(d.aux["logits"]), 0.0, 1.0, tiny), size=0)[1] == pytest.approx(
        0.0, abs=1e-4
    )
    # a function that mixes examples sees one at a time, so it cannot
    centred = metrics.Sum(lambda d: d.losses - jnp.mean(d.losses), -1.0, 1.0, tiny)
    assert step_of(centred)[1] == pytest.approx(0.0, abs=1e-4)
    with pytest.raises(ValueError, match="without a batch axis"):
        step_of(metrics.Sum(lambda d: d.aux["logits"], 0.0, 1.0, 1.0))


def test_a_sweep_over_multipliers_is_a_vmap():
    values = np.ones(3, np.float32)
    one = lambda m: metrics.Mean(None, 0.0, 1.0, m).release(values, expected_size=4, key=jr.key(3))
    swept = jax.jit(jax.vmap(one))(jnp.array([0.5, 2.0, 2e5]))
    alone = [float(jax.jit(lambda m=m: one(m))()) for m in (0.5, 2.0)]
    np.testing.assert_allclose(swept[:2], alone, rtol=1e-6)
    assert np.isnan(swept[2])  # too large to be added up, and too late to raise


def test_events_and_fresh_keys():
    metric = metrics.Mean(None, 0.0, 1.0, 10.0)
    assert metric.event == da.GaussianDpEvent(10.0)
    pair = [float(metric.release(np.ones(2), expected_size=2)) for _ in range(2)]
    assert pair[0] != pair[1]
    with pytest.raises(RuntimeError, match="tracing"):
        jax.jit(lambda v: metric.release(v, expected_size=2))(jnp.ones(2))


# --- Dropped examples ----------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(values=anything, mask=st.lists(st.booleans(), min_size=SIZE, max_size=SIZE))
def test_guarantee_one_example_moves_the_number_of_dropped_ones_by_at_most_one(values, mask):
    metric, values, mask = metrics.Dropped(2.0), np.asarray(values, np.float32), np.asarray(mask)
    count = lambda mask: as_float64(exact_sum(metric.contributions(jnp.asarray(values)), jnp.asarray(mask)))
    assert count(mask) == (~np.isfinite(values) & mask).sum()
    for i in range(SIZE):
        assert abs(count(mask) - count(mask & (np.arange(SIZE) != i))) <= 1


def test_dropped_examples_are_counted_where_they_are_dropped():
    def loss(model, x):
        # x = 1 gives an infinite gradient, x = 2 one that is NaN, x = 3 an infinite loss of finite gradient
        extra = jnp.where(x == 3, jnp.inf, 0.0)
        scale = jnp.where(x == 1, jnp.float32(3e38) * 10, jnp.where(x == 2, jnp.nan, 1.0))
        return jnp.sum(model["w"]) * scale + jax.lax.stop_gradient(extra)

    tiny = 1e-6
    model = {"w": jnp.ones(3)}
    private_grad = dpx.PrivateGradient(
        loss,
        dpx.FlatClipping(1.0),
        dpx.IndependentGaussian(1e-6),
        metrics={"dropped": metrics.Dropped(tiny), "size": metrics.Count(None, tiny)},
    )
    x = np.array([1, 0, 2, 3, 1, 1, 0, 2], np.float32)
    mask = np.array([1, 1, 1, 1, 1, 0, 0, 0], bool)  # the last three are padding, two of them not finite
    for method in (dpx.Auto(), dpx.Vectorized(3)):
        run = eqx.tree_at(lambda p: p.method, private_grad, method, is_leaf=lambda y: y is private_grad.method)
        grads, state, diagnostics = run(model, (x,), run.init(model), mask=mask)
        seen = diagnostics.reveal()
        np.testing.assert_array_equal(~np.isfinite(seen.norms), [1, 0, 1, 0, 1, 0, 0, 0])
        values = run.metric_values(state)
        assert values["dropped"] == pytest.approx(3.0, abs=1e-4) and values["size"] == pytest.approx(5.0, abs=1e-4)
        np.testing.assert_allclose(grads["w"], 2 / np.sqrt(3) * np.ones(3), rtol=1e-4)  # the two that were kept
        state.raise_if_failed()
    _, state, _ = private_grad(model, (x[:0],), private_grad.init(model))
    assert private_grad.metric_values(state)["dropped"] == pytest.approx(0.0, abs=1e-4)
    assert metrics.Dropped(tiny).release(np.array([1.0, np.inf, np.nan], np.float32), key=jr.key(0)) == pytest.approx(
        2.0, abs=1e-4
    )


def test_the_count_of_dropped_ones_has_its_noise_and_is_in_the_event():
    metric = metrics.Dropped(2.0)
    out = np.asarray(
        jax.vmap(lambda key: metric.release(np.array([1.0, np.inf, np.nan], np.float32), key=key))(
            jr.split(jr.key(5), 20_000)
        ),
        np.float64,
    )
    # 6 standard errors: passed once in 5e8
    assert abs(out.mean() - 2.0) < 6 * 2 / math.sqrt(20_000) and abs(out.std() / 2 - 1) < 6 / math.sqrt(40_000)
    plan = dpx.dp_sgd(100, 10, 5, noise_multiplier=2.0).with_metrics(dropped=metrics.Dropped(3.0))
    event: Any = plan.event
    assert event.event.event.noise_multiplier == pytest.approx((1 / 4 + 1 / 9) ** -0.5)


def test_norms_of_groups_that_are_finite_have_a_finite_norm_together():
    # each square fits into float32, their sum does not, and nothing was left out
    from dpx.clipping import GroupClipping

    private_grad = dpx.PrivateGradient(
        lambda m, x: m["a"] * x + m["b"] * x,
        GroupClipping({"a": 1.0, "b": 1.0}),
        dpx.IndependentGaussian(1.0),
        method=dpx.Vectorized(),
    )
    model = {"a": jnp.ones(()), "b": jnp.ones(())}
    x = np.array([1.5e19, 1e-3], np.float32)
    norms = private_grad(model, (x,), private_grad.init(model))[2].reveal().norms
    np.testing.assert_allclose(norms, np.sqrt(2) * x.astype(np.float64), rtol=1e-6)


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: metrics.Mean("losses", 0, 1), "no budget"),
        (lambda: metrics.Histogram("losses", [0, 1, 2]), "no budget"),
        (lambda: metrics.Quantile("losses", 0.5, 0, 1), "no budget"),
        (lambda: metrics.Count(), "no budget"),
        (lambda: metrics.Dropped(), "no budget"),
        (lambda: metrics.Sum("losses", 0, 1, -1.0), "positive"),
        (lambda: metrics.Sum("losses", 0, 1, 1e6), "at most"),
        (lambda: metrics.Mean("losses", 1, 1, 1.0), "`low` below"),
        (lambda: metrics.Mean("losses", 0, math.inf, 1.0), "finite"),
        (lambda: metrics.Mean("loss", 0, 1, 1.0), '"losses", "norms"'),
        (lambda: metrics.Quantile("losses", 1.0, 0, 1, 1.0), "strictly between 0 and 1"),
        (lambda: metrics.Histogram("losses", [0, 1, 1], 1.0), "increase"),
        (lambda: metrics.Histogram("losses", [0, 1], 1.0), "at least three"),
        (lambda: metrics.Mean(None, 0, 1, 1.0).release(np.ones(3)), "has to be public"),
        (lambda: metrics.Quantile(None, 0.5, 0, 1, 1.0).release(np.ones(3)), "has to be public"),
        (lambda: metrics.Count(None, 1.0).release(np.ones((3, 1))), "one real number an example"),
        (lambda: metrics.Count(None, 1.0).release(np.ones(3), mask=np.ones(2, bool)), "booleans of shape"),
        (lambda: metrics.Count(None, 1.0).release(np.ones(3), key=0), "typed PRNG key"),
    ],
)
def test_bad_input(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize("multiplier", [1.5, 30.0])
def test_guarantee_no_digit_of_a_sum_gets_past_the_noise(multiplier):
    """Noise of 30 contributions in float32 is a multiple of eight steps of the grid wherever it cancels the sum, and then told it modulo eight."""
    count = int(2 * multiplier) + 1
    units = jnp.ones(count).at[-1].set(3 * GRID)
    release = jax.jit(jax.vmap(lambda key: noisy_sum(units, jnp.ones(count, bool), jnp.float32(multiplier), key)))
    steps = np.asarray(release(jr.split(jr.key(0), 60_000)), np.float64) / GRID
    steps = steps[np.abs(steps) < 2**23]  # which float32 holds exactly
    assert len(steps) > 1_000
    # false alarm 1e-6; a noise that never has one of four residues gives 300 or more, one that has every other a tenth more often 130
    seen = np.bincount((steps % 4).astype(int), minlength=4)
    assert np.sum((seen - len(steps) / 4) ** 2) / (len(steps) / 4) < stats.chi2.isf(1e-6, 3)


def test_guarantee_cutting_to_a_grid_makes_no_contribution_longer():
    units = jr.normal(jr.key(1), (50, 40))
    units = units / jnp.linalg.norm(units, axis=1, keepdims=True) * (1 - 2e-7)
    for step in (1.0, 8.0, 2.0**16):
        cut = jax.vmap(lambda u, step=step: exact_sum(u[None], jnp.ones(1, bool), step))(units)
        assert np.linalg.norm(as_float64(cut), axis=1).max() <= 1
