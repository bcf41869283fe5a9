"""Every way to fail under every policy, in worker processes; and what becomes of the processes."""

from __future__ import annotations

import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlhf_toolkit.errors import ConfigError, RewardError
from rlhf_toolkit.rewards.calls import InProcess
from rlhf_toolkit.rewards.compose import Rewards
from rlhf_toolkit.rewards.confinement import environment_of_workers
from rlhf_toolkit.rewards.specification import RewardSpec
from tests.support.rewards import MISBEHAVING, batch_of, is_gone, rewards_of, wait_until

LIMIT = 1.5
SAID = {
    "sleep": "took longer than its 1.5 s; make it faster, or raise its timeout",
    "loop": "took longer than its 1.5 s; make it faster, or raise its timeout",
    "late": "took longer than its 1.5 s; make it faster, or raise its timeout",
    "raise": "raised LookupError: nobody knows; repair the function (see its traceback)",
    "leave": "raised SystemExit: left; repair the function (see its traceback)",
    "nan": "gave score nan (float); return a finite number for each response, or one for each of its tokens",
    "count": "returned 2 scores; return one number for each of the 1 responses",
    "type": "gave score 'good' (str); return a finite number for each response, or one for each of its tokens",
    "none": "returned None (NoneType); return one number for each of the 1 responses",
    "exit": "ended its process with status 3; repair the function (SIGKILL may mean that memory ran out)",
    "kill": "had its process killed by SIGKILL; repair the function (SIGKILL may mean that memory ran out)",
}
POLICIES: dict[str, dict[str, Any]] = {
    "error": {},
    "score": {"on_failure": "score", "failure_score": -1.5},
    "drop": {"on_failure": "drop"},
}


def of(name: str, /, **keys: Any) -> dict[str, Any]:
    return {"function": f"{MISBEHAVING}:{name}", "workers": 2, **keys}


@pytest.fixture(scope="module", params=POLICIES)
def pool(request: pytest.FixtureRequest) -> Any:
    """One pool for all misdeeds under one policy: it has to survive each."""
    with rewards_of(of("act", timeout=LIMIT, **POLICIES[request.param])) as rewards:
        yield request.param, rewards


@pytest.mark.parametrize("deed", SAID)
def test_each_misdeed_under_each_policy(deed: str, pool: tuple[str, Rewards]) -> None:
    policy, rewards = pool
    batch = batch_of(["a", "bb", deed, "dddd", "eeeee", "ffffff"])
    if policy == "error" and deed != "nan":
        with pytest.raises(RewardError) as caught:
            rewards.collect(*batch)
        assert str(caught.value) == (rf"reward act {SAID[deed]}; its prompt was 'prompt\n2' (row 102 of the dataset)")
        return
    scores = rewards.collect(*batch)
    value, kept = (-1.5, True) if policy == "score" else (0.0, False)
    if policy == "error":  # a number that is not finite leaves its update out, as with on_failure: skip
        assert math.isnan(scores.totals[2])
        scores.totals[2] = value
    assert scores.totals == [1, 2, value, 4, 5, 6]
    assert scores.kept == [True, True, kept, True, True, True]
    assert [math.isnan(part) for part in scores.parts["act"]] == [False, False, True, False, False, False]
    assert scores.failures == {"act": 1} and scores.token_rewards is None


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("deed", ["raise", "count", "none", "nan"])
def test_misdeeds_in_the_ranks_own_process(deed: str, policy: str) -> None:
    """One call for the whole batch, so that it fails as a whole; a number that is none concerns its response alone,
    but ``act`` spoils all of them."""
    entry = {**of("act", **POLICIES[policy]), "workers": 0}
    with rewards_of(entry) as rewards:
        if policy == "error" and deed != "nan":
            said = SAID[deed].replace("the 1 responses", "the 3 responses").replace("2 scores", "4 scores")
            with pytest.raises(RewardError) as caught:
                rewards.collect(*batch_of(["a", deed, "bb"]))
            assert str(caught.value) == (
                rf"reward act {said}; the first of its 3 prompts was 'prompt\n0' (row 100 of the dataset)"
            )
            return
        scores = rewards.collect(*batch_of(["a", deed, "bb"]))
        if policy == "error":
            assert all(map(math.isnan, scores.totals)) and scores.kept == [False] * 3
            return
        assert scores.totals == [-1.5 if policy == "score" else 0.0] * 3
        assert scores.kept == [policy == "score"] * 3 and scores.failures == {"act": 1}


