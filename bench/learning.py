"""Does what makes a step fast cost learning? The sentiment recipe, three seeds an arm, two runs at a time.

    python bench/learning.py [--rollouts 8] [--seeds 3]

Arms: ``plain`` (padded rows, exact weights, all rows at once), ``everything`` (packed rows that share prefixes, 16
slots, merged weights in decoding with importance correction), ``policy trunk`` (its value head reads the policy's).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import SMOKE, TINY, arguments, fetch_smollm, keep, model_folder

ROOT = Path(__file__).parents[1]
ARMS = {
    "plain": ["update.packing=off"],
    "everything": ["rollout.slots=16", "rollout.weights=merged", "ppo.importance_correction=token"],
    "policy trunk": ["model.value_on=policy_trunk"],
}


def curve(arm: str, seed: int, rollouts: int, model: str) -> list[float]:
    """Mean scores of the rollouts of one run, in a process of its own with one thread."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"model.name={model}", f"run.output_dir={folder}/run", f"run.seed={seed}", "run.wandb=off"]
        settings += [f"ppo.num_rollouts={rollouts}", "data.evaluation=none", *ARMS[arm]]
        command = [sys.executable, "recipes/ppo.py", "--config", "recipes/sentiment/ppo.yaml", *settings]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{arm}, seed {seed}: {done.stderr[-2000:]}")
        return [float(score) for score in json.loads(Path(folder, "run/summary.json").read_text())["mean_scores"]]


def summary(curves: list[list[float]]) -> dict[str, Any]:
    """Curves of one arm, and over seeds the mean and deviation of the last four rollouts' mean score."""
    ends = [statistics.mean(scores[-4:]) for scores in curves]
    return {
        "curves": [[round(score, 3) for score in scores] for scores in curves],
        "first_two": round(statistics.mean(statistics.mean(scores[:2]) for scores in curves), 3),
        "last_four": round(statistics.mean(ends), 3),
        "last_four_deviation": round(statistics.stdev(ends), 3) if len(ends) > 1 else 0.0,
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rollouts", type=int, default=1 if SMOKE else 8)
    parser.add_argument("--seeds", type=int, default=1 if SMOKE else 3)
    options = parser.parse_args()
    model = model_folder(TINY) if SMOKE else fetch_smollm()
    jobs = [(arm, seed) for seed in range(options.seeds) for arm in ARMS]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda job: curve(job[0], job[1], options.rollouts, model), jobs))
    by_arm = {arm: [scores for (name, _), scores in zip(jobs, results, strict=True) if name == arm] for arm in ARMS}
    keep("learning", [{"arm": arm, **summary(curves)} for arm, curves in by_arm.items()])


if __name__ == "__main__":
    main()
