"""From the rows of a rollout to a value for each prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlhf_toolkit.errors import RewardError
from rlhf_toolkit.rollout.evaluated import Passing, response_kl, values_by_prompt
from rlhf_toolkit.rollout.sampled import Sampled
from tests.support.offenders import for_each

GROUPS = [7, 7, 7, 3, 3, 3]
SCORES = torch.tensor([1.0, 0.0, 0.5, 0.25, 0.25, 9.0])


def sampled(**changes: Any) -> Sampled:
    """Three responses to each of two prompts; the last has no score."""
    rows = len(GROUPS)
    columns: dict[str, Any] = {
        "sequences": torch.ones(rows, 6, dtype=torch.long),
        "prompt_lengths": torch.full((rows,), 2),
        "response_lengths": torch.tensor([1, 2, 3, 4, 4, 1]),
        "rollout_logprobs": torch.zeros(rows, 4),
        "finished": torch.tensor([True, True, False, True, True, True]),
        "written": torch.ones(rows, 4, dtype=torch.bool),
        "raw_scores": SCORES,
        "kept": torch.tensor([True] * 5 + [False]),
        "groups": torch.tensor(GROUPS),
        "token_rewards": torch.zeros(rows, 4),
        "prompts": ["p"] * rows,
        "responses": ["a", "b", "a", "b", "none", "a"],
    }
    return Sampled(**{**columns, **changes})


def test_a_value_is_a_prompts_mean_and_a_missing_score_counts_nowhere() -> None:
    kl = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    parts = {"x": torch.tensor([1.0, 2.0, 3.0, float("nan"), 5.0, float("nan")]), "y": torch.zeros(6)}
    assert values_by_prompt(sampled(parts=parts), SCORES, kl) == {
        "score": [0.5, 0.25],
        "reward/x": [2.0, 5.0],
        "reward/y": [0.0, 0.0],
        "response_length": [2.0, 3.0],
        "ref_kl": [1.0, 4.0],
        "clip_ratio": [pytest.approx(1 / 3), 0.0],
    }


def test_a_prompt_without_any_score_is_left_out_of_scores_only() -> None:
    found = values_by_prompt(sampled(kept=torch.tensor([True] * 3 + [False] * 3)), SCORES, None)
    assert found["score"] == [0.5] and len(found["response_length"]) == 2 and "ref_kl" not in found


def test_passing_is_by_score_and_a_response_without_one_does_not_pass() -> None:
    found = Passing(0.5).values(sampled(), SCORES)
    assert found == {
        "pass@1": [pytest.approx(2 / 3), 0.0],
        "pass@2": [1.0, 0.0],
        "pass@3": [1.0, 0.0],
    }


def test_votes_are_by_the_answers_function() -> None:
    asked = []

    def answers(responses: list[str]) -> list[str | None]:
        asked.append(responses)
        return [None if response == "none" else response for response in responses]

    found = Passing(0.5, answers).values(sampled(), SCORES)
    assert asked == [["a", "b", "a", "b", "none", "a"]]
    assert found["maj@3"] == [1.0, 0.0] and found["maj@1"] == [pytest.approx(2 / 3), 0.0]


@for_each("answers, said", [(["a"], "gave 1 answers for 6"), (None, "failed on 6"), ([["a"]] * 6, "failed on 6")])
def test_answers_that_are_none_are_refused(answers: Any, said: str) -> None:
    with pytest.raises(RewardError, match=rf"^reward\.answer {said} responses"):
        Passing(0.5, lambda responses: answers).values(sampled(), SCORES)


def test_what_an_answers_function_raises_is_told_in_one_line() -> None:
    missing: dict[str, Any] = {}
    with pytest.raises(RewardError, match=r"^reward\.answer failed on 6 responses \(KeyError: 'x'\); repair it"):
        Passing(0.5, lambda responses: missing["x"]).values(sampled(), SCORES)


def test_kl_of_a_response_is_over_its_tokens() -> None:
    mask = torch.tensor([[True, True, False]])
    kl = response_kl(torch.tensor([[-1.0, -2.0, 9.0]]), torch.tensor([[-1.5, -1.0, 0.0]]), mask)
    assert kl.tolist() == [-0.5]
