"""`Recorder`: the user's own loop, watched from the place of its private gradient."""

import threading
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .._checks import described, instance, probability
from .._types import Batch, Mask, PRNGKey, RealScalarLike, Unchecked
from ..plan import PrivacyPlan
from ..private_gradient import PrivateGradient, PrivateSum
from ..sampling import FixedSizeSampler, PoissonSampler, ShuffleSampler, UserSampler
from . import _statistics as statistics
from ._assert_private import decided
from ._noise_laws import stated_noise
from ._report import AuditReport
from ._residuals import Residuals, noise_laws
from ._sampling_laws import Found
from ._statistics import binomial_p_value, of_binomial, uniform_p_value

_KEPT = 4096  # numbers of a leaf's noise that are kept a step

_MSG_NOTHING = (
    "`Recorder.report(plan)`: nothing was recorded. Use the recorder in the place of the private gradient, "
    "`recorder(model, batch, state, mask=mask)`, and run some steps of your loop."
)


class _Log:
    """What a recorder has seen; on the host, and never shown."""

    def __init__(self):
        self.lock = threading.Lock()
        self.calls: list[dict[str, Any]] = []

    def __repr__(self) -> str:
        return f"a log of {len(self.calls)} calls"

    def add(self, key: Any, step: Any, count: Any, size: Any, noise: Any) -> None:
        """One call."""
        with self.lock:
            self.calls.append(
                {
                    "key": np.asarray(key).tobytes(),
                    "step": int(step),
                    "count": int(count),
                    "size": int(size),
                    "noise": [np.asarray(x, np.float64) for x in noise],
                }
            )


