"""How a PPO step's time grows: with the tokens of a rollout, with ranks, with the adapters' rank.

    python bench/scaling.py        # result in bench/results/scaling.json; about 6 minutes

Each line changes one thing of the first. On a CPU two ranks share the cores that one rank has alone, so the ratio of
ranks is what ZeRO-3 costs, not what a second machine brings.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from common import SMOKE, arguments, experiment, keep, models, prepared, rounded
from ranks import on_ranks, worker_or_bench

ROLLOUTS = 3  # the first warms up
LINES: dict[str, tuple[int, dict[str, Any]]] = {  # name -> ranks, changes to the experiment
    "16 x 32 tokens, 1 rank, r16": (1, {}),
    "twice the responses": (1, {"rollout.prompts_per_rollout": 32}),
    "twice the tokens": (1, {"rollout.max_new_tokens": 64}),
    "2 ranks": (2, {}),
    "r4": (1, {"model.lora_rank": 4, "model.lora_alpha": 8}),
    "r64": (1, {"model.lora_rank": 64, "model.lora_alpha": 128}),
}
SAME = {"rollout.max_new_tokens": 32, "ppo.num_rollouts": ROLLOUTS, "data.system_prompt": ""}


def main() -> None:
    worker_or_bench(arguments(__doc__), worker, bench)


def bench(options: Any) -> None:
    """Every model of the set."""
    keep("scaling", rounded([line for model in models(options.set) for line in lines(model)]))


def lines(model: str) -> list[dict[str, Any]]:
    """Median seconds of a step by phase, and the ratio to the first line."""
    figures: list[dict[str, Any]] = []
    for name, (ranks, changes) in LINES.items():
        if SMOKE and changes:
            continue  # of launches, one of each kind
        job = {"model": model, "changes": {**SAME, **changes}}
        phases = on_ranks(__file__, job, ranks=ranks, stage=3 if ranks > 1 else None)
        first = figures[0]["seconds"] if figures else phases["step"]
        figures.append(
            {"model": model, "line": name, "seconds": phases["step"], "ratio": phases["step"] / first, "phases": phases}
        )
    return figures


def worker(job: dict[str, Any]) -> None:
    """Run the experiment; rank 0 writes the medians of its times over all rollouts but the first."""
    from rlhf_toolkit.reporting.records import read_records

    run = prepared(experiment(job["model"], Path(job["folder"]), job["changes"]), stops=False)
    run.train()
    if run.topology.is_main:
        records = read_records(Path(job["folder"]), "train")[1:]
        names = [name for name in records[0] if name.startswith("timing_s/")]
        medians = {name.partition("/")[2]: statistics.median(one[name] for one in records) for name in names}
        Path(job["result"]).write_text(json.dumps(medians))


if __name__ == "__main__":
    main()
