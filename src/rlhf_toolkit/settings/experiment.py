"""Experiment: one YAML file, and the rules that tie its sections together."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from rlhf_toolkit.algorithms.kl_control import ERROR_BOUND
from rlhf_toolkit.errors import ConfigError
from rlhf_toolkit.secrets import masked
from rlhf_toolkit.settings.alarms import AlarmsConfig
from rlhf_toolkit.settings.configs import (
    DataConfig,
    ModelConfig,
    PPOConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
)
from rlhf_toolkit.settings.idle import ABOUT_NEW_ADAPTERS, idle_in_fine_tuning, idle_in_ppo, refuse_idle
from rlhf_toolkit.settings.optimizer import UpdateConfig
from rlhf_toolkit.settings.supervised import (
    DatasetConfig,
    DPOConfig,
    FineTuneUpdateConfig,
    RewardModelConfig,
    SFTConfig,
)

MOST_UPDATES = 2**53
"""Of a run: a float counts no further, and a schedule is one."""


@dataclass(frozen=True)
class Experiment:
    """One YAML file."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    update: UpdateConfig = field(default_factory=UpdateConfig)
    run: RunConfig = field(default_factory=RunConfig)
    alarms: AlarmsConfig = field(default_factory=AlarmsConfig)

    def __post_init__(self) -> None:
        """Raise ConfigError for the first of ``RULES`` that is broken."""
        for rule in RULES:
            rule(self)
        refuse_idle(self, idle_in_ppo(self))

    @property
    def kl_asked(self) -> bool:
        """Whether reward or loss needs the KL to the reference: its coefficient is not 0, where ``kl_target`` would
        leave it, too."""
        return self.ppo.kl_coef != 0

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps for each rollout."""
        return self.ppo.num_ppo_epochs * self.ppo.mini_batches

    @property
    def mini_batch_rows(self) -> int:
        """Sequences of one optimizer step, over all ranks."""
        return self.rollout.sequences // self.ppo.mini_batches

    def check_processes(self, processes: int) -> None:
        """Raise ConfigError where sizes do not fit this many ranks."""
        prompts = self.rollout.prompts_per_rollout
        if prompts % processes:
            below = prompts // processes * processes
            raise ConfigError(
                f"rollout.prompts_per_rollout={prompts} does not divide among {processes} processes; "
                f"try {f'{below} or {below + processes}' if below else processes}"
            )
        if self.mini_batch_rows % processes:
            raise ConfigError(
                f"ppo.mini_batches={self.ppo.mini_batches} makes mini-batches of {self.mini_batch_rows} responses, "
                f"which do not divide among {processes} processes; "
                f"try {_divisors_near(self.rollout.sequences // processes, self.ppo.mini_batches)}"
            )

    def as_dict(self) -> dict[str, Any]:
        """Nested plain values, as they would stand in YAML, to be written down: secrets are masked."""
        return written(self)


@dataclass(frozen=True)
class FineTuning:
    """One YAML file of a supervised run: the sections that SFT, reward models and DPO share."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DatasetConfig = field(default_factory=DatasetConfig)
    update: FineTuneUpdateConfig = field(default_factory=FineTuneUpdateConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        """Rules that tie sections together."""
        for name, value in {"model.name": self.model.name, "data.train": self.data.train}.items():
            if not value:
                raise ConfigError(f"{name} is missing; set it in the YAML file or as {name}=... on the command line")
        longest = self.data.max_tokens
        if self.update.micro_batch_tokens < longest:
            raise ConfigError(
                f"update.micro_batch_tokens={self.update.micro_batch_tokens} cannot hold one row of {longest} tokens "
                f"(data.max_tokens); set it to {longest} or more"
            )
        held_out(self)
        refuse_idle(self, idle_in_fine_tuning(self))

    ADAPTER_LR: ClassVar[float] = 1e-4
    JOB: ClassVar[str]  # the section with epochs and batch size

    @property
    def job(self) -> SFTConfig | RewardModelConfig | DPOConfig:
        """The section with epochs and batch size."""
        section: SFTConfig | RewardModelConfig | DPOConfig = getattr(self, self.JOB)
        return section

    @property
    def lr(self) -> float:
        """The learning rate of all but a head."""
        return self.ADAPTER_LR if self.update.lr is None else self.update.lr

    @property
    def full(self) -> bool:
        """Whether all of the model's weights are trained."""
        return False

    @property
    def trains_head(self) -> bool:
        """Whether there is a head beside the adapter."""
        return False

    def steps(self, items: int) -> int:
        """Optimizer steps for so many training items. Raises ConfigError where nobody could count them."""
        steps = self.job.epochs * items / self.job.batch_size
        if steps > MOST_UPDATES:
            raise ConfigError(
                f"{self.JOB}.epochs={self.job.epochs} of {items} rows is more than {MOST_UPDATES:.0e} updates; choose "
                "less"
            )
        return max(1, round(steps))

    def as_dict(self) -> dict[str, Any]:
        """Nested plain values, as they would stand in YAML, to be written down: secrets are masked."""
        return written(self)


@dataclass(frozen=True)
class SFTExperiment(FineTuning):
    """Supervised fine-tuning of the policy."""

    sft: SFTConfig = field(default_factory=SFTConfig)
    JOB = "sft"

    def __post_init__(self) -> None:
        """Raise ConfigError, under ``sft.full``, for settings that are about an adapter: there is none."""
        super().__post_init__()
        if not self.full:
            return
        about = (*ABOUT_NEW_ADAPTERS, "update.loraplus_lr_ratio")
        refuse_idle(self, [(True, about, "sft.full trains no adapter; leave one of them out")])
        if self.model.policy_adapter is not None:
            raise ConfigError(
                f"model.policy_adapter={self.model.policy_adapter} is an adapter to go on with, but sft.full trains "
                "none; add it to its base with rlhf merge and name the merged model in model.name"
            )
        if self.model.quantization != "none":
            raise ConfigError(
                f"model.quantization={self.model.quantization} freezes the base's weights, and sft.full trains them; "
                "drop sft.full to train an adapter on it, or set model.quantization to none"
            )
        if self.model.dtype == "float16":
            raise ConfigError(
                "model.dtype=float16 under sft.full: gradients of float16 products may vanish; set it to bfloat16 or "
                "float32"
            )
        if self.update.lr is None:
            raise ConfigError(
                f"update.lr is missing: its default, {self.ADAPTER_LR:g}, suits adapters and is too high for sft.full; "
                "set it, to 1e-5 for a start"
            )

    @property
    def full(self) -> bool:
        """``sft.full``."""
        return self.sft.full


@dataclass(frozen=True)
class RewardExperiment(FineTuning):
    """A reward adapter and its head."""

    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    JOB = "reward_model"

    @property
    def trains_head(self) -> bool:
        """A reward model is an adapter and a head."""
        return True


@dataclass(frozen=True)
class DPOExperiment(FineTuning):
    """Direct preference optimisation of the policy."""

    dpo: DPOConfig = field(default_factory=DPOConfig)
    JOB = "dpo"


def written(experiment: Experiment | FineTuning) -> dict[str, Any]:
    """The settings of an experiment as they may be written to a file or sent to W&B: secrets are masked."""
    settings: dict[str, Any] = masked(asdict(experiment))
    return settings


# ---- rules that tie sections together: each raises ConfigError for what breaks it ------------------------------------


def required_settings(experiment: Experiment) -> None:
    """A model, prompts and a reward must be named."""
    required = {
        "model.name": experiment.model.name,
        "data.train": experiment.data.train,
        "reward.function": experiment.reward.named,
    }
    for name, value in required.items():
        if not value:
            raise ConfigError(f"{name} is missing; set it in the YAML file or as {name}=... on the command line")


def sizes_of_batches(experiment: Experiment) -> None:
    """A rollout divides into its mini-batches, and a micro-batch holds one sequence."""
    data, rollout, update = experiment.data, experiment.rollout, experiment.update
    rows, mini_batches = rollout.sequences, experiment.ppo.mini_batches
    if rows % mini_batches:
        raise ConfigError(
            f"a rollout of {rows} responses does not divide into ppo.mini_batches={mini_batches}; "
            f"try {_divisors_near(rows, mini_batches)}"
        )
    longest = data.max_prompt_tokens + rollout.max_new_tokens
    if update.micro_batch_tokens < longest:
        raise ConfigError(
            f"update.micro_batch_tokens={update.micro_batch_tokens} cannot hold one sequence of {longest} "
            f"tokens (data.max_prompt_tokens + rollout.max_new_tokens); set it to {longest} or more"
        )


def value_warmup(experiment: Experiment) -> None:
    """While the value warms up nothing moves the policy, and rollouts are left for it afterwards."""
    warmup, rollouts = experiment.ppo.value_warmup_rollouts, experiment.ppo.num_rollouts
    if warmup and experiment.update.weight_decay:
        raise ConfigError(
            f"update.weight_decay={experiment.update.weight_decay} would move the policy during "
            f"ppo.value_warmup_rollouts={warmup}; set one of them to 0"
        )
    if warmup >= rollouts:
        raise ConfigError(
            f"ppo.value_warmup_rollouts={warmup} leaves none of ppo.num_rollouts={rollouts} for the policy; "
            f"set it to {rollouts - 1} or less"
        )


def kl_horizon(experiment: Experiment) -> None:
    """``AdaptiveKL.update`` takes the responses of one rollout at once. It would refuse too, but after that rollout."""
    ppo, rows = experiment.ppo, experiment.rollout.sequences
    too_short = ERROR_BOUND * rows
    if ppo.kl_target is not None and ppo.kl_horizon <= too_short:
        raise ConfigError(
            f"ppo.kl_horizon={ppo.kl_horizon} is too short for rollouts of {rows} responses "
            f"under ppo.kl_target; set it to {math.floor(too_short) + 1} or more"
        )


def kl_stop(experiment: Experiment) -> None:
    """A stop within a rollout needs a second update to leave out."""
    if experiment.ppo.kl_stop is not None and experiment.updates_per_rollout == 1:
        raise ConfigError(
            f"ppo.kl_stop={experiment.ppo.kl_stop} does nothing where a rollout has one update; set ppo.mini_batches "
            "or ppo.num_ppo_epochs to 2 or more, or drop it"
        )


def turn_budget(experiment: Experiment) -> None:
    """A turn's budget is less than the response's, or it cuts nothing."""
    turn, whole = experiment.rollout.max_turn_tokens, experiment.rollout.max_new_tokens
    if turn is not None and turn >= whole:
        raise ConfigError(
            f"rollout.max_turn_tokens={turn} cuts no turn: a response has rollout.max_new_tokens={whole}, all turns "
            f"and answers together; set it to {whole - 1} or less, or drop it"
        )


def overlong_buffer(experiment: Experiment) -> None:
    """The buffer begins within the response. ``soft_overlong_penalty`` would refuse too, but after a rollout."""
    buffer, budget = experiment.reward.overlong_buffer, experiment.rollout.max_new_tokens
    if buffer > budget:
        raise ConfigError(
            f"reward.overlong_buffer={buffer} begins before the response: rollout.max_new_tokens={budget}; set it to "
            f"{budget} or less"
        )


def held_out(experiment: Experiment | FineTuning) -> None:
    """An evaluation needs held-out rows."""
    if experiment.run.evaluate_every and not experiment.data.evaluation:
        raise ConfigError(
            f"run.evaluate_every={experiment.run.evaluate_every} has nothing to evaluate; name held-out rows in "
            "data.evaluation, or set it to 0"
        )


def number_of_updates(experiment: Experiment) -> None:
    """All updates of the run can be counted."""
    updates = experiment.ppo.num_rollouts * experiment.updates_per_rollout
    if updates > MOST_UPDATES:
        raise ConfigError(
            f"ppo.num_rollouts={experiment.ppo.num_rollouts} with ppo.num_ppo_epochs={experiment.ppo.num_ppo_epochs} "
            f"and ppo.mini_batches={experiment.ppo.mini_batches} is more than {MOST_UPDATES:.0e} updates; choose less"
        )


RULES = (
    required_settings,
    sizes_of_batches,
    value_warmup,
    kl_horizon,
    kl_stop,
    turn_budget,
    overlong_buffer,
    held_out,
    number_of_updates,
)
"""In the order in which they are looked at."""


MOST_LOOKED_AT = 100_000


def _divisors_near(size: int, wanted: int) -> str:
    """The divisors of ``size`` on both sides of ``wanted``, or the one there is; of those far away, the ends."""
    wanted = min(wanted, size + 1)
    downwards = range(wanted - 1, max(0, wanted - MOST_LOOKED_AT), -1)
    upwards = range(wanted + 1, min(size, wanted + MOST_LOOKED_AT) + 1)
    below = next((d for d in downwards if size % d == 0), 1 if wanted > 1 else None)
    above = next((d for d in upwards if size % d == 0), size if wanted < size else None)
    return " or ".join(str(d) for d in (below, above) if d is not None)
