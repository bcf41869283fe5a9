"""Does PPO over a base in 4 bits learn as it does over one in bfloat16, and what does a step cost?

    python bench/quantised.py [--seeds 3] [--runs FOLDER]     # 40 minutes
    python bench/quantised.py --smoke

The demo (README's: two ranks on a CPU, one process for each GPU) with each quantization and seed, one run at a time.
Runs lie in FOLDER/QUANTIZATION-SEED; one that has ended there is not run again.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import SMOKE, SMOLLM, TINY, arguments, keep, model_folder

ROOT = Path(__file__).parents[1]
QUANTIZATIONS = ("none", "nf4")
PHASES = ("step", "gen", "old_log_prob", "update_actor")
HEADER = ["base", "mean scores of rollouts", "last four", "held out, before", "after", "memory of a rank, GiB"]
TINY_SETTINGS = ["ppo.num_rollouts=2", "rollout.prompts_per_rollout=4", "rollout.max_new_tokens=8"]


def demo(folder: Path, quantization: str, seed: int, model: str) -> None:
    """Run the demo into ``folder``, unless one has ended there."""
    if (folder / "summary.json").is_file():
        return
    processes = torch.cuda.device_count() or 2
    launcher = [str(Path(sys.executable).with_name("accelerate")), "launch", "--num_processes", str(processes)]
    launcher += [
        "--config_file",
        f"accelerate_configs/{'zero3_2gpu' if torch.cuda.is_available() else 'cpu_zero3'}.yaml",
    ]
    settings = [f"model.name={model}", f"model.quantization={quantization}", f"run.seed={seed}"]
    settings += [f"run.output_dir={folder}", "run.wandb=off", *(TINY_SETTINGS if SMOKE else [])]
    command = [*launcher, "recipes/ppo.py", "--config", "recipes/sentiment/ppo.yaml", "--overwrite", *settings]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    if not torch.cuda.is_available():
        environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)


def figures(folder: Path) -> dict[str, Any]:
    """What a run has left: scores, held-out scores at both ends, seconds of a rollout's phases, peak memory."""
    summary = json.loads((folder / "summary.json").read_text())
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    rollouts = [record for record in records if "timing_s/gen" in record]
    scores, tests = summary["mean_scores"], [each["eval/score/mean"] for each in summary["evaluations"]]
    return {
        "curve": [round(score, 3) for score in scores],
        "first_two": round(statistics.mean(scores[:2]), 3),
        "last_four": round(statistics.mean(scores[-4:]), 3),
        "held_out_before": round(tests[0], 3),
        "held_out_after": round(tests[-1], 3),
        "seconds": {
            name: round(statistics.median(each[f"timing_s/{name}"] for each in rollouts[1:]), 2) for name in PHASES
        },
        "memory_gib": round(summary["peak_memory_gib"], 2),
    }


def compared(none: list[dict[str, Any]], other: list[dict[str, Any]]) -> dict[str, Any]:
    """Of two quantizations: the means over seeds of the ends, and ratios of a step's time and phases, and of memory."""

    def mean(rows: list[dict[str, Any]], name: str) -> float:
        return round(statistics.mean(row[name] for row in rows), 3)

    def ratio(phase: str) -> float:
        pairs = zip(other, none, strict=True)
        return round(statistics.median(one["seconds"][phase] / two["seconds"][phase] for one, two in pairs), 2)

    return {
        "last_four": {"none": mean(none, "last_four"), "other": mean(other, "last_four")},
        "held_out": {"none": mean(none, "held_out_after"), "other": mean(other, "held_out_after")},
        "time": {phase: ratio(phase) for phase in PHASES},
        "memory": round(
            statistics.median(a["memory_gib"] / b["memory_gib"] for a, b in zip(other, none, strict=True)), 2
        ),
    }


def as_markdown(runs: dict[str, list[dict[str, Any]]]) -> str:
    """The table of curves as it stands in docs/performance.md."""
    lines = [HEADER, ["---"] * len(HEADER)]
    for name, rows in runs.items():
        for seed, row in enumerate(rows):
            scores = ", ".join(f"{score:.2f}" for score in row["curve"])
            ends = [f"{row[key]:.2f}" for key in ("last_four", "held_out_before", "held_out_after", "memory_gib")]
            lines.append([f"{name}, seed {seed}", scores, *ends])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=1 if SMOKE else 3)
    parser.add_argument("--runs", type=Path, help="where runs lie and stay; without it they are thrown away")
    options = parser.parse_args()
    model = model_folder(TINY if SMOKE else SMOLLM)
    with tempfile.TemporaryDirectory() as temporary:
        home = (options.runs or Path(temporary)).resolve()
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in QUANTIZATIONS}
        for seed in range(options.seeds):
            for name in QUANTIZATIONS:
                folder = home / f"{name}-{seed}"
                demo(folder, name, seed, model)
                rows[name].append(figures(folder))
        print(as_markdown(rows), file=sys.stderr)
        keep("quantised", [{"runs": rows, "nf4_over_none": compared(rows["none"], rows["nf4"])}])


if __name__ == "__main__":
    main()
