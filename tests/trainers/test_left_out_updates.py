"""What decides that an update is left out, and what is done then, on a plain module; on ranks and in whole runs:
tests/distributed/test_not_finite_updates.py and tests/runs/test_left_out.py."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf_toolkit.distributed.engine import backward, step
from rlhf_toolkit.errors import NotFiniteError
from rlhf_toolkit.reporting.meters import Meter, combined
from rlhf_toolkit.trainers.base import RoleTrainer
from rlhf_toolkit.trainers.first_gradients import FirstGradients
from rlhf_toolkit.trainers.left_out import UPDATES_LEFT_OUT, LeftOutUpdates

LOSSES = {
    "sound": [1.0, 2.0],
    "NaN first": [math.nan, 2.0],
    "infinite last": [1.0, math.inf],
    "minus infinity first": [-math.inf, 2.0],
}


def linear() -> nn.Linear:
    layer = nn.Linear(3, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.5, -1.0, 2.0]]))
    return layer


def loss_of(layer: nn.Module, number: float) -> Tensor:
    """A loss whose gradient is finite whatever ``number`` is added to it."""
    loss: Tensor = layer(torch.ones(3)).sum() + number
    return loss


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_that_is_not_finite_leaves_no_gradient_though_its_own_is_finite(name: str) -> None:
    layer, losses = linear(), LOSSES[name]
    for number, each in enumerate(losses):
        backward(layer, loss_of(layer, each), last=number == 1)
    sound = all(map(math.isfinite, losses))
    assert step(layer) is sound
    if sound:
        assert layer.weight.grad is not None and layer.weight.grad.tolist() == [[2.0, 2.0, 2.0]]
    else:
        assert layer.weight.grad is None and layer.bias.grad is None


@pytest.mark.parametrize("factor", [math.nan, math.inf, 1e25])
def test_a_gradient_that_is_not_finite_or_whose_norm_is_not_is_dropped(factor: float) -> None:
    layer = linear()
    layer.weight.register_hook(lambda gradient: gradient * factor)
    backward(layer, loss_of(layer, 0.0), last=True)
    assert step(layer) is False
    assert layer.weight.grad is None


class Counted(LeftOutUpdates):
    """Notes what was left out instead of keeping it."""

    def __init__(self, most_in_a_row: int = 2) -> None:
        super().__init__("sft", Path("unused"), most_in_a_row=most_in_a_row)
        self.steps: list[int] = []

    def _keep(self, model: Any, batch: Any) -> str:
        self.steps.append(batch.step)
        return "kept"


def updates(numbers: list[float], counted: Counted) -> dict[str, float]:
    """Make updates of one micro-batch each; what was metered."""
    layer = linear()
    trainer: Any = SimpleNamespace(meter=Meter(), model=layer, state=SimpleNamespace(global_step=0), not_finite=counted)
    trainer.first_gradients = FirstGradients()
    trainer.kept_parts, trainer.kept_details, trainer.failed_rewards = list, dict, list

    def micro_batch(part: dict[str, Tensor], first: bool) -> Tensor:
        trainer.meter.add("metered", part["number"].item(), 1)
        return loss_of(layer, part["number"].item())

    for number in numbers:
        total = RoleTrainer.make_update(
            trainer, layer, [{"number": torch.tensor(number)}], micro_batch, lambda part: part
        )
        assert (total is None) == (not math.isfinite(number))
        trainer.state.global_step += 1
    return combined([trainer.meter.take()])


def test_an_update_that_is_left_out_meters_nothing() -> None:
    counted = Counted()
    metered = updates([1.0, math.nan, 3.0, math.inf], counted)
    assert metered["metered"] == 2.0 and math.isfinite(metered["train/loss"]) and counted.steps == [2, 4]
    assert counted.take() == {UPDATES_LEFT_OUT: 2.0} and counted.take() == {}


def test_only_updates_in_a_row_count_towards_the_end() -> None:
    counted = Counted()
    updates([math.nan, math.nan, 1.0, math.nan, math.nan, 1.0], counted)
    with pytest.raises(
        NotFiniteError, match=r"^train/loss is nan at step 4: .* 3 updates in a row were left out; kept"
    ):
        updates([1.0, math.nan, math.nan, math.nan, 1.0], counted)


def test_the_count_of_updates_in_a_row_goes_on_from_a_checkpoint() -> None:
    counted, resumed = Counted(), Counted()
    updates([1.0, math.nan, math.nan], counted)
    resumed.restore(counted.state)
    assert counted.state == resumed.state == (2, 2) and resumed.take() == {UPDATES_LEFT_OUT: 2.0}
    with pytest.raises(NotFiniteError, match="3 updates in a row were left out"):
        updates([math.nan], resumed)


def test_a_reward_without_a_finite_score_is_named_where_it_is_the_cause() -> None:
    for spoiled, said in ((math.nan, ", since reward a, b gave no finite score at step 1:"), (2.0, " at step 1:")):
        parts = [{"advantages": torch.tensor([[1.0, spoiled]])}]
        counted = Counted(most_in_a_row=0)
        with pytest.raises(NotFiniteError, match=f"^train/loss is nan{said}"):
            counted.left_out(
                linear(),  # type: ignore[arg-type]
                parts,
                [torch.tensor(math.nan)],
                step=1,
                details={},
                failed_rewards=["a", "b"],
            )


def test_a_weight_that_is_not_finite_ends_the_run_at_once() -> None:
    counted, layer = Counted(), linear()
    with torch.no_grad():
        layer.weight[0, 1] = math.nan
    with pytest.raises(NotFiniteError, match="at step 1: weight holds NaN or infinity, one of 1 such weights"):
        counted.left_out(layer, [{}], [torch.tensor(1.0)], step=1, details={})  # type: ignore[arg-type]
