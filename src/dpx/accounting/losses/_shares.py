"""Moving masses to a grid so that what meets at a point has a mean of at least, or at most, that point."""

import numpy as np

_SWEEPS = 3


def up_shares(
    losses: np.ndarray, log_q: np.ndarray, width: float, targets: np.ndarray, is_lower: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    r"""How much of each mass goes up to its target; the rest goes down to the target of the mass below.

    Target $k$, at the loss `width * targets[k]`, lies between `losses[k]` and `losses[k + 1]`. From below it gets $U_k$ of the mass $q_k$,
    from above $D_{k+1} = q_{k+1} - U_{k+1}$. Their mean ratio is that of the target where $D_{k+1} = \kappa_k U_k$ for the ratio $\kappa_k$ of
    the distances. A few sweeps of relaxation, from $U_k = q_k q_{k+1} / (q_{k+1} + \kappa_k q_k)$, solve that where masses are smooth. Then
    $U_k$ is cut to what $D_{k+1}$ allows; that makes $D_k$ larger, and so breaks no other condition, whatever the masses are.

    **Arguments:**

    - `losses`, `log_q`: ascending, and the logarithms of the masses under $Q$.
    - `is_lower`: whether means must be at least their target's ratio, so that ratios are lowered; otherwise at most, so that they are raised.

    **Returns:**

    The shares, and how far each mass is below its target and above the one before. The lowest one goes down, and the highest up, by
    one target if they go where nothing balances them.
    """
    above = np.maximum(targets * width - losses, 0.0)
    below = losses - np.concatenate([targets[:1] - 1, targets[:-1]]) * width
    below = np.maximum(below, 0.0)
    if len(losses) == 1:
        return np.array([float(above[0] == 0 if is_lower else below[0] > 0)]), above, below
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        # kappa times the mass below over the mass above
        log_kappa = np.log(-np.expm1(-above[:-1])) - np.log(np.expm1(below[1:]))
        weight = np.exp(np.clip(log_kappa + log_q[:-1] - log_q[1:], -600.0, 600.0))
        up = np.append(1 / (1 + weight), 0.5)
        for _ in range(_SWEEPS):
            up[:-1] = np.clip(up[:-1] + (1 - up[1:] - weight * up[:-1]) / (1 + weight), 0.0, 1.0)
        if is_lower:
            up[-1] = float(above[-1] == 0)
            up[:-1] = np.minimum(up[:-1], (1 - up[1:]) / (weight * (1 + 1e-10)))
        else:
            up[0] = float(below[0] > 0)
            up[1:] = np.maximum(up[1:], 1 - weight * (1 - 1e-10) * up[:-1])
    return up, above, below