class Recorder(eqx.Module):
    """Stands in for a private gradient in your own training loop, and looks whether the loop does what the plan states.

    ```python
    recorder = dpx.auditing.Recorder(private_grad)
    train(recorder)  # your loop, with `recorder` where `private_grad` was
    recorder.report(plan).raise_if_failed()
    ```

    It returns what the private gradient returns. Beside that it takes each step once more with every row masked out, which costs about as much, and
    keeps the noise of that, how many rows were real, and a name for the state's key. So it finds a state that is not threaded, a key that is used
    twice, a mask that is forgotten, batches of another sampler, another rate or noise, and more steps than are paid for. What the loop
    does beside the private gradient, it does not see: for that there is `assert_only_private`.

    What is kept would undo the noise of the run: record tests, on made-up data, and publish nothing of them.

    **Arguments:**

    - `private_grad`: the private gradient, of a plan.
    """

    private_grad: Any
    log: _Log = eqx.field(static=True)

    def __init__(self, private_grad: Unchecked[PrivateGradient | PrivateSum]):
        kinds = (PrivateGradient, PrivateSum)
        if not isinstance(private_grad, kinds):
            instance("Recorder(private_grad=...)", private_grad, PrivateGradient, "plan.private_gradient(loss)")
        self.private_grad = private_grad
        self.log = _Log()

    def init(self, *args: Any, **kwargs: Any) -> Any:
        """As that of the private gradient."""
        return self.private_grad.init(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # whatever else a loop asks a private gradient
        if name.startswith("__") or name in ("private_grad", "log"):
            raise AttributeError(name)
        return getattr(self.private_grad, name)

    def __call__(
        self,
        model: PyTree,
        batch: Batch,
        state: Any,
        *,
        mask: Mask | None = None,
        key: PRNGKey | None = None,
        **options: Any,
    ) -> tuple[PyTree, Any, Any]:
        """As that of the private gradient; under `jit` and in loops of JAX's, too."""
        given: dict[str, Any] = {**options, "mask": mask, "key": key}
        out = self.private_grad(model, batch, state, **given)
        size = jax.tree.leaves(batch)[0].shape[0]
        units = jnp.ones(size, bool) if mask is None else jnp.asarray(mask)
        if units.ndim == 2:  # of users, those with a real row
            units = units.any(1)
        shape = jax.tree.leaves(batch)[0].shape[:2] if self.private_grad.unit == "user" else (size,)
        nothing, _, _ = self.private_grad(model, batch, state, **{**given, "mask": jnp.zeros(shape, bool)})
        normalizer = self.private_grad.normalizer
        clipping = self.private_grad.clipping
        rescale = clipping.rescale(state.clipping)
        leaves = jax.tree.leaves(nothing)
        if rescale is not None:
            leaves = [x / rescale[g] for x, g in zip(leaves, clipping.labels(nothing), strict=True)]
        # a part of each leaf, spread over it
        noise = [x.ravel()[:: max(1, -(-x.size // _KEPT))] * normalizer for x in leaves]
        jax.debug.callback(self.log.add, state.key_data, state.step, jnp.sum(units), jnp.asarray(size), noise)
        return out

    def report(self, plan: PrivacyPlan, *, false_alarm: RealScalarLike = 1e-6) -> AuditReport:
        """What the loop did, against what the plan states.

        **Arguments:**

        - `plan`: the plan, whose sampler, noise and steps should have been used.
        - `false_alarm`: the probability with which a sound loop fails.

        **Raises:** `ValueError` if nothing was recorded.
        """
        instance("Recorder.report(plan=...)", plan, PrivacyPlan, "dpx.dp_sgd(...)")
        level = probability("Recorder.report(false_alarm=...)", false_alarm)
        jax.effects_barrier()
        with self.log.lock:
            calls = sorted(self.log.calls, key=lambda c: (c["key"], c["step"]))
        if not calls:
            raise ValueError(_MSG_NOTHING)
        found = list(_laws_of(calls))
        found += _sizes(plan, np.array([c["count"] for c in calls]))
        within = [
            Found(
                "R2",
                "there are no more steps than the plan pays for",
                f"{len(calls)} of {plan.steps}",
                holds=len(calls) <= plan.steps,
            )
        ]
        notes: list[str] = []
        if plan.mechanism.is_private:
            found += within + _noise(plan, calls, notes)
        else:
            found.append(Found("P0", "contributions are bounded and hidden by noise", "`NoClipping`", holds=False))
        return decided(f"audit of {len(calls)} recorded steps of a training loop", found, level, notes)

    def __repr__(self) -> str:
        return f"Recorder({described(self.private_grad)}, {self.log!r})"


def _laws_of(calls: list[dict[str, Any]]) -> list[Found]:
    pairs = [(c["key"], c["step"]) for c in calls]
    repeated = len(pairs) - len(set(pairs))
    law = "no state is used for two steps, which would share their noise: thread it, `grads, state, _ = private_grad(model, batch, state)`"
    found = [
        Found(
            "R1",
            law,
            f"{repeated} of {len(pairs)} steps began with a key and a step that were used before",
            holds=repeated == 0,
        )
    ]
    keys = len({c["key"] for c in calls})
    steps = {key: sorted(c["step"] for c in calls if c["key"] == key) for key in {c["key"] for c in calls}}
    gaps = any(s != list(range(s[0], s[0] + len(s))) for s in steps.values()) and repeated == 0
    if gaps or keys > 1:
        text = f"{keys} runs" + (", with steps left out" if gaps else "")
        found.append(
            Found(
                "R3", "all steps belong to one run, which is what a plan pays for", text, holds=keys == 1 and not gaps
            )
        )
    return found


def _sizes(plan: PrivacyPlan, counts: np.ndarray) -> list[Found]:
    """How many rows were real."""
    sampler: Any = plan.sampler.base if isinstance(plan.sampler, UserSampler) else plan.sampler
    n, steps = sampler.num_examples, len(counts)
    rng = np.random.default_rng(0xC0)
    text = f"{counts.min()} to {counts.max()} real rows, {counts.mean():.5g} on average, over {steps} steps"
    remedy = " (pass `mask=mask`, and take batches from `plan.batches`)"
    law = "as many rows are real as the plan's sampler draws"
    if isinstance(sampler, FixedSizeSampler | ShuffleSampler):
        # the last batch of a pass may be smaller
        holds = bool(np.all(counts <= sampler.batch_size)) and counts.mean() > 0.5 * sampler.batch_size
        return [Found("S2", law, text + ("" if holds else remedy), holds=holds)]
    q = min(1.0, sampler.batch_size / n)
    if isinstance(sampler, PoissonSampler) and (sampler.max_batch_size is None or sampler.max_batch_size >= n):
        total = int(counts.sum())
        p = binomial_p_value(min(total, n * steps), n * steps, q)
        found = [
            Found("S1", f"every example is in every batch with probability {q:.6g}", text + (remedy if p < 1e-6 else ""), p_value=p,
                  power=lambda a: f"a rate {100 * statistics.least_rate_seen(n * steps, q, a):.2g} % off")
        ]  # fmt: skip
        p = uniform_p_value(of_binomial(counts, n, q, rng))
        return [*found, Found("S2", "sizes of batches are those of independent coins", text, p_value=p)]
    # of the other samplers, what one batch can be at most
    holds = bool(np.all(counts <= plan.sampler.physical_batch_size)) and bool(np.ptp(counts) > 0 or steps < 30)
    return [Found("S2", law, text + ("" if holds else remedy), holds=holds)]


def _noise(plan: PrivacyPlan, calls: list[dict[str, Any]], notes: list[str]) -> list[Found]:
    leaves = [np.stack([c["noise"][i] for c in calls]) for i in range(len(calls[0]["noise"]))]
    paths = [f"leaf {i}" for i in range(len(leaves))]
    steps = [c["step"] for c in calls]
    independent = plan.noise.bands == 1
    law = stated_noise(plan.mechanism, len(calls) if not independent else 1)
    if law is None:
        notes.append("the strategy's matrix is too large to be written down: the noise was not looked at")
        return []
    if not independent and steps != list(range(len(calls))):
        text = f"steps {steps[:6]}..., where {list(range(min(6, len(calls))))}... were due"
        return [Found("R4", "correlated noise is drawn step after step of one run", text, holds=False)]
    if not all(np.isfinite(x).all() for x in leaves):
        return [Found("N1", "the noise has the stated scale", "numbers that are not finite", holds=False)]
    return list(noise_laws(Residuals(leaves, paths, is_exact=law.kind != "integer"), law))
