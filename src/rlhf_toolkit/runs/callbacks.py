"""What happens around Trainer's loop: a look at the engine before the first step, evaluation at both ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Sized
from typing import Any, Protocol

from transformers import TrainerCallback

from rlhf_toolkit.distributed.topology import Topology, check_engine
from rlhf_toolkit.reporting.panel import end_panel
from rlhf_toolkit.trainers.base import RoleTrainer

SCORE, LOSS = "eval/score/mean", "eval/loss"


class EngineCheck(TrainerCallback):
    """Looks at the engine once it exists; what the run says at its start ends here."""

    def __init__(self, trainer: RoleTrainer, topology: Topology) -> None:
        self.trainer, self.topology = trainer, topology

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raises TopologyError where the engine is not what was asked for."""
        check_engine(self.topology, self.trainer.model_wrapped)
        if self.topology.is_main:
            end_panel()


class Evaluating(Protocol):
    """A trainer with held-out rows."""

    @property
    def held_out(self) -> Sized:
        """Those rows."""

    def evaluate(self) -> dict[str, float]:
        """Evaluate on them."""


class EvaluationAtBothEnds(TrainerCallback):
    """Evaluates on held-out prompts before the first update and after the last, and where a signal has left one out.

    ``lacks`` says, the same on every rank, whether the log has no evaluation of after so many optimizer steps.
    """

    def __init__(self, trainer: Evaluating, lacks: Callable[[int], bool] = lambda step: False) -> None:
        self.trainer, self.lacks = trainer, lacks
        self._before_training = False

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A program may have asked for the first evaluation already."""
        self._before_training = self._before_training or state.global_step == 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """When a run is resumed, only what was due as it stopped and has not come to its end."""
        step = state.global_step
        due = args.eval_strategy != "no" and step % args.eval_steps == 0 and self.lacks(step)
        if step == 0:
            due = not self._before_training
        if self.trainer.held_out and due:
            self.trainer.evaluate()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Not when Trainer itself has just evaluated at the last step."""
        just_done = args.eval_strategy != "no" and state.global_step % state.eval_steps == 0
        if self.trainer.held_out and not just_done:
            self.trainer.evaluate()


class KeepBest(TrainerCallback):
    """Keeps the checkpoint of the best evaluation: of the highest mean score, or of the lowest loss where there is no
    score."""

    def __init__(self, trainer: RoleTrainer) -> None:
        self.trainer = trainer

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Every rank has the same metrics. A collective. An evaluation in which no response got a score, or whose loss
        is not a number, is no best one."""
        metrics = kwargs["metrics"]
        value = metrics[SCORE] if SCORE in metrics else -metrics.get(LOSS, math.nan)
        if state.global_step > 0 and math.isfinite(
            value
        ):  # before the first update the model is what the run began with
            self.trainer.keep_if_best(value)
