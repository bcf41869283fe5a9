"""What is logged of a sample: each reward's score, the columns, why it was dropped; and that it is JSON and a table."""

from __future__ import annotations

import datetime
import json
from typing import Any

import torch

from rlhf_toolkit.reporting.sample_rows import LONGEST, logged, table, with_columns
from rlhf_toolkit.rewards.calls import Fault
from rlhf_toolkit.rewards.compose import weighted_sum
from rlhf_toolkit.rewards.specification import RewardSpec
from rlhf_toolkit.rollout.sampled import Sampled, as_samples, joined
from rlhf_toolkit.types import Prompt


def two_rewards(second: list[Any], policy: str = "drop") -> Any:
    """``weighted_sum`` of a reward that gives 1, 2, 3 and of one that gives ``second``."""
    specs = [RewardSpec("a", "length", "f"), RewardSpec("b", "judge", "g", weight=0.5, on_failure=policy)]
    prompts = [Prompt(i, f"p{i}", (1,), {}) for i in range(3)]
    values: Any = {"length": [1.0, 2.0, 3.0], "judge": second}
    return weighted_sum(specs, values, {"judge": 1}, tokens=[1, 1, 1], prompts=prompts)


def sampled(scores: Any) -> Sampled:
    """Responses of one token with these scores; the prompts are rows 4, 7 and 9 of the dataset."""
    column = torch.ones(3, 1)
    return Sampled(
        sequences=column.long().repeat(1, 2),
        prompt_lengths=torch.ones(3),
        response_lengths=torch.ones(3),
        rollout_logprobs=column,
        finished=torch.ones(3, dtype=torch.bool),
        written=column.bool(),
        raw_scores=torch.tensor(scores.totals),
        kept=torch.tensor(scores.kept),
        groups=torch.tensor([4, 7, 9]),
        token_rewards=torch.zeros(3, 1),
        parts={name: torch.tensor(part) for name, part in scores.parts.items()},
        prompts=["p4", "p7", "p9"],
        responses=["r4", "r7", "r9"],
        failures=scores.failures,
        dropped=scores.dropped,
    )


def test_a_sample_has_each_rewards_score_and_the_reason_of_dropping() -> None:
    rows = sampled(two_rewards([0.5, Fault("raised ValueError: no answer", "repair it"), 1.0]))
    found = as_samples(rows, torch.where(rows.kept, rows.raw_scores, torch.nan))
    assert found[0] == {
        "prompt": "p4",
        "response": "r4",
        "score": 1.25,
        "rewards": {"length": 1.0, "judge": 0.5},
        "row": 4,
    }
    assert found[1] == {
        "prompt": "p7",
        "response": "r7",
        "score": None,
        "rewards": {"length": 2.0, "judge": None},
        "row": 7,
        "dropped": "reward judge raised ValueError: no answer",
    }
    json.dumps(found, allow_nan=False)


def test_the_reason_stays_with_its_row() -> None:
    """Whatever is picked, put together or added: never another row's."""
    rows = sampled(two_rewards([0.5, Fault("raised X", "repair it"), 1.0]))
    assert rows.rows([2, 1]).dropped == {1: "reward judge raised X"}
    assert rows.rows([0, 2]).dropped == {}
    assert joined([rows, rows.rows([1])], pad_id=0).dropped == dict.fromkeys((1, 3), "reward judge raised X")
    more = rows.plus("model", torch.tensor([0.1, 0.2, float("inf")]), 1.0)
    assert more.dropped == {1: "reward judge raised X", 2: "reward model gave inf"}
    assert (~more.kept).nonzero().flatten().tolist() == [1, 2]


def test_a_score_that_is_skipped_has_its_reason_too() -> None:
    found = two_rewards([0.5, Fault("gave score nan (float)", "return a number", not_finite=True), 1.0], "error")
    assert found.dropped == {1: "reward judge gave score nan (float)"}
    assert two_rewards([0.5, Fault("raised X", "repair"), 1.0], "score").dropped == {}


def test_columns_become_json_however_odd_they_are() -> None:
    odd: dict[str, Any] = {
        "plain": {"a": [1, None, "ü"]},
        "nan": float("nan"),
        "bytes": b"\x00",
        "day": datetime.date(2026, 1, 2),
        "long": "x" * 10 * LONGEST,
        "big": 2**100,
    }
    found = logged(odd)
    json.dumps(found, allow_nan=False)
    assert (found["plain"], found["big"], found["nan"]) == (odd["plain"], 2**100, "nan")
    assert found["bytes"] == r"b'\x00'" and found["day"] == "datetime.date(2026, 1, 2)"
    assert len(found["long"]) <= LONGEST + 10


def test_columns_are_those_of_the_samples_own_prompt() -> None:
    samples: list[dict[str, Any]] = [
        {"row": 9, "prompt": "p"},
        {"row": 4, "prompt": "q"},
        {"prompt": "of an older checkpoint"},
    ]
    found = with_columns(samples, {4: {"answer": "4"}, 9: {"answer": "9"}})
    assert [each["columns"] for each in found] == [{"answer": "9"}, {"answer": "4"}, {}]


def test_the_table_has_a_column_for_everything_and_one_type_in_each() -> None:
    row = {"kind": "train", "step": 1, "prompt": "p", "response": "r", "score": 1.0, "row": 0}
    heading, rows = table(
        [
            {**row, "rewards": {"a": 1.0}, "columns": {"answer": ["4"]}},
            {**row, "rewards": {"a": None}, "columns": {"answer": ["5"], "level": 2}, "dropped": "because"},
        ],
        "step",
    )
    assert heading == [
        *("step", "kind", "prompt", "response", "score", "reward/a", "dropped", "column/answer", "column/level")
    ]
    assert rows == [
        [1, "train", "p", "r", 1.0, 1.0, None, '["4"]', None],
        [1, "train", "p", "r", 1.0, None, "because", '["5"]', 2],
    ]
