"""Rewards that fail on two ranks under ZeRO-3: each run ends as its policy says, in time, and leaves no process."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from rlhf_toolkit.data.prompts import PromptSchedule
from tests.support.launch import Finished, run_recipe
from tests.support.tiny import merged, write_experiment, write_task

PROMPTS, PER_ROLLOUT, RESPONSES = 24, 8, 2
REWARDS = '''
import os
import time
from pathlib import Path

HERE = Path(__file__).parent
(HERE / f"worker_{os.getpid()}").touch()


def lengths(responses):
    return [float(len(response)) for response in responses]


def sleepy(prompts, responses, **columns):
    """The first call on rank 1 never returns."""
    if os.environ["RANK"] == "1":
        try:
            (HERE / "asleep").touch(exist_ok=False)
        except FileExistsError:
            return lengths(responses)
        while True:
            time.sleep(1000)
    return lengths(responses)


def picky(prompts, responses, number, **columns):
    """Raises for one prompt in ten."""
    if number[0] % 10 == 3:
        raise ValueError(f"not number {number[0]}")
    return lengths(responses)


def undecided(prompts, responses, number, **columns):
    """NaN for one prompt in ten."""
    return [float("nan") if n % 10 == 3 else length for n, length in zip(number, lengths(responses))]
'''
SERVER = """
import json, os, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

