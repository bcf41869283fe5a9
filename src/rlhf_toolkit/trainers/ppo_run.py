"""A PPO run from one experiment: everything a recipe needs, in the order in which it must happen.

What can be wrong is looked for from cheap to dear: settings, launch, run folder, reward, tokenizer, prompts, and only
then the model.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from rlhf_toolkit.algorithms.importance import Correction
from rlhf_toolkit.algorithms.kl_control import AdaptiveKL, FixedKL
from rlhf_toolkit.checkpoints import (
    ManifestWriter,
    base_fingerprint,
    claim_run_folder,
    on_main,
    open_run_folder,
    read_manifest,
)
from rlhf_toolkit.configs import DataConfig, Experiment
from rlhf_toolkit.data.prompts import PromptSchedule, load_rows, tokenise_prompts
from rlhf_toolkit.data.tokenizers import pad_token_id, stop_token_ids
from rlhf_toolkit.distributed.collectives import world_size
from rlhf_toolkit.distributed.topology import Topology, deepspeed_settings, start
from rlhf_toolkit.distributed.zero3 import element_count, whole
from rlhf_toolkit.errors import DataError, ModelError
from rlhf_toolkit.models.attention import packing_obstacle
from rlhf_toolkit.models.loading import build_ppo_roles, load_base, load_model_config, load_tokenizer, lora_config
from rlhf_toolkit.models.shared_base import SharedBase
from rlhf_toolkit.plugins import load_function
from rlhf_toolkit.reporting.run_log import Progress, Record, RunLog, write_summary
from rlhf_toolkit.reporting.tracking import WandbMirror
from rlhf_toolkit.rewards.functions import FunctionReward
from rlhf_toolkit.rollout.collect import Collector, Shaping
from rlhf_toolkit.rollout.cutting import Cutting
from rlhf_toolkit.rollout.decoding import Sampling
from rlhf_toolkit.rollout.passes import Needs
from rlhf_toolkit.rollout.sampler import RolloutSize, Sampler
from rlhf_toolkit.rollout.schedule import ExpectedLengths
from rlhf_toolkit.seeding import derive_seed
from rlhf_toolkit.trainers.arguments import training_arguments
from rlhf_toolkit.trainers.callbacks import EvaluationAtBothEnds, StartCheck
from rlhf_toolkit.trainers.ppo import PPOLoss, PPOTrainer
from rlhf_toolkit.types import Prompt

FP32_TOLERANCE, HALF_PRECISION_TOLERANCE = 1e-4, 0.1  # of log-probs that should be equal


@dataclass(frozen=True)
class Task:
    """What is trained on: prompts, their tokenizer, how to sample, and the reward."""

    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    prompts: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]
    schedule: PromptSchedule
    reward: FunctionReward


@dataclass
class PPORun:
    """A prepared run. ``train`` runs it to its end and leaves adapters and ``summary.json`` in the run folder."""

    experiment: Experiment
    topology: Topology
    trainer: PPOTrainer
    checkpoint: Path | None
    mirror: WandbMirror | None
    progress: Progress

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.experiment.run.output_dir)

    def train(self) -> dict[str, Any]:
        """Evaluate, train, evaluate again, save; return the summary (an empty one on ranks other than 0)."""
        began = time.perf_counter()
        try:
            self.trainer.train(resume_from_checkpoint=str(self.checkpoint) if self.checkpoint else None)
        finally:
            self.progress.bar.close()  # so that whatever is printed next starts on a line of its own
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
    topology = start(max_grad_norm=experiment.update.max_grad_norm)
    experiment.check_processes(topology.world_size)
    folder, settings = Path(experiment.run.output_dir), experiment.as_dict()
    checkpoint = on_main(lambda: open_run_folder(folder, settings, resume=resume, overwrite=overwrite))
    config = load_model_config(experiment.model.name, trust_remote_code=experiment.model.trust_remote_code)
    task = load_task(experiment, config, topology)
    if checkpoint is None:
        on_main(lambda: claim_run_folder(folder, settings))
    shared = load_roles(experiment, config, topology)
    fingerprint = fingerprint_of(shared)
    manifest = read_manifest(checkpoint, fingerprint=fingerprint, world_size=topology.world_size) if checkpoint else {}
    mirror = start_wandb(experiment, topology, manifest.get("wandb_id"))
    progress = Progress(
        num_rollouts=experiment.ppo.num_rollouts,
        updates_per_rollout=experiment.updates_per_rollout,
        show=topology.is_main,
    )
    trainer = make_trainer(experiment, topology, task, shared, progress)
    control = trainer.collector.kl_control
    control.coefficient = manifest.get("kl_coefficient", control.coefficient)
    trainer.collector.expected = expected = ExpectedLengths(manifest.get("expected_lengths"))

    def state() -> dict[str, Any]:
        """What only the run knows, for the manifest of a checkpoint."""
        run_id = mirror.run_id if mirror else None
        return {
            "kl_coefficient": control.coefficient,
            "expected_lengths": expected.state,
            "wandb_id": run_id,
            "base": fingerprint,
            "world_size": topology.world_size,
        }

    log = run_log(experiment, trainer, mirror)
    for callback in (StartCheck(trainer, topology), log, EvaluationAtBothEnds(trainer), ManifestWriter(state)):
        trainer.add_callback(callback)
    return PPORun(experiment, topology, trainer, checkpoint, mirror, progress)


def load_task(experiment: Experiment, config: PretrainedConfig, topology: Topology) -> Task:
    """Reward, tokenizer and prompts; the model's weights are not touched."""
    reward = FunctionReward(
        load_function(experiment.reward.function, "reward.function"),
        experiment.reward.kwargs,
        experiment.reward.function,
    )
    tokenizer = load_tokenizer(experiment.model.name, trust_remote_code=experiment.model.trust_remote_code)
    sampling = make_sampling(experiment, tokenizer, config)
    data, processes = experiment.data, topology.world_size
    prompts = load_prompts(data, tokenizer, data.train, data.train_split, processes)
    held_out: tuple[Prompt, ...] = ()
    if data.evaluation:
        held_out = load_prompts(data, tokenizer, data.evaluation, data.evaluation_split, processes)
    schedule = PromptSchedule(len(prompts), experiment.rollout.prompts_per_rollout, experiment.run.seed)
    return Task(tokenizer, sampling, prompts, held_out, schedule, reward)


