"""The commands and their options."""

import contextlib
import enum
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer


class Noise(enum.Enum):
    """Mechanisms that the demo can train with."""

    independent = "independent"
    banded = "banded"


class Sampling(enum.Enum):
    """Who is in a batch."""

    poisson = "poisson"
    shuffle = "shuffle"
    balls_in_bins = "balls-in-bins"
    random_allocation = "random-allocation"
    fixed_size = "fixed-size"


class Neighbours(enum.Enum):
    """What neighbouring data sets are."""

    add_or_remove_one = "add_or_remove_one"
    replace_one = "replace_one"
    replace_special = "replace_special"


class Accountant(enum.Enum):
    """Privacy loss distributions, or Rényi."""

    pld = "pld"
    rdp = "rdp"


class Unknown(enum.Enum):
    """What calibration looks for."""

    noise_multiplier = "noise-multiplier"
    steps = "steps"
    batch_size = "batch-size"


Examples = Annotated[int, typer.Option(help="Size of the data set.")]
BatchSize = Annotated[int, typer.Option(help="Expected batch size.")]
Steps = Annotated[int, typer.Option(help="Number of steps.")]
Delta = Annotated[float, typer.Option(help="Delta: well below one over the number of examples.")]
Multiplier = Annotated[float | None, typer.Option(help="Standard deviation of the noise over the sensitivity.")]
Sampler = Annotated[
    Sampling, typer.Option(help="Who is in a batch. Shuffled data is accounted for without amplification.")
]
Bands = Annotated[
    int, typer.Option(help="Bands of the strategy matrix: 1 is DP-SGD; more is banded matrix factorization (DP-FTRL).")
]
Adjacency = Annotated[
    Neighbours | None,
    typer.Option(help="What neighbours are; by default adding or removing one, where the sampler allows it."),
]
Tool = Annotated[Accountant, typer.Option(help="Privacy loss distributions (tight), or Rényi.")]
MostExamples = Annotated[int | None, typer.Option(help="Cut larger Poisson batches, which costs privacy.")]
ClipNorm = Annotated[
    float | None,
    typer.Option(help="Bound on one gradient's norm; without it noise is stated in units of the clip norm."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")]

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Differentially private training."
)


@app.callback()
def _main() -> None:
    """Differentially private training."""


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Mistakes in what was typed are told without a traceback."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _options(
    examples: int,
    batch_size: int,
    steps: int,
    sampling: Sampling,
    bands: int,
    adjacency: Neighbours | None,
    accountant: Accountant,
    max_batch_size: int | None,
    clip_norm: float | None = None,
) -> Any:
    from ._accounting import Options

    return Options(
        examples,
        batch_size,
        steps,
        sampling.value,
        bands,
        None if adjacency is None else adjacency.value,
        accountant.value,
        max_batch_size,
        clip_norm,
    )


@app.command()
def calibrate(
    examples: Examples,
    batch_size: BatchSize,
    steps: Steps,
    epsilon: Annotated[float | None, typer.Option(help="Budget, with --delta.")] = None,
    delta: Annotated[float | None, typer.Option(help="Delta: well below one over the number of examples.")] = None,
    advantage: Annotated[
        float | None, typer.Option(help="Budget instead: largest true-positive minus false-positive rate of an attack.")
    ] = None,
    tpr: Annotated[float | None, typer.Option(help="Budget instead: largest true-positive rate, at --fpr.")] = None,
    fpr: Annotated[float | None, typer.Option(help="False-positive rate of the attack.")] = None,
    solve: Annotated[
        Unknown, typer.Option(help="What to look for; the value given for it, if any, is where the search starts.")
    ] = Unknown.noise_multiplier,
    noise_multiplier: Multiplier = None,
    sampling: Sampler = Sampling.poisson,
    bands: Bands = 1,
    adjacency: Adjacency = None,
    accountant: Tool = Accountant.pld,
    max_batch_size: MostExamples = None,
    as_json: Json = False,
) -> None:
    """Finds the noise multiplier, the number of steps or the batch size that just keeps a budget."""
    from ._accounting import calibrate as run

    budget = {
        "epsilon": epsilon,
        "delta": delta,
        "advantage": advantage,
        "true_positive_rate": tpr,
        "false_positive_rate": fpr,
    }
    with _told():
        options = _options(examples, batch_size, steps, sampling, bands, adjacency, accountant, max_batch_size)
        run(options, solve.value, noise_multiplier, budget, as_json)


