"""What a finished run shows on the terminal: a small table, samples from before and after, and where everything
lies."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

from rlhf_toolkit.texts import WORDS, printable, say

UNFINISHED, CHECKPOINT = "unfinished", "checkpoint"
"""Entries of the summary of a run that has not ended: how far it has come, in words, and the folder of that state."""
SHOWN_SAMPLES = 3
SHOWN_CHARACTERS = 120
MOST_READ = 100_000
"""Characters of a sample that are looked at to show some of them."""


def print_report(folder: Path, summary: dict[str, Any]) -> None:
    """Print the report of the run in ``folder``. An empty summary (ranks other than 0) prints nothing."""
    if not summary:
        return
    unfinished = [f"  {summary[UNFINISHED]}", ""] if UNFINISHED in summary else []
    lines = supervised_table(summary) if "losses" in summary else [*table(summary), "", *before_and_after(folder)]
    say("\n".join(["", *unfinished, *lines, "", *places(folder, folder / summary.get(CHECKPOINT, "."))]))


def table(summary: dict[str, Any]) -> list[str]:
    """Scores at both ends, on training prompts and held out, and what the run cost."""
    scores, evaluations = summary["mean_scores"], summary["evaluations"]
    rows = [
        ("mean score, first two rollouts", _mean(scores[:2])),
        ("mean score, last four rollouts", _mean(scores[-4:])),
    ]
    for name, words in {"eval/score/mean": "held-out score", "eval/sampled_score/mean": "the same, sampled"}.items():
        if evaluations and name in evaluations[0]:
            after = evaluations[-1].get(name, float("nan"))  # no response has a score
            rows += [(f"{words}, before", evaluations[0][name]), (f"{words}, after", after)]
    if summary["ref_kl"] and summary["ref_kl"][-1] is not None:
        rows.append(("KL to the reference, last rollout (nats a response)", summary["ref_kl"][-1]))
    rows += [
        ("minutes", summary["seconds"] / 60),
        ("tokens per second", summary["tokens_per_second"]),
        ("peak memory of rank 0 (GiB)", summary["peak_memory_gib"]),
    ]
    width = max(len(name) for name, _ in rows)
    return [f"  {name:<{width}}  {value:9.2f}" for name, value in rows]


def supervised_table(summary: dict[str, Any]) -> list[str]:
    """Losses at both ends, in training and held out, and what the run cost."""
    losses, tenth = summary["losses"], max(1, len(summary["losses"]) // 10)
    rows = [("loss, first tenth", _mean(losses[:tenth])), ("loss, last tenth", _mean(losses[-tenth:]))]
    if summary["evaluations"]:
        names = [name for name in summary["evaluations"][0] if name.startswith("eval/")]
        for when, place in (("before", 0), ("after", -1)):
            rows += [(f"held out, {when}: {name[5:]}", summary["evaluations"][place][name]) for name in names]
    rows += [("minutes", summary["seconds"] / 60), ("peak memory of rank 0 (GiB)", summary["peak_memory_gib"])]
    width = max(len(name) for name, _ in rows)
    return [f"  {name:<{width}}  {value:9.3f}" for name, value in rows]


def evaluation_lines(found: dict[str, Any]) -> list[str]:
    """An evaluation as a table, a column for each contestant: means over prompts with their 95% intervals; then who
    beats whom. ``found`` is ``Evaluation.as_dict``."""
    estimates = found["estimates"]
    lines = [
        f"  {found['prompts']} prompts, {found['samples']} samples of each; means and 95% intervals over prompts",
        "",
    ]
    for way in next(iter(estimates.values())):
        columns = [ways[way] for ways in estimates.values()]
        rows = [[way, *map(printable, estimates)]]
        for name in dict.fromkeys(name for column in columns for name in column):
            rows.append([printable(name), *(_interval(each[name], ".3f") if name in each else "" for each in columns)])
        widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
        for row in rows:
            line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            lines.append(f"  {line}".rstrip())
        lines.append("")
    rates = [
        printable(f"  {rate['of']} over {rate['over']}, by {rate['by']} ({rate['decoding']}): ")
        + _interval(rate["rate"], ".1%")
        for rate in found["win_rates"]
    ]
    return lines[:-1] if not rates else [*lines, "  win rates, ties a half", *rates]


def _interval(value: dict[str, float], form: str) -> str:
    return f"{value['mean']:{form}} [{value['low']:{form}}, {value['high']:{form}}]"


def before_and_after(folder: Path) -> list[str]:
    """The same held-out prompts answered before the first update and after the last."""
    path = folder / "samples.jsonl"
    samples = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    evaluated = [sample for sample in samples if sample["kind"] == "eval"]
    last = {sample["prompt"]: sample for sample in evaluated}
    lines = []
    for first in evaluated[: min(SHOWN_SAMPLES, len(last))]:
        after, prompt = last[first["prompt"]], " ".join(first["prompt"].split())
        if len(prompt) > SHOWN_CHARACTERS:  # a chat template puts its system message before what was asked
            prompt = f"[...] {prompt[-SHOWN_CHARACTERS:].partition(' ')[2]}"
        lines += [
            _quoted("prompt", prompt),
            _quoted(f"before {_signed(first['score'])}", first["response"]),
        ]
        lines += [_quoted(f"after  {_signed(after['score'])}", after["response"]), ""]
    return lines[:-1]


def places(folder: Path, home: Path) -> list[str]:
    """Where logs, what was trained, in the folder ``home``, and W&B's folder lie."""
    adapters = [home / role for role in ("policy", "value", "reward")]
    kind = "model" if (home / "policy/config.json").exists() else "adapters"
    lines = [
        f"  run folder  {folder}",
        f"  log         {folder / 'log.jsonl'}",
        f"  {kind:<10}  {', '.join(str(path) for path in adapters if path.is_dir())}",
    ]
    runs = sorted((folder / "wandb").glob("*run-*"), key=lambda run: run.name.partition("run-")[2])  # by time
    return [*lines, f"  W&B         {runs[-1]}"] if runs else lines


def _quoted(label: str, text: str) -> str:
    return f"  {label:<12}  {textwrap.shorten(' '.join(printable(text[:MOST_READ], WORDS).split()), 160)}"


def _signed(score: float | None) -> str:
    return "none" if score is None else f"{score:+.2f}"


def _mean(values: list[float | None]) -> float:
    """Of those that are there: a rollout none of whose responses got a score has none."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else float("nan")
