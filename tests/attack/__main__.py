"""`python -m tests.attack [NAME …]`: run the attacks, each in its own process, and print one table."""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent
NOT_ATTACKS = {"report"}
HOURS = 6


def names() -> list[str]:
    """Return the names of all attacks."""
    modules = (path.stem for path in FOLDER.glob("*.py"))
    return sorted(n for n in modules if not (n.startswith("_") or n in NOT_ATTACKS))


def run(name: str) -> list[dict[str, Any]]:
    """Run an attack and return its rows, plus a failed one if it did not end as it should."""
    start = time.monotonic()
    command = [sys.executable, "-m", f"tests.attack.{name}"]
    try:
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=HOURS * 3600)
        out, status = done.stdout, done.returncode
    except subprocess.TimeoutExpired as error:
        out, status = (error.stdout or b"").decode(), None
    rows = [json.loads(line) for line in out.splitlines() if line.startswith('{"attack": ')]
    if status is None or status != int(any(row["failed"] for row in rows)) or not rows:
        problem = f"longer than {HOURS} h" if status is None else f"exit status {status}"
        rows.append({"attack": f"{name}: {problem}", "attempts": 1, "survived": 0, "failed": 1})
    for row in rows:
        row |= {"module": name, "seconds": round(time.monotonic() - start)}
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| attack | module | attempts | survived | failed | |", "|---|---|---|---|---|---|"]
    for row in rows:
        counts = " | ".join(f"{row[key]:,}" for key in ("attempts", "survived", "failed"))
        lines.append(f"| {row['attack']} | `{row['module']}` | {counts} | {row.get('note', '')} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.attack", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of {', '.join(names())} (default: all)")
    chosen = parser.parse_args().names or names()
    unknown = set(chosen) - set(names())
    if unknown:
        parser.error(f"no such attack: {', '.join(sorted(unknown))}; there are {', '.join(names())}")
    rows = []
    for name in chosen:
        print(f"{name} …", file=sys.stderr, flush=True)
        rows += run(name)
    print(table(rows))
    return int(any(row["failed"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
