"""A private run of the Trainer takes 0.8 times the steps a second of a hand-written loop WITHOUT privacy, and records hold it up by at most 2 %.

    python benchmarks/trainer_costs_no_more.py [steps]

The README's model. The hand-written loop is as quick as one gets it: one jitted function of a donated carry, batches of 256 rows by one NumPy index
each, nothing looked at on the way. `fit` samples by Poisson, pads to 368 rows, clips, adds noise, checks, and keeps history. One process, taking
turns; medians of wall time. A machine that is busy with other things starves the thread that makes batches.
"""

import shutil
import sys
import tempfile
import time
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax

import dpx
from _timing import target
from dpx.training import _loop

STEPS = int(float(sys.argv[1])) if len(sys.argv) > 1 else 4000
TURNS, EVERY = 5, 100

x = np.random.default_rng(0).normal(size=(2000, 8)).astype(np.float32)
y = np.sin(x.sum(1, keepdims=True))
model = eqx.nn.MLP(8, 1, 32, 2, key=jr.key(0))
optim = optax.adam(3e-3)


def loss(model, x, y):
    return jnp.mean((model(x) - y) ** 2)


def by_hand():
    """Seconds a step without privacy."""
    params, static = eqx.partition(jax.tree.map(lambda a: jnp.copy(a) if eqx.is_array(a) else a, model), eqx.is_array)
    carry = params, optim.init(params)

    def step(carry, x, y):
        params, opt_state = carry
        mean = lambda p: jnp.mean(jax.vmap(lambda x, y: loss(eqx.combine(p, static), x, y))(x, y))
        updates, opt_state = optim.update(jax.grad(mean)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    jitted = jax.jit(step, donate_argnums=0)
    rng = np.random.default_rng(0)
    rows = rng.integers(len(x), size=(STEPS, 256))
    carry = jax.block_until_ready(jitted(carry, x[rows[0]], y[rows[0]]))
    begin = time.perf_counter()
    for i in rows:
        carry = jitted(carry, x[i], y[i])
    jax.block_until_ready(carry)
    return (time.perf_counter() - begin) / STEPS


class Timed:
    """Seconds that the loop spends in a function, which it replaces."""

    def __init__(self, owner: Any, name: str):
        self.seconds, real = 0.0, getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return real(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - begin

        setattr(owner, name, call)


def fitted(trainer):
    """Seconds a step of the loop, from its first step to its last, compilation not counted."""
    spent = Timed(_loop.Loop, "_program")
    run = Timed(_loop.Loop, "run")
    trainer.fit(model, (x, y), seed=0, key=jr.key(0), progress=False)
    return (run.seconds - spent.seconds) / STEPS


if __name__ == "__main__":
    print(f"{STEPS} steps, {jax.devices()[0].device_kind}; wall time, taking turns")
    plan = dpx.dp_sgd(num_examples=len(x), batch_size=256, steps=STEPS, noise_multiplier=1.0)
    alone, together = (dpx.Trainer(plan, loss, optim, steps_per_call=n) for n in (1, 20))
    kinds = {
        "by hand, no privacy": by_hand,
        "fit": lambda: fitted(alone),
        "fit, 20 steps a call": lambda: fitted(together),
    }
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(TURNS + 1):
        for name, run in kinds.items():
            spent = run()
            if turn:
                seconds[name].append(spent)
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    reference = medians["by hand, no privacy"]
    for name, median in medians.items():
        print(f"{name:22} {median * 1e6:8.0f} us a step, {reference / median:5.2f} x the steps a second")
    target(
        "steps a second by hand over those of fit with 20 steps a call",
        medians["fit, 20 steps a call"] / reference,
        1 / 0.8,
    )
    target("steps a second by hand over those of fit", medians["fit"] / reference, 1 / 0.6)

    shares = []
    for _ in range(TURNS):
        folder = tempfile.mkdtemp()
        trainer = dpx.Trainer(plan, loss, optim, checkpoint=dpx.Checkpoints(folder, every=EVERY))
        saving, loop = Timed(_loop.Loop, "save"), Timed(_loop.Loop, "run")
        trainer.fit(model, (x, y), seed=0, key=jr.key(0), progress=False)
        shares.append(saving.seconds / (STEPS * medians["fit"]))
        shutil.rmtree(folder)
    print(f"records every {EVERY} steps hold the loop up by {', '.join(f'{share:.1%}' for share in shares)}")
    target(f"share of the loop's time that records every {EVERY} steps take", float(np.median(shares)), 0.02)
