"""Every benchmark, one after the other, and every figure beside its target.

    python benchmarks/run_all.py [--only name] [--json figures.json]

Takes half an hour on two cores, on which nothing else should run. Ends with status 1 if a target was missed, and says which. What a script prints
beside its targets is in its own output, which passes through.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

TARGET = re.compile(r"^TARGET (.*): ([-+0-9.einfa]+) of at most ([-+0-9.e]+)(, MISSED)?$", re.MULTILINE)
SCRIPTS = sorted(
    p for p in Path(__file__).parent.glob("*.py") if not p.name.startswith(("_", "plot")) and p != Path(__file__)
)


def figures_of(script: Path) -> list[dict[str, Any]]:
    """Runs a script in a process of its own; a script that fails is a target missed."""
    print(f"\n=== {script.stem}", flush=True)
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    lines: list[str] = []
    for line in process.stdout or ():
        print(line, end="", flush=True)
        lines.append(line)
    found = [
        {"script": script.stem, "what": what, "figure": float(figure), "at_most": float(most), "is_met": not missed}
        for what, figure, most, missed in TARGET.findall("".join(lines))
    ]
    if process.wait() != 0:
        found.append({"script": script.stem, "what": "ran to its end", "figure": 1.0, "at_most": 0.0, "is_met": False})
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Every figure beside its target.")
    parser.add_argument("--only", default="", help="scripts whose name has this in it")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    rows = [row for script in SCRIPTS if options.only in script.stem for row in figures_of(script)]
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    print(f"\n{'figure':>9} {'at most':>9}")
    for row in rows:
        verdict = "" if row["is_met"] else "  <- MISSED"
        print(f"{row['figure']:9.3g} {row['at_most']:9.3g}  {row['script']}: {row['what']}{verdict}")
    short = [row for row in rows if not row["is_met"]]
    print(f"{len(rows) - len(short)} of {len(rows)} targets met")
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
