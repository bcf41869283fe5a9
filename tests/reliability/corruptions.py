"""``python -m tests.reliability.corruptions``: files of checkpoints, run folders, adapters and bases are spoiled, one
at a time, and every door that reads them is opened.

A case passes where the door refuses in one line, goes on from the checkpoint before, or gives what it gives on sound
files; never where it runs what it reads, writes elsewhere, hangs, shows a bare traceback or takes the spoiled file.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.reliability.damage import (
    ANY,
    BASIC,
    JSON,
    SILENT_FLIPS,
    Named,
    damages_of,
    missing_keys,
    newer_format,
    pickled,
    torch_archive,
)
from tests.reliability.doors import DOORS, Verdict, World, judge
from tests.support.forked import Processes

Spoil = Callable[[World], None]
NEWEST, OLDER = "half/checkpoint-4", "half/checkpoint-2"
PICKLES = (
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "rng_state_0.pth",
    "training_args.bin",
    "pytorch_model.bin",
    "adapter_model.bin",
    "policy/adapter_model.bin",
    "scaler.pt",
    "latest",
    "global_step4/mp_rank_00_model_states.pt",
    "trainer_state.pkl",
)
"""Names under which other libraries look for a pickle."""


@dataclass(frozen=True)
class Case:
    """What is spoiled, by what, and the door that is opened."""

    what: str
    damage: str
    door: str
    spoil: Spoil
    previous: bool = False
    hashed: bool = False

    def __str__(self) -> str:
        return f"{self.door:14} {self.what:52} {self.damage:24}"


# ---- cases -----------------------------------------------------------------------------------------------------------


def cases_of(world: World) -> Iterator[Case]:
    """Every case, by what lies in the world."""
    yield from of_checkpoints(world)
    yield from of_whole_checkpoints(world)
    yield from of_files(world, "half", ("run.json", "log.jsonl"), ("--resume",))
    yield from of_files(world, "done", ("run.json", "log.jsonl", "summary.json", "samples.jsonl"), ("report", "card"))
    adapter = ("adapter_config.json", "adapter_model.safetensors")
    yield from of_files(world, "done/policy", adapter, ("merge", "chat", "evaluate", "policy_adapter"))
    index = "model.safetensors.index.json"
    yield from of_files(world, "model", ("config.json", index, first_shard(world)), ("merge", "chat", "train"))
    for named in SILENT_FLIPS[1:]:  # the checkpoint knows its base
        name = f"model/{first_shard(world)}"
        yield Case(name, named.name, "--resume", spoiling(name, named))
    yield from of_files(world, "model", ("tokenizer.json", "tokenizer_config.json"), ("chat", "train"))
    yield from of_files(world, "model", ("generation_config.json",), ("train",))
    yield from of_pickles(world)


def of_checkpoints(world: World) -> Iterator[Case]:
    """Each file of the newest checkpoint: with an older one the run goes on from that, without it refuses."""
    checkpoint = world.pristine / NEWEST
    manifest = (checkpoint / "manifest.json").read_text()
    for path in sorted(file for file in checkpoint.rglob("*") if file.is_file()):
        name = str(path.relative_to(world.pristine))
        hashed = f'"{path.relative_to(checkpoint)}"' in manifest
        damages = [*damages_of(path), *SILENT_FLIPS]
        if path.name == "manifest.json":
            damages += [*missing_keys(path), Named("a newer format", newer_format)]
        for named in damages:
            yield Case(name, named.name, "--resume", spoiling(name, named), previous=True, hashed=hashed)
        for named in (*BASIC, SILENT_FLIPS[2]):
            alone = both(without_older, spoiling(name, named))
            yield Case(f"{name}, the only one", named.name, "--resume", alone, hashed=hashed)


def of_whole_checkpoints(world: World) -> Iterator[Case]:
    """A checkpoint that is another's, or in another's place."""
    whole: dict[str, Spoil] = {
        "of another model": lambda world: replaced(world, "other/checkpoint-4", NEWEST),
        "of an earlier step": lambda world: replaced(world, OLDER, NEWEST),
        "a link outside": linked_checkpoint,
        "an empty folder": lambda world: emptied(world.work / NEWEST),
        "a file": lambda world: as_file(world.work / NEWEST),
        "a number too large": lambda world: as_file(world.work / "half" / f"checkpoint-{10**30}"),
        "a newer name, empty": lambda world: emptied(world.work / "half/checkpoint-900"),
        "a newer name, the same": lambda world: replaced(world, NEWEST, "half/checkpoint-900"),
        "a newer name, negative": lambda world: replaced(world, OLDER, "half/checkpoint--6"),
        "a newer name, not decimal": lambda world: replaced(world, OLDER, "half/checkpoint-\u0669"),
        "a temporary one": lambda world: replaced(world, OLDER, "half/.checkpoint-6.tmp"),
    }
    for name, spoil in whole.items():
        yield Case("a whole checkpoint", name, "--resume", spoil, previous=True)
        yield Case("a whole checkpoint, the only one", name, "--resume", both(spoil, without_older))


def of_files(world: World, folder: str, names: Sequence[str], doors: Sequence[str]) -> Iterator[Case]:
    """Each file, by everything that can be wrong with its kind, at each door. A run without a summary has not ended."""
    for name in names:
        path = world.pristine / folder / name
        damages = (*ANY, *JSON[:6]) if path.suffix == ".jsonl" else damages_of(path)
        for named in damages:
            for door in () if (name, named.name) == ("summary.json", "removed") else doors:
                yield Case(f"{folder}/{name}", named.name, door, spoiling(f"{folder}/{name}", named))


def of_pickles(world: World) -> Iterator[Case]:
    """A pickle under every name, beside what is sound and instead of it."""
    places = {"--resume": NEWEST, "policy_adapter": "done/policy", "merge": "model", "train": "model", "chat": "model"}
    for door, place in places.items():
        for name in PICKLES:
            for word, data in (("a pickle beside", pickled()), ("torch's pickle beside", torch_archive())):
                yield Case(f"{place}/{name}", word, door, planting(f"{place}/{name}", data), previous=False)
    for door, place, weights in (
        ("merge", "done/policy", "adapter_model"),
        ("chat", "done/policy", "adapter_model"),
        ("evaluate", "done/policy", "adapter_model"),
        ("policy_adapter", "done/policy", "adapter_model"),
        ("train", "model", "pytorch_model"),
        ("chat", "model", "pytorch_model"),
        ("merge", "model", "pytorch_model"),
    ):
        instead = both(without_weights(place), planting(f"{place}/{weights}.bin", torch_archive()))
        yield Case(f"{place}/{weights}.bin", "a pickle instead", door, instead)


# ---- what is done to a world -----------------------------------------------------------------------------------------


def spoiling(name: str, named: Named) -> Spoil:
    """The damage at a file of the world."""
    return lambda world: named.damage(world.work / name)


def planting(name: str, data: bytes) -> Spoil:
    """A file more."""

    def spoil(world: World) -> None:
        path = world.work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    return spoil


def without_weights(place: str) -> Spoil:
    """No safetensors in that folder."""

    def spoil(world: World) -> None:
        for path in (world.work / place).glob("*.safetensors*"):
            path.unlink()

    return spoil


def both(*spoils: Spoil) -> Spoil:
    """One after another."""

    def spoil(world: World) -> None:
        for each in spoils:
            each(world)

    return spoil


def without_older(world: World) -> None:
    """The newest checkpoint is the only one."""
    shutil.rmtree(world.work / OLDER, ignore_errors=True)


def replaced(world: World, source: str, target: str) -> None:
    """One folder of the world in the place of another."""
    shutil.rmtree(world.work / target, ignore_errors=True)
    shutil.copytree(world.pristine / source, world.work / target)


def linked_checkpoint(world: World) -> None:
    """The newest checkpoint lies elsewhere."""
    shutil.move(world.work / NEWEST, world.outside / "elsewhere")
    (world.work / NEWEST).symlink_to(world.outside / "elsewhere")


def emptied(folder: Path) -> None:
    """An empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def as_file(folder: Path) -> None:
    """A file of a folder's name."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.write_text("{}")


def first_shard(world: World) -> str:
    """The base's first file of weights."""
    return min(path.name for path in (world.pristine / "model").glob("*.safetensors"))


