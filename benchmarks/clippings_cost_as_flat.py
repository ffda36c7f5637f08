"""Every clipping costs with Ghost what flat clipping costs.

    python benchmarks/clippings_cost_as_flat.py

Target: at most 1.1 times the step of FlatClipping, on the MLP and the transformer of ghost_costs_a_backward.py.
"""

from typing import Any

import equinox as eqx
import jax
import jax.random as jr

import dpx
from _timing import interleaved, table, target
from ghost_costs_a_backward import Workload, mlp, transformer


def steps(workload: Workload) -> dict[str, Any]:
    model, loss, batch, _ = workload
    clippings = {
        "FlatClipping": dpx.FlatClipping(1.0),
        "GroupClipping per layer": dpx.GroupClipping.per_layer(model, 1.0),
        "  optimal allocation": dpx.GroupClipping.per_layer(model, 1.0, allocation="optimal"),
        "NormalizedClipping": dpx.NormalizedClipping(1.0),
        "PSACClipping": dpx.PSACClipping(1.0),
        "HardThresholdClipping": dpx.HardThresholdClipping(1.0, 10.0),
        "AdaptiveClipping": dpx.AdaptiveClipping(1.0),
        "AdaptiveClipping per layer": dpx.AdaptiveClipping.per_layer(model, 1.0),
    }
    out = {}
    for name, clipping in clippings.items():
        private_grad = dpx.PrivateGradient(loss, clipping, dpx.IndependentGaussian(1.0), method=dpx.Ghost())
        state = private_grad.init(model, key=jr.key(1))
        compiled = eqx.filter_jit(
            lambda model, batch, state, private_grad=private_grad: private_grad(model, batch, state)[:2]
        )
        out[name] = lambda compiled=compiled, state=state: compiled(model, batch, state)
    return out


if __name__ == "__main__":
    print(jax.devices()[0].device_kind)
    for name, workload in (("MLP 784-1024x3-10, batch 256", mlp()), ("transformer, d 256, 4 layers", transformer())):
        print(f"\n{name}")
        seconds = interleaved(steps(workload), repeats=20)
        table(seconds, "FlatClipping")
        for clipping, value in seconds.items():
            target(f"{clipping.strip()} over FlatClipping, {name.split()[0]}", value / seconds["FlatClipping"], 1.1)
