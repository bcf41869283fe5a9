"""A supervised run from one experiment: SFT, a reward adapter, or DPO, in the order in which things must happen."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_toolkit.checkpoints import ManifestWriter, claim_run_folder, on_main, open_run_folder, read_manifest
from rlhf_toolkit.data.instructions import ExampleSet, tokenise_examples
from rlhf_toolkit.data.items import Cut, Item, Row
from rlhf_toolkit.data.layout import packed_layout, padded_layout
from rlhf_toolkit.data.preferences import PairSet, tokenise_pairs
from rlhf_toolkit.data.prompts import load_rows
from rlhf_toolkit.data.tokenizers import pad_token_id, stop_token_ids
from rlhf_toolkit.distributed.collectives import agreement
from rlhf_toolkit.distributed.topology import Topology, deepspeed_settings, start
from rlhf_toolkit.distributed.zero3 import element_count
from rlhf_toolkit.settings.experiment import DPOExperiment, FineTuning, RewardExperiment, SFTExperiment
from rlhf_toolkit.models.loading import adapter_config, load_base, load_model_config, load_tokenizer
from rlhf_toolkit.models.roles import POLICY, REFERENCE, REWARD
from rlhf_toolkit.models.shared_base import NOWHERE, SharedBase
from rlhf_toolkit.models.whole_model import WholeModel
from rlhf_toolkit.reporting.report import print_report
from rlhf_toolkit.reporting.run_log import Progress, RunLog, write_fine_tuning_summary
from rlhf_toolkit.seeding import derive_seed
from rlhf_toolkit.runs.arguments import training_arguments
from rlhf_toolkit.runs.assembly import packs
from rlhf_toolkit.runs.callbacks import EngineCheck, EvaluationAtBothEnds
from rlhf_toolkit.trainers.fine_tuner import FineTuner
from rlhf_toolkit.trainers.objectives import DPO, SFT, BradleyTerry, Objective
from rlhf_toolkit.runs.ppo import fingerprint_of, load_adapted_base, start_wandb
from rlhf_toolkit.runs.run import Run, read_command, with_dtype
from rlhf_toolkit.runs.task import generation_eos_of


class FineTuningRun(Run[FineTuning, FineTuner]):
    """A prepared supervised run. ``train`` runs it to its end and leaves adapters and ``summary.json`` behind."""

    def train(self) -> dict[str, Any]:
        """Evaluate, train, evaluate again, save; return the summary (an empty one on ranks other than 0)."""
        began, extra = time.perf_counter(), dict[str, Any]()
        self.fit()
        if isinstance(self.experiment, RewardExperiment) and self.experiment.reward_model.normalise:
            mean, deviation = self.trainer.normalise_rewards()
            extra = {"score_mean": mean, "score_deviation": deviation}
        self.trainer.save_model()
        if not self.topology.is_main:
            return {}
        if self.experiment.full:
            cast(PreTrainedTokenizerBase, self.trainer.processing_class).save_pretrained(
                self.folder / POLICY
            )  # a model's folder, where an adapter's has none
        summary = write_fine_tuning_summary(
            self.folder,
            seconds=time.perf_counter() - began,
            world_size=self.topology.world_size,
            device=str(self.topology.device),
            prefix=self.trainer.objective.prefix,
            extra=extra,
        )
        if self.mirror is not None:
            self.mirror.finish()
        return summary


def run_recipe(kind: type[FineTuning], description: str | None) -> None:
    """A supervised recipe: read its command line, run the experiment, print the report."""
    command = read_command(kind, description)
    run = prepare_fine_tuning(command.experiment, resume=command.resume, overwrite=command.overwrite)
    print_report(run.folder, run.train())


def prepare_fine_tuning(experiment: FineTuning, *, resume: bool = False, overwrite: bool = False) -> FineTuningRun:
    """Build the run on every rank. Raises a subclass of RLHFError for everything the user can mend."""
    topology = start(max_grad_norm=experiment.update.max_grad_norm, timeout_minutes=experiment.run.timeout_minutes)
    experiment = with_dtype(experiment, topology)
    folder, settings = Path(experiment.run.output_dir), experiment.as_dict()
    checkpoint = on_main(lambda: open_run_folder(folder, settings, resume=resume, overwrite=overwrite))
    with agreement("loading"):
        config = load_model_config(experiment.model.name, trust_remote_code=experiment.model.trust_remote_code)
        tokenizer = load_tokenizer(experiment.model.name, trust_remote_code=experiment.model.trust_remote_code)
        stop_ids = stop_token_ids(tokenizer, generation_eos_of(experiment.model.name, config), stop_strings=())
    items, held_out = load_items(experiment, tokenizer, stop_ids)
    if checkpoint is None:
        on_main(lambda: claim_run_folder(folder, settings))
    model = load_model(experiment, config, topology)
    fingerprint = fingerprint_of(model)
    here: dict[str, Any] = {"world_size": topology.world_size, "zero_stage": topology.launch.zero_stage}
    manifest = read_manifest(checkpoint, fingerprint=fingerprint, **here) if checkpoint else {}
    mirror = start_wandb(experiment, topology, manifest.get("wandb_id"), axis="step")
    steps = experiment.steps(len(items))
    progress = Progress(num_rollouts=steps, updates_per_rollout=1, show=topology.is_main, unit="step")
    pad_id = pad_token_id(tokenizer, stop_ids=stop_ids, vocab_size=config.get_text_config().vocab_size)
    trainer = make_trainer(experiment, topology, model, items, held_out, pad_id, tokenizer, progress)

    def state() -> dict[str, Any]:
        """What only the run knows, for the manifest of a checkpoint."""
        return {
            "wandb_id": mirror.run_id if mirror else None,
            "base": fingerprint,
            **here,
        }

    sinks = () if mirror is None else (mirror,)
    log = RunLog(folder, updates_per_rollout=1, samples=lambda kind: [], sinks=sinks, axis="step")
    for callback in (EngineCheck(trainer, topology), log, EvaluationAtBothEnds(trainer), ManifestWriter(state)):
        trainer.add_callback(callback)
    return FineTuningRun(experiment, topology, trainer, checkpoint, mirror, progress)


def make_trainer(
    experiment: FineTuning,
    topology: Topology,
    model: SharedBase | WholeModel,
    items: Sequence[Item],
    held_out: Sequence[Item],
    pad_id: int,
    tokenizer: PreTrainedTokenizerBase,
    progress: Progress,
) -> FineTuner:
    """The trainer of the experiment's objective."""
    update, size, objective = experiment.update, experiment.job.batch_size, objective_of(experiment)
    packing = packs(update.packing, model)
    groups = model.parameter_groups()
    sizes = [element_count(p) for group in groups.values() for p in group]
    rows_per_rank = max(1, size // topology.world_size)
    deepspeed = deepspeed_settings(
        topology,
        rows_per_rank=rows_per_rank,
        max_grad_norm=update.max_grad_norm,
        largest_adapter=None if experiment.full else max(sizes),
        trained=sum(sizes),
    )
    steps = experiment.steps(len(items))
    arguments = training_arguments(
        experiment.run,
        update,
        deepspeed,
        rounds=steps,
        steps_per_round=1,
        rows_per_rank=rows_per_rank,
        learning_rate=experiment.lr,
    )
    return FineTuner(
        model=model,
        args=arguments,
        processing_class=tokenizer,
        objective=objective,
        items=items,
        held_out=held_out,
        cut=Cut(size, update.micro_batch_tokens // len(objective.roles), not packing, topology.world_size),
        layout=packed_layout if packing else padded_layout,
        steps=steps,
        pad_id=pad_id,
        learning_rates={name: update.head_lr if name.endswith("_head") else experiment.lr for name in groups},
        callbacks=[progress],
    )


def objective_of(experiment: FineTuning) -> Objective:
    """What the run minimises."""
    if isinstance(experiment, RewardExperiment):
        return BradleyTerry(experiment.reward_model.centring)
    if isinstance(experiment, DPOExperiment):
        return DPO(experiment.dpo.beta, experiment.dpo.label_smoothing, experiment.dpo.loss)
    return SFT()


def load_model(experiment: FineTuning, config: PretrainedConfig, topology: Topology) -> SharedBase | WholeModel:
    """Adapters on a frozen base, which start from a derived seed, the same on every rank; or the whole model."""
    model = experiment.model
    if not experiment.full:
        base, adapter = load_adapted_base(model, config, topology)
        torch.manual_seed(derive_seed(experiment.run.seed, "adapters"))
        return build_roles(experiment, base, adapter)
    base = load_base(
        model.name,
        config,
        topology,
        dtype=torch.float32,
        attention=model.attention,
        trust_remote_code=model.trust_remote_code,
    )
    products = getattr(torch, model.dtype)
    whole = WholeModel(base, gradient_checkpointing=model.gradient_checkpointing, products=products)
    count = sum(element_count(p) for p in whole.parameter_groups()[POLICY])
    on_main(lambda: print(f"all {count / 1e6:.1f}M weights are trained, in float32; products in {model.dtype}"))
    return whole


def build_roles(experiment: FineTuning, base: PreTrainedModel, adapter: LoraConfig) -> SharedBase:
    """The roles that the objective trains, and for DPO the reference: a frozen copy of the policy's start, or the bare
    base."""
    options: dict[str, Any] = {
        "gradient_checkpointing": experiment.model.gradient_checkpointing,
        "value_on": NOWHERE,
    }
    start, setting = experiment.model.policy_adapter, "model.policy_adapter"
    if isinstance(experiment, RewardExperiment):
        adapters = {REWARD: adapter if start is None else adapter_config(start, setting)}
    else:
        adapters = {POLICY: adapter if start is None else adapter_config(start, setting)}
        if isinstance(experiment, DPOExperiment) and start is not None:
            adapters[REFERENCE] = adapters[POLICY]
    trained = REWARD if REWARD in adapters else POLICY
    shared = SharedBase(base, adapters, trained=(trained,), **options)
    for role in adapters if start is not None else ():
        shared.load_role(role, str(start))
    return shared


def load_items(
    experiment: FineTuning, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]
) -> tuple[list[Item], list[Item]]:
    """Training and held-out items, with a line about what was dropped from each."""
    data = experiment.data
    sources = [(data.train, data.train_split), (data.evaluation, data.evaluation_split)]
    found = [
        [] if source is None else _items(experiment, tokenizer, source, split, stop_ids) for source, split in sources
    ]
    return found[0], found[1]


def _items(
    experiment: FineTuning, tokenizer: PreTrainedTokenizerBase, source: str, split: str, stop_ids: Sequence[int]
) -> list[Item]:
    data = experiment.data
    options: dict[str, Any] = {
        "max_tokens": data.max_tokens,
        "system_prompt": data.system_prompt,
        "chat_template": data.chat_template,
        "stop_ids": stop_ids,
    }
    tokenise = tokenise_examples if isinstance(experiment, SFTExperiment) else tokenise_pairs
    with agreement("loading"):
        rows = load_rows(source, split, streaming=data.streaming, max_rows=data.max_rows)
        found = tokenise(rows, tokenizer, **options)
    on_main(lambda: print(f"{source}: {found.summary()}", flush=True))
    return items_of(found)


def items_of(found: ExampleSet | PairSet) -> list[Item]:
    """Examples as items of one row, pairs as items of two: chosen, rejected."""
    if isinstance(found, ExampleSet):
        return [Item((Row(e.token_ids, e.prompt_length, e.trained[e.prompt_length :]),)) for e in found.examples]
    return [
        Item(
            tuple(
                Row((*pair.prompt_ids, *response), len(pair.prompt_ids), (True,) * len(response))
                for response in (pair.chosen_ids, pair.rejected_ids)
            ),
            pair.margin,
        )
        for pair in found.pairs
    ]
