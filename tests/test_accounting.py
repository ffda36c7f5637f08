"""Accounting: against integrals and convolutions computed here, in float64, without dp_accounting."""

import math
import subprocess
import sys

import dp_accounting as da
import numpy as np
import pytest
from scipy import integrate, stats

import dpx
from conftest import ENVIRONMENT
from dpx import accounting
from dpx.accounting import LossDistribution, LossPmf, _questions, _renyi


def gaussian_delta(epsilon, sigma):
    """Balle and Wang 2018, theorem 8."""
    return stats.norm.cdf(0.5 / sigma - epsilon * sigma) - np.exp(epsilon) * stats.norm.cdf(
        -0.5 / sigma - epsilon * sigma
    )


def poisson_delta(epsilon, sigma, q):
    """One step of Poisson-sampled Gaussian: the larger hockey-stick divergence of the two directions, by quadrature."""
    base = lambda y: stats.norm.pdf(y, 0, sigma)
    mixture = lambda y: (1 - q) * stats.norm.pdf(y, 0, sigma) + q * stats.norm.pdf(y, 1, sigma)

    def hockey_stick(upper, lower):
        integrand = lambda y: max(0.0, upper(y) - math.exp(epsilon) * lower(y))
        return integrate.quad(integrand, -14 * sigma, 14 * sigma + 1, limit=2000, epsabs=1e-13, epsrel=1e-11)[0]

    return max(hockey_stick(mixture, base), hockey_stick(base, mixture))


def bracket(epsilon, sigma, q, steps, width=5e-4):
    """Lower and upper bounds of delta for the removal direction after `steps` steps: losses rounded down and up, convolved."""
    y = np.linspace(-14 * sigma, 14 * sigma + 1, 400_001)
    middle = (y[1:] + y[:-1]) / 2
    mass = (1 - q) * np.diff(stats.norm.cdf(y, 0, sigma)) + q * np.diff(stats.norm.cdf(y, 1, sigma))
    loss = lambda y: np.log1p(q * np.expm1((2 * y - 1) / (2 * sigma**2)))
    bounds = []
    for edge, rounding in ((y[:-1], np.floor), (y[1:], np.ceil)):  # the loss increases with y
        index = rounding(loss(edge) / width).astype(int)
        low = index.min()
        pmf = np.bincount(index - low, mass)
        size = 1 << math.ceil(math.log2(steps * len(pmf)))
        total = np.maximum(np.fft.irfft(np.fft.rfft(pmf, size) ** steps, size), 0)
        losses = (np.arange(size) + steps * low) * width
        bounds.append(np.sum(total * np.maximum(0, -np.expm1(epsilon - losses))))
    assert len(middle) == len(mass)
    return bounds


@pytest.mark.parametrize("sigma", [0.7, 1.0, 3.0])
@pytest.mark.parametrize("epsilon", [0.1, 1.0])
def test_one_gaussian_step_is_the_closed_form(sigma, epsilon):
    plan = dpx.dp_sgd(10, 10, 1, noise_multiplier=sigma)
    exact = gaussian_delta(epsilon, plan.noise_multiplier)
    assert exact <= plan.delta(epsilon) <= exact + 1e-6
    replaced = dpx.dp_sgd(10, 10, 1, noise_multiplier=sigma, adjacency="replace_one")
    twice = gaussian_delta(epsilon, plan.noise_multiplier / 2)
    assert twice * (1 - 1e-9) <= replaced.delta(epsilon) <= twice + 1e-6


@pytest.mark.parametrize(("sigma", "q"), [(0.6, 0.1), (1.0, 0.3), (2.0, 0.02)])
def test_one_poisson_step_is_the_integral(sigma, q):
    plan = dpx.dp_sgd(1000, int(1000 * q), 1, noise_multiplier=sigma)
    for epsilon in (0.05, 0.5, 1.5):
        exact = poisson_delta(epsilon, plan.noise_multiplier, q)
        assert exact - 1e-10 <= plan.delta(epsilon) <= exact + 1e-6


@pytest.mark.parametrize(("sigma", "q", "steps"), [(1.0, 0.05, 50), (2.0, 0.2, 30)])
def test_composed_steps_lie_above_a_proven_lower_bound(sigma, q, steps):
    plan = dpx.dp_sgd(1000, int(1000 * q), steps, noise_multiplier=sigma)
    epsilon = 1.0
    low, high = bracket(epsilon, sigma, q, steps)
    assert low <= plan.delta(epsilon) <= high * 1.02 + 1e-9
    assert low > 0 and high / low < 1.2  # the bracket says something


