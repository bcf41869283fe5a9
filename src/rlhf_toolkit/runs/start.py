"""The start of every kind of run: one order of work, in which each kind does its own parts.

What can be wrong is looked for from cheap to dear: settings, launch, run folder, data, and only then the model. An
earlier run in the folder stays until all of it has been looked at, on every machine.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, cast

from transformers import PretrainedConfig, TrainerCallback, TrainingArguments

from rlhf_toolkit.checkpoint_files import Checkpoint, understood
from rlhf_toolkit.checkpoints import claim_run_folder, open_run_folder, require_identity
from rlhf_toolkit.data.templates import render_as_of
from rlhf_toolkit.distributed.collectives import agreement, on_main
from rlhf_toolkit.distributed.machines import require_same
from rlhf_toolkit.distributed.topology import Topology, start
from rlhf_toolkit.distributed.watch import begin_watching
from rlhf_toolkit.given import given_section
from rlhf_toolkit.models.folders import commit_of
from rlhf_toolkit.models.loading import MAIN, load_model_config
from rlhf_toolkit.models.shared_base import SharedBase
from rlhf_toolkit.models.targets import beside_experts
from rlhf_toolkit.models.whole_model import WholeModel
from rlhf_toolkit.reporting.alarms import Notify
from rlhf_toolkit.reporting.panel import begin_panel
from rlhf_toolkit.reporting.progress import Progress
from rlhf_toolkit.reporting.quiet import quiet_libraries
from rlhf_toolkit.reporting.records import Record, history, mend_logs, versions
from rlhf_toolkit.reporting.run_log import RunLog
from rlhf_toolkit.reporting.trackers import Mirrors, Place, begun, require_trackers
from rlhf_toolkit.reporting.tracking import WandbMirror
from rlhf_toolkit.runs.callbacks import Evaluating, EvaluationAtBothEnds, KeepBest
from rlhf_toolkit.runs.opening import Opening
from rlhf_toolkit.runs.places import places_text, title_of
from rlhf_toolkit.runs.run import Run, with_dtype
from rlhf_toolkit.runs.tokenizer import identity_of_template, travelling
from rlhf_toolkit.runs.weights import fingerprint_of
from rlhf_toolkit.settings.configs import RunConfig
from rlhf_toolkit.settings.experiment import Experiment, FineTuning
from rlhf_toolkit.texts import say
from rlhf_toolkit.trainers.base import RoleTrainer
from rlhf_toolkit.trainers.optimizers import require_optimizer
from rlhf_toolkit.trainers.saving import CheckpointWriter

E = TypeVar("E", bound=Experiment | FineTuning)
D = TypeVar("D")
M = TypeVar("M", bound=SharedBase | WholeModel)
T = TypeVar("T", bound=RoleTrainer)
A = TypeVar("A", bound=Run[Any, Any])


class Kind(ABC, Generic[E, D, M, T]):
    """One kind of run: what it does for ``prepare_run``, in the order in which it is asked.

    ``D`` is what it loads before the model, ``M`` its model, ``T`` its trainer. ``axis`` is what its records count.
    """

    axis = "rollout"

    def __init__(self, experiment: E, topology: Topology) -> None:
        """Settle what needs neither files of the run nor the model. Raises ConfigError."""
        self.experiment, self.topology = experiment, topology

    @property
    def updates_per_round(self) -> int:
        """Optimizer steps for each round, which is what ``axis`` counts."""
        return 1

    @abstractmethod
    def load_data(self, config: PretrainedConfig) -> D:
        """Everything that is loaded but the model, whose ``config`` is there."""

    @abstractmethod
    def load_model(self, config: PretrainedConfig) -> M:
        """The base and what is trained on it."""

    @abstractmethod
    def rounds(self, data: D) -> int:
        """How many rounds the run has."""

    @abstractmethod
    def make_trainer(self, data: D, model: M, progress: Progress) -> T:
        """The trainer, before any callback but ``progress``."""

    @abstractmethod
    def engine_check(self, trainer: T) -> TrainerCallback:
        """What looks at the engine before the first step."""

    @abstractmethod
    def opening(self, data: D) -> Opening:
        """What the run takes for granted, to be said at its start."""

    def identity(self, data: D, model: M) -> dict[str, str]:
        """Fingerprints of what a checkpoint's numbers mean only together with, by a name in ``checkpoints.CHANGED``. A
        collective."""
        return {"base": fingerprint_of(model), **identity_of_template(self.opening(data).tokenizer)}

    def identity_of_rewards(self, trainer: T) -> dict[str, str]:
        """The same of what the trainer has loaded."""
        return {}

    def alarms(self, notify: Notify) -> Sequence[TrainerCallback]:
        """What watches the records before they are written; ``notify`` tells people."""
        return ()

    def samples(self, trainer: T, kind: str) -> Sequence[Record]:
        """The newest sample responses of ``kind``, train or eval, for the log."""
        return ()


def prepare_run(
    kind: type[Kind[E, D, M, T]], run: type[A], experiment: E, *, resume: bool = False, overwrite: bool = False
) -> A:
    """Build the run on every rank. Raises a subclass of RLHFError for everything the user can mend."""
    topology = joined(experiment)
    experiment = with_dtype(experiment, topology)
    folder, settings = Path(experiment.run.output_dir), experiment.as_dict() | given_section()
    require_same("the setting", flat(settings))
    parts = kind(experiment, topology)
    with agreement("finding the optimizer"):
        offloaded = topology.launch.offload_optimizer != "none"
        require_optimizer(experiment.update.optimizer, topology.device, offloaded=offloaded)
    on_main(lambda: require_trackers(experiment.run.watchers))
    checkpoint = on_main(lambda: open_run_folder(folder, settings, resume=resume, overwrite=overwrite))
    began = take_for_now(checkpoint)
    given = experiment.model
    with agreement("loading"):
        config = load_model_config(given.name, trust_remote_code=given.trust_remote_code, revision=given.revision)
    data = parts.load_data(config)
    opening = parts.opening(data)
    on_main(lambda: say(opening.text(given, config)))
    done = 0 if checkpoint is None else checkpoint.step // parts.updates_per_round
    if checkpoint is not None:
        on_main(lambda: mend_logs(folder, axis=parts.axis, until=done))
    model = parts.load_model(config)
    if (of_experts := beside_experts(model)) is not None:
        on_main(lambda: say(of_experts))
    identity = parts.identity(data, model)
    require_same("the fingerprint of", identity)
    if checkpoint is not None:
        require_identity(checkpoint, settings, identity)
        with understood(checkpoint.folder):
            model.load_trained(checkpoint.folder)
    rounds, updates = parts.rounds(data), parts.updates_per_round
    progress = Progress(num_rollouts=rounds, updates_per_rollout=updates, show=topology.is_main, unit=parts.axis)
    trainer = parts.make_trainer(data, model, progress)
    identity |= parts.identity_of_rewards(trainer)
    require_same("the fingerprint of", identity)
    if checkpoint is not None:
        require_identity(checkpoint, settings, identity)
    else:  # whatever was wrong with settings, files or machines has cost nobody the run that lay here
        on_main(lambda: claim_run_folder(folder, settings, overwrite=overwrite))
    run_ids = {} if checkpoint is None else run_ids_in(checkpoint)
    with agreement("the start of trackers"):
        mirror = start_trackers(experiment.run, settings, topology, trainer.args, run_ids, axis=parts.axis, until=done)
        if mirror is not None and checkpoint is not None:
            mirror.catch_up(history(folder, axis=parts.axis, until=done))
    about = {
        "settings": settings,
        "identity": identity,
        "run_ids": run_ids if mirror is None else {**run_ids, **mirror.run_ids},
        "commit": commit_of(given.name, given.revision or MAIN),
        "began": began,
        **described_here(topology),
    }
    with agreement("loading"):
        trainer.beside_adapters = travelling(given, opening.tokenizer, opening.stop_ids)
    trainer.keep_checkpoints(CheckpointWriter(folder, experiment.run.keep_checkpoints), about, checkpoint)
    watch_run(parts, trainer, progress, mirror)
    return run(experiment, topology, trainer, checkpoint, mirror, progress)


def joined(experiment: Experiment | FineTuning) -> Topology:
    """Join the process group, watch the other ranks, and say what begins."""
    quiet_libraries()
    topology = start(max_grad_norm=experiment.update.max_grad_norm, timeout_minutes=experiment.run.timeout_minutes)
    begin_watching(stall_seconds=60 * experiment.run.stall_minutes)
    on_main(lambda: begin_panel(f"{title_of(experiment)}: {experiment.model.name} on {experiment.data.train}"))
    return topology


def take_for_now(checkpoint: Checkpoint | None) -> str:
    """When the run began, here or before ``checkpoint``: chat templates that write the date write this. A collective.
    Raises CheckpointError where the checkpoint names no moment."""
    now = on_main(lambda: datetime.now().isoformat(timespec="seconds"))
    if checkpoint is None:
        render_as_of(now)
        return now
    with understood(checkpoint.folder):
        began = str(checkpoint.state.get("began", now))
        render_as_of(began)
    return began


def watch_run(parts: Kind[E, D, M, T], trainer: T, progress: Progress, mirror: Mirrors | None) -> None:
    """Say where everything goes, and add what watches the run to its trainer: engine check, alarms, log, evaluations,
    and the keeping of the best."""
    settings, alarms = parts.experiment.run, parts.alarms(notifier(progress, mirror))
    on_main(lambda: say(places_text(settings, progress.rounds, parts.axis)))
    log = RunLog(
        Path(settings.output_dir),
        updates_per_rollout=parts.updates_per_round,
        samples=lambda kind: parts.samples(trainer, kind),
        sinks=() if mirror is None else (mirror,),
        axis=parts.axis,
    )
    evaluation = EvaluationAtBothEnds(
        cast(Evaluating, trainer), lambda step: on_main(lambda: log.lacks_evaluation(step))
    )
    keepers = [KeepBest(trainer)] if settings.keep_best else []
    for callback in (parts.engine_check(trainer), *alarms, log, evaluation, *keepers):
        trainer.add_callback(callback)


def notifier(progress: Progress, mirror: Mirrors | None) -> Notify:
    """Tells people on rank 0: on the terminal, and in W&B."""

    def notify(title: str, text: str) -> None:
        if progress.shown:
            say(f"{title}: {text}", sys.stderr)
        if mirror is not None:
            mirror.alert(title, text)

    return notify


def described_here(topology: Topology) -> dict[str, Any]:
    """Where a checkpoint was written, for those who look into it: nothing of this has to be the same again."""
    return {
        "versions": versions(),
        "ranks": topology.world_size,
        "zero_stage": topology.launch.zero_stage,
        "device": topology.device.type,
    }


def flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings by their dotted names."""
    return {f"{section}.{name}": value for section, values in settings.items() for name, value in values.items()}