# ---- running ---------------------------------------------------------------------------------------------------------


def judge_case(case: Case, world: World, sound: dict[str, Any]) -> Verdict:
    """Spoil a fresh world and open the door."""
    world.fresh()
    os.environ["RLHF_TESTS_OUTSIDE"] = str(world.outside)
    case.spoil(world)
    return judge(DOORS[case.door], world, sound[case.door], previous=case.previous, hashed=case.hashed)


def sound_results(world: World, doors: Sequence[str]) -> dict[str, Any]:
    """What each door gives on sound files. Raises AssertionError where one fails."""
    results = {}
    for name in doors:
        world.fresh()
        results[name] = DOORS[name].result(world, DOORS[name].open(world).succeeded())
    return results


def judge_all(options: argparse.Namespace, folder: Path) -> list[tuple[Case, Verdict]]:
    """Every case that was asked for; what fails is printed at once."""
    processes = Processes(folder)
    try:
        world = World(folder / "world", processes)
        world.make()
        cases = [case for case in cases_of(world) if case.door in options.doors and (options.only or "") in str(case)]
        cases = cases[options.part :: options.every]
        sound = sound_results(world, sorted({case.door for case in cases}))
        found = []
        for case in cases:
            verdict = judge_case(case, world, sound)
            found.append((case, verdict))
            if not verdict.passed or options.all:
                print(f"{case} | {verdict.word}: {verdict.line}", flush=True)
        return found
    finally:
        processes.close()


def print_table(found: Sequence[tuple[Case, Verdict]]) -> None:
    """A row for each door, a column for each verdict."""
    words = sorted({verdict.word for _, verdict in found})
    for door in DOORS:
        counts = Counter(verdict.word for case, verdict in found if case.door == door)
        if counts:
            print(f"{door:14} {sum(counts.values()):5}  " + "  ".join(f"{w}: {counts[w]}" for w in words if counts[w]))


def main() -> int:
    """All corruptions; the number of those that were not met as they must be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--doors", nargs="+", choices=tuple(DOORS), default=tuple(DOORS))
    parser.add_argument("--only", help="cases whose line holds this text")
    parser.add_argument("--every", type=int, default=1, help="only one case of so many")
    parser.add_argument("--part", type=int, default=0, help="the first of them")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time (1)")
    parser.add_argument("--all", action="store_true", help="print every case, not only those that fail")
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = judge_all(options, Path(folder))
    failed = sum(not verdict.passed for _, verdict in found)
    print_table(found)
    print(f"{(time.monotonic() - began) / 60:.1f} minutes")
    print(f"{len(found) - failed} passed, {failed} failed")
    return failed


if __name__ == "__main__":
    raise SystemExit(min(main(), 1))
