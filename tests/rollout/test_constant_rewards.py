"""A reward that gives everything the same is named once, after the first rollouts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import torch

from rlhf_toolkit.rollout.constant_rewards import ConstantRewards


def sampled(finished: bool = True, tokens: float = 0.0, **parts: list[float]) -> Any:
    return SimpleNamespace(
        finished=torch.tensor([finished]),
        token_rewards=torch.tensor([[tokens]]),
        parts={name: torch.tensor(values) for name, values in parts.items()},
    )


def said(*rollouts: Any) -> list[str]:
    look = ConstantRewards()
    return [line for rollout in rollouts for line in look.look(cast(Any, rollout))]


def test_only_a_reward_that_never_differs_is_named_and_only_once() -> None:
    same, failed = [0.0] * 4, [0.0, float("nan"), 0.0, 0.0]
    (line,) = said(*[sampled(form=failed, words=[1.0, 2.0, 1.0, 1.0])] * 5)
    assert line.startswith("reward form has given 0 to all 9 responses of the first 3 rollouts")
    assert "samples.jsonl" in line and "\n" not in line
    assert not said(*[sampled(form=same)] * 2), "two rollouts are too few"
    assert not said(sampled(form=same), sampled(form=[0.0, 1.0]), sampled(form=same))
    assert not said(*[sampled(form=[0.0])] * 3), "three scores are too few"
    assert not said(*[sampled(form=same, tokens=0.5)] * 3), "it tells tokens apart"


def test_responses_that_never_end_are_the_likelier_cause() -> None:
    (line,) = said(*[sampled(finished=False, form=[0.0] * 4)] * 3)
    assert "rollout.max_new_tokens" in line
