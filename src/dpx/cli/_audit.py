"""`dpx audit`: the demo's training, attacked."""

import json
from pathlib import Path
from typing import Any

import jax.random as jr
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from .. import auditing
from .._files import write_text_atomically
from .._round import round_down, round_epsilon, round_up
from ..clipping import FlatClipping
from ..plan import dp_sgd
from ._digits import DigitsCNN, cross_entropy

_UNITS = 4_000  # images of the demo


def run(
    epsilon: float, delta: float, batch_size: int, steps: int, clip_norm: float, canaries: int, seed: int | None, out: Path, as_json: bool
) -> None:  # fmt: skip
    """Audits the demo's plan, loss and model on made-up images, and writes `audit.json` and `audit.png`; ends with status 1 if a law is broken."""
    plan = dp_sgd(_UNITS, batch_size, steps, epsilon=epsilon, delta=delta, clipping=FlatClipping(clip_norm))
    model = DigitsCNN(jr.key(0))
    rng = np.random.default_rng(0)
    batch = rng.random((4, 1, 28, 28)).astype(np.float32), np.arange(4, dtype=np.int32)
    laws = auditing.audit_laws(plan, cross_entropy, model, batch)
    report = auditing.audit_plan(plan, cross_entropy, model, canaries=canaries, seed=seed, delta=delta)
    found = {"laws": laws.to_dict(), "attack": report.to_dict()}
    write_text_atomically(out / "audit.json", json.dumps(found, indent=2, allow_nan=False) + "\n")
    if report.evidence is not None:
        report.plot(out / "audit.png")
    if as_json:
        typer.echo(json.dumps(found, indent=2, allow_nan=False))
    else:
        _print(laws, report, out)
    if not (laws.passed and report.passed):
        raise typer.Exit(1)


def _print(laws: auditing.AuditReport, report: auditing.AuditReport, out: Path) -> None:
    console = Console()
    table = Table(title="laws of the steps", title_justify="left")
    for column in ("", "test", "law", "found"):
        table.add_column(column, overflow="fold")
    for law in (*laws.laws, *report.laws):
        table.add_row("ok" if law.passed else "BROKEN", f"{law.code} {law.where}".strip(), law.law, law.found)
    console.print(table)
    table = Table(title="one run with canaries", title_justify="left")
    for column in ("bound", "epsilon", "ceiling"):
        table.add_column(column, overflow="fold")
    if report.epsilon is not None and report.delta is not None:
        table.add_row(f"stated, at delta {round_up(report.delta)}", f"<= {round_epsilon(report.epsilon)}", "")
    for name, bound in report.bounds.items():
        table.add_row(name, f">= {round_down(bound.value, 4)}", round_up(bound.ceiling, 4))
    console.print(table)
    for note in (*laws.notes, *report.notes):
        console.print(f"note: {note}", soft_wrap=True, highlight=False, markup=False)
    verdict: Any = (
        "passed"
        if laws.passed and report.passed
        else "BROKEN: " + "; ".join(map(str, (*laws.failures, *report.failures)))
    )
    console.print(f"{verdict}. Wrote {out / 'audit.json'} and {out / 'audit.png'}.", soft_wrap=True, markup=False)
