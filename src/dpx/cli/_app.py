"""The commands and their options."""

import enum
from pathlib import Path
from typing import Annotated

import typer


class Noise(enum.Enum):
    """Mechanisms that the demo can train with."""

    independent = "independent"
    banded = "banded"


app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Differentially private training."
)


@app.callback()
def _main() -> None:
    """Differentially private training."""


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

    try:
        run(epsilon, delta, batch_size, steps, clip_norm, learning_rate, noise.value, seed, out, baseline)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
