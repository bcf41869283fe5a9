"""The kinds of runs that are killed: tiny, six optimizer steps, a checkpoint after every second one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.support.launch import ROOT, write_launch_config
from tests.support.tiny import merged, write_experiment, write_task
from tests.trainers.test_fine_tuning import sections

STEPS, SAVED_EVERY = 6, 2


def _ppo(folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    task = merged(
        write_task(folder),
        {
            "data.evaluation": str(folder / "heldout.jsonl"),
            "rollout.prompts_per_rollout": 4,
            "rollout.max_new_tokens": 4,
            "ppo.mini_batches": 2,
            "ppo.kl_target": 0.01,
            "ppo.kl_horizon": 100,
            "update.schedule": "linear",
            "run.save_every": 1,
            "run.evaluate_every": 1,
        },
    )
    return merged(task, changes)


def _grpo(folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    groups = {"ppo.advantage": "grpo", "rollout.responses_per_prompt": 2, "rollout.replace_uniform_groups": 1}
    return merged(_ppo(folder, groups), changes)


def _sft(folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    supervised = {
        "update.schedule": "linear",
        "update.weight_decay": 0.1,
        "run.save_every": SAVED_EVERY,
        "run.evaluate_every": 3,
        "sft.batch_size": 5,
        "sft.epochs": 3.0,
    }
    return sections(folder, "sft", {**supervised, **changes})


@dataclass(frozen=True)
class Kind:
    """A kind of run: its recipe, its settings, what its records count, and the phases that it has."""

    name: str
    recipe: str
    make: Callable[[Path, dict[str, Any]], dict[str, Any]]
    axis: str
    without: tuple[str, ...] = ()

    @property
    def script(self) -> Path:
        """The recipe."""
        return ROOT / "recipes" / self.recipe


KINDS = {
    kind.name: kind
    for kind in (
        Kind("PPO", "ppo.py", _ppo, "rollout"),
        Kind("GRPO", "ppo.py", _grpo, "rollout"),
        Kind("SFT", "sft.py", _sft, "step", without=("rollout", "scoring")),
    )
}


class Task:
    """The files of one kind of run in a folder, shared by all its runs."""

    def __init__(self, kind: Kind, folder: Path, changes: dict[str, Any] | None = None, stage: int = 3) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.kind, self.folder = kind, folder
        self.sections = kind.make(folder, changes or {})
        self.launch_config = write_launch_config(folder, 2, stage, {})

    def arguments(self, run_folder: Path) -> list[str]:
        """Of the recipe, for a run in ``run_folder``."""
        settings = merged(self.sections, {"run.output_dir": str(run_folder)})
        return ["--config", str(write_experiment(run_folder.with_suffix(".yaml"), settings))]


# ---- what a run leaves -----------------------------------------------------------------------------------------------


def copied_run(source: Path, target: Path) -> None:
    """A run folder again under another name."""
    shutil.copytree(source, target)


def newest_checkpoint(run_folder: Path) -> int:
    """The step of the newest checkpoint that has a manifest; 0 where there is none."""
    found = [path.parent.name.rpartition("-")[2] for path in run_folder.glob("checkpoint-*/manifest.json")]
    return max((int(number) for number in found if number.isdecimal()), default=0)


def differences(straight: Path, broken: Path, axis: str) -> list[str]:
    """What a run's end has that the other's has not: every tensor bit for bit, every record but for its times."""
    found = []
    names = sorted(str(path.relative_to(straight)) for path in straight.glob("[pvr]*/*.safetensors"))
    assert names, f"{straight} has no weights to compare"
    for name in names:
        if not (broken / name).is_file():
            found.append(f"{name} is missing")
            continue
        one, other = load_file(straight / name), load_file(broken / name)
        if one.keys() != other.keys():
            found.append(f"{name} has other tensors")
        found += [f"{name}: {key}" for key in one.keys() & other.keys() if not torch.equal(one[key], other[key])]
    one_log, other_log = records(straight, axis), records(broken, axis)
    found += [
        f"log.jsonl: {key}"
        for key in sorted(one_log.keys() | other_log.keys())
        if one_log.get(key) != other_log.get(key)
    ]
    return found


def records(folder: Path, axis: str) -> dict[tuple[str, int], dict[str, Any]]:
    """The last record of each kind and place in ``log.jsonl``, without what is measured in time."""
    try:
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    except OSError:
        return {}
    timeless = [{k: v for k, v in line.items() if not k.startswith(("timing_s", "perf"))} for line in lines]
    return {(line["kind"], line[axis]): line for line in timeless}
