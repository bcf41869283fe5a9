"""A PPO run from one experiment: everything a recipe needs, in the order in which it must happen.

What can be wrong is looked for from cheap to dear: settings, launch, run folder, reward, tokenizer, prompts, and only
then the model.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import LoraConfig
from transformers import PretrainedConfig, PreTrainedModel

from rlhf_toolkit.checkpoints import (
    ManifestWriter,
    base_fingerprint,
    claim_run_folder,
    on_main,
    open_run_folder,
    read_manifest,
)
from rlhf_toolkit.settings.configs import ModelConfig
from rlhf_toolkit.distributed.collectives import agreement
from rlhf_toolkit.distributed.topology import Topology, start
from rlhf_toolkit.settings.experiment import Experiment, FineTuning
from rlhf_toolkit.models.loading import build_ppo_roles, load_base, load_model_config, lora_config
from rlhf_toolkit.models.shared_base import NOWHERE, SharedBase
from rlhf_toolkit.models.whole_model import WholeModel
from rlhf_toolkit.reporting.run_log import Progress, Record, RunLog, write_summary
from rlhf_toolkit.reporting.tracking import WandbMirror
from rlhf_toolkit.rollout.schedule import LastMeans
from rlhf_toolkit.seeding import derive_seed
from rlhf_toolkit.runs.assembly import check_algorithm, estimator_of, make_trainer
from rlhf_toolkit.runs.callbacks import EvaluationAtBothEnds, StartCheck
from rlhf_toolkit.trainers.ppo import PPOTrainer
from rlhf_toolkit.runs.run import Run, with_dtype
from rlhf_toolkit.runs.task import load_task


class PPORun(Run[Experiment, PPOTrainer]):
    """A prepared run of PPO. ``train`` runs it to its end and leaves adapters and ``summary.json`` in the folder."""

    def train(self) -> dict[str, Any]:
        """Evaluate, train, evaluate again, save; return the summary (an empty one on ranks other than 0)."""
        began = time.perf_counter()
        try:
            self.fit()
        finally:
            self.trainer.maker.responder.scorer.close()
        self.trainer.save_model()
        if not self.topology.is_main:
            return {}
        seconds = time.perf_counter() - began
        summary = write_summary(
            self.folder, seconds=seconds, world_size=self.topology.world_size, device=str(self.topology.device)
        )
        if self.mirror is not None:
            self.mirror.finish()
        return summary


def prepare(experiment: Experiment, *, resume: bool = False, overwrite: bool = False) -> PPORun:
    """Build the run on every rank. Raises a subclass of RLHFError for everything the user can mend."""
    topology = start(max_grad_norm=experiment.update.max_grad_norm, timeout_minutes=experiment.run.timeout_minutes)
    experiment = with_dtype(experiment, topology)
    experiment.check_processes(topology.world_size)
    check_algorithm(experiment.ppo)
    folder, settings = Path(experiment.run.output_dir), experiment.as_dict()
    checkpoint = on_main(lambda: open_run_folder(folder, settings, resume=resume, overwrite=overwrite))
    with agreement("loading"):
        config = load_model_config(experiment.model.name, trust_remote_code=experiment.model.trust_remote_code)
    task = load_task(experiment, config, topology)
    if checkpoint is None:
        on_main(lambda: claim_run_folder(folder, settings))
    shared = load_roles(experiment, config, topology)
    fingerprint = fingerprint_of(shared)
    here: dict[str, Any] = {"world_size": topology.world_size, "zero_stage": topology.launch.zero_stage}
    manifest = read_manifest(checkpoint, fingerprint=fingerprint, **here) if checkpoint else {}
    mirror = start_wandb(experiment, topology, manifest.get("wandb_id"))
    progress = Progress(
        num_rollouts=experiment.ppo.num_rollouts,
        updates_per_rollout=experiment.updates_per_rollout,
        show=topology.is_main,
    )
    trainer = make_trainer(experiment, topology, task, shared, progress)
    control, responder, source = trainer.maker.kl_control, trainer.maker.responder, trainer.maker.source
    control.coefficient = manifest.get("kl_coefficient", control.coefficient)
    responder.expected = expected = LastMeans(manifest.get("expected_lengths"))
    source.mean_scores = mean_scores = LastMeans(manifest.get("mean_scores"))

    def state() -> dict[str, Any]:
        """What only the run knows, for the manifest of a checkpoint."""
        run_id = mirror.run_id if mirror else None
        return {
            "kl_coefficient": control.coefficient,
            "expected_lengths": expected.state,
            "mean_scores": mean_scores.state,
            "wandb_id": run_id,
            "base": fingerprint,
            **here,
        }

    log = run_log(experiment, trainer, mirror)
    for callback in (StartCheck(trainer, topology), log, EvaluationAtBothEnds(trainer), ManifestWriter(state)):
        trainer.add_callback(callback)
    return PPORun(experiment, topology, trainer, checkpoint, mirror, progress)


def load_roles(experiment: Experiment, config: PretrainedConfig, topology: Topology) -> SharedBase:
    """The base with its adapters. Adapters start from a derived seed, the same on every rank."""
    model = experiment.model
    base, adapter = load_adapted_base(model, config, topology)
    torch.manual_seed(derive_seed(experiment.run.seed, "adapters"))
    return build_ppo_roles(
        base,
        adapter,
        policy_adapter=model.policy_adapter,
        reference_adapter=model.policy_adapter,
        value_adapter=model.value_adapter,
        reward_adapter=experiment.reward.adapter,
        value_on=model.value_on if estimator_of(experiment.ppo).needs("values") else NOWHERE,
        gradient_checkpointing=model.gradient_checkpointing,
        value_head_std=model.value_head_std,
    )


def load_adapted_base(
    model: ModelConfig, config: PretrainedConfig, topology: Topology
) -> tuple[PreTrainedModel, LoraConfig]:
    """The base, and the settings of a new adapter on it."""
    base = load_base(
        model.name,
        config,
        topology,
        dtype=getattr(torch, model.dtype),
        attention=model.attention,
        trust_remote_code=model.trust_remote_code,
    )
    adapter = lora_config(
        rank=model.lora_rank,
        alpha=model.lora_alpha,
        rslora=model.rslora,
        target_modules=model.target_modules,
        exclude_modules=model.exclude_modules,
    )
    return base, adapter


def fingerprint_of(model: SharedBase | WholeModel) -> str:
    """Identifies the frozen base, so that a checkpoint is never resumed on another one. Of a model that is trained as a
    whole only the config counts: all of its weights are in the checkpoint."""
    frozen = [
        (name, p)
        for name, p in model.named_parameters()
        if not p.requires_grad and "lora_" not in name and not name.startswith("scalar_heads")
    ]
    return base_fingerprint(model.causal_lm.config.to_json_string(), frozen)


def start_wandb(
    experiment: Experiment | FineTuning, topology: Topology, run_id: str | None, *, axis: str = "rollout"
) -> WandbMirror | None:
    """The W&B mirror, on the true rank 0 only."""
    run = experiment.run
    if run.wandb == "off" or not topology.is_main:
        return None
    name = run.name or Path(run.output_dir).name
    config = experiment.as_dict()
    return WandbMirror(
        mode=cast(Literal["online", "offline"], run.wandb),
        project=run.wandb_project,
        name=name,
        folder=Path(run.output_dir),
        config=config,
        run_id=run_id,
        axis=axis,
    )


def run_log(experiment: Experiment, trainer: PPOTrainer, mirror: WandbMirror | None) -> RunLog:
    """The JSONL log with its mirror."""

    def samples(kind: str) -> Sequence[Record]:
        newest = trainer.answered if kind == "eval" else trainer.rollouts.newest.samples
        return newest[: experiment.run.samples]

    sinks = () if mirror is None else (mirror,)
    folder = Path(experiment.run.output_dir)
    return RunLog(folder, updates_per_rollout=experiment.updates_per_rollout, samples=samples, sinks=sinks)
