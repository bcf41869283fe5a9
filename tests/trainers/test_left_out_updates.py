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
from rlhf_toolkit.trainers.left_out import SKIPPED, LeftOutUpdates

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
    for i, each in enumerate(losses):
        backward(layer, loss_of(layer, each), last=i == 1)
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

    def __init__(self) -> None:
        super().__init__("sft", Path("unused"), most_in_a_row=2)
        self.steps: list[int] = []

    def _keep(self, model: Any, batch: Any) -> str:
        self.steps.append(batch.step)
        return "kept"


def updates(numbers: list[float], counted: Counted) -> dict[str, float]:
    """Make updates of one micro-batch each; what was metered."""
    layer = linear()
    trainer: Any = SimpleNamespace(meter=Meter(), model=layer, state=SimpleNamespace(global_step=0), not_finite=counted)
    trainer.kept_parts, trainer.kept_details = list, dict

    def micro_batch(part: dict[str, Tensor], first: bool) -> Tensor:
        trainer.meter.add("metered", part["number"].item(), 1)
        return loss_of(layer, part["number"].item())

    for number in numbers:
        total = RoleTrainer.make_update(trainer, layer, [{"number": torch.tensor(number)}], micro_batch, dict)
        assert (total is None) == (not math.isfinite(number))
        trainer.state.global_step += 1
    return combined([trainer.meter.take()])


def test_an_update_that_is_left_out_meters_nothing() -> None:
    counted = Counted()
    metered = updates([1.0, math.nan, 3.0, math.inf], counted)
    assert metered["metered"] == 2.0 and math.isfinite(metered["train/loss"]) and counted.steps == [2, 4]
    assert counted.take() == {SKIPPED: 2.0} and counted.take() == {}


def test_only_updates_in_a_row_count_towards_the_end() -> None:
    counted = Counted()
    updates([math.nan, math.nan, 1.0, math.nan, math.nan, 1.0], counted)
    with pytest.raises(
        NotFiniteError, match=r"^train/loss is nan at step 4: .* 3 updates in a row were left out; kept"
    ):
        updates([1.0, math.nan, math.nan, math.nan, 1.0], counted)


def test_a_weight_that_is_not_finite_ends_the_run_at_once() -> None:
    counted, layer = Counted(), linear()
    with torch.no_grad():
        layer.weight[0, 1] = math.nan
    with pytest.raises(NotFiniteError, match="at step 1: weight holds NaN or infinity, one of 1 such weights"):
        counted.left_out(layer, [{}], [torch.tensor(1.0)], step=1, details={})  # type: ignore[arg-type]
