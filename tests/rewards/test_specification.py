"""Entries of ``reward.functions``: defaults, what every key takes, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from rlhf_toolkit.errors import ConfigError
from rlhf_toolkit.rewards.specification import RewardSpec
from tests.support.offenders import for_each

F = {"function": "my/reward.py:score"}
FIVE: dict[Any, Any] = {5: 1}  # YAML keys may be numbers
U = {"url": "http://judge.example:8000/score?kind=a"}


def parsed(text: str) -> RewardSpec:
    return RewardSpec.parse(yaml.safe_load(text), "reward.functions[2]")


def test_what_is_not_said() -> None:
    assert RewardSpec.parse(F) == RewardSpec("reward.functions[0]", "score", "my/reward.py:score")
    assert RewardSpec.parse(U, "reward.functions[1]") == RewardSpec(
        "reward.functions[1]", "judge.example", url="http://judge.example:8000/score?kind=a", workers=4, timeout=60.0
    )
    bare = RewardSpec.parse(F)
    assert (bare.weight, bare.kwargs, bare.workers, bare.batch_size, bare.timeout) == (1.0, {}, 0, 1, None)
    assert (bare.on_failure, bare.failure_score, bare.retries) == ("error", 0.0, 0)


def test_every_key_from_yaml() -> None:
    text = """
        function: package.rewards:check
        name: math
        weight: -5e-1
        kwargs: {strict: true, digits: 4}
        workers: 3
        batch_size: 8
        timeout: 10
        on_failure: score
        failure_score: -1
        retries: 2
    """
    assert parsed(text) == RewardSpec(
        setting="reward.functions[2]",
        name="math",
        function="package.rewards:check",
        weight=-0.5,
        kwargs={"strict": True, "digits": 4},
        workers=3,
        batch_size=8,
        timeout=10.0,
        on_failure="score",
        failure_score=-1.0,
        retries=2,
    )


def test_what_yaml_reads_as_text_or_as_nothing() -> None:
    spec = parsed("{function: 'f.py:f', weight: 1e-4, timeout: none, kwargs: }")
    assert (spec.weight, spec.timeout, spec.kwargs) == (1e-4, None, {})


@pytest.mark.parametrize(
    ("url", "name"), [("http://127.0.0.1:8000", "127.0.0.1"), ("https://[::1]:80/x", "__1"), ("http://Judge/", "judge")]
)
def test_the_name_of_a_server_is_its_host(url: str, name: str) -> None:
    assert RewardSpec.parse({"url": url}).name == name


@for_each(
    "entry, message",
    [
        ("my.py:f", "reward.functions[2] holds 'my.py:f', not settings; write function: path/to/file.py:name"),
        ({}, "reward.functions[2] has no function; give function: path/to/file.py:name, or url: http://..."),
        ({**F, **U}, "reward.functions[2] has function and url; keep one of them"),
        ({**F, "wieght": 1}, "unknown setting reward.functions[2].wieght; did you mean weight?"),
        ({**F, "setting": "x"}, "unknown setting reward.functions[2].setting; known are name, function, url, weight"),
        ({**F, **FIVE}, "unknown setting reward.functions[2].5; known are name"),
        ({"function": "score"}, "reward.functions[2].function='score' names no function; write path/to/file.py:name"),
        ({"function": 5}, "reward.functions[2].function=5 is not text; put text in quotes"),
        ({"url": "judge:8000"}, "reward.functions[2].url='judge:8000' is no address; write http://host:port/path"),
        ({"url": "ftp://judge/"}, "reward.functions[2].url='ftp://judge/' is no address"),
        ({"url": "http://judge:x/"}, "reward.functions[2].url='http://judge:x/' is no address"),
        ({"url": "http:///path"}, "reward.functions[2].url='http:///path' is no address"),
        ({"url": "http://a b/"}, "reward.functions[2].url='http://a b/' is no address"),
        ({"url": "http://me:secret@judge/"}, "reward.functions[2].url='http://me:secret@judge/' is no address"),
        ({**F, "name": "a/b"}, "reward.functions[2].name='a/b' becomes part of a metric's name; use letters"),
        ({**F, "weight": "much"}, "reward.functions[2].weight='much' is not a finite number; give one such as 0.5"),
        ({**F, "weight": True}, "reward.functions[2].weight=True is not a finite number"),
        ({**F, "weight": float("nan")}, "reward.functions[2].weight=nan is not a finite number"),
        ({**F, "kwargs": [1]}, "reward.functions[2].kwargs=[1] is not settings with names"),
        ({**F, "kwargs": {1: 1}}, "reward.functions[2].kwargs={1: 1} is not settings with names"),
        ({**F, "kwargs": {"prompts": 1}}, "reward.functions[2].kwargs.prompts is also an argument every reward gets"),
        ({**F, "workers": -1}, "reward.functions[2].workers=-1 is not a whole number of 0 or more; give one"),
        ({**F, "workers": 1.5}, "reward.functions[2].workers=1.5 is not a whole number of 0 or more"),
        ({**F, "workers": True}, "reward.functions[2].workers=True is not a whole number of 0 or more"),
        ({**F, "workers": 1, "batch_size": 0}, "reward.functions[2].batch_size=0 is not a whole number of 1 or more"),
        ({**F, "timeout": 0}, "reward.functions[2].timeout=0 must be above 0; give some seconds, or leave it out"),
        ({**F, "timeout": "soon"}, "reward.functions[2].timeout='soon' is not a finite number"),
        ({**F, "on_failure": "scroe"}, "reward.functions[2].on_failure='scroe' is not known; did you mean score?"),
        ({**F, "on_failure": 1}, "reward.functions[2].on_failure=1 is not known; known are error, score, drop, skip"),
        ({**F, "batch_size": 4}, "reward.functions[2].batch_size has no effect in the rank's own process; set"),
        ({**F, "retries": 4}, "reward.functions[2].retries has no effect in the rank's own process; set"),
        ({**F, "failure_score": 1}, "reward.functions[2].failure_score has no effect; set reward.functions[2].on_fail"),
        (
            {**F, "failure_score": 1, "on_failure": "drop"},
            "reward.functions[2].failure_score has no effect; set reward.functions[2].on_failure: score, too",
        ),
        ({**U, "workers": 0}, "reward.functions[2].workers=0 would send no request; give 1 or more, or leave it out"),
    ],
    ids=str,
)
def test_an_entry_that_cannot_work_is_refused(entry: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RewardSpec.parse(entry, "reward.functions[2]")
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
