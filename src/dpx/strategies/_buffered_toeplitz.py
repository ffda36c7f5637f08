"""Buffered linear Toeplitz strategies: all steps correlated through a few buffers."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from .._checks import positive_int, real_array
from ._base import MSG_NO_REPLAY, AbstractAnalysedStrategy, check_steps
from ._buffered_optimize import interlaced_inverse, optimize_buffers
from ._error import Workload, check_kind, geometric, inverse_error, resolve_workload
from ._sensitivity import check_participation, toeplitz, toeplitz_sensitivity
from ._stream import Ring, init_ring, weighted_sum


class BufferedToeplitz(AbstractAnalysedStrategy[Ring]):
    r"""A buffered linear Toeplitz matrix (BLT): $c_0 = 1$, $c_t = \sum_i \omega_i \theta_i^{t-1}$, with $m$ buffers.

    $x_t = z_t - \sum_i \omega_i s_i$, then $s_i \leftarrow \theta_i s_i + x_t$. Keeps $m$ copies of the parameters; three of them
    come within a few per cent of the square root that keeps all. Never ends.

    !!! success "Guarantee"

        The sensitivity is exact, for one participation and for several: $\omega > 0$, $0 \le \theta < 1$ and
        $\sum_i \omega_i \le 1$ make the coefficients non-negative and non-increasing. Other $\omega$ get an upper bound.

    **Arguments:**

    - `decays`: $\theta_1 > \dots > \theta_m$, distinct, in $[0, 1)$.
    - `scales`: $\omega_1, \dots, \omega_m$, finite.

    ??? cite "Reference"

        Dvijotham et al., *Efficient and near-optimal noise generation for streaming differential privacy*, FOCS 2024. McMahan,
        Xu and Zhang, *A hassle-free algorithm for strong differential privacy in federated learning systems*, EMNLP 2024.
    """

    decays: tuple[float, ...] = eqx.field(static=True)
    scales: tuple[float, ...] = eqx.field(static=True)
    steps: int | None = eqx.field(static=True)
    bands: int | None = eqx.field(static=True)
    replay_depth: int | None = eqx.field(static=True)

    def __init__(self, decays: Sequence[float] | np.ndarray, scales: Sequence[float] | np.ndarray):
        what = "a sequence of numbers, one for each buffer"
        theta = real_array("BufferedToeplitz(decays=...)", decays, what)
        omega = real_array("BufferedToeplitz(scales=...)", scales, what)
        if theta.ndim != 1 or theta.shape != omega.shape or theta.size == 0:
            raise ValueError(
                "`BufferedToeplitz(decays=..., scales=...)` must be two sequences of the same length, one number a buffer; "
                f"got shapes {theta.shape} and {omega.shape}."
            )
        if not (np.isfinite(theta).all() and (theta >= 0).all() and (theta < 1).all()):
            raise ValueError(
                f"`BufferedToeplitz(decays=...)` must lie in [0, 1), or the buffers never forget; got {theta}."
            )
        if len(np.unique(theta)) < len(theta):
            raise ValueError(
                f"`BufferedToeplitz(decays=...)` must be distinct; got {theta}. Add the scales of equal ones."
            )
        if not np.isfinite(omega).all():
            raise ValueError(f"`BufferedToeplitz(scales=...)` must be finite; got {omega}.")
        order = np.argsort(-theta)
        self.decays = tuple(theta[order].tolist())
        self.scales = tuple(omega[order].tolist())
        self.steps = None
        self.bands = None
        self.replay_depth = None

    @classmethod
    def optimize(
        cls,
        steps: int,
        buffers: int = 3,
        min_separation: int = 1,
        *,
        max_participations: int | None = 1,
        workload: Workload = "prefix",
        kind: str = "mean",
    ) -> "BufferedToeplitz":
        r"""The buffers of least error, by quasi-Newton steps in float64 on closed forms that cost $O(m^2)$, whatever $n$ is.

        The decays of $C$ and of its inverse interlace in $(0, 1)$, which keeps every step feasible: the unknowns are the gaps.

        **Arguments:**

        - `steps`: $n$.
        - `buffers`: $m$.
        - `min_separation`, `max_participations`, `workload`, `kind`: the error to be minimised, as for `error`. Workloads other
            than `"prefix"` cost $O(n m)$ (Toeplitz) or $O(n^2 m)$ (a matrix) an evaluation.
        """
        call = "BufferedToeplitz.optimize"
        steps = positive_int(f"{call}(steps=...)", steps)
        buffers = positive_int(f"{call}(buffers=...)", buffers)
        check_kind(call, kind)
        queries = (
            None if isinstance(workload, str) and workload == "prefix" else resolve_workload(call, workload, steps)
        )
        _, separation, k = check_participation("BufferedToeplitz", steps, min_separation, max_participations)
        return cls(*optimize_buffers(steps, buffers, queries, kind, separation, k))

    def coefficients(self, steps: int) -> np.ndarray:
        """The first column of $C$, of shape `(steps,)`."""
        tail = sum(omega * geometric(theta, steps) for theta, omega in zip(self.decays, self.scales, strict=True))
        return np.concatenate([[1.0], np.asarray(tail)[: steps - 1]])

    def inverse_coefficients(self, steps: int) -> np.ndarray:
        """The first column of the inverse of $C$, of shape `(steps,)`."""
        from scipy.signal import lfilter

        # the recurrence of the buffers on an impulse: P(x) / Q(x), with the zeros of Q as decays
        poles = np.linalg.eigvals(np.diag(self.decays) - np.outer(np.ones(len(self.decays)), self.scales))
        distinct = len(np.unique(poles.round(12))) == len(poles)
        if np.isrealobj(poles) and distinct and np.abs(poles).max() < 1:
            theta, omega = interlaced_inverse(np.asarray(self.decays), poles)
            tail = sum(o * geometric(t, steps) for t, o in zip(theta, omega, strict=True))
            return np.concatenate([[1.0], np.asarray(tail)[: steps - 1]])
        impulse = np.zeros(steps)
        impulse[0] = 1.0
        return np.asarray(lfilter(np.poly(self.decays), np.real(np.poly(poles)), impulse))

    def materialize(self, steps: int) -> np.ndarray:
        return toeplitz(self.coefficients(check_steps("BufferedToeplitz.materialize", steps, None)))

    def init(self, struct: PyTree[Any]) -> PyTree:
        return init_ring(struct, len(self.decays))

    def step(self, z: PyTree[Array], buffers: Ring) -> tuple[PyTree[Array], Ring]:
        decays, scales = np.asarray(self.decays), np.asarray(self.scales)
        correlate = lambda z, s: (
            z.astype(s.dtype) - weighted_sum(jnp.asarray(scales, s.dtype), s, buffers.count + s.shape[0])
        )
        advance = lambda x, s: jnp.asarray(decays, s.dtype).reshape(-1, *(1,) * x.ndim) * s + x[None]
        x = jax.tree.map(correlate, z, buffers.slots)
        slots = jax.tree.map(advance, x, buffers.slots)
        return jax.tree.map(lambda x, z: x.astype(z.dtype), x, z), Ring(buffers.count + 1, slots)

    def replay(self, regenerate: Callable[[Any], PyTree[Array]], step: Int[Array, ""]) -> PyTree[Array]:
        raise ValueError(MSG_NO_REPLAY.format(name="BufferedToeplitz"))

    def sensitivity(self, steps: int, min_separation: int = 1, max_participations: int | None = 1) -> float:
        steps, separation, k = check_participation("BufferedToeplitz", steps, min_separation, max_participations)
        return toeplitz_sensitivity(self.coefficients(steps), separation, k)

    def inverse_row_power(self, steps: int) -> np.ndarray:
        steps = check_steps("BufferedToeplitz.inverse_row_power", steps, None)
        return np.cumsum(np.square(self.inverse_coefficients(steps)))

    def decoder_error(self, queries: np.ndarray, kind: str) -> float:
        return inverse_error(self.inverse_coefficients(len(queries)), queries, kind)
