"""What every trainer of the toolkit changes about ``transformers.Trainer``, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PrinterCallback, Trainer

from rlhf_toolkit.distributed import stopping
from rlhf_toolkit.distributed.collectives import all_gather, world_size
from rlhf_toolkit.distributed.engine import step
from rlhf_toolkit.errors import NotFiniteError
from rlhf_toolkit.models.finite import WAYS_OUT, broken_weights
from rlhf_toolkit.models.shared_base import SharedBase
from rlhf_toolkit.models.whole_model import WholeModel
from rlhf_toolkit.reporting.meters import Meter, combined
from rlhf_toolkit.trainers.attempts import accumulate
from rlhf_toolkit.trainers.kept_batches import Part
from rlhf_toolkit.trainers.left_out import GRADIENT_NORM, LOSS, LeftOutUpdates

B = TypeVar("B", bound=Mapping[str, Tensor])
UPDATE_RETRIES = "perf/update_retries"


class RoleTrainer(Trainer):
    """A Trainer over a SharedBase or a WholeModel: one AdamW with named groups, tensors moved but never cast,
    metrics met before they are logged.

    ``learning_rates`` maps the names of ``parameter_groups`` to their rates; one schedule scales them all. ``kind`` is
    that of kept batches; ``most_left_out`` updates in a row may be left out, since their numbers are not finite.
    """

    loss_is_scaled_for_ga = True
    model: SharedBase | WholeModel

    def __init__(
        self,
        *args: Any,
        learning_rates: dict[str, float],
        kind: str,
        most_left_out: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)  # records go to the run log
        self.learning_rates = learning_rates
        self.meter = Meter()
        self.not_finite = LeftOutUpdates(kind, Path(str(self.args.output_dir)), most_in_a_row=most_left_out)
        self.update_retries, self._logged_retries = 0, 0

    def note_retry(self, smaller: str, said: str) -> None:
        """Count an update that is made again after ``said``, in ``smaller`` parts, and say so on rank 0."""
        self.update_retries += 1
        if self.args.process_index == 0:
            tqdm.write(f"update {self.state.global_step + 1} is made again with {smaller}: {said}")

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One AdamW over the named groups, in the order of ``parameter_groups``."""
        if self.optimizer is None:
            groups = self.model.parameter_groups()
            self.optimizer = torch.optim.AdamW(
                [
                    {"params": parameters, "lr": self.learning_rates[name], "name": name}
                    for name, parameters in groups.items()
                ],
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
                weight_decay=self.args.weight_decay,
            )
        return self.optimizer

    def _prepare_input(self, data: Any) -> Any:
        """Move to the device, never cast: Trainer would turn old log-probs and advantages into DeepSpeed's dtype."""
        if isinstance(data, dict):
            return {name: self._prepare_input(value) for name, value in data.items()}
        return data.to(self.args.device) if isinstance(data, torch.Tensor) else data

    def make_update(
        self,
        model: nn.Module,
        parts: Sequence[B],
        loss_of: Callable[[B, bool], Tensor],
        least: Callable[[B], B],
    ) -> Tensor | None:
        """Forward and backward of every micro-batch, by ``loss_of(part, first)``; this rank's share of the mini-batch's
        loss. ``least(part)`` is as little of a micro-batch as its loss can be had of. A collective.

        None where a number is not finite on any rank. Then nothing has changed, what the micro-batches have metered is
        forgotten, and the batch is kept. Raises NotFiniteError, on all ranks, where the run cannot go on, and what a
        micro-batch has failed with on any rank; then, too, nothing has changed.
        """
        before, self.meter = self.meter, Meter()
        try:
            losses = accumulate(model, parts, loss_of, least)
        finally:
            ours, self.meter = self.meter, before
        if not step(model):
            number = self.state.global_step + 1
            kept = self.kept_parts(parts)
            self.not_finite.left_out(self.model, kept, losses, step=number, details=self.kept_details())
            return None
        self.not_finite.made()
        total = torch.stack(losses).sum()
        self.meter.absorb(ours)
        self.meter.add(LOSS, total, 1 / world_size())
        return total

    def kept_parts(self, parts: Sequence[Mapping[str, Tensor]]) -> list[Part]:
        """This rank's micro-batches with all columns that their loss needs, for a file."""
        return [dict(part) for part in parts]

    def kept_details(self) -> dict[str, float]:
        """What the loss needs beside, as plain numbers, for a file."""
        return {}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means over all ranks of what was metered since the last record. Every rank comes here at the same
        step."""
        logs.update(combined(all_gather(self.meter.take())))
        if LOSS in logs and self.update_retries > self._logged_retries:
            logs[UPDATE_RETRIES] = float(self.update_retries - self._logged_retries)
            self._logged_retries = self.update_retries
        self._refuse_not_finite(logs)
        # What an update that was left out has spoiled is no number of JSON.
        written = {name: v for name, v in logs.items() if not isinstance(v, float) or math.isfinite(v)}
        super().log(written, start_time)

    def _refuse_not_finite(self, logs: dict[str, float]) -> None:
        """Raise NotFiniteError, on all ranks, before such weights would become a checkpoint."""
        broken = [name for name in (LOSS, GRADIENT_NORM) if not math.isfinite(logs.get(name, 0.0))]
        if broken:
            weights = broken_weights(self.model) or "all weights that lie here are finite"
            raise NotFiniteError(
                f"{broken[0]} is {logs[broken[0]]} at step {self.state.global_step}: {weights}; {WAYS_OUT}"
            )

    def write_checkpoint(self) -> None:
        """Write the state after the last whole optimizer step. A collective, at any moment at which no optimizer step
        is half done; nothing stops it but a second signal."""
        with stopping.held():
            self._save_checkpoint(self.model, trial=None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Without DeepSpeed: Trainer's own way with several adapters would leave only the first one trainable."""
        self.model.load_trained(resume_from_checkpoint)
