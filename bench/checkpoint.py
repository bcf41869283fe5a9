"""What a checkpoint costs: how long a run stands still for it, how long its writing goes on beside the run, its size.

    python bench/checkpoint.py
    accelerate launch --config_file accelerate_configs/cpu_zero3.yaml bench/checkpoint.py

Steps of the sentiment task, each followed by a checkpoint. Aims: a checkpoint holds a run up for at most 2 % of a step,
and takes at most 4 times the bytes of the adapters and heads in it.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from common import SMOKE, arguments, experiment, keep, models, peak_memory_gib, prepared, rounded

MOST_OF_A_STEP, MOST_OF_ADAPTERS = 0.02, 4.0
ROLLOUTS = 2 if SMOKE else 6
DEMO = {
    "rollout.prompts_per_rollout": 32,
    "rollout.max_new_tokens": 4 if SMOKE else 32,
    "ppo.mini_batches": 2,
    "update.micro_batch_tokens": 2560,
    "run.save_every": 1,
}
"""As many sequences and updates as a rollout of ``make demo`` has."""


def main() -> None:
    options = arguments(__doc__).parse_args()
    figures = [measured(model) for model in models(options.set)]
    if os.environ.get("RANK", "0") == "0":
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        name = "checkpoint" if ranks == 1 else f"checkpoint_{ranks}_ranks"
        keep(name, rounded(figures), ranks=ranks, most_of_a_step=MOST_OF_A_STEP, most_of_adapters=MOST_OF_ADAPTERS)


def measured(model: str) -> dict[str, Any]:
    """Of one model: medians over all rollouts but the first. On ranks other than 0 nothing."""
    folder = Path(tempfile.gettempdir()) / f"rlhf_checkpoint_{os.environ.get('MASTER_PORT', os.getpid())}"
    run = prepared(experiment(model, folder, {**DEMO, "ppo.num_rollouts": ROLLOUTS}))
    held, written = timed(run.trainer, "write_checkpoint"), timed(run.trainer.writer, "_complete")
    summary = run.train()
    if not summary:
        return {}
    newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    size = {str(path.relative_to(newest)): path.stat().st_size for path in newest.rglob("*") if path.is_file()}
    shutil.rmtree(folder)
    step, still = statistics.median(summary["seconds_per_rollout"][1:]), statistics.median(held[1:])
    adapters = sum(count for name, count in size.items() if "/" in name)
    return {
        "model": model,
        "seconds of a step": step,
        "seconds that a step stands still": still,
        "seconds of writing beside the next step": statistics.median(written[1:]),
        "share of a step": still / step,
        "MB": sum(size.values()) / 1e6,
        "MB of adapters and heads": adapters / 1e6,
        "times the adapters": sum(size.values()) / adapters,
        "peak GiB": peak_memory_gib(),
    }


def timed(owner: Any, name: str) -> list[float]:
    """Seconds of each call of a method from now on."""
    real, seconds = getattr(owner, name), list[float]()

    def call(*args: Any) -> None:
        start = time.perf_counter()
        real(*args)
        seconds.append(time.perf_counter() - start)

    setattr(owner, name, call)
    return seconds


if __name__ == "__main__":
    main()