def load_prompts(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, source: str, split: str, processes: int
) -> tuple[Prompt, ...]:
    """The prompts of one source, at least one for each process, and a line about what was dropped."""
    found = tokenise_prompts(
        load_rows(source, split),
        tokenizer,
        column=data.prompt_column,
        chat_template=data.chat_template,
        system_prompt=data.system_prompt,
        max_prompt_tokens=data.max_prompt_tokens,
    )
    on_main(lambda: print(f"{source}: {found.summary()}", flush=True))
    if len(found.prompts) < processes:
        raise DataError(
            f"{source} gives {len(found.prompts)} prompts for {processes} processes, each of which needs one; add "
            f"prompts or start at most {len(found.prompts)} processes"
        )
    return found.prompts


def make_sampling(experiment: Experiment, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> Sampling:
    """Sampling settings with the model's own stop tokens and a pad token that is never resized for."""
    rollout, name = experiment.rollout, experiment.model.name
    try:
        generation_eos = GenerationConfig.from_pretrained(name).eos_token_id
    except OSError:  # a model without generation_config.json says all it has to say in its config
        generation_eos = config.get_text_config().eos_token_id
    stop_ids = stop_token_ids(tokenizer, generation_eos, stop_strings=tuple(rollout.stop_strings))
    return Sampling(
        max_new_tokens=rollout.max_new_tokens,
        stop_ids=stop_ids,
        pad_id=pad_token_id(tokenizer, stop_ids=stop_ids, vocab_size=config.get_text_config().vocab_size),
        temperature=rollout.temperature,
        top_k=rollout.top_k,
        top_p=rollout.top_p,
        stop_strings=tuple(rollout.stop_strings),
    )


def load_roles(experiment: Experiment, config: PretrainedConfig, topology: Topology) -> SharedBase:
    """The base with its adapters. Adapters start from a derived seed, the same on every rank."""
    model = experiment.model
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
    torch.manual_seed(derive_seed(experiment.run.seed, "adapters"))
    return build_ppo_roles(
        base,
        adapter,
        policy_adapter=model.policy_adapter,
        value_on=model.value_on,
        gradient_checkpointing=model.gradient_checkpointing,
        value_head_std=model.value_head_std,
    )


def fingerprint_of(shared: SharedBase) -> str:
    """Identifies the frozen base, so that a checkpoint is never resumed on another one."""
    frozen = [
        (name, p)
        for name, p in shared.named_parameters()
        if "lora_" not in name and not name.startswith("scalar_heads")
    ]
    with whole([p for _, p in frozen]):
        return base_fingerprint(shared.causal_lm.config.to_json_string(), frozen)


def start_wandb(experiment: Experiment, topology: Topology, run_id: str | None) -> WandbMirror | None:
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
    )


def make_trainer(
    experiment: Experiment, topology: Topology, task: Task, shared: SharedBase, progress: Progress
) -> PPOTrainer:
    """Collector, loss and Trainer arguments from the experiment, tied together."""
    ppo, update = experiment.ppo, experiment.update
    rates = {"policy": update.policy_lr, "value": update.value_lr, "value_head": update.value_head_lr}
    deepspeed = deepspeed_settings(
        topology,
        rows_per_rank=experiment.mini_batch_rows // topology.world_size,
        max_grad_norm=update.max_grad_norm,
        largest_adapter=max(element_count(p) for group in shared.parameter_groups().values() for p in group),
    )
    return PPOTrainer(
        model=shared,
        args=training_arguments(experiment, topology, deepspeed),
        processing_class=task.tokenizer,
        collector=make_collector(experiment, task, progress, packing=packs(experiment, shared)),
        loss=make_loss(experiment),
        schedule=(ppo.num_rollouts, ppo.num_ppo_epochs, ppo.mini_batches),
        held_out=task.held_out,
        learning_rates=rates,
        callbacks=[progress],
    )


