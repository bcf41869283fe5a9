"""Curves of finished runs, several seeds of each kind, side by side:

python recipes/plot_runs.py curve.svg PPO=runs/ppo0,runs/ppo1 GRPO=runs/grpo0,runs/grpo1
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from rlhf_toolkit.reporting.records import read_records

SCORES = {
    "training prompts, sampled": ("train", "critic/score/mean"),
    "held-out prompts, sampled": ("eval", "eval/sampled_score/mean"),
    "held-out prompts, greedy": ("eval", "eval/score/mean"),
}


def curve(folders: list[Path], kind: str, name: str) -> dict[int, list[float]]:
    """Rollout to the values of all runs that have one there."""
    found: dict[int, list[float]] = {}
    for folder in folders:
        for record in read_records(folder, kind):
            if name in record:
                found.setdefault(record["rollout"], []).append(record[name])
    return found


def main() -> None:
    from matplotlib import pyplot

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the picture: .svg or .png")
    parser.add_argument("runs", nargs="+", metavar="LABEL=FOLDER,FOLDER", help="run folders under one label")
    options = parser.parse_args()
    figure, axes = pyplot.subplots(1, len(SCORES), figsize=(12, 3.6), sharey=True)
    for axis, (title, (kind, name)) in zip(axes, SCORES.items(), strict=True):
        for group in options.runs:
            label, _, folders = group.partition("=")
            points = sorted(curve([Path(folder) for folder in folders.split(",")], kind, name).items())
            if not points:
                continue
            rollouts, values = [rollout for rollout, _ in points], [values for _, values in points]
            (line,) = axis.plot(rollouts, [statistics.mean(each) for each in values], label=label)
            axis.fill_between(
                rollouts, list(map(min, values)), list(map(max, values)), alpha=0.2, color=line.get_color()
            )
        axis.set(title=title, xlabel="rollouts")
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="mean score; bands: lowest and highest seed")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(options.out)


if __name__ == "__main__":
    main()
