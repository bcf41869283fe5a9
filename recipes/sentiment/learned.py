"""Whether a run of the sentiment task has learned, from its summary: `python recipes/sentiment/learned.py FOLDER`.

The bar: the mean score of the last four rollouts is at least ``--last``, and at least ``--rise`` above that of the
first two. The exit status is 1 where it is missed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

FIRST, LAST = 2, 4
"""Rollouts."""


def learned(scores: list[float], *, last: float, rise: float) -> tuple[bool, str]:
    """Whether the mean ``scores`` of the rollouts meet the bar, and one line that says how far they are from it.

    Raises ValueError where the run is too short to have both ends.
    """
    if len(scores) < FIRST + LAST:
        raise ValueError(f"{len(scores)} rollouts; the bar takes the first {FIRST} and the last {LAST}")
    start, end = statistics.mean(scores[:FIRST]), statistics.mean(scores[-LAST:])
    met = end >= last and end - start >= rise
    line = (
        f"mean score {start:.2f} over the first {FIRST} rollouts, {end:.2f} over the last {LAST}; the bar is "
        f"{last:.2f} and {rise:.2f} above the first: {'met' if met else 'MISSED'}"
    )
    return met, line


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="the run's folder, which holds summary.json")
    parser.add_argument("--last", type=float, default=0.40, help="default: %(default)s")
    parser.add_argument("--rise", type=float, default=0.50, help="default: %(default)s")
    options = parser.parse_args()
    scores = json.loads((options.folder / "summary.json").read_text())["mean_scores"]
    met, line = learned(scores, last=options.last, rise=options.rise)
    print(line)
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
