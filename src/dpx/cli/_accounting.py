"""`dpx calibrate`, `account`, `compare` and `report`: what a run costs, before it runs."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import typer

from .._files import write_text_atomically
from .._round import round_epsilon, round_up
from ..clipping import FlatClipping
from ..noise import AbstractNoise, CorrelatedGaussian, IndependentGaussian
from ..plan import PrivacyPlan, dp_mf, dp_sgd
from ..sampling import (
    AbstractSampler,
    BallsInBinsSampler,
    CyclicPoissonSampler,
    FixedSizeSampler,
    PoissonSampler,
    RandomAllocationSampler,
    ShuffleSampler,
)
from ..strategies import BandedToeplitz, BufferedToeplitz

_BANDS = (4, 16, 64)
_BUFFERS = 3


class Options(NamedTuple):
    """What describes a run, as typed.

    **Arguments:**

    - `examples`, `batch_size`, `steps`: its size.
    - `sampling`: the name of a sampler.
    - `bands`: of the strategy matrix; 1 is DP-SGD.
    - `adjacency`: who the neighbours are; None for the sampler's own.
    - `accountant`: `"pld"` or `"rdp"`.
    - `max_batch_size`: where Poisson batches are cut, if anywhere.
    - `clip_norm`: None if it is not chosen yet, in which case noise is stated in units of it.
    """

    examples: int
    batch_size: int
    steps: int
    sampling: str
    bands: int
    adjacency: str | None
    accountant: str
    max_batch_size: int | None
    clip_norm: float | None = None


def plan_of(options: Options, noise_multiplier: float | None) -> PrivacyPlan:
    """The plan that the options describe."""
    sampler = _sampler(options)
    noise: AbstractNoise = IndependentGaussian(noise_multiplier)
    if options.bands > 1:
        noise = CorrelatedGaussian(BandedToeplitz.optimize(options.steps, options.bands), noise_multiplier)
    return PrivacyPlan(
        sampler,
        FlatClipping(1.0 if options.clip_norm is None else options.clip_norm),
        noise,
        adjacency=options.adjacency or _usual_adjacency(sampler),
        accountant=options.accountant,
    )


def _usual_adjacency(sampler: AbstractSampler) -> str:
    return "add_or_remove_one" if "add_or_remove_one" in sampler.adjacencies else "replace_special"


def _sampler(options: Options) -> AbstractSampler:
    size = (options.examples, options.batch_size, options.steps)
    if options.max_batch_size is not None and (options.sampling != "poisson" or options.bands > 1):
        raise ValueError("--max-batch-size goes with `--sampling poisson` and independent noise.")
    match options.sampling:
        case "poisson" if options.bands > 1:
            return CyclicPoissonSampler(*size, options.bands)  # groups that take turns leave room for the bands
        case "poisson":
            return PoissonSampler(*size, options.max_batch_size)
        case "shuffle":
            return ShuffleSampler(*size)
        case "balls-in-bins":
            return BallsInBinsSampler(*size)
        case "random-allocation":
            epochs = max(1, round(options.steps * options.batch_size / options.examples))
            return RandomAllocationSampler(*size, epochs)
    return FixedSizeSampler(*size)


def calibrate(
    options: Options, solve: str, noise_multiplier: float | None, budget: dict[str, float | None], as_json: bool
) -> None:
    """Prints the plan that just keeps a budget."""
    if (solve == "noise-multiplier") != (noise_multiplier is None):
        given = "is what is looked for" if solve == "noise-multiplier" else "must be given"
        raise ValueError(f"--noise-multiplier {given} with `--solve {solve}`.")
    wanted: dict[str, Any] = {name: value for name, value in budget.items() if value is not None}
    if wanted.get("delta") is not None and "epsilon" not in wanted:
        delta = wanted.pop("delta")  # an attack's rates need none; it is for the epsilon that is printed
    else:
        delta = wanted.get("delta")
    if not wanted:
        raise ValueError("A budget is needed: --epsilon with --delta, --advantage, or --tpr with --fpr.")
    plan = plan_of(options, noise_multiplier).calibrate(**wanted, parameter=solve.replace("-", "_"))
    found = _summary(plan, delta)
    found["solved_for"] = solve
    found["budget"] = wanted
    if as_json:
        _print_json(found)
    else:
        _print_summary(found, f"{solve.replace('-', ' ')} found")


def account(options: Options, noise_multiplier: float, delta: float, as_json: bool) -> None:
    """Prints what a run costs: epsilon, advantage, and how it grows."""
    plan = plan_of(options, noise_multiplier)
    report = plan.report(delta, in_clip_norms=options.clip_norm is None)
    if as_json:
        _print_json(report)
        return
    _print_summary(_summary(plan, delta), "cost")
    table = _table("epsilon as the run goes on", "step", "epsilon")
    for step, epsilon in report["epsilon_after_steps"].items():
        table.add_row(f"{int(step):,}", round_epsilon(epsilon))
    _console().print(table)
    table = _table("attacks", "false-positive rate", "true-positive rate at most")
    for rate, power in report["true_positive_rate"].items():
        table.add_row(rate, round_epsilon(power))
    _console().print(table)


def compare(options: Options, epsilon: float, delta: float, as_json: bool) -> None:
    """Prints DP-SGD and matrix factorization with equal budgets, least error first."""
    rows = []
    for name, sampling, make in _candidates(options, {"epsilon": epsilon, "delta": delta}):
        row: dict[str, Any] = {"mechanism": name, "sampling": sampling}
        try:
            plan = make()
            row |= {
                "error": plan.error(),
                "step_error": plan.step_error(),
                "noise_multiplier": plan.noise_multiplier,
                "epsilon": plan.epsilon(delta),
                "adjacency": plan.adjacency,
                "reason": None,
            }
        except ValueError as error:
            row |= dict.fromkeys(("error", "step_error", "noise_multiplier", "epsilon", "adjacency")) | {
                "reason": str(error)
            }
        rows.append(row)
    rows.sort(key=lambda row: math.inf if row["error"] is None else row["error"])
    if as_json:
        _print_json({"epsilon": epsilon, "delta": delta, "clip_norm": 1.0, "plans": rows})
        return
    title = f"epsilon {round_up(epsilon)} at delta {round_up(delta)}, clip norm 1: error of sums of normalised gradients, and noise of one step"
    table = _table(title, "mechanism", "sampling", "error", "one step", "noise multiplier", "neighbours")
    for row in rows:
        if row["error"] is not None:
            numbers = (
                round_up(row["error"], 5),
                round_up(row["step_error"], 5),
                round_up(row["noise_multiplier"]),
                row["adjacency"],
            )
            table.add_row(row["mechanism"], row["sampling"], *numbers)
    _console().print(table)
    for row in rows:
        if row["error"] is None:
            _console().print(f"{row['mechanism']} ({row['sampling']}): {row['reason']}", highlight=False, markup=False)


def _candidates(options: Options, budget: dict[str, Any]):
    size = (options.examples, options.batch_size, options.steps)
    common: dict[str, Any] = {**budget, "accountant": options.accountant}
    sampled: dict[str, Any] = common | ({"adjacency": options.adjacency} if options.adjacency else {})
    # whose batches everybody's depend on has neighbours of the same size
    ordered: dict[str, Any] = common | {
        "adjacency": "replace_one" if options.adjacency == "replace_one" else "replace_special"
    }
    yield "DP-SGD", "Poisson", lambda: dp_sgd(*size, **sampled)
    most = min(options.steps, options.examples // options.batch_size)
    for bands in _BANDS:
        if bands <= most:
            yield (
                f"banded, {bands} bands",
                "cyclic Poisson",
                lambda b=bands: dp_mf(*size, bands=b, amplified=True, **sampled),
            )
    separation, participations = ShuffleSampler(*size).participation

    def buffered() -> PrivacyPlan:
        strategy = BufferedToeplitz.optimize(options.steps, _BUFFERS, separation, max_participations=participations)
        return dp_mf(*size, strategy=strategy, **ordered)

    yield f"buffered (BLT), {_BUFFERS} buffers", "fixed order", buffered
    yield "DP-SGD", "fixed order", lambda: _unamplified(size, ordered)


def _unamplified(size: tuple[int, int, int], options: dict[str, Any]) -> PrivacyPlan:
    budget = {name: options[name] for name in ("epsilon", "delta")}
    rest: dict[str, Any] = {name: options[name] for name in ("adjacency", "accountant")}
    return PrivacyPlan(ShuffleSampler(*size), FlatClipping(1.0), IndependentGaussian(), **rest).calibrate(**budget)


def report(
    options: Options, noise_multiplier: float | None, epsilon: float | None, delta: float, out: Path, as_json: bool
) -> None:
    """Writes report.json and privacy.png."""
    if (noise_multiplier is None) == (epsilon is None):
        raise ValueError("Give --noise-multiplier, or an --epsilon to calibrate it to: one of the two.")
    plan = plan_of(options, noise_multiplier)
    if epsilon is not None:
        plan = plan.calibrate(epsilon, delta)
    found = plan.report(delta, in_clip_norms=options.clip_norm is None)
    write_text_atomically(out / "report.json", json.dumps(finite(found), indent=2, allow_nan=False) + "\n")
    plan.plot(out / "privacy.png", delta)
    if as_json:
        _print_json(found)
        return
    _console().print(found["statement"], soft_wrap=True, highlight=False, markup=False)
    _console().print(f"\nWrote {out / 'report.json'} and {out / 'privacy.png'}.", soft_wrap=True)


def _summary(plan: PrivacyPlan, delta: float | None) -> dict[str, Any]:
    curve = plan.trade_off()
    return {
        "noise_multiplier": plan.noise_multiplier,
        "epsilon": None if delta is None else plan.epsilon(delta),
        "delta": delta,
        "advantage": curve.advantage,
        "steps": plan.steps,
        "batch_size": plan.sampler.batch_size,
        "num_examples": plan.sampler.num_examples,
        "sampler": type(plan.sampler).__name__,
        "bands": plan.noise.bands,
        "adjacency": plan.adjacency,
        "accountant": plan.accountant,
        "error": plan.error(),
    }


def _print_summary(found: dict[str, Any], title: str) -> None:
    table = _table(title, "", "")
    for name, value in found.items():
        if value is None or name in ("solved_for", "budget"):
            continue
        text = round_up(value) if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
        if name in ("epsilon", "advantage"):
            text = round_epsilon(value)
        table.add_row(name.replace("_", " "), text)
    _console().print(table)


def finite(value: Any) -> Any:
    """The same with "infinity" for infinite numbers, which JSON has none of."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return "infinity" if isinstance(value, float) and not math.isfinite(value) else value


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(finite(value), indent=2, allow_nan=False))


def _console():
    from rich.console import Console

    return Console()


def _table(title: str, *columns: str):
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=any(columns))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
