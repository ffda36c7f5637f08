"""Membership inference from losses: how well attacks do that see a final model, for a figure in a report."""

import math
from typing import Any, Literal, get_args

import numpy as np

from .._checks import at_least_zero, choice, described, positive_float, real_array
from .._types import RealScalarLike, Unchecked

Attack = Literal["lira", "lira_offline", "rmia", "loss"]

_FEW = 64  # shadow models, below which one variance for all examples is the better estimate

_MSG_SHADOWS = "`membership_inference({name}=...)` must have a row for each shadow model, a column for each of {size} examples; got {got}."


def logit_scores(logits: Any, labels: Any) -> np.ndarray:
    r"""$\phi = \log p_y - \log \sum_{c \ne y} p_c$ of each example: what attacks on classifiers are made of.

    From logits, and never from probabilities, of which 1 - p has no digits left where a model is sure.

    **Arguments:**

    - `logits`: `(..., examples, classes)`.
    - `labels`: `(examples,)`.
    """
    from scipy import special

    z = real_array("logit_scores(logits=...)", logits, "an array (..., examples, classes)")
    y = np.asarray(labels)
    if z.ndim < 2 or y.shape != z.shape[-2:-1] or z.shape[-1] < 2 or not np.issubdtype(y.dtype, np.integer):
        raise ValueError(
            f"`logit_scores(logits, labels)` needs an integer label for each example, and logits (..., examples, classes); got {described(logits)} "
            f"and {described(labels)}."
        )
    if y.size and not 0 <= y.min() <= y.max() < z.shape[-1]:
        raise ValueError(f"`logit_scores(labels=...)` must lie in 0 to {z.shape[-1] - 1}; got {y.min()} to {y.max()}.")
    is_own = np.arange(z.shape[-1]) == y[:, None]
    own = np.sum(np.where(is_own, z, 0.0), axis=-1)
    return own - np.asarray(special.logsumexp(np.where(is_own, -np.inf, z), axis=-1))


def membership_inference(
    target: Any,
    shadows: Any = None,
    membership: Any = None,
    *,
    attack: Unchecked[Attack] = "lira",
    population: Any = None,
    offset: RealScalarLike = 0.3,
    gamma: RealScalarLike = 1.0,
) -> np.ndarray:
    r"""The score of each example, high where it seems to have been in the target's training data.

    Give the scores of members and of others to `attack_report`: they describe an attack, and say nothing about epsilon. Nor do they find faults: with
    800 mislabelled canaries and 300 steps the AUC was 0.530 at epsilon 1, 0.531 at 8, and 0.5335 without any noise.

    | attack | needs | score |
    |---|---|---|
    | `"loss"` | nothing | the example's own number |
    | `"lira"` | shadow models with the example and without it | log ratio of two normal densities |
    | `"lira_offline"` | shadow models without it | how far above those, in their standard deviations |
    | `"rmia"` | shadow models without it | against how many others the example has gained more |

    **Arguments:**

    - `target`: of each example a number of the target model, such as `logit_scores` gives, or minus the loss; shape `(examples,)`.
    - `shadows`: the same of other models, trained on random halves of the examples; shape `(models, examples)`.
    - `membership`: `Bool[models, examples]`: which were in whose data.
    - `attack`: which.
    - `population`: for `"rmia"`, which examples stand for the population (booleans or positions); by default all.
    - `offset`: for `"rmia"`, $a$ in $\bar p = ((1 + a) p_\text{out} + 1 - a) / 2$.
    - `gamma`: for `"rmia"`, by what factor an example must have gained more.

    ??? cite "Reference"

        Carlini et al., *Membership inference attacks from first principles*, S&P 2022; Zarifzadeh et al., *Low-cost high-power membership inference
        attacks*, ICML 2024.
    """
    name = choice("membership_inference(attack=...)", attack, get_args(Attack))
    phi = real_array("membership_inference(target=...)", target, "a vector, one number for each example")
    if phi.ndim != 1 or phi.size == 0 or np.isnan(phi).any():
        raise ValueError(
            f"`membership_inference(target=...)` must be a vector of numbers, none of them NaN; got {described(target)}."
        )
    if name == "loss":
        return phi.copy()
    others, member = _shadows(shadows, membership, phi.size)
    # an infinite logit is a sure one: far out, and not without order
    others, phi = np.clip(others, -1e6, 1e6), np.clip(phi, -1e6, 1e6)
    out_mean, out_deviation = _moments(others, ~member, "out of the data of some shadow model")
    if name == "lira_offline":
        from scipy import special

        return special.log_ndtr((phi - out_mean) / out_deviation)
    if name == "lira":
        in_mean, in_deviation = _moments(others, member, "in the data of some shadow model")
        log_density = lambda mean, deviation: -0.5 * ((phi - mean) / deviation) ** 2 - np.log(deviation)
        return log_density(in_mean, in_deviation) - log_density(out_mean, out_deviation)
    return _rmia(
        phi,
        others,
        member,
        population,
        at_least_zero("membership_inference(offset=...)", offset),
        positive_float("membership_inference(gamma=...)", gamma),
    )