def test_of_several_faults_the_run_ends_for_what_is_no_number() -> None:
    """Numbers that are not finite do not hide it, in whatever order and call they come; alone they have one line."""
    lines: list[str] = []

    def given(*scores: Any) -> Rewards:
        spec = RewardSpec("reward.functions[0]", "given", function=f"{MISBEHAVING}:act")
        rewards = Rewards([spec], warn=lines.append)
        rewards._rewards[0].source = InProcess(lambda prompts, responses: list(scores), {})
        return rewards

    for scores in ([math.nan, "good", 1.0], ["good", math.inf, 1.0], [[math.nan], 2.0, ["good"]]):
        with pytest.raises(RewardError, match="good"):
            given(*scores).collect(*batch_of(["a", "b", "c"]))
    found = given(-math.inf, 2, 1e39).collect(*batch_of(["a", "b", "c"]))
    assert [math.isnan(total) for total in found.totals] == [True, False, True] and found.kept == [False, True, False]
    (line,) = lines
    assert line.startswith(
        "reward given: 1 of 1 calls failed and were left without a score: updates with them are left"
    )
    assert "gave score -inf (float); return a finite number" in line and "(row 100 of the dataset)" in line


@pytest.mark.parametrize("batch_size", [1, 5])
def test_one_in_ten_fails(batch_size: int) -> None:
    """With more responses a call, those of the same call fail with it."""
    responses = ["raise" if i % 10 == 7 else "x" * (i + 1) for i in range(50)]
    with rewards_of(of("act", batch_size=batch_size, **POLICIES["score"])) as rewards:
        scores = rewards.collect(*batch_of(responses))
    hit = {i for i in range(50) if any(i // batch_size == j // batch_size for j in range(7, 50, 10))}
    assert scores.totals == [-1.5 if i in hit else i + 1 for i in range(50)]
    assert scores.failures == {"act": 5}


def test_the_traceback_of_a_worker_comes_along() -> None:
    with rewards_of(of("act")) as rewards, pytest.raises(RewardError) as caught:
        rewards.collect(*batch_of(["raise"]))
    shown = "".join(traceback.format_exception(caught.value.__cause__))
    assert f'File "{MISBEHAVING}", line ' in shown and "in raise_an_error" in shown
    assert shown.rstrip().endswith("LookupError: nobody\nknows")


# ---- others go on ----------------------------------------------------------------------------------------------------


def test_a_call_that_hangs_holds_up_no_other(tmp_path: Path) -> None:
    """The first call ends only when all others have: were it in their way, it would never."""
    responses = ["wait", *(f"r{i}" for i in range(20))]
    with rewards_of(of("waits_for_the_others", kwargs={"others": 20})) as rewards:
        scores = rewards.collect(*batch_of(responses, folder=str(tmp_path)))
    assert scores.totals == [len(response) for response in responses]


def test_more_calls_that_hang_than_there_are_workers() -> None:
    responses = ["loop", "sleep", "late", "a", "bb", "ccc"]
    with rewards_of(of("act", timeout=1, **POLICIES["drop"])) as rewards:
        scores = rewards.collect(*batch_of(responses))
    assert scores.kept == [False] * 3 + [True] * 3 and scores.totals == [0, 0, 0, 1, 2, 3]
    assert scores.failures == {"act": 3}


def test_workers_are_kept_and_replaced_only_when_they_are_gone() -> None:
    with rewards_of(of("pid", workers=1), of("act", name="other", **POLICIES["drop"])) as rewards:
        first = rewards.collect(*batch_of(["a", "b"])).parts["pid"]
        (worker,) = set(first)
        assert rewards.collect(*batch_of(["a", "exit"])).parts["pid"] == first
        os.kill(int(worker), signal.SIGKILL)
        wait_until(lambda: is_gone(int(worker)))
        after = rewards.collect(*batch_of(["a", "b"])).parts["pid"]
        assert len(set(after)) == 1 and set(after) != {worker}


# ---- retries ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["raise", "exit", "kill", "sleep"])
@pytest.mark.parametrize("retries", [0, 1])
def test_a_call_that_fails_is_tried_again(how: str, retries: int, tmp_path: Path) -> None:
    entry = of("fails_first", timeout=1, kwargs={"how": how}, retries=retries, **POLICIES["score"])
    with rewards_of(entry) as rewards:
        scores = rewards.collect(*batch_of(["a", "bb"], folder=str(tmp_path)))
    assert scores.totals == ([1, 2] if retries else [-1.5, -1.5])
    assert scores.failures == {"fails_first": 0 if retries else 2}


def test_an_answer_that_is_no_score_is_not_asked_for_again(tmp_path: Path) -> None:
    with rewards_of(of("fails_first", kwargs={"how": "raise"}, retries=0, **POLICIES["drop"])) as rewards:
        assert rewards.collect(*batch_of(["a"], folder=str(tmp_path))).kept == [False]
        assert rewards.collect(*batch_of(["a"], folder=str(tmp_path))).kept == [True]


# ---- start -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import os; os._exit(4)", "ended its process with status 4"),
        ("import os; os.kill(os.getpid(), 11)", "had its process killed by SIGSEGV"),
    ],
)
def test_a_file_that_takes_its_process_down(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "f.py").write_text(text)
    with pytest.raises(ConfigError) as caught:
        Rewards([RewardSpec.parse({"function": f"{tmp_path}/f.py:f", "workers": 2})])
    assert str(caught.value).startswith(f"reward.functions[0].function='{tmp_path}/f.py:f': its worker {said}")


