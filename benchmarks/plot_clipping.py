"""Draws docs/images/clipping.png: test accuracy on the digits against the clip norm, at equal epsilon; real runs.

python benchmarks/plot_clipping.py docs/images/clipping.png
"""

import json
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
import optax
from matplotlib.figure import Figure

import dpx
from dpx.cli._digits import DigitsCNN, cross_entropy, digits, evaluate

BATCH, STEPS, EPSILON, DELTA, SEEDS = 250, 48, 3.0, 1e-5, (0, 1)
NORMS = (0.01, 0.1, 1.0, 10.0, 30.0, 100.0, 1000.0)
RATE = 2.0  # of steps measured in clip norms

optim = optax.sgd(RATE, momentum=0.5)


@eqx.filter_jit
def step(private_grad, model, state, opt_state, batch, mask):
    clipping = private_grad.clipping
    # in units of the clip norm, so that one learning rate suits all of them; an adapted norm is public
    rescale = clipping.rescale(state.clipping)
    unit = clipping.sensitivity if rescale is None else clipping.sensitivity * rescale[0]
    grads, state, _ = private_grad(model, batch, state, mask=mask)
    grads = jax.tree.map(lambda g: g / unit, grads)
    updates, opt_state = optim.update(grads, opt_state, eqx.filter(model, eqx.is_inexact_array))
    return eqx.apply_updates(model, updates), state, opt_state


def accuracy(clipping, train, test, seed):
    plan = dpx.dp_sgd(len(train[0]), BATCH, STEPS, epsilon=EPSILON, delta=DELTA, clipping=clipping)
    assert plan.epsilon(DELTA) <= EPSILON
    private_grad = plan.private_gradient(cross_entropy, method=dpx.Ghost())
    model = DigitsCNN(jr.key(seed))
    state = private_grad.init(model, key=jr.key(100 + seed))
    opt_state = optim.init(eqx.filter(model, eqx.is_inexact_array))
    for batch, mask in plan.batches(train, seed=seed):
        model, state, opt_state = step(private_grad, model, state, opt_state, batch, mask)
    state.raise_if_failed()
    return float(evaluate(model, *test)[1])


if __name__ == "__main__":
    train, test = digits()
    test = jax.device_put(test)
    mean = lambda clipping: float(np.mean([accuracy(clipping, train, test, seed) for seed in SEEDS]))
    flat, adaptive, slack = [], [], []
    automatic = mean(dpx.NormalizedClipping(1.0))
    print(f"AUTO-S {automatic:.3f}", flush=True)
    for norm in NORMS:
        flat.append(mean(dpx.FlatClipping(norm)))
        adaptive.append(mean(dpx.AdaptiveClipping(norm, count_noise_multiplier=BATCH / 20)))
        slack.append(mean(dpx.SlackClipping(norm)))
        print(f"C {norm:<8g} flat {flat[-1]:.3f}  adaptive {adaptive[-1]:.3f}  slack {slack[-1]:.3f}", flush=True)
    out = Path(sys.argv[1])
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    axes.semilogx(NORMS, flat, "o-", label="FlatClipping(C)")
    axes.semilogx(NORMS, adaptive, "s-", label="AdaptiveClipping(initial_norm=C)")
    axes.semilogx(NORMS, slack, "^-", label="SlackClipping(norm=C)")
    axes.axhline(automatic, color="C2", label="NormalizedClipping (AUTO-S), which has no C")
    title = f"digits, epsilon {EPSILON:g}, {STEPS} steps of {BATCH}, mean of {len(SEEDS)} seeds"
    axes.set(xlabel="clip norm C", ylabel="test accuracy", ylim=(0, 1), title=title)
    axes.legend(loc="lower center")
    figure.savefig(out, dpi=150)
    print(json.dumps({"norms": NORMS, "flat": flat, "adaptive": adaptive, "slack": slack, "auto_s": automatic}))
