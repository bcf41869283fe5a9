"""What a run writes, how often and where to, as its start says it."""

from __future__ import annotations

from rlhf_toolkit.settings.configs import RunConfig
from rlhf_toolkit.settings.experiment import Experiment, FineTuning

SAVES = 10
"""Checkpoints of a run that does not say how often."""


TITLES = {"sft": "SFT", "reward_model": "reward model", "dpo": "DPO"}


def title_of(experiment: Experiment | FineTuning) -> str:
    """What this kind of run is called."""
    return TITLES[experiment.JOB] if isinstance(experiment, FineTuning) else "PPO"


def saved_every(run: RunConfig, rounds: int) -> int:
    """Rounds between checkpoints; 0: there are none."""
    return -(-rounds // SAVES) if run.save_every is None else run.save_every


def places_text(run: RunConfig, rounds: int, unit: str) -> str:
    """Where everything goes."""
    every, kept = saved_every(run, rounds), run.keep_checkpoints
    times = f"every {unit}" if every == 1 else f"every {every} {unit}s"
    checkpoints = f"a checkpoint {times}, the newest {kept} kept" if every else "no checkpoints before the end"
    watchers = ", ".join(f"W&B {run.wandb}" if each == "wandb" else each for each in run.watchers)
    told = f"; {watchers}" if watchers else ""
    return f"writes: {run.output_dir}: log.jsonl, samples.jsonl, summary.json, {checkpoints}{told}"
