"""What is trained on: prompts, their tokenizer, how to sample, and the rewards. No weights are touched here."""

from __future__ import annotations

from dataclasses import dataclass, replace

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from rlhf_toolkit.data.endings import check_turn_end
from rlhf_toolkit.data.prompts import PromptSchedule, load_rows, tokenise_prompts
from rlhf_toolkit.data.template_values import template_values
from rlhf_toolkit.data.tokenizers import pad_token_id
from rlhf_toolkit.distributed.collectives import agreement, on_main
from rlhf_toolkit.distributed.topology import Topology
from rlhf_toolkit.errors import DataError
from rlhf_toolkit.models.context import check_context
from rlhf_toolkit.models.loading import sampling_wishes_of
from rlhf_toolkit.rewards.compose import Rewards
from rlhf_toolkit.rewards.scores import NoFunctions
from rlhf_toolkit.rewards.specification import RewardSpec
from rlhf_toolkit.rewards.values import READERS
from rlhf_toolkit.rollout.decoding import Sampling
from rlhf_toolkit.rollout.scored_sampler import Scorer
from rlhf_toolkit.runs.sampling_rules import logit_rules, uncorrected, unheeded
from rlhf_toolkit.runs.tokenizer import load_run_tokenizer, reading, rendering
from rlhf_toolkit.secrets import resolved
from rlhf_toolkit.settings.configs import DataConfig
from rlhf_toolkit.settings.experiment import Experiment
from rlhf_toolkit.texts import say
from rlhf_toolkit.types import Prompt


@dataclass(frozen=True)
class Task:
    """What is trained on: prompts, their tokenizer, how to sample, and the reward."""

    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    prompts: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]
    schedule: PromptSchedule
    reward: Scorer

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt, of those to train on and of those held out."""
        return max(len(prompt.token_ids) for prompt in (*self.prompts, *self.held_out))


def load_task(experiment: Experiment, config: PretrainedConfig, topology: Topology) -> Task:
    """Reward, tokenizer and prompts; the model's weights are not touched."""
    with agreement("loading"):
        reward = load_rewards(experiment)
        tokenizer, stop_ids = load_tokenizer_of(experiment, config)
        sampling = make_sampling(experiment, tokenizer, stop_ids, config)
    say_how_tokens_are_drawn(experiment)
    data, processes = experiment.data, topology.world_size
    prompts = load_prompts(data, tokenizer, data.train, data.train_split, processes)
    held_out: tuple[Prompt, ...] = ()
    if data.evaluation:
        held_out = load_prompts(data, tokenizer, data.evaluation, data.evaluation_split, processes)
    with agreement("loading"):
        for first in (prompts[0], *held_out[:1]):
            reward.require_columns(first)
    schedule = PromptSchedule(len(prompts), experiment.rollout.prompts_per_rollout, experiment.run.seed)
    task = Task(tokenizer, sampling, prompts, held_out, schedule, reward)
    check_length(experiment.model.name, config, task)
    check_turns(experiment, task)
    return task


def load_tokenizer_of(
    experiment: Experiment, config: PretrainedConfig
) -> tuple[PreTrainedTokenizerBase, tuple[int, ...]]:
    """The tokenizer as the settings want it, and the ids that end a response."""
    strings = experiment.rollout.stop_strings
    return load_run_tokenizer(experiment.model, experiment.data.chat_template, config, stop_strings=strings)


def check_turns(experiment: Experiment, task: Task) -> None:
    """Raise DataError where the chat template ends the assistant's turn, behind the first prompt that it has rendered,
    with a token at which no response ends; say so where that may be meant. A collective."""
    chats = [prompt for prompt in (*task.prompts, *task.held_out) if prompt.messages is not None]
    if not chats:
        return
    values, first = experiment.data.chat_template_kwargs, chats[0]
    with agreement("loading"):
        warning = check_turn_end(
            first.messages or (),
            task.tokenizer,
            template_values(first.columns, values, index=first.index),
            index=first.index,
            stop_ids=task.sampling.stop_ids,
            stop_strings=task.sampling.stop_strings,
            chosen=experiment.model.eos_token is not None,
        )
    if warning is not None:
        on_main(lambda: say(warning))


