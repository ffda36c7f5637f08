"""Membership inference, shadow models and exposure: attacks that describe, and prove nothing."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from dpx import auditing

A: Any = auditing  # what a wrong call gives is tested here, and not what an editor says of it

ATTACKS = ["lira", "lira_offline", "rmia", "loss"]


def world(models=16, examples=400, seed=0, leak=1.5):
    """Numbers of models that like what they were trained on, by an example's own difficulty."""
    rng = np.random.default_rng(seed)
    member = rng.random((models + 1, examples)) < 0.5
    hardness = 2 * rng.normal(size=examples)
    phi = hardness + leak * member + rng.normal(size=member.shape)
    return phi[0], phi[1:], member[1:], member[0]


def auc(scores, member):
    return A.attack_report(scores[member], scores[~member]).auc


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_find_members(attack):
    target, shadows, membership, member = world()
    scores = A.membership_inference(target, shadows, membership, attack=attack)
    assert scores.shape == target.shape and len(np.unique(scores)) == len(scores)
    weakest = {"lira": 0.8, "lira_offline": 0.78, "rmia": 0.7, "loss": 0.6}[attack]
    assert weakest < auc(scores, member) < 0.95


@pytest.mark.parametrize("attack", ATTACKS)
def test_without_leakage_they_find_nothing(attack):
    target, shadows, membership, member = world(leak=0.0)
    assert abs(auc(A.membership_inference(target, shadows, membership, attack=attack), member) - 0.5) < 0.14


def test_many_shadows_have_variances_of_their_own():
    target, shadows, membership, member = world(models=80)
    scores = A.membership_inference(target, shadows, membership)
    out = np.where(membership, np.nan, shadows)
    inside = np.where(membership, shadows, np.nan)
    density = lambda x: (
        -0.5 * ((target - np.nanmean(x, 0)) / np.nanstd(x, 0, ddof=1)) ** 2 - np.log(np.nanstd(x, 0, ddof=1))
    )
    np.testing.assert_allclose(scores, density(inside) - density(out), rtol=1e-9)
    assert auc(scores, member) > 0.8


def test_offline_with_one_variance_ranks_as_the_difference_to_the_mean():
    target, shadows, membership, _ = world()
    scores = A.membership_inference(target, shadows, membership, attack="lira_offline")
    difference = target - np.nanmean(np.where(membership, np.nan, shadows), 0)
    assert (np.argsort(scores) == np.argsort(difference)).all()


def test_ties_of_rmia_are_broken_by_the_gain():
    target, shadows, membership, _ = world(examples=50)
    few = A.membership_inference(target, shadows, membership, attack="rmia", population=[0, 1, 2])
    assert len(np.unique(few)) == 50


def test_logit_scores_keep_digits_of_sure_models():
    logits = np.array([[30.0, 0.0, -5.0], [200.0, 100.0, 0.0]])
    scores = A.logit_scores(logits, np.array([0, 1]))
    np.testing.assert_allclose(scores, [30 - np.log1p(np.exp(-5.0)), -100.0], rtol=1e-12)
    assert A.logit_scores(logits[None], np.array([0, 1])).shape == (1, 2)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda t, s, m: A.membership_inference(t, attack="lira"), "need `shadows`"),
        (lambda t, s, m: A.membership_inference(t, s[:, :3], m), "a column for each"),
        (lambda t, s, m: A.membership_inference(t, s, m.astype(float)), "booleans"),
        (lambda t, s, m: A.membership_inference(t, s, np.ones_like(m)), "out of the data"),
        (lambda t, s, m: A.membership_inference(t * np.nan, s, m), "NaN"),
        (lambda t, s, m: A.membership_inference(t, s, m, attack="best"), "attack"),
        (lambda t, s, m: A.membership_inference(t, s, m, attack="rmia", population=[]), "population"),
        (lambda t, s, m: A.logit_scores(np.ones((2, 3)), np.array([0.5, 1])), "integer label"),
        (lambda t, s, m: A.logit_scores(np.ones((2, 3)), np.array([0, 3])), "0 to 2"),
        (lambda t, s, m: A.train_shadows(lambda k: k, jr.key(0)), "split"),
        (lambda t, s, m: A.train_shadows(lambda k: k, jr.split(jr.key(0), 2), vectorised="yes"), "True or False"),
    ],
)
def test_mistakes_are_refused_by_name(call, words):
    with pytest.raises(ValueError, match=words):
        call(*world(examples=20)[:3])


def test_shadows_are_the_models_that_each_key_gives():
    def train(key_and_shift):
        key, shift = key_and_shift
        model = eqx.nn.MLP(2, 1, 3, 1, key=key)
        return eqx.tree_at(lambda m: m.layers[0].bias, model, replace_fn=lambda b: b + shift)

    keys = jr.split(jr.key(0), 3), np.arange(3.0, dtype=np.float32)
    found = [A.train_shadows(train, keys, vectorised=v) for v in (True, False, None)]
    for models in found:
        assert models.layers[0].weight.shape == (3, 3, 2) and models.activation is not None
        for i in range(3):
            alone = train((keys[0][i], keys[1][i]))
            one = jax.tree.map(lambda x, i=i: x[i], eqx.filter(models, eqx.is_array))
            for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eqx.filter(alone, eqx.is_array)), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-6)
    assert eqx.filter_vmap(lambda m: m(jnp.ones(2)))(found[1]).shape == (3, 1)
