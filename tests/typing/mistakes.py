"""What users get wrong. Pyright must report every line that ends in `# mistake`, and no other; nothing here is run."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import dpx
from dpx import accounting, metrics, sampling


def loss(model: eqx.nn.Linear, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.sum((model(x) - y) ** 2)


model = eqx.nn.Linear(3, 1, key=jr.key(0))
batch = (jnp.ones((8, 3)), jnp.ones((8, 1)))
clipping, noise = dpx.FlatClipping(1.0), dpx.IndependentGaussian(1.0)
plan = dpx.dp_sgd(1000, 10, 5, noise_multiplier=1.0)
private_grad = plan.private_gradient(loss)
state = private_grad.init(model)

# plans
dpx.dp_sgd(num_examples="many", batch_size=10, steps=5, noise_multiplier=1.0)  # mistake
dpx.dp_sgd(num_examples=1000, batch_size=[1], steps=5, noise_multiplier=1.0)  # mistake
dpx.dp_sgd(1000, 10, 2.5, noise_multiplier=1.0)  # mistake
dpx.dp_sgd(1000, 10, 5, noise=1.0)  # mistake
dpx.dp_sgd(1000, 10, 5, noise_multiplier=1.0, adjacency="remove_one")  # mistake
dpx.dp_sgd(1000, 10, 5, noise_multiplier=1.0, accountant="prv")  # mistake
dpx.dp_mf(1000, 10, 5, bands="all", noise_multiplier=1.0)  # mistake
dpx.dp_mf(1000, 10, 5, strategy=clipping, noise_multiplier=1.0)  # mistake
dpx.PrivacyPlan(dpx.PoissonSampler(1000, 10, 5), clipping, noise, adjacency="remove_one")  # mistake
dpx.PrivacyPlan(clipping, dpx.PoissonSampler(1000, 10, 5), noise)  # mistake
dpx.PrivacyPlan(dpx.PoissonSampler(1000, 10, 5), clipping, 1.0)  # mistake
plan.epsilon("1e-5")  # mistake
plan.epsilon(1e-5, steps="all")  # mistake
plan.calibrate(1.0, 1e-5, parameter="epochs")  # mistake
plan.private_gradient(loss, methd=dpx.Ghost())  # mistake
plan.private_gradient(loss, method=3)  # mistake
plan.private_gradient(3)  # mistake
plan.with_metrics(loss=3)  # mistake
plan.batches(jnp.ones((1000, 3)), seed=0)  # mistake
plan.batches(batch, seed="secret")  # mistake
plan.statement()  # mistake
plan.noise_multiplier = 2.0  # mistake

# steps
private_grad(model, batch, state, key=3)  # mistake
private_grad(model, batch, state, mask="x")  # mistake
private_grad(model, jnp.ones((8, 3)), state)  # mistake
private_grad(model, batch)  # mistake
private_grad.init(model, key=0)  # mistake
grads, state, diagnostics = private_grad(model, batch, state)
diagnostics.losses  # mistake
diagnostics.reveal().loss  # mistake
dpx.PrivateGradient(loss, clipping, noise, steps="5")  # mistake
dpx.PrivateGradient(loss, clipping, noise, unit="patient")  # mistake
dpx.PrivateGradient(loss, clipping)  # mistake

# parts
dpx.FlatClipping("1")  # mistake
dpx.GroupClipping.per_layer(model, 1.0, alocation="equal")  # mistake
dpx.GroupClipping.per_layer(model, 1.0, allocation="even")  # mistake
dpx.AdaptiveClipping.per_layer(model, 1.0, median=0.5)  # mistake
dpx.PoissonSampler("many", 10, 5)  # mistake
dpx.PoissonSampler(1000, 10, 5, max_physical_batch_size=20)  # mistake
dpx.CyclicPoissonSampler(1000, 10, 5)  # mistake
sampling.FixedSizeSampler(1000, 10.0, 5)  # mistake
dpx.CorrelatedGaussian(noise)  # mistake
dpx.Vectorized("small")  # mistake
metrics.Mean("losses", 0.0, 1.0, "noisy")  # mistake

# bookkeeping
accounting.PrivacyLedger("remove_one")  # mistake
ledger = accounting.PrivacyLedger("add_or_remove_one")
ledger.spend(1.0)  # mistake
ledger.spend(plan, count="twice")  # mistake
ledger.epsilon()  # mistake
accounting.epsilon(plan.event, 1e-5, adjacency="add")  # mistake
accounting.PrivacyFilter(1.0, 1e-5, "remove_one")  # mistake
np.asarray(diagnostics.reveal().norms)
