"""Runs in Python: a model, rewards, rows and settings go in as objects or as names, and a run comes out.

Nothing is assembled here. The arguments become the experiment that a YAML file would be, objects stand under names
in it, and ``prepare`` builds the run as it does for a recipe, on every rank alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar, cast

from transformers import PreTrainedTokenizerBase, TrainerCallback

from rlhf_toolkit.errors import ConfigError, TopologyError, shortened
from rlhf_toolkit.given import given
from rlhf_toolkit.runs.api_objects import SPLIT_OF, Brought
from rlhf_toolkit.runs.api_settings import DPOConfig, PPOConfig, RewardConfig, Sections, Settings, SFTConfig
from rlhf_toolkit.runs.fine_tuning import FineTuningRun, prepare_fine_tuning
from rlhf_toolkit.runs.ppo import PPORun, prepare
from rlhf_toolkit.settings.experiment import Experiment
from rlhf_toolkit.settings.loading import experiment_from_dict

A = TypeVar("A", bound=PPORun | FineTuningRun)


class Program(Generic[A]):
    """A run that a Python program makes: its experiment and its objects, and the run once it is prepared.

    ``experiment`` is the same that a YAML file would give. The run is prepared, and the model loaded, by the first of
    ``train``, ``evaluate`` and ``save_model``; all are collectives.
    """

    CONFIG: ClassVar[type[Settings]]

    def __init__(self, settings: Settings, brought: Brought, callbacks: Sequence[Any]) -> None:
        brought.functions(settings.functions)
        for callback in callbacks:
            one = isinstance(callback, type) and issubclass(callback, TrainerCallback)
            if not one and not isinstance(callback, TrainerCallback):
                raise ConfigError(
                    f"the callback {shortened(callback)} is no TrainerCallback of transformers; make it one"
                )
        self.experiment = experiment_from_dict(settings.sections, self.CONFIG.EXPERIMENT)
        if isinstance(self.experiment, Experiment):
            brought.refuse_for_rewards(self.experiment.reward.model)
        self.callbacks, self._brought = tuple(callbacks), brought
        self._run: A | None = None
        self._trained = False

    @property
    def folder(self) -> Path:
        """The run folder: ``output_dir``."""
        return Path(self.experiment.run.output_dir)

    @property
    def run(self) -> A:
        """The prepared run; ``run.trainer`` is the Trainer, ``run.trainer.model`` the base with its roles."""
        if self._run is None:
            self.prepare()
        return cast(A, self._run)

    def prepare(self, *, resume: bool = False, overwrite: bool = False) -> None:
        """Load and check everything, up to the first step. ``resume`` goes on from the newest checkpoint in the folder,
        ``overwrite`` replaces what another run has left there. Raises ConfigError where that has been done already, and
        other subclasses of RLHFError."""
        if self._run is not None:
            raise ConfigError("this run has been prepared already; call prepare() before evaluate() and the others")
        make: Any = prepare if isinstance(self.experiment, Experiment) else prepare_fine_tuning
        with given(self._brought.objects, self._brought.about):
            run = make(self.experiment, resume=resume, overwrite=overwrite)
        self._brought = Brought()  # what a run needs of the objects it has; the others may go
        for callback in self.callbacks:
            run.trainer.add_callback(callback)
        self._run = run

    def train(self, *, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
        """Evaluate, train, evaluate again, save, as a recipe does; return the summary, on other ranks than 0 {}.
        ``resume`` and ``overwrite`` are those of ``prepare``."""
        if self._trained:
            raise ConfigError("this run has been trained; make another trainer, to go on with train(resume=True)")
        if self._run is None or resume or overwrite:
            self.prepare(resume=resume, overwrite=overwrite)
        self._trained = True
        return self.run.train()

    def evaluate(self) -> dict[str, float]:
        """The metrics of the held-out rows, by the names of docs/metrics.md: of the model as it is before ``train``, or
        as that has left it. Raises ConfigError where there are no such rows."""
        if not self.experiment.data.evaluation:
            raise ConfigError("eval_dataset is missing; give held-out rows")
        trainer = self.run.trainer
        for record in reversed(trainer.state.log_history):  # the end of a training has evaluated already
            if record["step"] == trainer.state.global_step and any(name.startswith("eval/") for name in record):
                return {name: value for name, value in record.items() if name.startswith("eval/")}
        if self.run.topology.launch.zero_stage is not None:
            raise TopologyError(
                "evaluate() before train() runs without DeepSpeed, whose engine train() makes; it evaluates before "
                "the first update, too, and log.jsonl has it"
            )
        return trainer.evaluate()

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Write adapters, or the whole model that is trained, and the tokenizer to the run folder or another."""
        self.run.trainer.save_model(None if output_dir is None else str(output_dir))


