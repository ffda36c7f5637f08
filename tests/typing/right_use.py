"""What users write, and what an editor knows of it. Pyright must report nothing, and reveal the types that stand beside; nothing here is run."""

from typing import Any, reveal_type

import dp_accounting
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax

import dpx
from dpx import accounting, metrics


def loss(model: eqx.nn.Linear, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.sum((model(x) - y) ** 2)


model = eqx.nn.Linear(3, 1, key=jr.key(0))
data = (np.ones((1000, 3)), np.ones((1000, 1)))

# integers of NumPy and JAX, neighbours by name or by member, a clip norm as a number
plan = dpx.dp_sgd(np.int64(1000), 10, jnp.array(5), epsilon=1.0, delta=1e-5, clipping=0.5)
dpx.dp_sgd(1000, 10, epochs=1.1, noise_multiplier=np.float32(1.0), adjacency="replace_one")
dpx.dp_sgd(1000, 10, 5, noise_multiplier=1.0, adjacency=dp_accounting.NeighboringRelation.REPLACE_SPECIAL)
dpx.PoissonSampler(1000, 10, 5, truncated_batch_size=20)
reveal_type(plan)  # PrivacyPlan
reveal_type(plan.epsilon(1e-5))  # float
reveal_type(plan.epsilon_bracket(1e-5))  # tuple[float, float]
reveal_type(plan.calibrate(1.0, 1e-5, parameter="steps"))  # PrivacyPlan
reveal_type(plan.statement(1e-5))  # str
reveal_type(plan.trade_off().advantage)  # float

private_grad = plan.private_gradient(loss, method=dpx.Ghost(), has_aux=False)
state = private_grad.init(model, key=jr.key(0))
optim = optax.sgd(0.1)
opt_state: Any = optim.init(eqx.filter(model, eqx.is_inexact_array))
reveal_type(private_grad)  # PrivateGradient
reveal_type(state)  # PrivateGradientState
for batch, mask in plan.batches(data, seed=0, start=np.int32(0)):
    reveal_type(mask)  # ndarray[tuple[Any, ...], dtype[Any]]
    grads, state, diagnostics = private_grad(model, batch, state, mask=mask)
    reveal_type(diagnostics)  # Sensitive[Diagnostics]
    reveal_type(diagnostics.reveal())  # Diagnostics
    reveal_type(diagnostics.reveal().norms)  # Array
    updates, opt_state = optim.update(grads, opt_state)
    model = eqx.apply_updates(model, updates)

ledger = accounting.PrivacyLedger("add_or_remove_one").spend(plan).spend(dp_accounting.GaussianDpEvent(10.0), count=2)
reveal_type(ledger)  # PrivacyLedger
reveal_type(dpx.GroupClipping.per_layer(model, 1.0, allocation="equal"))  # GroupClipping
reveal_type(plan.with_metrics(loss=metrics.Mean("losses", 0.0, 1.0, 10.0)))  # PrivacyPlan
