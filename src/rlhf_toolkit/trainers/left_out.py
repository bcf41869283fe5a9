"""Updates that are left out because a number in them is not finite: how many, their batches, and when that ends a run.

One bad batch need not end a run of days: its update is left out on all ranks together (``distributed/engine.py``) and
its batch is kept as a file. Weights that are not finite, or too many such updates in a row, end it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from rlhf_toolkit.distributed.collectives import all_gather, on_main, rank
from rlhf_toolkit.distributed.zero3 import element_count, whole
from rlhf_toolkit.errors import NotFiniteError, described
from rlhf_toolkit.models.finite import WAYS_OUT, broken_weights
from rlhf_toolkit.models.shared_base import SharedBase
from rlhf_toolkit.models.whole_model import WholeModel
from rlhf_toolkit.texts import say
from rlhf_toolkit.trainers.kept_batches import MOST_BYTES_OF_WEIGHTS, MOST_KEPT, KeptBatch, Part
from rlhf_toolkit.trainers.saving import filling

LOSS, GRADIENT_NORM = "train/loss", "train/grad_norm"
UPDATES_LEFT_OUT = "train/not_finite_updates"


class LeftOutUpdates:
    """Keeps count of a trainer's updates that were left out. All ranks call it together and know the same.

    Args:
        kind: of trainer, as in ``KeptBatch``.
        folder: the run folder.
        most_in_a_row: one more ends the run.
    """

    def __init__(self, kind: str, folder: Path, *, most_in_a_row: int) -> None:
        self.kind, self.folder, self.most_in_a_row = kind, folder, most_in_a_row
        self._in_a_row = self._unreported = 0

    @property
    def state(self) -> tuple[int, int]:
        """For a checkpoint: how many updates in a row were left out, and how many no record tells of yet."""
        return self._in_a_row, self._unreported

    def restore(self, state: Sequence[int]) -> None:
        """Go on from what ``state`` was."""
        self._in_a_row, self._unreported = map(int, state)

    def made(self) -> None:
        """An update was made."""
        self._in_a_row = 0

    def left_out(
        self,
        model: SharedBase | WholeModel,
        parts: Sequence[Part],
        losses: Sequence[Tensor],
        *,
        step: int,
        details: Mapping[str, Any],
        failed_rewards: Sequence[str] = (),
    ) -> None:
        """Update number ``step`` was left out: keep its batch, say so, and look whether the run can go on. ``parts``
        and ``losses`` are this rank's micro-batches; ``failed_rewards`` have not given each response of the rollout a
        finite score, which is the cause where advantages are NaN. A collective.

        Raises NotFiniteError, on all ranks, where weights are not finite or too many updates in a row were left out.
        """
        self._in_a_row += 1
        self._unreported += 1
        mine = [{name: column.detach().cpu() for name, column in part.items()} for part in parts]
        everyone = all_gather((mine, [loss.item() for loss in losses], broken_weights(model)))
        places = [(number, i) for number, (found, _, _) in enumerate(everyone) for i in range(len(found))]
        values = [loss for _, found, _ in everyone for loss in found]
        total = sum(values)
        why = f"{GRADIENT_NORM} is not finite" if math.isfinite(total) else f"{LOSS} is {total}"
        everyones = [part for found, _, _ in everyone for part in found]
        if failed_rewards and any(part["advantages"].isnan().any() for part in everyones if "advantages" in part):
            why += f", since reward {', '.join(failed_rewards)} gave no finite score"
        batch = KeptBatch(self.kind, step, everyones, places, values, why, details)
        kept = self._keep(model, batch)
        broken = next((words for _, _, words in everyone if words is not None), None)
        if broken is not None or self._in_a_row > self.most_in_a_row:
            weights = broken or f"all weights that lie here are finite, {self._in_a_row} updates in a row were left out"
            raise NotFiniteError(f"{why} at step {step}: {weights}; {kept}; {WAYS_OUT}")
        if rank() == 0:
            say(f"step {step} was left out: {why}; {kept}", sys.stderr)

    def take(self) -> dict[str, float]:
        """The metric since the last call: nothing where no update was left out."""
        count, self._unreported = self._unreported, 0
        return {UPDATES_LEFT_OUT: float(count)} if count else {}

    def _keep(self, model: SharedBase | WholeModel, batch: KeptBatch) -> str:
        """Write the batch on rank 0; what became of it, in words. What it needs no run may fail of, such as room."""
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        small = sum(element_count(p) * p.element_size() for p in trained.values()) <= MOST_BYTES_OF_WEIGHTS
        save_weights: Callable[[Path], None] | None = None
        if small and isinstance(model, SharedBase):
            with whole(trained.values()):
                weights = {name: p.detach().cpu().clone() for name, p in trained.items()} if rank() == 0 else {}

            def save_weights(folder: Path) -> None:
                with filling:
                    model.save_pretrained(folder, state_dict=weights)

        def write() -> str:
            try:
                place = batch.write(self.folder, save_weights)
            except (OSError, SafetensorError) as error:
                return f"its batch could not be kept ({described(error)})"
            if place is None:
                return f"its batch was not kept, since {MOST_KEPT} earlier ones are"
            return f"look at its batch with rlhf inspect {place}"

        return on_main(write)
