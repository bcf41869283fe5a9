"""What all runs have in common: the parts of a prepared one, and its training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from rlhf_toolkit.checkpoint_files import Checkpoint
from rlhf_toolkit.distributed import stopping
from rlhf_toolkit.distributed.collectives import all_gather, on_main
from rlhf_toolkit.distributed.topology import Topology
from rlhf_toolkit.errors import ConfigError, StopAskedError
from rlhf_toolkit.models.precision import resolved_dtype
from rlhf_toolkit.reporting.progress import Progress
from rlhf_toolkit.reporting.records import summary_of_ended
from rlhf_toolkit.reporting.trackers import Mirrors
from rlhf_toolkit.run_claims import release
from rlhf_toolkit.runs.stop import stopped
from rlhf_toolkit.settings.configs import AUTO
from rlhf_toolkit.settings.experiment import Experiment, FineTuning
from rlhf_toolkit.texts import say
from rlhf_toolkit.trainers.base import RoleTrainer

E = TypeVar("E", bound=Experiment | FineTuning)
T = TypeVar("T", bound=RoleTrainer)


@dataclass
class Run(Generic[E, T]):
    """A prepared run."""

    experiment: E
    topology: Topology
    trainer: T
    checkpoint: Checkpoint | None
    mirror: Mirrors | None
    progress: Progress

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.experiment.run.output_dir)

    def ended(self) -> dict[str, Any] | None:
        """The summary of a run that is resumed although it has had all its rounds, with files as it left them; None
        where there is something to do. Says so. A collective."""
        if self.checkpoint is None:
            return None
        progress = self.progress
        summary = on_main(lambda: summary_of_ended(self.folder, progress.rounds, progress.unit))
        if summary is not None:
            on_main(lambda: say(f"{self.folder} has had its {progress.rounds} {progress.unit}s: nothing is done anew"))
            release(self.folder)
        return summary

    def finished(self, summary: dict[str, Any]) -> dict[str, Any]:
        """Give the trackers the ``summary`` and close them; it on rank 0, on others an empty one."""
        if self.mirror is not None:
            self.mirror.finish(summary)
        return summary if self.topology.is_main else {}

    def fit(self) -> None:
        """Train to the end, from the checkpoint if there is one.

        Raises StopAskedError where a signal has stopped it, after a checkpoint, with the command that goes on.
        """
        writer = self.trainer.writer
        try:
            stopping.training_begins()
            self.trainer.train()
            if writer is not None:
                writer.finish()
        except StopAskedError as stop:
            raise stopped(self.trainer, self.checkpoint, str(stop)) from None
        finally:
            stopping.hold()  # what follows is an end, whole or broken, and not long
            self.progress.close()  # so that whatever is printed next starts on a line of its own
            release(self.folder)
            if writer is not None:
                writer.close()  # what is being written is a sound checkpoint, whatever ends the run


def with_dtype(experiment: E, topology: Topology, *, trains: bool = True) -> E:
    """The experiment with the dtype that ``model.dtype: auto`` means here, the same on every rank; says which.

    It is decided before the run folder is claimed, so that run.json, checkpoints and the model card name it. Raises
    ConfigError for float16 in a run that ``trains``.
    """
    if trains and experiment.model.dtype == "float16":
        raise ConfigError(
            "model.dtype=float16: without a scaled loss the gradients of many tokens vanish in it (a quarter of them "
            "at 131,072 tokens a mini-batch); set it to bfloat16, or to float32 where the device has none, or to auto"
        )
    found = all_gather(resolved_dtype(experiment.model.dtype, topology.device))
    # Where one rank's device has no bfloat16, auto is float32 on all.
    dtype, reason = next((each for each in found if each[0] == "float32" or "slow" in each[1]), found[0])
    if experiment.model.dtype == AUTO or "slow" in reason:
        on_main(lambda: say(reason))
    return replace(experiment, model=replace(experiment.model, dtype=dtype))
