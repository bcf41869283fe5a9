"""When held-out rows are evaluated around Trainer's loop."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_toolkit.runs.callbacks import LOSS, SCORE, EvaluationAtBothEnds, KeepBest


class Counting:
    held_out = (1, 2)

    def __init__(self) -> None:
        self.count = 0

    def evaluate(self) -> dict[str, float]:
        self.count += 1
        return {}


@pytest.mark.parametrize(
    ("step", "strategy", "lacks", "expected"),
    [
        (0, "steps", False, 1),
        (0, "no", False, 1),
        (6, "steps", True, 1),
        (6, "steps", False, 0),
        (5, "steps", True, 0),
        (6, "no", True, 0),
    ],
)
def test_a_resumed_run_evaluates_only_what_was_due_and_is_not_in_the_log(
    step: int, strategy: str, lacks: bool, expected: int
) -> None:
    trainer = Counting()
    arguments: Any = SimpleNamespace(eval_strategy=strategy, eval_steps=3)
    callback = EvaluationAtBothEnds(trainer, lambda at: lacks and at == step)
    callback.on_train_begin(arguments, SimpleNamespace(global_step=step), None)
    assert trainer.count == expected


class Keeping:
    def __init__(self) -> None:
        self.kept: list[float] = []

    def keep_if_best(self, value: float) -> None:
        self.kept.append(value)


@pytest.mark.parametrize(
    ("step", "metrics", "kept"),
    [
        (1, {SCORE: 0.5, LOSS: 9.0}, [0.5]),
        (1, {LOSS: 2.0}, [-2.0]),
        (0, {SCORE: 0.5}, []),
        (1, {"eval/ref_kl": 0.1}, []),  # no response got a score
        (1, {LOSS: float("nan")}, []),
    ],
)
def test_what_may_be_the_best_evaluation(step: int, metrics: dict[str, float], kept: list[float]) -> None:
    trainer: Any = Keeping()
    KeepBest(trainer).on_evaluate(None, SimpleNamespace(global_step=step), None, metrics=metrics)
    assert trainer.kept == kept
