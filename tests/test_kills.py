"""A run that is killed, at any instant, ends as if nothing had happened: in a Python of its own, which forks and kills."""

import json
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ENVIRONMENT

SCRIPT = Path(__file__).with_name("kills.py")


def killed(folder, *arguments):
    folder.mkdir()
    run = subprocess.run(
        [sys.executable, str(SCRIPT), arguments[0], str(folder), *map(str, arguments[1:])],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


def test_records_survive_death_at_every_call_that_changes_files_and_runs_survive_kills(tmp_path):
    found = killed(tmp_path / "all", "all", "--number", 4, "--seed", 0)
    assert found["instants"]["instants"] >= 40 and not found["instants"]["wrong"], found
    assert found["signals"]["kills"] == 4 and not found["signals"]["wrong"], found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["small", "rich"])
def test_a_hundred_kills_at_random_instants(tmp_path, kind, capsys):
    seed = secrets.randbits(32)
    found = killed(tmp_path / kind, "signals", "--kind", kind, "--number", 100, "--seed", seed)
    with capsys.disabled():
        print(f"\n{kind}: {found}")
    assert found["kills"] == 100 and found["runs"] >= 2 and not found["wrong"], found