def test_a_file_that_is_gone_when_a_worker_has_to_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "f.py"
    path.write_text(MISBEHAVING.read_text())
    entry = {"function": f"{path}:act", "workers": 1}
    with rewards_of(entry) as rewards:
        path.unlink()
        with pytest.raises(RewardError, match="status 3"):
            rewards.collect(*batch_of(["exit"]))
        with pytest.raises(RewardError, match=r"could not be started again: .* there is no file .*; repair its file;"):
            rewards.collect(*batch_of(["a"]))
        path.write_text(MISBEHAVING.read_text())
        assert rewards.collect(*batch_of(["a"])).totals == [1]


def test_columns_that_cannot_be_sent() -> None:
    with rewards_of(of("act", **POLICIES["score"])) as rewards:
        assert rewards.collect(*batch_of(["a"], label=lambda: 1)).totals == [-1.5]
    with (
        rewards_of(of("act")) as rewards,
        pytest.raises(RewardError, match="reward act got columns that cannot be sent"),
    ):
        rewards.collect(*batch_of(["a"], label=lambda: 1))


class OnlyHere:
    """A value that asks, where it is read, for a module that is not there."""

    def __reduce__(self) -> Any:
        return __import__, ("no_such_module",)


def test_columns_that_a_worker_cannot_read() -> None:
    with rewards_of(of("act")) as rewards, pytest.raises(RewardError, match="columns that a worker cannot read: Mod"):
        rewards.collect(*batch_of(["a"], label=OnlyHere()))


# ---- processes -------------------------------------------------------------------------------------------------------