@app.command()
def account(
    examples: Examples,
    batch_size: BatchSize,
    steps: Steps,
    noise_multiplier: Annotated[float, typer.Option(help="Standard deviation of the noise over the sensitivity.")],
    delta: Delta,
    sampling: Sampler = Sampling.poisson,
    bands: Bands = 1,
    adjacency: Adjacency = None,
    accountant: Tool = Accountant.pld,
    max_batch_size: MostExamples = None,
    clip_norm: ClipNorm = None,
    as_json: Json = False,
) -> None:
    """Says what a run costs: epsilon, attack rates, and how epsilon grows with the steps."""
    from ._accounting import account as run

    with _told():
        options = _options(
            examples, batch_size, steps, sampling, bands, adjacency, accountant, max_batch_size, clip_norm
        )
        run(options, noise_multiplier, delta, as_json)


@app.command()
def compare(
    examples: Examples,
    batch_size: BatchSize,
    steps: Steps,
    epsilon: Annotated[float, typer.Option(help="Budget of every plan.")],
    delta: Delta,
    adjacency: Adjacency = None,
    accountant: Tool = Accountant.pld,
    as_json: Json = False,
) -> None:
    """Ranks DP-SGD and matrix factorization by their error at equal epsilon."""
    from ._accounting import compare as run

    with _told():
        options = _options(examples, batch_size, steps, Sampling.poisson, 1, adjacency, accountant, None)
        run(options, epsilon, delta, as_json)


@app.command()
def report(
    examples: Examples,
    batch_size: BatchSize,
    steps: Steps,
    delta: Delta,
    noise_multiplier: Multiplier = None,
    epsilon: Annotated[float | None, typer.Option(help="Budget to calibrate the noise to, instead.")] = None,
    sampling: Sampler = Sampling.poisson,
    bands: Bands = 1,
    adjacency: Adjacency = None,
    accountant: Tool = Accountant.pld,
    max_batch_size: MostExamples = None,
    clip_norm: ClipNorm = None,
    out: Annotated[Path, typer.Option(help="Folder for report.json and privacy.png.")] = Path("dpx-report"),
    as_json: Json = False,
) -> None:
    """Writes a report that is complete enough to publish: report.json and privacy.png."""
    from ._accounting import report as run

    with _told():
        options = _options(
            examples, batch_size, steps, sampling, bands, adjacency, accountant, max_batch_size, clip_norm
        )
        run(options, noise_multiplier, epsilon, delta, out, as_json)


@app.command()
def demo(
    epsilon: Annotated[float, typer.Option(help="Privacy budget.")] = 3.0,
    delta: Annotated[float, typer.Option(help="Privacy budget.")] = 1e-5,
    batch_size: Annotated[int, typer.Option(help="Expected batch size.")] = 500,
    steps: Annotated[int, typer.Option(help="Number of steps.")] = 60,
    clip_norm: Annotated[float, typer.Option(help="Bound on the norm of one example's gradient.")] = 0.5,
    learning_rate: Annotated[float, typer.Option(help="Learning rate of the private run.")] = 4.0,
    noise: Annotated[
        Noise, typer.Option(help="Independent (DP-SGD), or correlated by a banded matrix (DP-FTRL).")
    ] = Noise.independent,
    seed: Annotated[
        int | None,
        typer.Option(help="Makes the run reproducible, and no longer private; by default from the system's entropy."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for report.json and curve.png.")] = Path("dpx-demo"),
    baseline: Annotated[bool, typer.Option(help="Also train without privacy.")] = True,
) -> None:
    """Trains a small CNN on 4,000 handwritten digits with DP-SGD, next to the same without privacy."""
    from ._demo import run

    with _told():
        run(epsilon, delta, batch_size, steps, clip_norm, learning_rate, noise.value, seed, out, baseline)


@app.command()
def audit(
    epsilon: Annotated[float, typer.Option(help="Privacy budget.")] = 3.0,
    delta: Annotated[float, typer.Option(help="Privacy budget.")] = 1e-5,
    batch_size: Annotated[int, typer.Option(help="Expected batch size.")] = 500,
    steps: Annotated[int, typer.Option(help="Number of steps.")] = 60,
    clip_norm: Annotated[float, typer.Option(help="Bound on the norm of one example's gradient.")] = 0.5,
    canaries: Annotated[int, typer.Option(help="Rows whose presence the attack is to tell.")] = 1000,
    seed: Annotated[int | None, typer.Option(help="Makes the attack reproducible; by default from the system.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for audit.json and audit.png.")] = Path("dpx-audit"),
    as_json: Json = False,
) -> None:
    """Attacks the demo's training, on made-up images: laws of its steps, and lower bounds on epsilon. Status 1 if a law is broken."""
    from ._audit import run

    with _told():
        run(epsilon, delta, batch_size, steps, clip_norm, canaries, seed, out, as_json)
