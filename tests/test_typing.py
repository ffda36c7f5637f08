"""An editor reports what users get wrong, and knows the types of what they get."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

FILES = Path(__file__).parent / "typing"


@pytest.fixture(scope="module")
def reports():
    """What pyright says of both files, by name and line."""
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(FILES)]
    done = subprocess.run(command, capture_output=True, text=True)
    found: dict[str, dict[int, list[str]]] = {}
    for row in json.loads(done.stdout)["generalDiagnostics"]:
        lines = found.setdefault(Path(row["file"]).name, {})
        lines.setdefault(row["range"]["start"]["line"], []).append(f"{row['severity']}: {row['message']}")
    return found


def lines_of(name, mark):
    text = (FILES / name).read_text().splitlines()
    return {number: match[1] for number, line in enumerate(text) if (match := re.search(mark, line))}


def test_every_mistake_is_reported_and_nothing_else(reports):
    expected = set(lines_of("mistakes.py", "# (mistake)$"))
    reported = {n for n, rows in reports["mistakes.py"].items() if any(row.startswith("error") for row in rows)}
    text = (FILES / "mistakes.py").read_text().splitlines()
    assert len(expected) > 40
    assert not [text[n] for n in sorted(expected - reported)], "not reported"
    assert not [(text[n], reports["mistakes.py"][n]) for n in sorted(reported - expected)], "reported, but right"


def test_right_use_has_the_types_that_stand_beside_it(reports):
    seen = reports["right_use.py"]
    wrong = {n: rows for n, rows in seen.items() if any(not row.startswith("information") for row in rows)}
    assert not wrong
    expected = lines_of("right_use.py", r"^ *reveal_type\(.*\)  # (.*)$")
    types = {n: match[1] for n, rows in seen.items() if (match := re.search(r' is "(.*)"$', rows[0]))}
    assert types == expected
