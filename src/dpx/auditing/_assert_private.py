"""`assert_private`: white-box tests of a plan, in a test of one's own."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import PyTree

from .._checks import instance, positive_int, probability
from .._tree import leaf_paths
from .._types import Batch, Integer, RealScalarLike, Unchecked
from ..gradients import AbstractGradientMethod, Auto
from ..plan import PrivacyPlan
from ..private_gradient import PrivateGradient, PrivateGradientState
from ..problem import WithinUser, check_batch, trainable
from ._accounting_laws import accounting_laws, is_slow
from ._differences import ROWS, Row, Subject, difference_laws, hostile_rows, probes, public_scale
from ._noise_laws import stated_noise
from ._probe import probe_of, rows_of
from ._report import AuditedLaw, AuditReport
from ._residuals import Residuals, noise_laws
from ._sampling_laws import Found, sampling_laws
from ._statistics import chi_square_p_value

_SEED = 0xD9A0D17  # of all that the tests draw themselves, the noise's key included: a failure repeats
_DRAWS = 500_000  # numbers of noise, in which a scale 1 % too small shows
_NOT_PRIVATE = "contributions are bounded and hidden by noise"
_LATE = "past the plan's last step nothing is published"


def assert_private(
    plan: PrivacyPlan,
    loss: Callable[..., Any],
    model: PyTree,
    batch: Batch,
    *,
    false_alarm: RealScalarLike = 1e-6,
    steps: Integer = 60,
    method: AbstractGradientMethod = Auto(),
    filter_spec: PyTree = eqx.is_inexact_array,
    has_aux: bool = False,
    within_user: Unchecked[WithinUser] = "mean",
) -> AuditReport:
    """Asserts that what runs is what the plan states: bound, mask, noise, sampling and accounting, by exact laws. For a test in your CI.

    ```python
    def test_my_training_is_private():
        dpx.auditing.assert_private(plan, loss, model, (x[:8], y[:8]))
    ```

    It looks at differences of two steps under one key, in which the noise cancels; at the noise of steps whose rows are all masked out; at who is in
    which batch; and at what is paid for. docs/auditing.md says what each test finds. Nothing is trained, and a few seconds suffice.

    !!! success "Guarantee"

        Sound code fails with probability `false_alarm` at most, and always or never: everything that is drawn follows from fixed seeds. A failure
        names the law that is broken and the leaf.

    !!! warning

        That it passes says that the laws hold which it looks at, with the power that the report states; it proves no epsilon. It sees
        nothing of what your loop does beside the private gradient: for that there are `Recorder` and `assert_only_private`.

    **Arguments:**

    - `plan`: the plan, calibrated.
    - `loss`: your loss, of ONE example.
    - `model`: your model, or a small one of the same make.
    - `batch`: a few rows, as the loss takes them; made-up ones will do.
    - `false_alarm`: the probability with which sound code fails, over all tests.
    - `steps`: how many steps' noise is looked at (and about four times as many batches).
    - `method`, `filter_spec`, `has_aux`, `within_user`: as for `plan.private_gradient`.

    **Returns:** the `AuditReport`, which has passed.

    **Raises:**

    - `PrivacyAuditError`, whose text is the table of what was found and whose `report` has it as data.
    - `ValueError` for what cannot be audited: no plan, no loss, no rows.
    """
    report = audit_laws(
        plan, loss, model, batch, false_alarm=false_alarm, steps=steps, method=method, filter_spec=filter_spec,
        has_aux=has_aux, within_user=within_user,
    )  # fmt: skip
    report.raise_if_failed()
    return report


def audit_laws(
    plan: PrivacyPlan,
    loss: Callable[..., Any],
    model: PyTree,
    batch: Batch,
    *,
    false_alarm: RealScalarLike = 1e-6,
    steps: Integer = 60,
    method: AbstractGradientMethod = Auto(),
    filter_spec: PyTree = eqx.is_inexact_array,
    has_aux: bool = False,
    within_user: Unchecked[WithinUser] = "mean",
) -> AuditReport:
    """The report of `assert_private`, whether it has passed or not; arguments as there.

    **Returns:** the `AuditReport`; `report.raise_if_failed()` is what `assert_private` does with it.
    """
    options: dict[str, Any] = {
        "method": method,
        "filter_spec": filter_spec,
        "has_aux": has_aux,
        "within_user": within_user,
    }
    name = "assert_private"
    instance(f"{name}(plan=...)", plan, PrivacyPlan, "dpx.dp_sgd(...)")
    false_alarm = probability(f"{name}(false_alarm=...)", false_alarm)
    steps = positive_int(f"{name}(steps=...)", steps)
    batch, size = check_batch(batch)
    if size == 0:
        raise ValueError(f"`{name}(batch=...)` needs a row at least, to call the loss with.")
    title = f"white-box audit of a plan of {plan.steps} steps with `{type(plan.noise).__name__}` and `{type(plan.clipping).__name__}`"
    if not plan.mechanism.is_private:
        found = "`NoClipping`: gradients are neither clipped nor noised, and epsilon is infinite"
        return AuditReport(title, (AuditedLaw("P0", _NOT_PRIVATE, False, found),), false_alarm)
    found, notes = [], []
    with warnings.catch_warnings():
        # leaves that the probe's loss reaches and yours does not, or the other way round, are nothing that an audit is about
        warnings.simplefilter("ignore")
        found += _steps_of(plan, loss, model, batch, steps, options, notes)
    found += sampling_laws(plan.sampler, steps, _SEED)
    if not _is_known(plan):
        notes.append(
            f"`{type(plan.sampler).__name__}` is a sampler of your own: of its batches only the stated participation was looked at"
        )
    if is_slow(plan):
        notes.append("epsilon of this plan is found by samples, which takes minutes: the accounting was not looked at")
    delta = min(1e-5, 0.1 / plan.sampler.num_examples)
    found += accounting_laws(plan, delta)
    return decided(title, found, false_alarm, notes)


def decided(title: str, found: Iterable[Found], false_alarm: float, notes: Sequence[str] = ()) -> AuditReport:
    """The report: p-values below their share of the false alarm are failures."""
    found = list(found)
    level = false_alarm / max(1, sum(f.p_value is not None for f in found))
    laws = []
    for f in found:
        passed = bool(f.holds) if f.holds is not None else (f.p_value is not None and f.p_value >= level)
        power = f.power(level) if f.power is not None else ""
        laws.append(AuditedLaw(f.code, f.law, passed, f.found, f.where, f.p_value, power))
    return AuditReport(title, tuple(laws), false_alarm, notes=tuple(notes))


def _is_known(plan: PrivacyPlan) -> bool:
    kind = type(getattr(plan.sampler, "base", plan.sampler))
    return kind.__module__.startswith("dpx.")


class Program(eqx.Module):
    """A private gradient of a plan, on rows of one shape, as sums.

    **Arguments:**

    - `gradient`: the private gradient.
    - `model`: the model.
    - `normalizer`: the batch size that the PLAN states, whatever the gradient divides by.
    - `is_user`: whether rows have an axis of examples.
    """

    gradient: PrivateGradient
    model: PyTree
    normalizer: float = eqx.field(static=True)
    is_user: bool = eqx.field(static=True)

    def step(
        self, rows: tuple[Any, ...], mask: np.ndarray, state: PrivateGradientState
    ) -> tuple[list[np.ndarray], PrivateGradientState]:
        """The noisy sum of a step, leaf by leaf in float64, and the state after it."""
        if self.is_user:
            shape = jax.tree.leaves(rows)[0].shape[:2]
            mask = np.broadcast_to(mask[:, None], shape)
        grads, new, _ = self.gradient(self.model, rows, state, mask=jnp.asarray(mask))
        leaves = [np.asarray(g, np.float64) * self.normalizer for g in jax.tree.leaves(grads)]
        clipping = self.gradient.clipping
        rescale = clipping.rescale(state.clipping)
        if rescale is not None:
            params, _ = trainable(self.model, self.gradient.filter_spec)
            by = np.asarray(rescale, np.float64)
            leaves = [x / by[g] for x, g in zip(leaves, clipping.labels(params), strict=True)]
        return leaves, new

    def subject(self, state: PrivateGradientState, paths: Sequence[str], plan: PrivacyPlan) -> Subject:
        """For differences under the key of a state."""
        sums = lambda rows, mask: self.step(rows, mask, state)[0]
        return Subject(sums, float(plan.mechanism.sensitivity), plan.clipping.order, paths)


def _steps_of(
    plan: PrivacyPlan, loss: Callable[..., Any], model: PyTree, batch: tuple[Any, ...], steps: int, options: dict[str, Any],
    notes: list[str],
) -> list[Found]:  # fmt: skip
    found: list[Found] = []
    options = dict(options)
    is_user = plan.unit == "user"
    params, _ = trainable(model, options["filter_spec"])
    paths, sizes = leaf_paths(params), [x.size for x in jax.tree.leaves(params)]
    wrap = lambda gradient: Program(gradient, model, float(plan.sampler.batch_size), is_user)
    own = wrap(plan.private_gradient(loss, **options))
    probe = probe_of(loss, len(batch), options["filter_spec"], options["has_aux"])
    without_aux: dict[str, Any] = {**options, "has_aux": False}
    forced = wrap(plan.private_gradient(probe, **without_aux))
    key = jr.key(_SEED)

    # differences under one key, with gradients of the audit's own making
    state = forced.gradient.init(model, key=key)
    subject = forced.subject(state, paths, plan)
    rows = probes(batch, subject, sizes, is_user)
    found += difference_laws(subject, rows)
    found.append(public_scale(subject, rows[0]))

    # the noise, of the user's own program, with nobody in the batch
    length = min(steps, plan.steps)
    runs = _runs_of(sum(sizes), steps, length)
    residuals, states, metrics = _noise_of(own, rows_of(batch, ROWS), length, jr.split(key, runs))
    law = stated_noise(plan.mechanism, length)
    if law is None:
        notes.append(
            "the strategy's matrix is too large to be written down: the noise of single steps was not looked at"
        )
    elif not all(np.isfinite(x).all() for x in residuals):
        at = next(p for p, x in zip(paths, residuals, strict=True) if not np.isfinite(x).all())
        found.append(Found("N1", "the noise has the stated scale", "numbers that are not finite", at, holds=False))
    else:
        found += noise_laws(Residuals(residuals, paths, is_exact=law.kind != "integer"), law)
    found += _metric_laws(plan, metrics, notes)
    found += _runs(own, model, states)

    # differences of the user's own program, at the beginning and after some steps
    hostile: list[Row] = hostile_rows(batch)
    found += difference_laws(own.subject(states[0], paths, plan), hostile, ", your loss")
    if len(states) > 2:
        found += difference_laws(own.subject(states[-2], paths, plan), hostile[:2], ", your loss, later")
    found.append(_end(own, rows_of(batch, ROWS), plan, states[0]))
    return found


def _runs_of(dimension: int, steps: int, length: int) -> int:
    """In how many runs noise is drawn: one, or more where a run is short or a model small, so that 1 % of the scale shows."""
    wanted = min(max(steps, _DRAWS // max(1, dimension)), 4 * steps)
    return max(1, -(-wanted // length))


def _noise_of(
    program: Program, rows: tuple[Any, ...], steps: int, keys: Any
) -> tuple[list[np.ndarray], list[PrivateGradientState], list[dict[str, np.ndarray]]]:
    """Noisy sums of steps in which every row is masked out, by leaf, run after run; the first run's first two and last two states; what
    metrics released."""
    nobody = np.zeros(ROWS, bool)
    states, sums, metrics = [], [], []
    for run, key in enumerate(keys):
        now = program.gradient.init(program.model, key=key)
        seen = [now]
        for _ in range(steps):
            leaves, now = program.step(rows, nobody, now)
            sums.append([x.ravel() for x in leaves])
            values = program.gradient.metric_values(now)
            metrics.append({name: np.asarray(v, np.float64) for name, v in values.items()})
            # buffers may be large, and no others are used again
            seen = [*seen, now] if len(seen) < 4 else [*seen[:2], seen[-1], now]
        states = states if run else seen
    leaves = [np.stack(x) for x in zip(*sums, strict=True)]
    return leaves, states, metrics


def _runs(program: Program, model: PyTree, states: Sequence[PrivateGradientState]) -> list[Found]:
    """I3: two runs share no noise."""
    law = "two runs have keys of their own"
    try:
        keys = [np.asarray(program.gradient.init(model).key_data) for _ in range(2)]
    except RuntimeError:
        return []  # several processes, which must be given one
    differ = not np.array_equal(keys[0], keys[1])
    differ = differ and not any(np.array_equal(k, np.asarray(states[0].key_data)) for k in keys)
    return [Found("I3", law, "other keys" if differ else "the same key in two runs", holds=differ)]


def _end(program: Program, rows: tuple[Any, ...], plan: PrivacyPlan, state: PrivateGradientState) -> Found:
    """B1: the step after the last."""
    at_end = eqx.tree_at(lambda s: s.step, state, jnp.asarray(plan.steps, state.step.dtype))
    leaves, after = program.step(rows, np.zeros(ROWS, bool), at_end)
    stops = all(np.isnan(x).all() for x in leaves)
    try:
        after.raise_if_failed()
        stops = False
    except RuntimeError:
        pass
    found = "NaN, and the state says so" if stops else f"a gradient after {plan.steps} steps, which no budget covers"
    return Found("B1", _LATE, found, holds=stops)


def _metric_laws(plan: PrivacyPlan, released: Sequence[dict[str, np.ndarray]], notes: list[str]) -> list[Found]:
    """M1: of metrics that are one noisy sum, the noise of steps in which nobody took part."""
    found = []
    for name, metric in plan.metrics.items():
        if not hasattr(metric, "from_sum"):
            notes.append(
                f"metrics[{name!r}] is no noisy sum: its noise was not looked at (dpx.testing.check_metric does)"
            )
            continue
        values = np.stack([step[name] for step in released])
        shape, size = values.shape[1:], jnp.float32(plan.sampler.batch_size)
        from_sum: Any = metric
        at = [np.asarray(from_sum.from_sum(jnp.full(shape, x, jnp.float32), size), np.float64) for x in (0.0, 1.0)]
        with np.errstate(divide="ignore", invalid="ignore"):
            z = (values - at[0]) / (at[1] - at[0]) / float(metric.noise_multiplier)
        total = float(np.sum(z**2))
        ratio = np.sqrt(total / z.size)
        where, text = f"metrics[{name!r}]", f"{ratio:.5g} times the stated standard deviation, over {z.size} numbers"
        p = chi_square_p_value(total, z.size) if np.isfinite(total) else 0.0
        found.append(Found("M1", "the noise of a metric has the stated scale", text, where, p_value=p))
    return found
