"""A supervised run from one experiment: the parts of SFT, reward models and DPO of what ``start.prepare_run`` does."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from peft import LoraConfig
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_toolkit.checkpoints import fingerprint, folder_fingerprint
from rlhf_toolkit.data.instructions import Example, ExampleSet, tokenise_examples
from rlhf_toolkit.data.items import Cut, Item, Row
from rlhf_toolkit.data.layout import packed_layout, padded_layout
from rlhf_toolkit.data.preferences import Pair, PairSet, tokenise_pairs
from rlhf_toolkit.data.prompts import load_rows
from rlhf_toolkit.data.tokenizers import pad_token_id
from rlhf_toolkit.distributed.collectives import agreement, on_main
from rlhf_toolkit.distributed.topology import Topology, deepspeed_settings
from rlhf_toolkit.distributed.zero3 import element_count
from rlhf_toolkit.models.context import check_context
from rlhf_toolkit.models.loading import adapter_config, load_base
from rlhf_toolkit.models.roles import POLICY, REFERENCE, REWARD
from rlhf_toolkit.models.shared_base import NOWHERE, SharedBase
from rlhf_toolkit.models.whole_model import WholeModel
from rlhf_toolkit.reporting.progress import Progress
from rlhf_toolkit.reporting.records import write_fine_tuning_summary
from rlhf_toolkit.runs.arguments import training_arguments
from rlhf_toolkit.runs.callbacks import EngineCheck
from rlhf_toolkit.runs.opening import Opening, adapters_text
from rlhf_toolkit.runs.packing import packs
from rlhf_toolkit.runs.run import Run
from rlhf_toolkit.runs.start import Kind, prepare_run
from rlhf_toolkit.runs.tokenizer import load_run_tokenizer, reading, rendering
from rlhf_toolkit.runs.weights import load_adapted_base, require_one_model
from rlhf_toolkit.seeding import derive_seed
from rlhf_toolkit.settings.experiment import DPOExperiment, FineTuning, RewardExperiment, SFTExperiment
from rlhf_toolkit.texts import say
from rlhf_toolkit.trainers.fine_tuner import FineTuner
from rlhf_toolkit.trainers.objectives import DPO, SFT, BradleyTerry, Objective


class FineTuningRun(Run[FineTuning, FineTuner]):
    """A prepared supervised run. ``train`` runs it to its end and leaves adapters and ``summary.json`` behind."""

    def train(self) -> dict[str, Any]:
        """Evaluate, train, evaluate again, save; return the summary (an empty one on ranks other than 0)."""
        began, extra, ended = time.perf_counter(), dict[str, Any](), self.ended()
        if ended is not None:
            return self.finished(ended)
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
        return self.finished(summary)


def prepare_fine_tuning(experiment: FineTuning, *, resume: bool = False, overwrite: bool = False) -> FineTuningRun:
    """Build the run on every rank. Raises a subclass of RLHFError for everything the user can mend."""
    return prepare_run(FineTuningKind, FineTuningRun, experiment, resume=resume, overwrite=overwrite)


@dataclass(frozen=True)
class TrainingItems:
    """What is trained on and evaluated on, with the tokenizer that made it."""

    tokenizer: PreTrainedTokenizerBase
    stop_ids: Sequence[int]
    pad_id: int
    items: list[Item]
    held_out: list[Item]
    first: Example | Pair


class FineTuningKind(Kind[FineTuning, TrainingItems, SharedBase | WholeModel, FineTuner]):
    """SFT, reward models and DPO, whose records count optimizer steps."""

    axis = "step"

    def load_data(self, config: PretrainedConfig) -> TrainingItems:
        """Tokenizer and items."""
        model, data = self.experiment.model, self.experiment.data
        with agreement("loading"):
            tokenizer, stop_ids = load_run_tokenizer(model, data.chat_template, config)
        items, held_out, first = load_items(self.experiment, tokenizer, stop_ids)
        longest = max(length for item in (*items, *held_out) for length in item.lengths)
        way_out = f"lower data.max_tokens={data.max_tokens}"
        warning = check_context(model.name, config, longest, what="the longest row", way_out=way_out)
        if warning is not None:
            on_main(lambda: say(warning))
        vocabulary = config.get_text_config().vocab_size
        pad_id = pad_token_id(tokenizer, stop_ids=stop_ids, vocab_size=vocabulary)
        return TrainingItems(tokenizer, stop_ids, pad_id, items, held_out, first)

    def load_model(self, config: PretrainedConfig) -> SharedBase | WholeModel:
        """Adapters on a frozen base, or the whole model."""
        return load_trained_model(self.experiment, config, self.topology)

    def opening(self, data: TrainingItems) -> Opening:
        """The first row, and the adapter or the weights that are trained."""
        model, role = self.experiment.model, REWARD if isinstance(self.experiment, RewardExperiment) else POLICY
        trained = "all weights" if self.experiment.full else adapters_text(model, role, model.policy_adapter)
        trained += " and its head" * self.experiment.trains_head
        values, start = self.experiment.data.chat_template_kwargs, model.policy_adapter
        starts = () if start is None else (start,)
        return Opening(data.tokenizer, data.stop_ids, data.first, values, trained, adapters=starts)

    def identity(self, data: TrainingItems, model: SharedBase | WholeModel) -> dict[str, str]:
        """Also of the examples, and of the reference where the objective has one."""
        examples = ([item.margin, *([row.token_ids, row.trained] for row in item.rows)] for item in data.items)
        found = {**super().identity(data, model), "examples": fingerprint(examples)}
        start = self.experiment.model.policy_adapter
        if start is not None and isinstance(self.experiment, DPOExperiment):
            found["reference"] = on_main(lambda: folder_fingerprint(start))
        return found

    def rounds(self, data: TrainingItems) -> int:
        """The optimizer steps of the run."""
        return self.experiment.steps(len(data.items))

    def make_trainer(self, data: TrainingItems, model: SharedBase | WholeModel, progress: Progress) -> FineTuner:
        """The trainer of the experiment's objective. A model that is saved whole names all its stop tokens."""
        if isinstance(model, WholeModel) and model.causal_lm.generation_config is not None:
            model.causal_lm.generation_config.eos_token_id = list(data.stop_ids)
        return make_fine_tuner(self.experiment, self.topology, data, model, progress)

    def engine_check(self, trainer: FineTuner) -> EngineCheck:
        """The check of the engine, which prints nothing."""
        return EngineCheck(trainer, self.topology)