def check_length(name: str, config: PretrainedConfig, task: Task) -> None:
    """Raise ConfigError where the longest prompt with its response cannot be read by the model ``name``; say so where
    it can, but untrained."""
    budget, longest = task.sampling.max_new_tokens, task.longest_prompt
    warning = check_context(
        name,
        config,
        longest + budget,
        what=f"the longest prompt ({longest} tokens) with its response (rollout.max_new_tokens={budget})",
        way_out="lower rollout.max_new_tokens or data.max_prompt_tokens",
    )
    if warning is not None:
        on_main(lambda: say(warning))


def load_rewards(experiment: Experiment) -> Rewards | NoFunctions:
    """The rewards of ``reward.functions``, or the one of ``reward.function``; what fails and may fail is said on the
    terminal."""
    reward = experiment.reward
    if not (reward.function or reward.functions):
        return NoFunctions()
    entries = reward.functions or [{"function": reward.function, "kwargs": reward.kwargs}]
    places = [f"reward.functions[{number}]" if reward.functions else "reward" for number in range(len(entries))]
    specs = [with_secrets(RewardSpec.parse(*each)) for each in zip(entries, places, strict=True)]
    return Rewards(specs, warn=say)


def with_secrets(spec: RewardSpec) -> RewardSpec:
    """The reward with the environment's values for every ``${NAME}`` in its kwargs and its address. Its name, which
    metrics carry, is made of the address as it is written. Raises ConfigError for a variable that is not set."""
    kwargs = resolved(dict(spec.kwargs), f"{spec.setting}.kwargs")
    url = None if spec.url is None else READERS["url"](f"{spec.setting}.url", resolved(spec.url, f"{spec.setting}.url"))
    return replace(spec, kwargs=kwargs, url=url)


def load_prompts(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, source: str, split: str, processes: int
) -> tuple[Prompt, ...]:
    """The prompts of one source, at least one for each process, and a line about what was dropped."""
    with agreement("loading"):
        found = tokenise_prompts(
            load_rows(source, split, **reading(data)),
            tokenizer,
            column=data.prompt_column,
            max_prompt_tokens=data.max_prompt_tokens,
            **rendering(data),
        )
    on_main(lambda: say(f"{source}: {found.summary()}"))
    if len(found.prompts) < processes:
        raise DataError(
            f"{source} gives {len(found.prompts)} prompts for {processes} processes, each of which needs one; add "
            f"prompts or start at most {len(found.prompts)} processes"
        )
    return found.prompts


def say_how_tokens_are_drawn(experiment: Experiment, *, trains: bool = True) -> None:
    """Say on rank 0 what of the model's own wishes about sampling is not followed, and, where a policy ``trains``, that
    nothing corrects for how its tokens are drawn. A collective."""
    with agreement("loading"):
        wishes = sampling_wishes_of(experiment.model.name, experiment.model.revision)
    lines = unheeded(experiment.model.name, wishes, experiment.rollout)
    lines += uncorrected(experiment) if trains else []
    if lines:
        on_main(lambda: say("\n".join(lines)))


def make_sampling(
    experiment: Experiment, tokenizer: PreTrainedTokenizerBase, stop_ids: tuple[int, ...], config: PretrainedConfig
) -> Sampling:
    """Sampling settings with the stop tokens and a pad token that is never resized for."""
    rollout = experiment.rollout
    vocab_size = config.get_text_config().vocab_size
    return Sampling(
        max_new_tokens=rollout.max_new_tokens,
        stop_ids=stop_ids,
        pad_id=pad_token_id(tokenizer, stop_ids=stop_ids, vocab_size=vocab_size),
        temperature=rollout.temperature,
        top_k=rollout.top_k,
        top_p=rollout.top_p,
        min_p=rollout.min_p,
        rules=logit_rules(rollout, tokenizer, stop_ids=stop_ids, vocab_size=vocab_size),
        stop_strings=tuple(rollout.stop_strings),
    )