def test_reference_figures():
    strategy = dpx.strategies.BandedToeplitz([1.0] + 15 * [0.1])
    bands = dpx.dp_mf(160_000, 100, 128, strategy=strategy, noise_multiplier=1.0)
    assert bands.epsilon(1e-6) == pytest.approx(0.56682, abs=1e-4)
    assert dpx.dp_sgd(1000, 100, 512, epsilon=1.0, delta=1e-6).noise_multiplier == pytest.approx(9.6618, abs=2e-4)
    assert dpx.dp_sgd(10_000, 100, 128, noise_multiplier=1.0).epsilon(1e-6) == pytest.approx(1.01522, abs=1e-4)
    assert dpx.dp_sgd(1000, 100, 512, noise_multiplier=3.0).epsilon(1e-6) == pytest.approx(3.7697, abs=1e-4)
    assert dpx.dp_sgd(1000, 100, 512, noise_multiplier=3.0, accountant="rdp").epsilon(1e-6) == pytest.approx(
        4.0510, abs=1e-4
    )
    truncated = dpx.dp_sgd(10_000, 100, 1000, noise_multiplier=1.0, max_batch_size=150)
    assert truncated.epsilon(1e-5) == pytest.approx(1.8312, abs=2e-3)
    assert truncated.epsilon(1e-5) > dpx.dp_sgd(10_000, 100, 1000, noise_multiplier=1.0).epsilon(1e-5)


def test_calibration_meets_the_budget_and_no_more():
    plan = dpx.dp_sgd(60_000, 256, 5_000, epsilon=1.0, delta=1e-5)
    assert plan.noise_multiplier == pytest.approx(1.33678, abs=1e-4)
    assert plan.epsilon(1e-5) <= 1.0
    assert float(np.float32(plan.noise_multiplier)) == plan.noise_multiplier
    less = dpx.dp_sgd(60_000, 256, 5_000, noise_multiplier=plan.noise_multiplier * (1 - 1e-4))
    assert less.epsilon(1e-5) > 1.0