def make_fine_tuner(
    experiment: FineTuning, topology: Topology, rows: TrainingItems, model: SharedBase | WholeModel, progress: Progress
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
    steps = experiment.steps(len(rows.items))
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
        processing_class=rows.tokenizer,
        objective=objective,
        items=rows.items,
        held_out=rows.held_out,
        cut=Cut(size, update.micro_batch_tokens // len(objective.roles), not packing, topology.world_size),
        layout=packed_layout if packing else padded_layout,
        steps=steps,
        pad_id=rows.pad_id,
        learning_rates={name: update.head_lr if name.endswith("_head") else experiment.lr for name in groups},
        loraplus_lr_ratio=update.loraplus_lr_ratio,
        most_left_out=experiment.run.most_not_finite,
        callbacks=[progress],
    )


def objective_of(experiment: FineTuning) -> Objective:
    """What the run minimises."""
    if isinstance(experiment, RewardExperiment):
        return BradleyTerry(experiment.reward_model.centring)
    if isinstance(experiment, DPOExperiment):
        return DPO(experiment.dpo.beta, experiment.dpo.label_smoothing, experiment.dpo.loss)
    return SFT()


def load_trained_model(experiment: FineTuning, config: PretrainedConfig, topology: Topology) -> SharedBase | WholeModel:
    """Adapters on a frozen base, which start from a derived seed, the same on every rank; or the whole model."""
    model = experiment.model
    if not experiment.full:
        base, adapter = load_adapted_base(model, config, topology)
        torch.manual_seed(derive_seed(experiment.run.seed, "adapters"))
        return build_roles(experiment, base, adapter)
    require_one_model(model.name)
    base = load_base(
        model.name,
        config,
        topology,
        dtype=torch.float32,
        attention=model.attention,
        trust_remote_code=model.trust_remote_code,
        revision=model.revision,
    )
    products = getattr(torch, model.dtype)
    whole = WholeModel(base, gradient_checkpointing=model.gradient_checkpointing, products=products)
    count = sum(element_count(p) for p in whole.parameter_groups()[POLICY])
    on_main(lambda: say(f"all {count / 1e6:.1f}M weights are trained, in float32; products in {model.dtype}"))
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
        adapters = {REWARD: adapter if start is None else adapter_config(start, setting, adapter.revision)}
    else:
        adapters = {POLICY: adapter if start is None else adapter_config(start, setting, adapter.revision)}
        if isinstance(experiment, DPOExperiment) and start is not None:
            adapters[REFERENCE] = adapters[POLICY]
    trained = REWARD if REWARD in adapters else POLICY
    shared = SharedBase(base, adapters, trained=(trained,), **options)
    for role in adapters if start is not None else ():
        shared.load_role(role, str(start))
    return shared


def load_items(
    experiment: FineTuning, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]
) -> tuple[list[Item], list[Item], Example | Pair]:
    """Training and held-out items, with a line about what was dropped from each, and the first row to train on."""
    data = experiment.data
    options = {"max_tokens": data.max_tokens, "stop_ids": stop_ids, **rendering(data)}
    tokenise: Callable[..., ExampleSet | PairSet] = tokenise_pairs
    if isinstance(experiment, SFTExperiment):
        tokenise = partial(tokenise_examples, turns=experiment.sft.turns)

    def load(source: str, split: str) -> ExampleSet | PairSet:
        with agreement("loading"):
            found = tokenise(load_rows(source, split, **reading(data)), tokenizer, **options)
        on_main(lambda: say(f"{source}: {found.summary()}"))
        return found

    found = load(data.train, data.train_split)
    held_out = [] if data.evaluation is None else items_of(load(data.evaluation, data.evaluation_split))
    return items_of(found), held_out, found.examples[0] if isinstance(found, ExampleSet) else found.pairs[0]


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