def run_ids_in(checkpoint: Checkpoint) -> dict[str, str]:
    """What trackers call the run that wrote the checkpoint, by tracker."""
    with understood(checkpoint.folder):
        found = dict(checkpoint.state.get("run_ids", {}))
        if "wandb_id" in checkpoint.state:  # before there were others
            found["wandb"] = checkpoint.state["wandb_id"]
    return {name: run_id for name, run_id in found.items() if isinstance(run_id, str)}


def start_trackers(
    run: RunConfig,
    settings: dict[str, Any],
    topology: Topology,
    arguments: TrainingArguments,
    run_ids: dict[str, str],
    *,
    axis: str,
    until: int,
) -> Mirrors | None:
    """The run's trackers, on the true rank 0 only. Raises ConfigError where one cannot begin."""
    if not run.watchers or not topology.is_main:
        return None
    name, folder = run.name or Path(run.output_dir).name, Path(run.output_dir)
    wandb = None
    if "wandb" in run.watchers:
        wandb = WandbMirror(
            mode=cast(Literal["online", "offline"], run.wandb),
            project=run.wandb_project,
            name=name,
            folder=folder,
            config={**settings, "versions": versions()},
            run_id=run_ids.get("wandb"),
            axis=axis,
        )
    others = [
        begun(each, Place(folder, name, run.wandb_project, until, run_ids.get(each)), settings, arguments, axis)
        for each in run.watchers
        if each != "wandb"
    ]
    return Mirrors(wandb, others)