def packs(experiment: Experiment, shared: SharedBase) -> bool:
    """Whether micro-batches are packed: as ``update.packing`` says, and only where the model can. Prints what was
    chosen."""
    wanted = experiment.update.packing
    obstacle = packing_obstacle(shared.causal_lm)
    if wanted == "on" and obstacle is not None:
        raise ModelError(f"update.packing=on, but {obstacle}; set it to auto or off")
    chosen = wanted != "off" and obstacle is None
    reason = f" ({obstacle})" if wanted == "auto" and obstacle is not None else ""
    words = "packed, shared prefixes once" if chosen else f"padded rows{reason}"
    on_main(lambda: print(f"micro-batches: {words}", flush=True))
    return chosen


def make_collector(experiment: Experiment, task: Task, progress: Progress, *, packing: bool) -> Collector:
    """What turns prompts into experience; the trainer gives it its model."""
    ppo, rollout = experiment.ppo, experiment.rollout
    sampler = make_sampler(experiment, task, progress)
    return Collector(
        sampler,
        task.prompts,
        task.schedule,
        task.reward,
        task.sampling,
        Shaping(
            gamma=ppo.gamma,
            gae_lambda=ppo.gae_lambda,
            whiten_advantages=ppo.whiten_advantages,
            kl_in_reward=ppo.kl_in == "reward",
            kl_estimator=ppo.kl_estimator,
            missing_eos_penalty=experiment.reward.missing_eos_penalty,
            truncated=ppo.truncated,
        ),
        Cutting(ppo.mini_batches, experiment.update.micro_batch_tokens, packing),
        FixedKL(ppo.kl_coef) if ppo.kl_target is None else AdaptiveKL(ppo.kl_coef, ppo.kl_target, ppo.kl_horizon),
        responses_per_prompt=rollout.responses_per_prompt,
        seed=experiment.run.seed,
        tolerance=tolerance(experiment),
        needs=Needs(
            updates_per_rollout=experiment.updates_per_rollout,
            kl_in_reward=ppo.kl_in == "reward",
            kl_asked=experiment.kl_asked,
        ),
        correction=Correction(ppo.importance_correction, ppo.importance_cap),
    )


def make_sampler(experiment: Experiment, task: Task, progress: Progress) -> Sampler:
    """What decodes, for training and for evaluation: as large as the larger of the two."""
    rollout, ranks = experiment.rollout, world_size()
    size = RolloutSize(
        rows=max(rollout.sequences // ranks, -(-len(task.held_out) // ranks)),
        columns=max(len(p.token_ids) for p in (*task.prompts, *task.held_out)) + rollout.max_new_tokens,
        scoring_tokens=3 * experiment.update.micro_batch_tokens,
    )
    return Sampler(
        task.tokenizer,
        size,
        mode=rollout.mode,
        slots=rollout.slots,
        weights=rollout.weights,
        on_tokens=progress.on_tokens,
    )


def make_loss(experiment: Experiment) -> PPOLoss:
    """The loss's knobs from the experiment."""
    ppo = experiment.ppo
    return PPOLoss(
        clip_range_low=ppo.clip_range_low,
        clip_range_high=ppo.clip_range_high,
        dual_clip=ppo.dual_clip,
        value_clip_range=ppo.value_clip_range,
        value_coef=ppo.value_coef,
        entropy_coef=ppo.entropy_coef,
        loss_aggregation=ppo.loss_aggregation,
        kl_in_loss=ppo.kl_in == "loss",
        kl_estimator=ppo.kl_estimator,
        value_warmup_rollouts=ppo.value_warmup_rollouts,
        width=experiment.rollout.max_new_tokens,
        temperature=experiment.rollout.temperature,
        tolerance=tolerance(experiment),
        correction=Correction(ppo.importance_correction, ppo.importance_cap),
    )


def tolerance(experiment: Experiment) -> float:
    """How far log-probs of one policy may lie apart before the run stops."""
    default = FP32_TOLERANCE if experiment.model.dtype == "float32" else HALF_PRECISION_TOLERANCE
    return experiment.ppo.first_ratio_tolerance or default


def run_log(experiment: Experiment, trainer: PPOTrainer, mirror: WandbMirror | None) -> RunLog:
    """The JSONL log with its mirror."""

    def samples(kind: str) -> Sequence[Record]:
        newest = trainer.evaluation_samples if kind == "eval" else trainer.collector.samples
        return newest[: experiment.run.samples]

    sinks = () if mirror is None else (mirror,)
    folder = Path(experiment.run.output_dir)
    return RunLog(folder, updates_per_rollout=experiment.updates_per_rollout, samples=samples, sinks=sinks)
