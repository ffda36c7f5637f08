"""Plans: what is stated is what runs, and what nobody can account for is refused."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpx
from conftest import loss, make_model
from dpx.mechanism import Mechanism


@pytest.fixture(scope="module")
def plan():
    return dpx.dp_sgd(1000, 50, 40, epsilon=2.0, delta=1e-6, clipping=dpx.FlatClipping(0.3))


def test_the_gradient_uses_the_numbers_of_the_statement(plan):
    private_grad = plan.private_gradient(loss, has_aux=False, method=dpx.Vectorized(4))
    assert float(private_grad.noise.noise_multiplier) == plan.noise_multiplier
    assert float(private_grad.normalizer) == 50 and private_grad.steps == 40
    assert private_grad.sensitivity == float(np.float32(0.3)) or private_grad.sensitivity >= 0.3
    assert private_grad.participation == dpx.Participation(1, 1) and plan.sampler.participation == dpx.Participation(
        1, 40
    )
    for fixed in ("normalizer", "steps", "participation"):
        with pytest.raises(ValueError, match="fixed by the plan"):
            plan.private_gradient(loss, **{fixed: 1})


def test_statement_names_everything_it_rests_on(plan):
    text = plan.statement(1e-6)
    for part in (
        "1e-06",
        "one example",
        "added to or removed from",
        "Gaussian",
        "clip norm 0.3",
        f"{plan.noise_multiplier:.6g}",
        "Poisson sampling",
        "Steps: 40",
        "advantage",
        "Assumed",
        "floating-point",
        "privacy loss distributions",
    ):
        assert part in text, part
    stated = float(text.split("(")[1].split(",")[0])
    assert plan.epsilon(1e-6) <= stated <= plan.epsilon(1e-6) + 1e-4
    other = dpx.dp_sgd(1000, 50, 40, noise_multiplier=2.0, adjacency="replace_one", unit="patient", max_batch_size=90)
    assert "one patient is replaced by any other" in other.statement(1e-6)
    assert "cut to a random subset" in other.statement(1e-6)
    assert "NOT differentially private" in dpx.dp_sgd(1000, 50, 40, clipping=dpx.NoClipping()).statement(1e-6)


def test_event_is_derived_from_the_parts(plan):
    import dp_accounting as da

    expected = da.SelfComposedDpEvent(da.PoissonSampledDpEvent(0.05, da.GaussianDpEvent(plan.noise_multiplier)), 40)
    assert plan.event == expected
    more = eqx.tree_at(lambda p: p.noise.noise_multiplier, plan, jnp.asarray(9.0, jnp.float32))
    assert more.event.event.event.noise_multiplier == 9.0


def test_what_a_clipping_learns_is_paid_by_the_gradient():
    # counts of multiplier 10 and the gradient together are one Gaussian of the stated multiplier (Andrew et al. 2021, theorem 1)
    clipping = dpx.AdaptiveClipping(2.0, count_noise_multiplier=5.0)
    sampler = dpx.PoissonSampler(100, 10, 5)
    plan = dpx.PrivacyPlan(sampler, clipping, dpx.IndependentGaussian(1.0))
    event: Any = plan.event
    assert event.event.event.noise_multiplier == 1.0
    scale = float(plan.mechanism.scale())
    assert scale / 2.0 == pytest.approx(1.0050378, abs=2e-6) and scale / 2.0 >= (1 - 1 / 100) ** -0.5
    assert "1.00504" in plan.statement(1e-3)


def test_counts_are_paid_for_every_participation_of_an_event():
    # unamplified matrix factorization is one Gaussian of the whole run, in which an example is counted in each of 4 epochs
    sampler = dpx.ShuffleSampler(40, 10, 16)
    noise = dpx.CorrelatedGaussian(dpx.SquareRootToeplitz(16), 1.0)
    plain = noise.scale(jnp.ones(()), 16, sampler.participation_per_event)
    clipping = dpx.AdaptiveClipping(1.0, count_noise_multiplier=5.0)
    mechanism = lambda clipping: Mechanism(clipping, noise, {}, 16, sampler.participation_per_event)
    ratio = float(mechanism(clipping).scale() / plain)
    assert ratio == pytest.approx((1 - 4 / 100) ** -0.5, rel=2e-6)
    with pytest.raises(ValueError, match="count_noise_multiplier"):
        mechanism(dpx.AdaptiveClipping(1.0, count_noise_multiplier=0.9)).check_budget()


def test_guarantee_noise_on_integers_never_pays_for_counts():
    # its scale multiplies signal and noise alike, so that raising it would leave the stated multiplier short
    clipping, noise = dpx.AdaptiveClipping(1.0, count_noise_multiplier=2.5), dpx.DiscreteGaussian(4.0)
    with pytest.raises(ValueError, match="cannot make room for the private counts"):
        dpx.PrivateGradient(loss, clipping, noise)
    with pytest.raises(ValueError, match="IndependentGaussian"):
        dpx.PrivacyPlan(dpx.PoissonSampler(100, 10, 5), clipping, noise, accountant="rdp")
    with pytest.raises(ValueError, match="cannot make room for the private counts of `SlackClipping`"):
        dpx.PrivateGradient(loss, dpx.SlackClipping(1.0), noise)


@pytest.mark.parametrize(
    "noise", [dpx.IndependentGaussian(4.0), dpx.CorrelatedGaussian(dpx.BandedToeplitz([1.0, 0.5]), 4.0)]
)
def test_what_counts_cost_is_added_as_noise_and_never_to_the_signal(noise):
    clipping = dpx.AdaptiveClipping(1.0, count_noise_multiplier=2.5)
    scale = Mechanism(clipping, noise, {}, 1, dpx.Participation(1, 1)).scale()
    zero, ones = jnp.zeros(50), jnp.ones(50)
    run = lambda total: noise.step(total, scale, jax.random.key(0), jnp.int32(0), noise.init(total))[0]
    np.testing.assert_allclose(run(ones) - run(zero), ones, atol=1e-5)


def test_metrics_add_to_the_cost_and_are_released_in_the_state(model, batch):
    plan = dpx.dp_sgd(100, 10, 5, noise_multiplier=1.0)
    mean = dpx.metrics.Mean("losses", low=0.0, high=2.0, noise_multiplier=4.0)
    watched = plan.with_metrics(loss=mean, again=mean)
    event: Any = watched.event
    assert event.event.event.noise_multiplier == pytest.approx((1 + 2 / 16) ** -0.5)
    assert watched.epsilon(1e-3) > plan.epsilon(1e-3)
    private_grad = watched.private_gradient(loss)
    mask = np.ones(8, bool)
    _, state, _ = private_grad(model, batch, private_grad.init(model, key=jax.random.key(0)), mask=mask)
    values = [float(v) for v in private_grad.metric_values(state).values()]
    assert np.isfinite(values).all() and values[0] != values[1]  # two metrics never share their noise
    for _ in range(5):
        before = state
        _, state, _ = private_grad(model, batch, state, mask=mask)
    assert state.result == dpx.Result.budget_spent
    assert eqx.tree_equal(before.metrics, state.metrics)  # past the budget nothing is released  # pyright: ignore[reportPossiblyUnboundVariable]
    assert "noise multiplier 4" in watched.statement(1e-3)
    with pytest.raises(ValueError, match="dpx.metrics"):
        plan.with_metrics(loss="losses")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="private_sum"):
        watched.private_sum(lambda model, x, y: x)


def test_multipliers_are_rounded_up_to_what_is_used():
    for value in (1.1, 0.7, 1 / 3):
        stored = dpx.dp_sgd(1000, 50, 40, noise_multiplier=value).noise_multiplier
        assert value <= stored <= value * (1 + 2e-7)


def test_no_clipping_has_infinite_epsilon():
    plan = dpx.dp_sgd(1000, 50, 40, clipping=dpx.NoClipping())
    assert plan.epsilon(1e-5) == np.inf and plan.delta(3.0) == 1.0 and plan.trade_off().advantage == 1.0
    private_grad = plan.private_gradient(loss)
    model = make_model()
    x, y = np.ones((4, 4), np.float32), np.ones((4, 3), np.float32)
    grads, _, _ = private_grad(model, (x, y), private_grad.init(model))
    plain = eqx.filter_grad(lambda m: jnp.sum(jax.vmap(loss, (None, 0, 0))(m, x, y)) / 50)(model)
    np.testing.assert_allclose(grads.weight, plain.weight, rtol=1e-5)


def test_batches_end_where_the_budget_ends(plan):
    data = (np.zeros((1000, 4), np.float32), np.zeros((1000, 3), np.float32))
    assert sum(1 for _ in plan.batches(data, seed=0)) == 40
    assert sum(1 for _ in plan.batches(data, seed=0, start=38)) == 2
    assert sum(1 for _ in plan.batches(data, seed=None)) == 40
    with pytest.raises(ValueError, match="another sampling"):
        plan.batches(data, seed=None, start=38)
    with pytest.raises(ValueError, match="no budget covers"):
        plan.batches(data, seed=0, start=41)
    for past in (41, 10**6):
        with pytest.raises(ValueError, match="past the plan's end"):
            plan.epsilon(1e-6, steps=past)


def test_a_plan_is_refused_before_calibration():
    plan = dpx.PrivacyPlan(dpx.PoissonSampler(100, 10, 5), dpx.FlatClipping(1.0), dpx.IndependentGaussian())
    for use in (
        lambda: plan.epsilon(1e-5),
        lambda: plan.delta(1.0),
        lambda: plan.event,
        lambda: plan.statement(1e-5),
        lambda: plan.trade_off(),
        lambda: plan.private_gradient(loss),
        lambda: plan.calibrate(1.0, 1e-5, "steps"),
    ):
        with pytest.raises(ValueError, match="noise multiplier"):
            use()
    assert plan.calibrate(1.0, 1e-5).is_calibrated and not plan.is_calibrated


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"epsilon": -1.0}, "epsilon"),
        ({"epsilon": np.inf}, "epsilon"),
        ({"delta": 0.0}, "delta"),
        ({"delta": 1.0}, "delta"),
        ({"delta": None}, "needs a `delta=`"),
        ({"noise_multiplier": 1.0}, "not both"),
        ({"epsilon": None}, "got neither"),
        ({"epsilon": None, "noise_multiplier": -1.0}, "noise_multiplier"),
        ({"batch_size": 2000}, "got 2000 of 1000"),
        ({"steps": 0}, "steps"),
        ({"adjacency": "bounded"}, "`adjacency` must be one of"),
        ({"accountant": "gdp"}, "`accountant` must be"),
    ],
)
def test_bad_plans(changes, match):
    good = {"num_examples": 1000, "batch_size": 50, "steps": 40, "epsilon": 1.0, "delta": 1e-5}
    with pytest.raises(ValueError, match=match):
        dpx.dp_sgd(**{**good, **changes})


def test_delta_too_large_for_the_data_warns(plan):
    with pytest.warns(UserWarning, match="at least 1 / num_examples"):
        plan.epsilon(1e-3)


def test_bad_questions(plan):
    for delta in (0.0, 1.0, -1.0, np.nan):
        with pytest.raises(ValueError, match="delta"):
            plan.epsilon(delta)
    with pytest.raises(ValueError, match="epsilon"):
        plan.delta(-1.0)
    with pytest.raises(ValueError, match="parameter"):
        plan.calibrate(1.0, 1e-6, "clip_norm")


def test_laplace_plans_are_accounted():
    sampler = dpx.PoissonSampler(1000, 1000, 1)
    plan = dpx.PrivacyPlan(sampler, dpx.FlatClipping(1.0, order=1), dpx.Laplace(2.0))
    assert plan.epsilon(1e-9) == pytest.approx(0.5, abs=1e-3)  # pure DP: one over the scale
    with pytest.raises(ValueError, match="l1 norm"):
        dpx.PrivacyPlan(sampler, dpx.FlatClipping(1.0), dpx.Laplace(2.0))


def test_options_that_a_gradient_has_not_are_refused_by_name():
    plan = dpx.dp_sgd(100, 10, 5, noise_multiplier=1.0)
    unknown: Any = {"methd": dpx.Ghost()}
    with pytest.raises(ValueError, match=r"private_gradient\(methd=\.\.\.\)`: there is no such option.*method"):
        plan.private_gradient(lambda m, x: 0.0, **unknown)
