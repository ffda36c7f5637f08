"""`dpx demo`: a private model, trained end to end."""

import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.random as jr
import optax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .._checks import positive_float
from .._files import write_atomically, write_text_atomically
from .._round import round_up
from ..clipping import FlatClipping, NoClipping
from ..gradients import Vectorized
from ..plan import PrivacyPlan, dp_mf, dp_sgd
from ..sampling import PoissonSampler
from ..strategies import BandedToeplitz, momentum_workload
from ..training import StepInfo, Trainer
from ._digits import DigitsCNN, cross_entropy, digits, evaluate

# Convolutions of a hundred examples at a time keep the processor's caches; larger microbatches would differentiate more padding.
_METHOD = Vectorized(microbatch_size=125)
_POINTS = 12
_MOMENTUM = 0.5
_BANDS = 4  # of least error at the default size and budget, among those that leave room for sampling


def run(
    epsilon: float,
    delta: float,
    batch_size: int,
    steps: int,
    clip_norm: float,
    learning_rate: float,
    noise: str,
    seed: int | None,
    out: Path,
    baseline: bool,
) -> dict[str, Any]:
    """Trains, reports, and writes `report.json` and `curve.png` into `out`. Returns the report."""
    begin = time.perf_counter()
    console = Console()
    positive_float("--learning-rate", learning_rate)
    out.mkdir(parents=True, exist_ok=True)
    train, test = digits()
    sizes = (len(train[0]), batch_size, steps)
    budget: dict[str, Any] = {"epsilon": epsilon, "delta": delta, "clipping": FlatClipping(clip_norm)}
    if noise == "banded":
        PoissonSampler(*sizes)  # says what is wrong with the sizes
        bands = min(_BANDS, steps, sizes[0] // batch_size)
        workload = momentum_workload(steps, _MOMENTUM)
        plan = dp_mf(*sizes, strategy=BandedToeplitz.optimize(steps, bands, workload=workload), **budget)
    else:
        plan = dp_sgd(*sizes, **budget)
    console.print(
        f"Noise multiplier {round_up(plan.noise_multiplier)} for epsilon {round_up(epsilon)} at delta {round_up(delta)}."
    )
    curve = _train(plan, optax.sgd(learning_rate, momentum=_MOMENTUM), train, test, seed, console, "private", delta)
    plain = None
    if baseline:
        open_plan = dp_sgd(len(train[0]), batch_size, steps, clipping=NoClipping())
        plain = _train(open_plan, optax.sgd(0.2, momentum=0.9), train, test, seed, console, "no privacy", None)
    report = {
        "test_accuracy": curve[-1]["test_accuracy"],
        "baseline_test_accuracy": plain[-1]["test_accuracy"] if plain else None,
        "epsilon": plan.epsilon(delta),
        "delta": delta,
        "noise_multiplier": plan.noise_multiplier,
        "steps": steps,
        "batch_size": batch_size,
        "clip_norm": clip_norm,
        "learning_rate": learning_rate,
        "noise": noise,
        "seed": seed,
        "seconds": time.perf_counter() - begin,
        "statement": plan.statement(delta),
        "curve": curve,
        "baseline_curve": plain,
    }
    write_text_atomically(out / "report.json", json.dumps(report, indent=2) + "\n")
    write_atomically(out / "curve.png", lambda path: _plot(path, curve, plain))
    against = f" (without privacy: {report['baseline_test_accuracy']:.1%})" if plain else ""
    console.print(f"\nTest accuracy with privacy: [bold]{report['test_accuracy']:.1%}[/bold]{against}\n")
    console.print(report["statement"], soft_wrap=True, highlight=False, markup=False)
    if seed is not None:
        console.print(
            "\nThe seed was given on the command line, so whoever knows it can remove the noise: a reproducible run is not private."
        )
    console.print(
        f"\nWrote {out / 'report.json'} and {out / 'curve.png'} after {report['seconds']:.0f} seconds.", soft_wrap=True
    )
    return report


def _train(
    plan: PrivacyPlan,
    optim: optax.GradientTransformation,
    train: Any,
    test: Any,
    seed: int | None,
    console: Console,
    name: str,
    delta: float | None,
) -> list[dict[str, float]]:
    trainer = Trainer(plan, cross_entropy, optim, method=_METHOD)
    model = DigitsCNN(jr.key(0 if seed is None else seed))
    test = jax.device_put(test)

    def measured(model: DigitsCNN) -> dict[str, float]:
        # the test images are public here; the loss of the private batch would leave unnoised
        loss, accuracy = (float(x) for x in evaluate(model, *test))
        return {"test_loss": loss, "test_accuracy": accuracy}

    columns = [
        TextColumn(f"{name:>10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    ]
    curve: list[dict[str, float]] = []
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=plan.steps)

        def show(info: StepInfo) -> None:
            progress.update(task, completed=info.step)
            if info.metrics:
                point = {"step": info.step, **info.metrics}
                if delta is not None:
                    point["epsilon"] = info.epsilon
                curve.append(point)
                spent = f"  epsilon {round_up(point['epsilon'], 3)}" if delta is not None else ""
                text = f"test loss {point['test_loss']:.3f}  accuracy {point['test_accuracy']:.1%}{spent}"
                progress.update(task, description=text)

        key = None if seed is None else jr.key(seed)
        every = max(1, plan.steps // _POINTS)
        options: Any = {"evaluate": measured, "evaluate_every": every, "callbacks": [show], "delta": delta}
        trainer.fit(model, train, seed=seed, key=key, progress=False, **options)
    return curve


def _plot(path: Path, curve: list[dict[str, float]], plain: list[dict[str, float]] | None) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    left = figure.subplots()
    column = lambda points, name: [p[name] for p in points]
    lines = left.plot(
        column(curve, "step"), column(curve, "test_accuracy"), "C0-o", markersize=3, label="accuracy, private"
    )
    if plain:
        lines += left.plot(
            column(plain, "step"), column(plain, "test_accuracy"), "C7--", label="accuracy, without privacy"
        )
    left.set(xlabel="step", ylabel="test accuracy", ylim=(0, 1))
    right = left.twinx()
    # a step function: a chord would lie below the curve, which is concave
    drawn = column(curve, "step"), column(curve, "epsilon")
    lines += right.plot([0, *drawn[0]], [0.0, *drawn[1]], "C1-", drawstyle="steps-pre", label="epsilon spent")
    right.set(ylabel="epsilon", ylim=(0, None))
    left.legend(handles=lines, loc="lower right")
    figure.savefig(path, format="png", dpi=150)
