"""What does a mistake cost on the screen and on the clock? Each of docs/mistakes.md, given to ``rlhf train``.

    python bench/mistakes.py [--smoke]      # 4 minutes

One process on a CPU, on a tiny model. A row for each: seconds to the end, lines of the error, lines that the start had
said before it.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import ROOT, SMOKE, arguments, keep

sys.path.insert(0, str(ROOT))
from tests.support.mistakes import SCORINGS, SETTINGS, STARTS, Mistake, written

KINDS = {"settings": SETTINGS, "start": STARTS, "scoring": SCORINGS}
HEADER = ["seen", "mistakes", "lines of the error", "lines said before, at most", "seconds, median", "at most"]
STACK = "Traceback (most recent call last):"


def cost(kind: str, case: Mistake) -> dict[str, Any]:
    """Of one mistake. Raises SystemExit where the run does not end with its line."""
    with tempfile.TemporaryDirectory() as name:
        path = written(case, Path(name))
        words = ["-m", "rlhf_toolkit.cli", "train", str(path), *(f"--{word}" for word in case.arguments)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
        began = time.perf_counter()
        run = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
        seconds, said = time.perf_counter() - began, run.stderr.splitlines()
        line = case.line.replace("{here}", name).replace("{cwd}", str(ROOT))
        line = line.partition(";")[0] if kind == "scoring" else line  # which prompt is first depends on the run
        if run.returncode != 1 or line not in said[-1]:
            raise SystemExit(f"{case.written}: status {run.returncode}, not the line {line!r}:\n{run.stderr}")
    row = {"kind": kind, "written": case.written, "seconds": round(seconds, 2), "lines": len(said)}
    return {**row, "before": len(run.stdout.splitlines()), "stack": said[0] == STACK}


def as_markdown(rows: list[dict[str, Any]]) -> str:
    """The table as it stands in docs/mistakes.md."""
    lines = [HEADER, ["---"] * len(HEADER)]
    for kind in KINDS:
        found = [row for row in rows if row["kind"] == kind]
        seconds = [row["seconds"] for row in found]
        plain, stacks = [row["lines"] for row in found if not row["stack"]], sum(row["stack"] for row in found)
        shown = f"{max(plain)}" + (f", and a stack of the user's own code ({stacks})" if stacks else "")
        before = str(max(row["before"] for row in found))
        times = [f"{statistics.median(seconds):.1f}", f"{max(seconds):.1f}"]
        lines.append([kind, str(len(found)), shown, before, *times])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    arguments(__doc__).parse_args()
    each = 1 if SMOKE else None
    rows = [cost(kind, case) for kind, cases in KINDS.items() for case in cases[:each]]
    print(as_markdown(rows), file=sys.stderr)
    keep("mistakes", rows)


if __name__ == "__main__":
    main()