class PPOTrainer(Program[PPORun]):
    """PPO, GRPO or another method with rollouts.

    Args:
        model: a hub name, a folder, or a causal language model of transformers, which the run takes over.
        reward_funcs: a function ``(prompts, responses, **columns) -> scores``, an import path of one, or several in a
            list; also as dicts of docs/rewards.md, with ``function``, ``weight`` and more.
        args: settings; others may follow as keyword arguments, which come before these.
        train_dataset, eval_dataset: a ``datasets.Dataset``, a list of dicts, a file or a hub name.
        processing_class: a tokenizer in place of the model's own.
        callbacks: of transformers' Trainer.

    Raises:
        RLHFError: a subclass, in one line, for everything the user can mend.
    """

    CONFIG = PPOConfig

    def __init__(
        self,
        model: Any = None,
        reward_funcs: Any = (),
        args: PPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: Sequence[Any] = (),
        **settings: Any,
    ) -> None:
        functions = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
        if functions:
            settings["reward"] = {**settings.get("reward", {}), "functions": functions}
        found, brought = settings_of(PPOConfig, args, settings), Brought()
        put_objects(found.sections, brought, model, processing_class, train_dataset, eval_dataset)
        super().__init__(found, brought, callbacks)


class FineTuningProgram(Program[FineTuningRun]):
    """SFT, a reward model or DPO: the arguments of ``PPOTrainer`` but for rewards. Rows have the columns of
    docs/fine_tuning.md."""

    def __init__(
        self,
        model: Any = None,
        args: Settings | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: Sequence[Any] = (),
        **settings: Any,
    ) -> None:
        found, brought = settings_of(self.CONFIG, args, settings), Brought()
        put_objects(found.sections, brought, model, processing_class, train_dataset, eval_dataset)
        super().__init__(found, brought, callbacks)


class SFTTrainer(FineTuningProgram):
    """Supervised fine-tuning of an adapter, or with ``full`` of all weights."""

    CONFIG = SFTConfig


class RewardTrainer(FineTuningProgram):
    """A reward adapter and its head from preferred pairs."""

    CONFIG = RewardConfig


class DPOTrainer(FineTuningProgram):
    """Direct preference optimisation of an adapter."""

    CONFIG = DPOConfig


def settings_of(kind: type[Settings], args: Settings | None, more: dict[str, Any]) -> Settings:
    """The settings of ``args`` with ``more`` in their place. Raises ConfigError for settings of another kind of run."""
    if args is None:
        return kind(**more)
    if not isinstance(args, kind):
        raise ConfigError(f"args is a {type(args).__name__}; give a {kind.__name__}")
    return args.with_settings(more)


def put_objects(
    sections: Sections,
    brought: Brought,
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    train: Any,
    evaluation: Any,
) -> None:
    """Give model and rows their names in ``sections``. Raises ConfigError for a split of rows that are no file."""
    if model is not None:
        named = sections.setdefault("model", {})
        named["name"] = brought.model(model, tokenizer)
        if not isinstance(model, (str, Path)):
            named.setdefault("dtype", str(model.dtype).removeprefix("torch."))
    elif tokenizer is not None:
        raise ConfigError("processing_class goes with the argument model; give that, too")
    data = sections.setdefault("data", {})
    for setting, rows in {"data.train": train, "data.evaluation": evaluation}.items():
        if rows is not None:
            data[setting.partition(".")[2]] = brought.rows(rows, setting)
        if setting in brought.about and SPLIT_OF[setting] in data:
            raise ConfigError(f"data.{SPLIT_OF[setting]} names a part of a file or hub dataset, not of rows; drop it")
    if brought.about.keys() & SPLIT_OF.keys() and data.get("streaming"):
        raise ConfigError("data.streaming reads a file or a hub dataset as it comes, and the rows are here; drop it")
