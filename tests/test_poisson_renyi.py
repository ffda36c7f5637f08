"""Poisson sampling under Rényi accounting: the general bound against exact moments of discrete Gaussians and of hostile pairs."""

import math
from typing import Any

import dp_accounting as da
import numpy as np
import pytest
from scipy.special import comb, logsumexp

import dpx
from dpx import accounting
from dpx.accounting.losses._zcdp import sampled_divergences, sampled_zcdp

ORDERS = np.array([2, 3, 4, 5, 8, 16, 33, 64], float)


def sampled(q, rho):
    return da.PoissonSampledDpEvent(q, da.dp_event.ZCDpEvent(rho))


def exact(log_p, log_q, alpha):
    """D_alpha of two discrete distributions, in logarithms."""
    return logsumexp(alpha * log_p + (1 - alpha) * log_q) / (alpha - 1)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0, 8.0])
@pytest.mark.parametrize("q", [1e-3, 0.05, 0.3, 0.9])
def test_the_bound_is_above_discrete_gaussians_in_both_directions(sigma, q):
    y = np.arange(-400, 420)
    absent, present = (-((y - shift) ** 2) / (2 * sigma**2) for shift in (0, 1))
    absent, present = absent - logsumexp(absent), present - logsumexp(present)
    mixed = np.logaddexp(math.log1p(-q) + absent, math.log(q) + present)
    orders = np.array([1.25, 1.9, *ORDERS])
    bound = sampled_zcdp(sampled(q, 0.5 / sigma**2), orders)
    for alpha, claimed in zip(orders, bound, strict=True):
        truth = max(exact(mixed, absent, alpha), exact(absent, mixed, alpha))
        assert truth <= claimed * (1 + 1e-7)
        assert claimed <= alpha / (2 * sigma**2)  # and sampling never costs


@pytest.mark.parametrize("seed", range(20))
def test_the_bound_is_above_pairs_without_any_symmetry(seed):
    rng = np.random.default_rng(seed)
    p, q = (rng.dirichlet(np.full(rng.integers(2, 6), 10 ** rng.uniform(-0.5, 1.5))) + 1e-9 for _ in range(2))
    size = min(len(p), len(q))
    p, q = np.log(p[:size] / p[:size].sum()), np.log(q[:size] / q[:size].sum())
    divergence = lambda orders: np.array([max(exact(p, q, a), exact(q, p, a)) for a in np.atleast_1d(orders)])
    for gamma in (0.01, 0.2, 0.7, 0.99):
        mixed = np.logaddexp(math.log1p(-gamma) + p, math.log(gamma) + q)
        bound = sampled_divergences(gamma, divergence, ORDERS)
        truth = np.array([max(exact(mixed, p, a), exact(p, mixed, a)) for a in ORDERS])
        assert np.all(truth <= bound * (1 + 1e-7) + 1e-12)


def test_the_factor_of_three_suffices_point_by_point():
    # with r the ratio q / p: what addition costs is at most what removal does, plus twice the terms from 3 on of the reverse ratio, plus a
    # multiple of 1 - s, whose mean is 0
    r = np.concatenate([np.geomspace(1e-6, 1, 400), np.geomspace(1, 1e3, 50)])
    for alpha in (3, 4, 5, 6, 8, 12, 20, 40):
        for gamma in (1e-4, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.95, 0.999):
            s = 1 - gamma + gamma * r
            ell = np.arange(3, alpha + 1)[:, None]
            extra = (comb(alpha, ell) * gamma**ell * (1 - gamma) ** (alpha - ell) * r ** (1.0 - ell)).sum(0)
            assert np.all(s ** (1.0 - alpha) <= (s**alpha + 2 * extra + (2 * alpha - 1) * (1 - s)) * (1 + 1e-9) + 1e-12)


def test_the_closed_form_is_the_published_sum():
    q, rho = 0.05, 0.125
    for alpha in (2, 3, 7, 20):
        total = (1 - q) ** (alpha - 1) * (alpha * q - q + 1)
        total += comb(alpha, 2) * q**2 * (1 - q) ** (alpha - 2) * math.exp(2 * rho)
        total += sum(
            3 * comb(alpha, k) * (1 - q) ** (alpha - k) * q**k * math.exp((k - 1) * k * rho)
            for k in range(3, alpha + 1)
        )
        assert sampled_zcdp(sampled(q, rho), np.array([alpha]))[0] == pytest.approx(
            math.log(total) / (alpha - 1), rel=1e-7
        )


def test_the_discrete_gaussian_is_amplified():
    options: Any = dict(accountant="rdp")
    plan = dpx.PrivacyPlan(
        dpx.PoissonSampler(1000, 50, 40), dpx.FlatClipping(1.0), dpx.DiscreteGaussian(2.0), **options
    )
    everybody = dpx.PrivacyPlan(
        dpx.PoissonSampler(50, 50, 40), dpx.FlatClipping(1.0), dpx.DiscreteGaussian(2.0), **options
    )
    assert plan.epsilon(1e-4) == pytest.approx(1.041, abs=1e-3)
    assert everybody.epsilon(1e-4) == pytest.approx(17.4, abs=0.1)
    # what continuous noise costs, of which Rényi accounting knows everything, is below
    assert plan.epsilon(1e-4) > dpx.dp_sgd(1000, 50, 40, noise_multiplier=2.0, accountant="rdp").epsilon(1e-4)
    # in a ledger, in a filter, and calibrated
    ledger = accounting.PrivacyLedger("add_or_remove_one").spend(plan).spend(plan)
    assert plan.epsilon(1e-4) < ledger.epsilon(1e-4) < 2 * plan.epsilon(1e-4)
    budget = accounting.PrivacyFilter(3.0, 1e-4, hint=plan).spend(plan)
    assert 0.05 < budget.fraction_spent < 0.5
    noise: Any = dpx.DiscreteGaussian()
    found = dpx.PrivacyPlan(plan.sampler, plan.clipping, noise, **options).calibrate(1.0, 1e-4)
    assert 2.0 < found.noise_multiplier < 2.2 and 0.999 < found.epsilon(1e-4) <= 1.0
    with pytest.raises(ValueError, match="replace_one"):
        accounting.epsilon(plan.event, 1e-4, adjacency="replace_one", accountant="rdp")


def test_sampling_at_the_extremes():
    orders = np.array([1.5, 2.0, 10.0])
    np.testing.assert_array_equal(sampled_zcdp(sampled(1.0, 0.1), orders), 0.1 * orders)
    np.testing.assert_array_equal(sampled_zcdp(sampled(0.0, 0.1), orders), 0.0 * orders)
    assert np.all(np.isfinite(sampled_zcdp(sampled(0.5, 200.0), np.array([2.0, 512.0, 1024.0]))))
    tiny = sampled_zcdp(sampled(1e-6, 1e-6), orders)
    assert np.all(tiny >= 0) and tiny[1] == pytest.approx(1e-12 * 2e-6, rel=1e-3)
