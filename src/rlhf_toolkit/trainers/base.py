"""What every trainer of the toolkit changes about ``transformers.Trainer``, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer

from rlhf_toolkit.checkpoint_files import EXPERIENCE, OPTIMIZER, PLUGINS, Checkpoint, Contents, load_tensors, understood
from rlhf_toolkit.distributed import stopping
from rlhf_toolkit.distributed.collectives import agreement, all_gather, on_main, rank, stop_together, world_size
from rlhf_toolkit.distributed.engine import step
from rlhf_toolkit.distributed.moments import (
    Gathered,
    Named,
    moments_on_main,
    require_moments,
    restore_moments,
    weights_on_main,
)
from rlhf_toolkit.errors import NotFiniteError
from rlhf_toolkit.models.finite import WAYS_OUT, broken_weights
from rlhf_toolkit.models.roles import ROLES_OF_THEIR_OWN
from rlhf_toolkit.models.shared_base import SharedBase
from rlhf_toolkit.models.whole_model import WholeModel
from rlhf_toolkit.reporting.meters import Meter, Number, combined, plain, shared_out
from rlhf_toolkit.seeding import derive_seed
from rlhf_toolkit.texts import say
from rlhf_toolkit.trainers.attempts import accumulate
from rlhf_toolkit.trainers.first_gradients import FirstGradients
from rlhf_toolkit.trainers.kept_batches import Part
from rlhf_toolkit.trainers.left_out import GRADIENT_NORM, LOSS, LeftOutUpdates
from rlhf_toolkit.trainers.optimizers import make_adamw, named_groups
from rlhf_toolkit.trainers.plugin_state import States, plugin_states, put_together, restore_plugins, taken_apart
from rlhf_toolkit.trainers.saving import CheckpointWriter, filling

B = TypeVar("B", bound=Mapping[str, Tensor])
T = TypeVar("T")
UPDATE_RETRIES = "perf/update_retries"


@dataclass(frozen=True)
class Settled:
    """What a run had come to after its last whole optimizer step, but for what only an optimizer step changes.

    ``progress`` is JSON, ``sums`` are the meter's, ``experience`` the columns of a rollout that has updates to come.
    """

    step: int
    progress: Mapping[str, Any]
    sums: Mapping[str, tuple[Number, Number]]
    experience: Mapping[str, Tensor]
    plugins: States


class RoleTrainer(Trainer):
    """A Trainer over a SharedBase or a WholeModel: one AdamW with named groups, tensors moved but never cast,
    metrics met before they are logged.

    ``learning_rates`` maps the names of ``parameter_groups`` to their rates; one schedule scales them all. Matrices B
    have ``loraplus_lr_ratio`` times the rate of A. ``kind`` is that of kept batches; ``most_left_out``
    updates in a row may be left out, since their numbers are not finite.
    """

    # ``beside_adapters`` writes what belongs beside the weights of a policy or a reward, into its folder.
    loss_is_scaled_for_ga = True
    model: SharedBase | WholeModel

    def __init__(
        self,
        *args: Any,
        learning_rates: dict[str, float],
        kind: str,
        loraplus_lr_ratio: float = 1.0,
        most_left_out: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)  # records go to the run log
        self.learning_rates, self.loraplus_lr_ratio = learning_rates, loraplus_lr_ratio
        self.meter = Meter()
        self.not_finite = LeftOutUpdates(kind, Path(str(self.args.output_dir)), most_in_a_row=most_left_out)
        self.writer: CheckpointWriter | None = None
        self.resumed: Checkpoint | None = None
        self.best: tuple[int, float] | None = None
        self.first_gradients = FirstGradients()
        self.beside_adapters: Callable[[Path], None] | None = None
        self._settled: Settled | None = None
        self._about: Mapping[str, Any] = {}
        self.update_retries, self._logged_retries = 0, 0

    def note_retry(self, smaller: str, said: str, *, what: str = "") -> None:
        """Count an update, or ``what`` else, that is made again after ``said``, in ``smaller`` parts, and say so on
        rank 0."""
        self.update_retries += 1
        if self.args.process_index == 0:
            what = what or f"update {self.state.global_step + 1}"
            say(f"{what} is made again with {smaller}: {said}")

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One AdamW, that of ``args.optim``, over the named groups (``optimizers.py``)."""
        if self.optimizer is None:
            self.optimizer = make_adamw(
                self.args.optim,
                named_groups(self.model, self.learning_rates, self.loraplus_lr_ratio),
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
        forgotten, and the batch is kept. Raises NotFiniteError, on all ranks, where the run cannot go on, ModelError
        where the first update leaves a tensor without a gradient, and what a micro-batch has failed with on any rank;
        then, too, nothing has changed.
        """
        before, self.meter = self.meter, Meter()
        self.first_gradients.watch(self.model)
        try:
            losses = accumulate(model, parts, loss_of, least)
        finally:
            ours, self.meter = self.meter, before
        self.first_gradients.check()
        if not step(model):
            number = self.state.global_step + 1
            kept = self.kept_parts(parts)
            details, rewards = self.kept_details(), self.failed_rewards()
            self.not_finite.left_out(self.model, kept, losses, step=number, details=details, failed_rewards=rewards)
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

    def failed_rewards(self) -> list[str]:
        """The rewards that have left a response of this update's rollout without a score."""
        return []

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means over all ranks of what was metered since the last record. Every rank comes here at the same
        step. Raises NotFiniteError, on all ranks, for a loss or a norm that is not finite."""
        logs.update(combined(all_gather(self.meter.take())))
        if LOSS in logs and self.update_retries > self._logged_retries:
            logs[UPDATE_RETRIES] = float(self.update_retries - self._logged_retries)
            self._logged_retries = self.update_retries
        broken = [name for name in (LOSS, GRADIENT_NORM) if not math.isfinite(logs.get(name, 0.0))]
        if broken:  # before such weights would become a checkpoint
            weights = broken_weights(self.model) or "all weights that lie here are finite"
            raise NotFiniteError(
                f"{broken[0]} is {logs[broken[0]]} at step {self.state.global_step}: {weights}; {WAYS_OUT}"
            )
        # What an update that was left out has spoiled is no number of JSON.
        written = {name: v for name, v in logs.items() if not isinstance(v, float) or math.isfinite(v)}
        super().log(written, start_time)

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def keep_checkpoints(self, writer: CheckpointWriter, about: Mapping[str, Any], resumed: Checkpoint | None) -> None:
        """Write checkpoints by ``writer``; ``about`` is what of a checkpoint's state only the run knows. Go on from
        ``resumed``, whose weights the model has already."""
        self.writer, self._about, self.resumed = writer, about, resumed

    def write_checkpoint(self) -> None:
        """Write the state after the last whole optimizer step to ``checkpoint-<global_step>``, unless that has been
        done. A collective; at any moment at which no optimizer step is half done, between micro-batches too.

        Returns when the run may go on; the writing does, too. Nothing stops it but a second signal. Raises
        CheckpointError on all ranks.
        """
        optimizer, schedule, step = self.optimizer, self.lr_scheduler, self.state.global_step
        assert self.writer and optimizer and schedule, "keep_checkpoints and the start of training come before"
        if self.writer.last == step:
            return
        with stopping.held():
            settled = self._settled
            if settled is None or settled.step != step:
                settled = self._settled = self._settle()
            trained = self._trained()
            weights = weights_on_main(self._saved(trained))
            moments, steps = moments_on_main(self.model_wrapped, optimizer, trained)
            plugins, of_plugins = taken_apart(all_gather(settled.plugins))
            state = {
                **self._about,
                "best": self.best,
                "left_out": self.not_finite.state,
                "plugins": plugins,
                "progress": settled.progress,
                "meters": all_gather(plain(settled.sums)),
                "adamw_steps": steps,
                "schedule": schedule.state_dict(),
                "learning_rates": [group["lr"] for group in optimizer.param_groups],
            }

            def contents() -> Contents:
                tensors = {OPTIMIZER: moments.put_together(), EXPERIENCE: settled.experience, PLUGINS: of_plugins}
                return Contents(step, state, {file: each for file, each in tensors.items() if each})

            best = None if self.best is None else self.best[0]
            # transformers reads the model's own parameters when it writes a whole one: under ZeRO-3 a thread must not.
            at_once = isinstance(self.model, WholeModel)
            self.writer.write(step, contents, partial(self._write_roles, weights), best=best, at_once=at_once)

    def keep_if_best(self, value: float) -> None:
        """Note an evaluation of the state after the last step: where ``value``, which is the better the larger it is,
        is the best so far, its checkpoint is written and stays. A collective."""
        if self.best is None or value > self.best[1]:
            self.best = (self.state.global_step, value)
            self.write_checkpoint()

    def progress(self) -> dict[str, Any]:
        """What else has changed since the run began, as JSON that later changes do not reach."""
        return {}

    def restore_progress(self, progress: dict[str, Any], experience: dict[str, Tensor]) -> None:
        """Take over what ``progress`` and ``experience`` gave."""

    def experience(self) -> dict[str, Tensor]:
        """The columns of a rollout that the next update is made on."""
        return {}

    def next_batch(self, batches: Iterator[T]) -> T | None:
        """The next of ``batches``; None at the end. Here a run stops that was asked to. What the global generators give
        from here on follows from the seed, the step and the rank."""
        stop_together()
        if self.writer is not None:
            self.writer.look()
        torch.manual_seed(derive_seed(self.args.seed, "step", self.state.global_step, rank()))
        self._settled = self._settle()
        batch = next(batches, None)
        self._settled = self._settle()
        return batch

    def _settle(self) -> Settled:
        return Settled(self.state.global_step, self.progress(), self.meter.sums, self.experience(), plugin_states())

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad]

    def _saved(self, trained: Named) -> Named:
        """The parameters that a checkpoint's role folders hold: of a whole model its frozen tables, too."""
        return list(self.model.named_parameters()) if isinstance(self.model, WholeModel) else trained

    def _write_roles(self, weights: Gathered, folder: Path) -> None:
        buffers = self.model.kept_constants() if isinstance(self.model, WholeModel) else {}
        with filling:
            self.model.save_pretrained(folder, state_dict={**buffers, **weights.put_together()})
            for place in (folder / role for role in ROLES_OF_THEIR_OWN):
                if self.beside_adapters is not None and place.is_dir():
                    self.beside_adapters(place)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write roles and tokenizer to the run folder, or to ``output_dir``. A collective. Trainer's own way adds its
        arguments as a pickle."""
        weights, folder = weights_on_main(self._saved(self._trained())), Path(output_dir or str(self.args.output_dir))
        with agreement("the writing of the model"):
            if rank() == 0:
                self._write_roles(weights, folder)
                if self.processing_class is not None:
                    self.processing_class.save_pretrained(folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Trainer's own way holds pickles, and under DeepSpeed the shards of so many ranks."""
        self.write_checkpoint()

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: Any,
        trial: Any,
    ) -> tuple[int, int]:
        """The number of steps that have been made is the checkpoint's."""
        first = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, None, trial)
        if self.resumed is None:
            return first
        self.state.global_step = self.resumed.step
        self.state.epoch = self.resumed.step / num_update_steps_per_epoch
        return self.resumed.step // num_update_steps_per_epoch, 0

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """Once the engine is there, its optimizer and the schedule go on where the checkpoint was written."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if self.resumed is not None:
            self._take_over(self.resumed)
        return prepared

    def _take_over(self, checkpoint: Checkpoint) -> None:
        """All of ``checkpoint`` but the weights. Only rank 0 reads its files."""
        folder, state = checkpoint.folder, checkpoint.state
        optimizer, schedule = self.optimizer, self.lr_scheduler
        assert optimizer is not None and schedule is not None, "both are there once training is prepared"
        with understood(folder), agreement("reading the checkpoint"):
            moments = load_tensors(folder, OPTIMIZER) if rank() == 0 else {}
            if rank() == 0:
                require_moments(self._trained(), state["adamw_steps"], moments)
        experience, of_plugins = on_main(lambda: [load_tensors(folder, file) for file in (EXPERIENCE, PLUGINS)])
        with understood(folder):
            same = restore_moments(self.model_wrapped, optimizer, self._trained(), state["adamw_steps"], moments)
            if not same and rank() == 0:
                say("the checkpoint's 8-bit moments lay on other ranks: their blocks are cut anew, about 1% apart")
            schedule.load_state_dict(state["schedule"])
            for group, rate in zip(optimizer.param_groups, state["learning_rates"], strict=True):
                group["lr"] = rate
            self.meter = Meter(shared_out(state["meters"], rank=rank(), ranks=world_size()))
            self.best = None if state["best"] is None else (int(state["best"][0]), float(state["best"][1]))
            self.not_finite.restore(state["left_out"])
            with agreement("restoring plugins"):
                restore_plugins(put_together(state["plugins"], of_plugins, rank=rank(), ranks=world_size()))
            self.restore_progress(state["progress"], experience)