@pytest.mark.parametrize(
    "epsilon", [pytest.param(0.02, marks=pytest.mark.slow), 0.3, pytest.param(30.0, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_calibration_over_the_whole_range(epsilon, accountant):
    plan = dpx.dp_sgd(1000, 50, 40, epsilon=epsilon, delta=1e-6, accountant=accountant)
    assert epsilon * (1 - 1e-3) <= plan.epsilon(1e-6) <= epsilon


@pytest.mark.parametrize("adjacency", ["replace_one", "replace_special"])
def test_calibration_under_other_adjacencies(adjacency):
    plan = dpx.dp_sgd(1000, 50, 40, epsilon=1.0, delta=1e-6, adjacency=adjacency)
    assert 1 - 1e-3 <= plan.epsilon(1e-6) <= 1.0


@pytest.mark.parametrize("parameter", ["steps", "batch_size"])
def test_calibration_of_steps_and_batch_size(parameter):
    plan = dpx.dp_sgd(1000, 50, 40, noise_multiplier=1.5).calibrate(3.0, 1e-6, parameter)
    found = getattr(plan.sampler, parameter)
    assert plan.epsilon(1e-6) <= 3.0
    arguments = {"batch_size": 50, "steps": 40, parameter: found + 1}
    assert dpx.dp_sgd(1000, noise_multiplier=1.5, **arguments).epsilon(1e-6) > 3.0


def test_calibration_that_no_value_meets():
    plan = dpx.dp_sgd(1000, 500, 40, noise_multiplier=0.5)
    with pytest.raises(ValueError, match="Not even steps = 1"):
        plan.calibrate(0.1, 1e-6, "steps")
    with pytest.raises(ValueError, match="NoClipping"):
        dpx.dp_sgd(1000, 50, 40, clipping=dpx.NoClipping()).calibrate(1.0, 1e-6)
    everything = dpx.dp_sgd(1000, 50, 1, noise_multiplier=1000.0).calibrate(3.0, 1e-6, "batch_size")
    assert everything.sampler.batch_size == 1000


def test_epsilon_is_monotone_and_pld_below_rdp():
    base = {"num_examples": 1000, "batch_size": 50, "steps": 40, "noise_multiplier": 1.0}

    def epsilon(**changes):
        return dpx.dp_sgd(**{**base, **changes}).epsilon(1e-6)

    middle = epsilon()
    assert epsilon(noise_multiplier=1.1) < middle < epsilon(noise_multiplier=0.9)
    assert epsilon(steps=20) < middle < epsilon(steps=60)
    assert epsilon(batch_size=40) < middle < epsilon(batch_size=60)
    assert middle <= epsilon(accountant="rdp")
    assert middle < epsilon(adjacency="replace_one")
    spent = [dpx.dp_sgd(**base).epsilon(1e-6, steps=t) for t in (0, 10, 40)]
    assert spent[0] == 0 < spent[1] < spent[2] == middle


def test_epsilon_and_delta_are_inverse():
    plan = dpx.dp_sgd(1000, 50, 40, noise_multiplier=1.0)
    assert plan.delta(plan.epsilon(1e-6)) == pytest.approx(1e-6, rel=1e-3)
    assert plan.delta(0.0) == plan.trade_off().advantage


def test_negative_epsilons_are_never_printed():
    assert dpx.dp_sgd(1000, 1, 1, noise_multiplier=100.0, accountant="rdp").epsilon(0.0009) >= 0
    assert dpx.dp_sgd(1000, 1, 1, noise_multiplier=100.0).epsilon(0.0009) >= 0


def test_trade_off_curve_is_below_the_exact_one():
    plan = dpx.dp_sgd(10, 10, 1, noise_multiplier=1.0)
    curve = plan.trade_off()
    alpha = np.linspace(0, 1, 21)
    exact = stats.norm.cdf(stats.norm.isf(alpha) - 1.0)  # a Gaussian of multiplier 1 is exactly 1-GDP
    fnr = curve.false_negative_rate(alpha)
    assert np.all(fnr <= exact + 1e-9) and np.all(fnr >= exact - 2e-3)
    assert np.all(curve.true_positive_rate(alpha) >= alpha - 1e-12)
    assert curve.advantage == pytest.approx(2 * stats.norm.cdf(0.5) - 1, abs=1e-4)
    with pytest.raises(ValueError, match="false_positive_rate"):
        curve.false_negative_rate(1.5)


def test_rdp_under_replacement_is_refused():
    with pytest.raises(ValueError, match="half of what it is"):
        dpx.dp_sgd(1000, 50, 40, noise_multiplier=1.0, adjacency="replace_one", accountant="rdp")


def test_tiny_delta_is_refused_with_pld_and_answered_with_rdp():
    plan = dpx.dp_sgd(1000, 50, 40, noise_multiplier=1.0)
    with pytest.raises(ValueError, match="1e-12.*rdp"):
        plan.epsilon(1e-13)
    assert math.isfinite(dpx.dp_sgd(1000, 50, 40, noise_multiplier=1.0, accountant="rdp").epsilon(1e-13))


def test_unknown_events_are_refused():
    for accountant in ("pld", "rdp"):
        with pytest.raises(ValueError, match="know"):
            accounting.epsilon(da.UnsupportedDpEvent(), 1e-5, accountant=accountant)


def test_a_million_steps_and_little_noise_cost_no_gigabytes():
    assert dpx.dp_sgd(60_000, 256, 10**6, noise_multiplier=2.0).epsilon(1e-5) > 10
    assert dpx.dp_sgd(60_000, 256, 1000, noise_multiplier=0.1).epsilon(1e-5) > 100


times = da.SelfComposedDpEvent


def loss_distribution(event, **options):
    found = accounting.loss_distribution(event, "add_or_remove_one", **options)
    assert isinstance(found, LossDistribution)
    return found


def poisson(sigma, q, count=1):
    return times(da.PoissonSampledDpEvent(q, da.GaussianDpEvent(sigma)), count)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("sigma", "q", "count"),
    [
        (1.0, 0.01, 300),
        (8.0, 1.0, 200),
        pytest.param(0.7, 0.2, 5, marks=SLOW),
        pytest.param(2.0, 0.3, 40, marks=SLOW),
        pytest.param(1.2, 1e-4, 2000, marks=SLOW),
    ],
)
def test_losses_are_tighter_than_renyi_and_monotone(sigma, q, count, delta=1e-7):
    epsilon = lambda *mechanism: accounting.epsilon(poisson(*mechanism), delta)
    middle = epsilon(sigma, q, count)
    assert middle <= accounting.epsilon(poisson(sigma, q, count), delta, accountant="rdp") + 1e-9
    assert epsilon(1.1 * sigma, q, count) <= middle <= epsilon(0.9 * sigma, q, count)
    assert epsilon(sigma, q, count // 2) <= middle <= epsilon(sigma, q, 2 * count)
    assert epsilon(sigma, 0.8 * q, count) <= middle <= epsilon(sigma, min(1.0, 1.2 * q), count)
    assert middle <= accounting.epsilon(poisson(sigma, q, count), delta / 10)


def test_samples_of_composed_losses_confirm_the_bound_from_below():
    rng = np.random.default_rng(0)
    sigma, q, count, samples = 0.8, 0.1, 15, 200_000
    loss = lambda y: np.log1p(q * np.expm1((2 * y - 1) / (2 * sigma**2)))
    absent = rng.normal(0, sigma, (samples, count))
    present = rng.normal(0, sigma, (samples, count)) + (rng.random((samples, count)) < q)
    found = loss_distribution(poisson(sigma, q, count))
    for pmf, losses in ((found.remove, loss(present).sum(1)), (found.add, -loss(absent).sum(1))):
        for epsilon in (0.3, 1.0):
            values = -np.expm1(np.minimum(epsilon - losses, 0.0))
            error = 5 * values.std() / math.sqrt(samples)  # a false alarm has probability 1e-6
            assert error < values.mean() / 2
            assert values.mean() - error <= pmf.delta(epsilon) <= values.mean() + error + 1e-4


@pytest.mark.parametrize("kind", [float, int, np.float32, np.int64])
def test_trap_t1_nested_gaussians_count_whatever_the_type_of_the_multiplier(kind):
    _questions._rdp_epsilon.cache_clear()  # equal events of other types would be looked up
    _renyi.renyi_curve.cache_clear()
    # dp_accounting's Rényi accountant drops the inner composition unless the multiplier is a `float`
    inner = da.SelfComposedDpEvent(da.GaussianDpEvent(kind(2)), 4)
    event = da.SelfComposedDpEvent(da.PoissonSampledDpEvent(0.1, inner), 100)
    assert accounting.epsilon(event, 1e-5, accountant="rdp") == pytest.approx(7.9039, abs=1e-3)
    assert accounting.epsilon(event, 1e-5) == pytest.approx(accounting.epsilon(poisson(1.0, 0.1, 100), 1e-5), rel=1e-9)


def test_trap_t2_replacement_is_twice_the_distance_whoever_accounts():
    once = da.GaussianDpEvent(2.0)
    for accountant in ("pld", "rdp"):
        replaced = accounting.epsilon(once, 1e-5, adjacency="replace_one", accountant=accountant)
        assert replaced == accounting.epsilon(da.GaussianDpEvent(1.0), 1e-5, accountant=accountant)
    with pytest.raises(ValueError, match="half of what it is"):
        accounting.epsilon(poisson(2.0, 0.1), 1e-5, adjacency="replace_one", accountant="rdp")


@pytest.mark.slow
def test_trap_t3_mixtures_of_gaussians_answer_in_seconds():
    event = times(da.dp_event.MixtureOfGaussiansDpEvent(1.0, [0.0, 1.0, 2.0], [0.8, 0.15, 0.05]), 3)
    found = accounting.epsilon(event, 1e-5, interval=1e-2)
    assert accounting.epsilon(poisson(1.0, 0.2, 3), 1e-5) < found < accounting.epsilon(poisson(0.5, 0.2, 3), 1e-5)
    assert isinstance(loss_distribution(event, interval=1e-2).get_delta(1.0), float)


def test_trap_t4_deltas_beneath_the_truncated_tails_are_refused():
    with pytest.raises(ValueError, match="1e-12"):
        accounting.epsilon(poisson(1.0, 0.05, 40), 1e-13)
    close = accounting.epsilon(poisson(1.0, 0.05, 40), 1.1e-12)
    assert close <= accounting.epsilon(poisson(1.0, 0.05, 40), 1.1e-12, accountant="rdp")


def test_trap_t5_equal_steps_are_composed_at_once():
    one, other = (da.PoissonSampledDpEvent(q, da.GaussianDpEvent(1.3)) for q in (0.05, 0.06))
    listed = da.ComposedDpEvent([one, other] * 200)
    power, calls = LossPmf._power, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LossPmf, "_power", lambda pmf, n, *aim: calls.append(n) or power(pmf, n, *aim))
        found = accounting.epsilon(listed, 1e-5)
    assert calls == 4 * [200]
    short = da.ComposedDpEvent([times(one, 200), times(other, 200)])
    assert found == pytest.approx(accounting.epsilon(short, 1e-5), rel=1e-6)


def test_trap_t6_little_noise_does_not_fill_the_memory():
    assert len(loss_distribution(poisson(0.1, 0.01, 1000)).remove.mass) < 1e6
    # rare, large losses: the window of the transform must follow the tails
    rare = loss_distribution(poisson(0.4, 1e-4, 10_000), interval=1e-4)
    assert len(rare.remove.mass) < 1e6


def test_trap_t7_the_grid_moves_epsilon_by_little_and_upwards():
    event = poisson(1.0, 0.02, 1000)
    fine, wide, widest = (accounting.epsilon(event, 1e-6, interval=h) for h in (1e-4, 1e-3, 1e-2))
    assert fine <= wide <= widest <= fine * 1.02
    assert wide <= fine * (1 + 1e-3)
    # steps that lose less than an interval get a finer one
    small = poisson(50.0, 0.01, 1000)
    chosen = accounting.epsilon(small, 1e-6)
    assert chosen <= 1.01 * accounting.epsilon(small, 1e-6, interval=5e-6)


def test_trap_t8_renyi_is_looser_and_never_the_default():
    event = poisson(0.8, 1e-3, 1000)
    assert accounting.epsilon(event, 1e-5) == pytest.approx(0.3036, abs=2e-4)
    assert accounting.epsilon(event, 1e-5, accountant="rdp") > 3 * 0.3036


def test_trap_t9_epsilon_is_above_that_of_the_central_limit():
    for sigma, steps in ((1.3, 3516), (1.1, 14063), (0.7, 10547)):
        q = 256 / 60_000
        mu = q * math.sqrt(steps * math.expm1(sigma**-2))
        assert gaussian_delta(accounting.epsilon(poisson(sigma, q, steps), 1e-5), 1 / mu) < 0.99e-5


def test_trap_t10_truncation_has_its_price():
    plan = lambda most: dpx.dp_sgd(10_000, 100, 1000, noise_multiplier=1.0, max_batch_size=most).epsilon(1e-5)
    untruncated = dpx.dp_sgd(10_000, 100, 1000, noise_multiplier=1.0).epsilon(1e-5)
    assert untruncated == pytest.approx(1.8289, abs=2e-3)
    assert untruncated < plan(150) == pytest.approx(1.8312, abs=2e-3)
    # who is added takes the place of another: at twice the distance, but in one of the two data sets only
    assert plan(120) == pytest.approx(5.230, abs=2e-3)


def test_trap_t11_tiny_rates_stay_upper_bounds():
    event = poisson(1.0, 1e-4, 100)
    rdp = accounting.epsilon(event, 1e-5, accountant="rdp")
    assert 0 < accounting.epsilon(event, 1e-5) <= rdp < math.inf


def test_trap_t12_trees_are_one_gaussian_and_nothing_else():
    tree = da.SingleEpochTreeAggregationDpEvent(2.0, 7)
    with pytest.raises(ValueError, match="know"):
        accounting.epsilon(tree, 1e-5, accountant="rdp")
    for accountant in ("pld", "rdp"):
        with pytest.raises(ValueError):
            accounting.epsilon(tree, 1e-5, adjacency="replace_one", accountant=accountant)
    rdp = accounting.epsilon(tree, 1e-5, adjacency="replace_special", accountant="rdp")
    # 7 steps are 3 levels: dpx's own trees are accounted for by the exact formula, which is below
    assert accounting.epsilon(da.GaussianDpEvent(2.0 / math.sqrt(3)), 1e-5) <= rdp


def test_import_is_light_and_leaves_devices_alone():
    code = (
        "import sys, dpx, jax; assert not {'dp_accounting', 'scipy', 'matplotlib', 'typer', 'rich'} & set(sys.modules);"
        "jax.config.update('jax_num_cpu_devices', 3); assert len(jax.devices()) == 3"
    )
    subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, check=True)