def test_a_worker_imports_what_the_function_imports_and_knows_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "torch" in sys.modules  # here
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"]
    names += ["WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "OMP_TOKEN", "https_proxy", "REWARD_KEY", "LC_X"]
    for name in names:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_ENDPOINT", "https://user:password@host")
    names.append("HF_ENDPOINT")
    before = dict(os.environ)
    with rewards_of(of("has_torch"), of("rank_variables", environment=["REWARD_KEY"])) as rewards:
        prompts, responses, tokens = batch_of(["r"] * len(names))
        prompts = [type(p)(p.index, name, (1,), {}) for p, name in zip(prompts, names, strict=True)]
        scores = rewards.collect(prompts, responses, tokens)
    seen = [name for name, is_set in zip(names, scores.parts["rank_variables"], strict=True) if is_set]
    assert seen == ["REWARD_KEY", "LC_X"] and set(scores.parts["has_torch"]) == {0}
    assert dict(os.environ) == before and environment_of_workers().items() <= before.items()


def test_a_variable_that_is_not_there_is_named() -> None:
    entry = of("quick", environment=["NOT_SET_HERE"])
    with pytest.raises(ConfigError, match=r"environment names NOT_SET_HERE, which is not set"), rewards_of(entry):
        pass


def namespaces_work() -> bool:
    """Asked of a child, by other means than ours."""
    return shutil.which("unshare") is not None and subprocess.run(["unshare", "-rn", "true"]).returncode == 0


def test_a_worker_without_network_reaches_nobody(tmp_path: Path) -> None:
    """While another, with one, does; the server listens on this machine."""
    file = tmp_path / "asks.py"
    file.write_text(
        "import os, socket\n"
        "def reaches(prompts, responses, port, **columns):\n"
        "    try:\n"
        "        socket.create_connection(('127.0.0.1', port[0]), timeout=5).close()\n"
        "    except OSError:\n"
        "        return [0.0]\n"
        "    return [1.0]\n"
        "def user(prompts, responses, **columns):\n"
        "    return [os.geteuid()]\n"
    )
    entries = [of("reaches", network=network, name=f"n{network}") for network in (True, False)]
    entries += [of("user", network=False)]
    entries = [{**entry, "function": f"{file}:{entry['function'].rpartition(':')[2]}"} for entry in entries]
    if not namespaces_work():
        with pytest.raises(ConfigError, match=r"network=false cannot be kept"), rewards_of(entries[1]):
            pass
        return
    with socket.create_server(("127.0.0.1", 0)) as server, rewards_of(*entries) as rewards:
        scores = rewards.collect(*batch_of(["a"], port=server.getsockname()[1]))
    assert scores.parts == {"nTrue": [1.0], "nFalse": [0.0], "user": [os.geteuid()]}


def test_what_a_worker_has_started_goes_with_it(tmp_path: Path) -> None:
    """The fork holds the worker's socket open; a parent that waits for its end of file would wait for ever."""
    with rewards_of(of("leaves_children", timeout=LIMIT, **POLICIES["drop"])) as rewards:
        assert rewards.collect(*batch_of(["sleep", "exit"], folder=str(tmp_path))).kept == [False, False]
        pids = [int(part) for path in tmp_path.iterdir() for part in path.name.split("-")]
        assert len(pids) == 6
        wait_until(lambda: all(map(is_gone, pids)))


@pytest.mark.parametrize("deed", ["loop", "sleep", "a"])
def test_close_leaves_no_process_and_no_thread(deed: str) -> None:
    before, threads = set(psutil.Process().children(recursive=True)), threading.active_count()
    rewards = Rewards([RewardSpec.parse(of("act"))])
    for i, row in enumerate(zip(*batch_of([deed] * 5), strict=True)):
        rewards.submit(i, *row)
    assert len(set(psutil.Process().children()) - before) == 2
    rewards.close()
    assert set(psutil.Process().children(recursive=True)) <= before
    wait_until(lambda: threading.active_count() <= threads)
    rewards.close()


def test_rewards_that_nobody_refers_to_any_more_are_closed() -> None:
    before = set(psutil.Process().children())
    rewards = Rewards([RewardSpec.parse(of("act"))])
    assert set(psutil.Process().children()) > before
    del rewards
    wait_until(lambda: set(psutil.Process().children()) <= before)


SCRIPT = """
import os, sys, torch
import psutil
from rlhf_toolkit.rewards.compose import Rewards
from rlhf_toolkit.rewards.specification import RewardSpec
from rlhf_toolkit.types import Prompt

file, end = sys.argv[1:]
keys = {"function": file + ":has_torch", "workers": 1}
hangs = {"function": file + ":act", "workers": 2}
rewards = Rewards([RewardSpec.parse(keys), RewardSpec.parse(hangs, "reward.functions[1]")])
prompts = [Prompt(i, "p", (1,), {}) for i in range(3)]
scores = rewards.collect(prompts, ["a"] * 3, [[1]] * 3)
rewards.submit(0, prompts[0], "loop", [1])
rewards.submit(1, prompts[1], "sleep", [1])
print(*scores.parts["has_torch"], *(child.pid for child in psutil.Process().children()), flush=True)
if end == "killed":
    os.kill(os.getpid(), 9)
if end == "raises":
    raise SystemExit(7)
"""


@pytest.mark.parametrize(("end", "status"), [("raises", 7), ("killed", -9)])
def test_the_end_of_the_parent_is_the_end_of_its_workers(end: str, status: int, tmp_path: Path) -> None:
    """Whose script imports torch, which a worker does not import with it."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), str(MISBEHAVING), end],
        stdout=subprocess.PIPE,
        text=True,
        timeout=50,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == status
    *torch, first, second, third = done.stdout.split()
    assert torch == ["0.0"] * 3
    wait_until(lambda: all(is_gone(int(pid)) for pid in (first, second, third)))
