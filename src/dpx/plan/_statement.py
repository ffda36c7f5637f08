"""The privacy statement, in plain English."""

from .._round import round_down, round_epsilon, round_up
from ._facts import Facts

NOT_PRIVATE = (
    "This run is NOT differentially private: contributions are not clipped and no noise is added (epsilon is infinite). Nothing "
    "that depends on its result may be published as private."
)


def statement(facts: Facts) -> str:
    """The facts as text. Numbers are rounded against us: what is read is still a bound, and a run with them keeps it."""
    unit, noise = facts.unit, facts.noise
    ideal = "floating-point noise behaves like real-valued noise"
    if facts.is_exact:
        ideal = "the bits of its key's stream are random"
    row = f"one row of the data is one {unit}"
    if unit == "user":
        row = "each user's examples are told apart correctly"
    lines = [
        f"This run is ({round_epsilon(facts.epsilon)}, {round_up(facts.delta)})-differentially private for one {unit}.",
        "",
        f"- Neighbouring data sets: {facts.neighbours} (adjacency `{facts.adjacency}`).",
        f"- Mechanism: {facts.mechanism}, on sums of clipped per-{unit} gradients.",
        f"- Clipping: {facts.clipping_text}.",
        f"- Noise multiplier: {round_up(noise['noise_multiplier'], 9)}; noise of scale {round_up(noise['scale'])}"
        f"{' clip norms' if noise['scale_is_in_clip_norms'] else ''} in every coordinate of the sum"
        f"{' before it is correlated' if noise['bands'] != 1 else ''}.",
        *_side_lines(facts),
        f"- Sampling: {facts.sampling['assumption']}.",
        *_shuffling_lines(facts),
        f"- Steps: {_steps(facts)}. All intermediate models may be published.",
        f"- Epsilon: {round_epsilon(facts.epsilon)} at delta {round_up(facts.delta)}, an upper bound computed with {facts.tool} (dp_accounting "
        f"{facts.versions['dp-accounting']}).",
        f"- Attack advantage: whoever knows everything but one {unit} tells with true-positive rate minus false-positive rate at most "
        f"{round_epsilon(facts.curve.advantage)} whether that one was used.",
        f"- Assumed: batches are drawn as stated, with a secret seed; {row} and the loss sees one at "
        "a time; the noise key is secret and used once; choices made by looking at the data (architecture, hyperparameters, "
        f"preprocessing) are not counted; and {ideal}.",
    ]
    return "\n".join(lines)


def _steps(facts: Facts) -> str:
    taken, planned = facts.sampling["steps"], facts.sampling["planned_steps"]
    return str(taken) if taken == planned else f"the first {taken} of the {planned} that were planned"


def _side_lines(facts: Facts) -> list[str]:
    lines = []
    if facts.gradient_noise_multiplier is not None:
        lines.append(
            f"- The clip norm is adapted by private counts, whose noise is part of the noise multiplier: the gradient alone gets "
            f"{round_up(facts.gradient_noise_multiplier)}."
        )
    if facts.metrics_text:
        lines.append(f"- Also released at every step, and part of epsilon: {facts.metrics_text}.")
    return lines


def _shuffling_lines(facts: Facts) -> list[str]:
    gap, delta = facts.shuffling_gap, facts.delta
    if gap is None or gap["delta_at_least"] <= delta:
        return []
    return [
        f"- Why no amplification is claimed: one epoch of Poisson samples would have epsilon {round_up(gap['epsilon'])} at delta "
        f"{round_up(delta)}; of shuffled batches delta at that epsilon is at least {round_down(gap['delta_at_least'], 3)} (Chua et al. 2024)."
    ]
