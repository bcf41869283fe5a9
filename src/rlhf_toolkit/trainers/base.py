"""What every trainer of the toolkit changes about ``transformers.Trainer``, and nothing else."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, Trainer

from rlhf_toolkit.distributed.collectives import all_gather
from rlhf_toolkit.errors import NotFiniteError
from rlhf_toolkit.models.finite import WAYS_OUT, broken_weights
from rlhf_toolkit.models.shared_base import SharedBase
from rlhf_toolkit.models.whole_model import WholeModel
from rlhf_toolkit.reporting.meters import Meter, combined

LOSS, GRADIENT_NORM = "train/loss", "train/grad_norm"


class RoleTrainer(Trainer):
    """A Trainer over a SharedBase or a WholeModel: one AdamW with named groups, tensors moved but never cast,
    metrics met before they are logged.

    ``learning_rates`` maps the names of ``parameter_groups`` to their rates; one schedule scales them all.
    """

    loss_is_scaled_for_ga = True
    model: SharedBase | WholeModel

    def __init__(self, *args: Any, learning_rates: dict[str, float], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)  # records go to the run log
        self.learning_rates = learning_rates
        self.meter = Meter()

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

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means over all ranks of what was metered since the last record. Every rank comes here at the same
        step."""
        logs.update(combined(all_gather(self.meter.take())))
        self._refuse_not_finite(logs)
        super().log(logs, start_time)

    def _refuse_not_finite(self, logs: dict[str, float]) -> None:
        """Raise NotFiniteError, on all ranks, before such weights would become a checkpoint."""
        broken = [name for name in (LOSS, GRADIENT_NORM) if not math.isfinite(logs.get(name, 0.0))]
        if broken:
            weights = broken_weights(self.model) or "all weights that lie here are finite"
            raise NotFiniteError(
                f"{broken[0]} is {logs[broken[0]]} at step {self.state.global_step}: {weights}; {WAYS_OUT}"
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Without DeepSpeed: Trainer's own way with several adapters would leave only the first one trainable."""
        self.model.load_trained(resume_from_checkpoint)