left, lock = int(sys.argv[1]), threading.Lock()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        global left
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with lock:
            left -= 1
            if left < 0:
                os._exit(1)
            answer = json.dumps({"scores": [float(len(response)) for response in body["responses"]]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

    def log_message(self, *args):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_address[1], flush=True)
server.serve_forever()
"""
ENTRIES: dict[str, dict[str, Any]] = {
    "sleepy": {"workers": 1, "timeout": 8, "environment": ["RANK"]},
    "picky": {"workers": 1},
    "undecided": {},
}
POLICIES: dict[str, dict[str, Any]] = {
    "error": {},
    "score": {"on_failure": "score", "failure_score": -5.0},
    "drop": {"on_failure": "drop"},
}


def launched(folder: Path, entry: dict[str, Any], policy: str, *, launcher: bool = False, **changes: Any) -> Finished:
    """A run of three rollouts whose reward is ``entry`` under ``policy``; by ``accelerate launch`` where it says so."""
    task = write_task(folder, prompts=PROMPTS)
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    numbered = [{**row, "number": number} for number, row in enumerate(rows)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in numbered))
    (folder / "reward.py").write_text(REWARDS)
    reward = {"function": "", "functions": [{**entry, **POLICIES[policy]}]}
    task = merged({**task, "reward": reward}, {"rollout.responses_per_prompt": RESPONSES, **changes})
    return run_recipe(write_experiment(folder / "run.yaml", task), processes=2, stage=3, launcher=launcher)


def function(folder: Path, name: str) -> dict[str, Any]:
    return {"function": f"{folder}/reward.py:{name}", **ENTRIES[name]}


def left_behind(folder: Path) -> list[list[str]]:
    """The command lines of processes that still have to do with a run: launcher, ranks and workers name its folder."""
    lines = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                lines.append(process.cmdline())
        except psutil.NoSuchProcess:
            continue
    return [line for line in lines if any(str(folder) in part for part in line)]


def assert_nothing_is_left(folder: Path, *, workers: int) -> None:
    assert len(list(folder.glob("worker_*"))) >= workers, "no worker has loaded the function"
    assert not left_behind(folder)


def assert_both_ranks_said(finished: Finished, pattern: str) -> None:
    """One line of each rank, that names reward, fault, way out and prompt; and an end that was not a time limit."""
    assert finished.status not in (0, -9), finished.output[-3000:]
    said = [line for line in finished.output.splitlines() if "RewardError: " in line]
    of_main = [line for line in said if line.startswith("RewardError: ")]
    of_other = [line for line in said if line.startswith("[rank 1] RewardError: ")]
    assert len(of_main) == len(of_other) == 1, said
    for line in (*of_main, *of_other):
        assert re.search(rf"reward {pattern}; its prompt was '[w\d ]+' \(row \d+ of the dataset\)$", line), line


def records(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "run/log.jsonl").read_text().splitlines()]


def failing_responses(rollout: int) -> int:
    """To the prompts that are one in ten."""
    return RESPONSES * sum(i % 10 == 3 for i in PromptSchedule(PROMPTS, PER_ROLLOUT, 0).indices(rollout))


def assert_trained(finished: Finished, folder: Path) -> None:
    finished.succeeded()
    adapter = load_file(folder / "run/policy/adapter_model.safetensors")
    assert all(tensor.any() for name, tensor in adapter.items() if "lora_B" in name), "an adapter never moved"
    assert len(records(folder)) == 3


@pytest.mark.thorough
def test_a_reward_that_never_returns_on_one_rank_ends_both(tmp_path: Path) -> None:
    finished = launched(tmp_path, function(tmp_path, "sleepy"), "error", launcher=True)
    assert_both_ranks_said(finished, r"sleepy took longer than its 8 s; make it faster, or raise its timeout")
    assert "RewardError: rank 1 failed in the reward: reward sleepy" in finished.output
    assert_nothing_is_left(tmp_path, workers=2)


def test_a_reward_that_never_returns_on_one_rank_costs_one_response(tmp_path: Path) -> None:
    finished = launched(tmp_path, function(tmp_path, "sleepy"), "drop")
    assert_trained(finished, tmp_path)
    assert [record.get("reward/sleepy_failures") for record in records(tmp_path)] == [1.0, None, None]
    assert [record.get("reward/dropped") for record in records(tmp_path)] == [1.0, None, None]
    assert (
        "reward sleepy: 1 of 8 calls failed and were dropped; the first: reward sleepy took longer" in finished.output
    )
    assert_nothing_is_left(tmp_path, workers=3)  # the one that slept was replaced


def test_a_reward_that_raises_for_one_prompt_in_ten_scores_these(tmp_path: Path) -> None:
    finished = launched(tmp_path, function(tmp_path, "picky"), "score")
    assert_trained(finished, tmp_path)
    expected = [failing_responses(rollout) for rollout in range(3)]
    assert sum(expected) == 3 * RESPONSES, "each prompt was there once"
    assert [record.get("reward/picky_failures", 0) for record in records(tmp_path)] == expected
    assert [record["critic/raw_score/min"] == -5.0 for record in records(tmp_path)] == [n > 0 for n in expected]
    assert not any("reward/dropped" in record for record in records(tmp_path))
    assert "reward picky raised ValueError: not number" in finished.output
    assert_nothing_is_left(tmp_path, workers=2)


def test_a_reward_that_gives_nan_leaves_these_responses_out(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"ppo.advantage": "grpo"}
    finished = launched(tmp_path, function(tmp_path, "undecided"), "drop", **changes)
    assert_trained(finished, tmp_path)
    expected = [failing_responses(rollout) for rollout in range(3)]
    assert [record.get("reward/dropped", 0) for record in records(tmp_path)] == expected
    assert all(record["critic/raw_score/min"] >= 0 for record in records(tmp_path))
    assert_nothing_is_left(tmp_path, workers=2)


@contextmanager
def server(*, answers: int) -> Iterator[str]:
    """The address of a server whose process ends in the middle of the request after so many answers."""
    command = [sys.executable, "-c", SERVER, str(answers)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/score"
        finally:
            process.kill()


def remote(url: str) -> dict[str, Any]:
    return {"url": url, "name": "judge", "timeout": 20, "retries": 1}


def test_a_server_that_dies_ends_the_run(tmp_path: Path) -> None:
    with server(answers=20) as url:
        finished = launched(tmp_path, remote(url), "error")
    fault = rf"judge got no answer from {url}: \w+: [^;]+; check that the server runs and that the address is right"
    assert_both_ranks_said(finished, fault)
    assert len(records(tmp_path)) == 1, "the server lived for a rollout"
    assert_nothing_is_left(tmp_path, workers=0)


def test_a_server_that_dies_is_scored(tmp_path: Path) -> None:
    with server(answers=20) as url:
        assert_trained(launched(tmp_path, remote(url), "score"), tmp_path)
    first, second, third = (record.get("reward/judge_failures", 0) for record in records(tmp_path))
    assert first == 0 and 0 < second <= 16 and third == 16
    assert records(tmp_path)[2]["critic/raw_score/max"] == -5.0
    assert_nothing_is_left(tmp_path, workers=0)