def _shadows(shadows: Any, membership: Any, size: int) -> tuple[np.ndarray, np.ndarray]:
    if shadows is None or membership is None:
        raise ValueError(
            '`membership_inference(attack=...)`: all attacks but "loss" need `shadows` and their `membership`.'
        )
    others = real_array("membership_inference(shadows=...)", shadows, "an array (models, examples)")
    member = np.asarray(membership)
    for name, array, value in (("shadows", others, shadows), ("membership", member, membership)):
        if array.ndim != 2 or array.shape[1] != size or len(array) == 0:
            raise ValueError(_MSG_SHADOWS.format(name=name, size=size, got=described(value)))
    if member.dtype != np.bool_ or member.shape != others.shape or np.isnan(others).any():
        raise ValueError(
            "`membership_inference(shadows, membership)`: booleans of the shape of the shadows' numbers, none of which is NaN."
        )
    return others, member


def _moments(values: np.ndarray, use: np.ndarray, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of each example over the shadows of one kind; one deviation for all where there are few."""
    count = use.sum(0)
    if (count == 0).any():
        raise ValueError(
            f"`membership_inference(membership=...)`: every example must be {what}; {int((count == 0).sum())} are not."
        )
    mean = np.sum(np.where(use, values, 0.0), axis=0) / count
    squares = np.sum(np.where(use, (values - mean) ** 2, 0.0), axis=0)
    if len(values) < _FEW or (count < 2).any():
        variance = np.full_like(mean, squares.sum() / max(1, (count - 1).clip(0).sum()))
    else:
        variance = squares / (count - 1)
    return mean, np.sqrt(np.maximum(variance, 1e-24))


def _rmia(
    phi: np.ndarray, others: np.ndarray, member: np.ndarray, population: Any, offset: float, gamma: float
) -> np.ndarray:
    from scipy import special

    # log p of log(p / (1 - p))
    log_p, log_others = -np.logaddexp(0.0, -phi), -np.logaddexp(0.0, -others)
    outside = np.where(member, -np.inf, log_others)
    log_out = special.logsumexp(outside, axis=0) - np.log((~member).sum(0))
    log_mean = np.log(((1 + offset) * np.exp(log_out) + max(0.0, 1 - offset)) / 2 + 1e-300)
    gain = log_p - log_mean
    chosen = np.arange(len(gain)) if population is None else np.asarray(population)
    is_mask = chosen.dtype == np.bool_ and chosen.shape == gain.shape
    is_positions = np.issubdtype(chosen.dtype, np.integer) and np.all((chosen >= 0) & (chosen < len(gain)))
    if not (is_mask or is_positions) or not np.any(chosen if is_mask else np.ones_like(chosen)):
        raise ValueError(
            f"`membership_inference(population=...)` must name examples, one at least, by booleans or positions; got {described(population)}."
        )
    reference = np.sort(gain[chosen])
    share = np.searchsorted(reference, gain - math.log(gamma), side="right") / len(reference)
    # the share has few values; among equals the larger gain is the more likely member
    order = np.argsort(np.argsort(gain, kind="stable"), kind="stable")
    return share + order / (len(gain) * (len(reference) + 1.0))
