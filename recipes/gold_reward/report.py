"""What the gold-reward experiment came to: report.md and over_optimisation.svg in its folder.

python recipes/gold_reward/report.py FOLDER
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_toolkit.reporting.records import Record, read_records

PROXY, GOLD, KL = "reward/adapter", "reward/gold", "actor/ref_kl"
CONTESTANTS = {"base": "base", "sft/policy": "SFT", "dpo/policy": "DPO", "ppo/policy": "PPO"}
SMOOTHED = 3
"""Rollouts whose mean is a point of the curve and of the report's best gold."""


def smoothed(values: Sequence[float]) -> list[float]:
    """Means of ``SMOOTHED`` values in a row."""
    return [sum(values[i : i + SMOOTHED]) / SMOOTHED for i in range(len(values) - SMOOTHED + 1)]


def curve(records: Sequence[Record]) -> dict[str, list[float]]:
    """KL, proxy and gold score of the rollouts, smoothed."""
    return {name: smoothed([record[name] for record in records]) for name in (KL, PROXY, GOLD)}


def plot(found: dict[str, list[float]], out: Path) -> None:
    """Proxy and gold over the root of the KL, the axes of Gao et al. 2022, figure 1."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text
    from matplotlib import pyplot

    distance = [max(kl, 0.0) ** 0.5 for kl in found[KL]]
    figure, axis = pyplot.subplots(figsize=(6, 3.6))
    for name, label, colour in ((PROXY, "proxy: reward adapter", "tab:orange"), (GOLD, "gold: VADER", "tab:blue")):
        axis.plot(distance, found[name], marker="o", markersize=3, label=label, color=colour)
    axis.set(xlabel="square root of the KL to the SFT model (nats a response)", ylabel="mean score of a rollout")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(out)


def report(folder: Path) -> str:
    """The text of report.md."""
    reward, evaluation = (
        json.loads((folder / name).read_text()) for name in ("reward/summary.json", "evaluation.json")
    )
    records, seconds = read_records(folder / "ppo", "train"), json.loads((folder / "seconds.json").read_text())
    merged = (folder / "logs/merge.log").read_text()
    sections = [
        "# SFT, reward model, PPO, DPO",
        "## Reward model",
        f"Accuracy on held-out pairs: {reward['evaluations'][0]['eval/accuracy']:.1%} before, "
        f"{reward['evaluations'][-1]['eval/accuracy']:.1%} after.",
        "## PPO",
        optimisation(records),
        "![proxy and gold over KL](over_optimisation.svg)",
        "## Evaluation",
        f"{evaluation['prompts']} held-out prompts; sampled: {evaluation['samples']} responses to each. Means, in "
        "brackets their 95% intervals over prompts.",
        *[scores(evaluation, way) for way in ("sampled", "greedy")],
        "Win rates by gold, ties a half:",
        win_rates(evaluation),
        "## Merged model",
        *re.findall(r"^(?:rounding|logits).*$", merged, flags=re.MULTILINE),
        "## Time",
        table(("stage", "seconds"), [(name, f"{value:.0f}") for name, value in seconds.items()]),
        f"{sum(seconds.values()) / 60:.0f} minutes in all.",
    ]
    return "\n\n".join(sections) + "\n"


def optimisation(records: Sequence[Record]) -> str:
    """Where proxy and gold began, where gold was best, where both ended."""
    found = curve(records)
    best = max(range(len(found[GOLD])), key=found[GOLD].__getitem__)
    places = {"first": 0, "best gold": best, "last": len(found[GOLD]) - 1}
    rows = [
        (name, f"{i + 1} to {i + SMOOTHED}", *(f"{found[column][i]:.3f}" for column in (KL, PROXY, GOLD)))
        for name, i in places.items()
    ]
    start = f"KL to the reference in the first rollout, before any update: {records[0][KL]:g}."
    return start + "\n\n" + table(("", "rollouts", "KL (nats a response)", "proxy", "gold"), rows)


def scores(evaluation: dict[str, Any], way: str) -> str:
    """A row for each contestant."""
    names = ("reward/gold", "reward/adapter", "reward/topic", "ref_kl", "response_length")
    rows = [
        (label(contestant), *(interval(ways[way][name]) for name in names))
        for contestant, ways in evaluation["estimates"].items()
    ]
    return table((way, "gold", "proxy", "names the thing", "KL to SFT", "tokens"), rows)


def win_rates(evaluation: dict[str, Any]) -> str:
    rows = [
        (f"{label(rate['of'])} over {label(rate['over'])}", rate["decoding"], interval(rate["rate"], ".1%"))
        for rate in evaluation["win_rates"]
        if rate["by"] == "reward/gold"
    ]
    return table(("", "decoding", "win rate"), rows)


def label(contestant: str) -> str:
    return next(short for end, short in CONTESTANTS.items() if contestant.endswith(end))


def interval(value: dict[str, float], form: str = ".2f") -> str:
    return f"{value['mean']:{form}} [{value['low']:{form}}, {value['high']:{form}}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    plot(curve(read_records(folder / "ppo", "train")), folder / "over_optimisation.svg")
    (folder / "report.md").write_text(report(folder))


if __name__ == "__main__":
    main()
