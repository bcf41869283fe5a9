"""Two machines without a shared disk: start, train, checkpoint, lose one, go on with both, go on with one.

The machines are network namespaces, the launch is ``accelerate_configs/zero3_2nodes.yaml`` as README gives it.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.hosts import ADDRESSES, Hosts, reason_against
from tests.support.launch import ROOT, run_recipe
from tests.support.processes import Finished
from tests.support.tiny import merged, write_experiment, write_task

CONFIG = ROOT / "accelerate_configs/zero3_2nodes.yaml"
ROLLOUTS, KILLED_IN = 4, 4
SECONDS = 300.0
"""A hang's: what ends at all ends in a tenth of it where nothing else runs."""
BOUND = 60.0
"""Seconds in which one host ends after the other has lost a process."""
MORTAL = '''
import os
import signal
from pathlib import Path

calls = 0


def low_words(prompts, responses, **columns):
    """The process dies, without a word, in the call that the file ``dies_at`` names, on the machine that has it."""
    global calls
    calls += 1
    file = Path(__file__).with_name("dies_at")
    if file.exists() and calls == int(file.read_text()):
        file.unlink()
        Path(__file__).with_name("died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return [float(sum(word < "w14" for word in response.split())) for response in responses]
'''

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(reason_against() is not None, reason=f"two hosts: {reason_against()}"),
]


@dataclass
class Story:
    """What happened, one step after another."""

    hosts: Hosts
    straight: Path
    broken: list[Finished]
    seconds: float
    after_the_kill: list[list[str]]
    resumed: list[Finished]
    alone: Finished


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    folder = tmp_path_factory.mktemp("hosts")
    straight = folder / "straight"
    straight.mkdir()
    changes = {"ppo.num_rollouts": ROLLOUTS, "run.save_every": 1, "ppo.kl_target": 0.01, "ppo.kl_horizon": 100}
    task = merged(write_task(straight), changes)
    (straight / "reward.py").write_text(MORTAL)
    run_recipe(write_experiment(straight / "run.yaml", task), processes=2, stage=3).succeeded()
    hosts = Hosts(folder)
    try:
        yield _tell(hosts, straight)
    finally:
        hosts.close()


def _tell(hosts: Hosts, straight: Path) -> Story:
    for root in hosts.roots:
        shutil.copytree(straight, root, dirs_exist_ok=True, ignore=shutil.ignore_patterns("run"))
        text = (straight / "run.yaml").read_text().replace(str(straight), str(hosts.disk))
        (root / "run.yaml").write_text(text)
    (hosts.roots[1] / "dies_at").write_text(str(KILLED_IN))
    broken, seconds = _on_both(hosts, watched=hosts.roots[1] / "died")
    after_the_kill = [_files(root / "run") for root in hosts.roots]
    shutil.copytree(hosts.roots[0] / "run", hosts.roots[0] / "alone")
    resumed, _ = _on_both(hosts, "--resume")
    recipe = [sys.executable, str(ROOT / "recipes/ppo.py"), "--config", str(hosts.disk / "run.yaml"), "--resume"]
    alone = hosts.start(0, [*recipe, f"run.output_dir={hosts.disk / 'alone'}"]).finished(SECONDS)
    return Story(hosts, straight, broken, seconds, after_the_kill, resumed, alone)


def _on_both(hosts: Hosts, *words: str, watched: Path | None = None) -> tuple[list[Finished], float]:
    """Start the recipe on both hosts and wait for both; the seconds from when ``watched`` is there to the end of the
    first host."""
    script = [str(ROOT / "recipes/ppo.py"), "--config", str(hosts.disk / "run.yaml"), *words]
    commands = [hosts.accelerate(number, CONFIG, *script) for number in range(2)]
    deadline = time.monotonic() + SECONDS
    while watched is not None and not watched.exists() and time.monotonic() < deadline:
        if commands[0].process.poll() is not None:
            break
        time.sleep(0.05)
    began = time.monotonic()
    first = commands[0].finished(SECONDS)
    seconds = time.monotonic() - began
    return [first, commands[1].finished(BOUND)], seconds


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for role in ("policy", "value"):
        for path in sorted((folder / role).glob("*.safetensors")):
            found.update({f"{role}/{path.name}/{name}": tensor for name, tensor in load_file(path).items()})
    return found


def assert_equals_straight(story: Story, folder: Path) -> None:
    expected, found = weights(story.straight / "run"), weights(folder)
    assert expected.keys() == found.keys() and len(expected) > 2
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= 1e-5, name
    assert scores(folder) == pytest.approx(scores(story.straight / "run"), abs=1e-5)


def scores(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    by_rollout = {line["rollout"]: line["critic/score/mean"] for line in lines if line["kind"] == "train"}
    assert sorted(by_rollout) == list(range(1, ROLLOUTS + 1))
    return [by_rollout[number] for number in sorted(by_rollout)]


def test_a_lost_process_ends_the_other_host_with_its_name(story: Story) -> None:
    here, there = story.broken
    assert here.status not in (0, -9) and there.status not in (0, -9)
    assert story.seconds < BOUND, f"it took {story.seconds:.0f} s"
    said = [line for line in here.output.splitlines() if re.search(rf"rank 1\b|{re.escape(ADDRESSES[1])}", line)]
    assert said, here.output[-3000:]


def test_only_the_first_host_writes(story: Story) -> None:
    first, second = story.after_the_kill
    assert any(re.fullmatch(r"checkpoint-\d+/manifest\.json", name) for name in first)
    assert second == []
    assert _files(story.hosts.roots[1] / "run") == []


def test_both_go_on_from_what_the_first_has(story: Story) -> None:
    for finished in story.resumed:
        finished.succeeded()
    assert_equals_straight(story, story.hosts.roots[0] / "run")


def test_one_goes_on_alone(story: Story) -> None:
    story.alone.succeeded()
    assert_equals_straight(story, story.hosts.roots[0] / "alone")
