"""The commands through which a checkpoint, a run folder, an adapter or a base comes in, on one small world of files."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.reliability.cells import has_bare_traceback, last_line
from tests.reliability.damage import CANARY
from tests.reliability.kinds import differences
from tests.reliability.strike import RESUMED, Strike, watch_code
from tests.support.forked import Processes
from tests.support.processes import ROOT, Finished
from tests.support.tiny import merged, tiny_llama, write_experiment, write_task

CLI, PPO = str(ROOT / "src/rlhf_toolkit/cli/__main__.py"), str(ROOT / "recipes/ppo.py")
SECONDS = 60
"""What a case may take on a busy machine; on a quiet one it takes two seconds."""
ONE_LINE = re.compile(r"^(\w*Error): ", flags=re.MULTILINE)
TYPED = "import io, sys; sys.stdin = io.StringIO('w1 w2 w3\\n')\n"
PASSED = ("refused", "previous", "harmless", "named")
NAMED = re.compile(r"log\.jsonl has lost \d+ of \d+ records")


@dataclass(frozen=True)
class Verdict:
    """What a door did with an input: one of ``PASSED``, or what is wrong, and a line about it."""

    word: str
    line: str = ""

    @property
    def passed(self) -> bool:
        """Whether the door did what it must."""
        return self.word in PASSED


class World:
    """A folder that every case finds as it was: a base in shards, adapters, a finished run and one that was killed
    after its second checkpoint. ``work`` is what a case spoils, ``outside`` what nobody may touch."""

    def __init__(self, folder: Path, processes: Processes) -> None:
        self.folder, self.processes = folder, processes
        self.work, self.pristine, self.outside = folder / "work", folder / "pristine", folder / "outside"
        self.canary, self.notes = folder / "canary", folder / "notes"

    def make(self) -> None:
        """Write and train everything once, and keep a copy. Raises AssertionError where a door fails already."""
        for place in (self.work, self.outside, self.notes):
            place.mkdir(parents=True)
        task = merged(write_task(self.work), {"data.evaluation": str(self.work / "heldout.jsonl"), **CHANGES})
        model = tiny_llama()
        (self.work / "model/model.safetensors").unlink()
        model.save_pretrained(self.work / "model", max_shard_size="40KB")
        for name, changes in RUNS.items():
            at = {"run.output_dir": str(self.work / name), **changes}
            write_experiment(self.work / f"{name}.yaml", merged(task, at))
        self.run(PPO, "--config", str(self.work / "done.yaml")).succeeded()
        strike = Strike("renamed", 9, "0", str(self.notes), step=4)
        self.run(PPO, "--config", str(self.work / "half.yaml"), before=strike.code())
        other = merged(task, {"model.name": str(self.work / "other_model"), "run.output_dir": str(self.work / "other")})
        torch.manual_seed(5)
        shutil.copytree(self.work / "model", self.work / "other_model")
        tiny_llama(initializer_range=0.1).save_pretrained(self.work / "other_model", max_shard_size="40KB")
        write_experiment(self.work / "other.yaml", other)
        self.run(PPO, "--config", str(self.work / "other.yaml")).succeeded()
        shutil.copytree(self.work, self.pristine, symlinks=True)

    def fresh(self) -> None:
        """As ``make`` left it."""
        for place in (self.work, self.notes, self.outside):
            shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.pristine, self.work, symlinks=True)
        self.notes.mkdir()
        self.outside.mkdir()
        self.canary.unlink(missing_ok=True)

    def run(self, script: str, *arguments: str, before: str = "") -> Finished:
        """One plain process with this script."""
        return self.processes.run(
            script, *arguments, seconds=SECONDS, before=before, environment={CANARY: str(self.canary)}
        )


CHANGES: dict[str, Any] = {
    "rollout.prompts_per_rollout": 4,
    "rollout.max_new_tokens": 4,
    "ppo.mini_batches": 2,
    "run.save_every": 1,
    "run.evaluate_every": 0,
}
RUNS: dict[str, dict[str, Any]] = {"done": {}, "half": {}, "new": {"ppo.num_rollouts": 1}}


@dataclass(frozen=True)
class Door:
    """A command, and what it leaves that two calls on the same files have in common."""

    name: str
    script: str
    arguments: Callable[[Path], list[str]]
    result: Callable[[World, Finished], Any]
    before: Callable[[World], str] = lambda world: ""

    def open(self, world: World) -> Finished:
        """Run the command on what lies in ``world.work``."""
        return world.run(self.script, *self.arguments(world.work), before=self.before(world))


def judge(door: Door, world: World, sound: Any, *, previous: bool = False, hashed: bool = False) -> Verdict:
    """Open the door on what was spoiled. ``sound`` is the result on unspoiled files. ``previous``: the run has to go
    on, from the checkpoint before. ``hashed``: what was spoiled has a hash, so that even its harmless use is a fault.
    """
    guarded = snapshot(world.outside)
    began = time.monotonic()
    finished = door.open(world)
    if world.canary.exists():
        return Verdict("EXECUTED", "the pickle ran")
    if snapshot(world.outside) != guarded:
        return Verdict("WRITTEN OUTSIDE", str(world.outside))
    if "Timeout (0:" in finished.output or time.monotonic() - began > SECONDS - 5:
        return Verdict("HUNG", last_line(finished.output))
    if finished.status == 0:
        if hashed and _resumed_step(world) == 4:
            return Verdict("ACCEPTED", "a file whose hash is another")
        return _of_success(world, finished, door, sound, previous=previous)
    if has_bare_traceback(finished.output) or not ONE_LINE.search(finished.output):
        return Verdict("TRACEBACK", f"status {finished.status}: {last_line(finished.output)}")
    by_hand = "is a link" in finished.output or "neither a file nor a folder" in finished.output
    if previous and not by_hand:  # a person put it there, no fault of a disk: to stop is right
        return Verdict("STOPPED, BUT NOT BY ITS PREVIOUS CHECKPOINT", last_line(finished.output))
    return Verdict("refused", last_line(finished.output))


def _of_success(world: World, finished: Finished, door: Door, sound: Any, *, previous: bool) -> Verdict:
    if door.result(world, finished) != sound:
        if door.name == "--resume" and NAMED.search(finished.output):
            return Verdict("named", "the run goes on without records that nothing else holds")
        return Verdict("ACCEPTED", "with another result")
    if previous and _resumed_step(world) != 2:
        return Verdict("harmless", f"it went on from step {_resumed_step(world)}, with the same end")
    return Verdict("previous" if previous else "harmless")


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file in a folder, with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def tensors_of(paths: Iterable[Path]) -> dict[str, Any]:
    """Every tensor of these files, as lists that can be compared."""
    return {
        f"{path.name}:{name}": tensor.float().tolist()
        for path in sorted(paths)
        for name, tensor in load_file(path).items()
    }


def _resumed_step(world: World) -> int:
    path = world.notes / RESUMED
    return int(json.loads(path.read_text())) if path.is_file() else -1


def _same_end(world: World, finished: Finished) -> Any:
    return differences(world.pristine / "done", world.work / "half", "rollout")


def _new_weights(world: World, finished: Finished) -> Any:
    return tensors_of((world.work / "new").glob("[pv]*/*.safetensors"))


def _printed(world: World, finished: Finished) -> Any:
    return [line for line in finished.output.splitlines() if not line.startswith("  W&B")]


def _card(world: World, finished: Finished) -> Any:
    return (world.work / "done/README.md").read_text()


def _merged(world: World, finished: Finished) -> Any:
    return tensors_of((world.work / "merged").glob("*.safetensors"))


def _evaluated(world: World, finished: Finished) -> Any:
    return json.loads((world.work / "evaluated.json").read_text())["estimates"]


DOORS = {
    door.name: door
    for door in (
        Door(
            "--resume",
            PPO,
            lambda work: ["--config", str(work / "half.yaml"), "--resume"],
            _same_end,
            lambda world: watch_code(world.notes),
        ),
        Door("report", CLI, lambda work: ["report", str(work / "done")], _printed),
        Door("card", CLI, lambda work: ["card", str(work / "done")], _card),
        Door(
            "merge",
            CLI,
            lambda work: ["merge", str(work / "model"), str(work / "done/policy"), str(work / "merged")],
            _merged,
        ),
        Door(
            "chat",
            CLI,
            lambda work: ["chat", str(work / "model"), str(work / "done/policy"), "--max-new-tokens", "4"],
            _printed,
            lambda world: TYPED,
        ),
        Door(
            "evaluate",
            CLI,
            lambda work: [
                *("evaluate", str(work / "half.yaml"), str(work / "done/policy")),
                *("--out", str(work / "evaluated.json")),
            ],
            _evaluated,
        ),
        Door(
            "policy_adapter",
            PPO,
            lambda work: ["--config", str(work / "new.yaml"), f"model.policy_adapter={work / 'done/policy'}"],
            _new_weights,
        ),
        Door("train", PPO, lambda work: ["--config", str(work / "new.yaml")], _new_weights),
    )
}
