"""``rlhf evaluate``: adapters and their base, side by side, on the held-out prompts of an experiment.

An experiment's own YAML file says what is evaluated: ``data.evaluation``, the rewards, how to sample. One contestant at
a time is in memory; each answers the same prompts from the same random streams, and the reference of the KL is the
experiment's (``model.policy_adapter``, or the bare base).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from rlhf_toolkit.algorithms.evaluation import Estimate, estimate, win_rate
from rlhf_toolkit.data.preview import is_rendered
from rlhf_toolkit.data.prompts import PromptSchedule
from rlhf_toolkit.distributed.topology import start
from rlhf_toolkit.errors import ConfigError, TopologyError, described
from rlhf_toolkit.export.folders import adapter_folder
from rlhf_toolkit.files import created
from rlhf_toolkit.models.loading import build_ppo_roles, load_model_config
from rlhf_toolkit.models.shared_base import NOWHERE, SharedBase
from rlhf_toolkit.reporting.progress import Progress
from rlhf_toolkit.rollout.evaluated import (
    HeldOutResponses,
    Values,
    held_out_responses,
    rows_by_prompt,
    values_by_prompt,
)
from rlhf_toolkit.runs.algorithm import resolve
from rlhf_toolkit.runs.assembly import Setup, make_scored_sampler
from rlhf_toolkit.runs.opening import taught_otherwise
from rlhf_toolkit.runs.packing import packs
from rlhf_toolkit.runs.run import with_dtype
from rlhf_toolkit.runs.task import (
    Task,
    check_turns,
    load_prompts,
    load_rewards,
    load_tokenizer_of,
    make_sampling,
    say_how_tokens_are_drawn,
)
from rlhf_toolkit.runs.weights import load_adapted_base
from rlhf_toolkit.settings.experiment import Experiment
from rlhf_toolkit.settings.loading import load_experiment, parse_overrides
from rlhf_toolkit.texts import say

BASE = "base"
GREEDY, SAMPLED = "greedy", "sampled"


@dataclass(frozen=True)
class WinRate:
    """How often responses of ``of`` score above those of ``over``, by one reward, in one way of decoding."""

    of: str
    over: str
    by: str
    decoding: str
    rate: Estimate


@dataclass(frozen=True)
class Evaluation:
    """Estimates by contestant, way of decoding and quantity; win rates of each later contestant over each earlier."""

    prompts: int
    samples: int
    estimates: dict[str, dict[str, dict[str, Estimate]]]
    win_rates: list[WinRate]
    responses: dict[str, dict[str, HeldOutResponses]]

    def as_dict(self) -> dict[str, Any]:
        """Everything but the responses, as JSON takes it."""
        plain = {
            label: {way: {name: asdict(value) for name, value in found.items()} for way, found in ways.items()}
            for label, ways in self.estimates.items()
        }
        return {
            "prompts": self.prompts,
            "samples": self.samples,
            "estimates": plain,
            "win_rates": [asdict(rate) for rate in self.win_rates],
        }

    def write_responses(self, path: Path) -> None:
        """One JSON line for each response: contestant, way of decoding, ``row`` of the dataset, sample, texts, scores.

        A score that could not be had is null.
        """
        unfinished = path.with_name(path.name + ".part")  # renamed at the end: a file is whole or not there
        with created(unfinished) as file:
            for label, ways in self.responses.items():
                for way, responses in ways.items():
                    file.writelines(json.dumps(line) + "\n" for line in _lines(label, way, responses))
        unfinished.rename(path)


@contextmanager
def written_to(path: Path) -> Iterator[None]:
    """Inside, ``path`` is written. Where it cannot be, or is a folder, ConfigError says so."""
    try:
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder")
        yield
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written ({described(error)}); name a file in a folder that is there and that you may "
            "write to"
        ) from error


def read_experiment(path: str, overrides: Sequence[str], *, samples: int | None) -> Experiment:
    """The experiment of a command line; ``samples`` stands for ``run.evaluation_samples``."""
    settings = parse_overrides(list(overrides))
    if samples is not None:
        settings["run.evaluation_samples"] = samples
    return load_experiment(path, settings, Experiment)


def compare_contestants(
    experiment: Experiment, contestants: Sequence[str], *, greedy: bool = True, kl: bool = True
) -> Evaluation:
    """Have every contestant answer the held-out prompts, once greedily with ``greedy`` and ``run.evaluation_samples``
    times at random. Without ``kl`` the pass of policy and reference over the responses is left out.

    Contestants are adapter folders, names of the hub, or ``base``. Raises a subclass of RLHFError for everything the
    user can mend.
    """
    if not experiment.data.evaluation:
        raise ConfigError("data.evaluation is missing; name held-out prompts there, or as --set data.evaluation=FILE")
    twice = sorted({name for name in contestants if contestants.count(name) > 1})
    if twice:
        raise ConfigError(f"{twice[0]} is named twice; name each contestant once")
    if not greedy and not experiment.run.evaluation_samples:
        raise ConfigError("nothing to decode: --no-greedy leaves the samples only; ask for them with --samples 4")
    folders = [None if name == BASE else str(adapter_folder(name)) for name in contestants]
    topology = start(max_grad_norm=experiment.update.max_grad_norm, timeout_minutes=experiment.run.timeout_minutes)
    experiment = with_dtype(experiment, topology, trains=False)
    if topology.world_size > 1:
        raise TopologyError(f"rlhf evaluate runs in one process, not in {topology.world_size}; start it without launch")
    algorithm = resolve(experiment)
    model = experiment.model
    config = load_model_config(model.name, trust_remote_code=model.trust_remote_code, revision=model.revision)
    setup = Setup(experiment, algorithm, topology, load_held_out(experiment, config))
    say_what_was_taught_otherwise([Path(folder) for folder in folders if folder is not None], setup.task, config)
    progress = Progress(num_rollouts=len(contestants), updates_per_rollout=1, show=True, unit="contestant")
    responses: dict[str, dict[str, HeldOutResponses]] = {}
    try:
        for label, folder in zip(contestants, folders, strict=True):
            shared = load_contestant(setup, config, folder)
            responses[label] = _answers(setup, shared, progress, greedy=greedy, kl=kl)
            progress.next_round()
    finally:
        setup.task.reward.close()
        progress.close()
    return compare(setup, responses)


def load_held_out(experiment: Experiment, config: PretrainedConfig) -> Task:
    """Reward, tokenizer and held-out prompts."""
    data, reward = experiment.data, load_rewards(experiment)
    tokenizer, stop_ids = load_tokenizer_of(experiment, config)
    prompts = load_prompts(data, tokenizer, str(data.evaluation), data.evaluation_split, 1)
    reward.require_columns(prompts[0])
    schedule = PromptSchedule(len(prompts), 1, experiment.run.seed)
    sampling = make_sampling(experiment, tokenizer, stop_ids, config)
    task = Task(tokenizer, sampling, prompts, prompts, schedule, reward)
    check_turns(experiment, task)
    say_how_tokens_are_drawn(experiment, trains=False)
    return task


def say_what_was_taught_otherwise(folders: Sequence[Path], task: Task, config: PretrainedConfig) -> None:
    """A line for each contestant that was trained with another template or other stop tokens than the experiment's, as
    which all of them are asked."""
    used = is_rendered(task.held_out[0])
    for folder in folders:
        for line in taught_otherwise(folder, task.tokenizer, task.sampling.stop_ids, config, template=used):
            say(line)


def compare(setup: Setup, responses: dict[str, dict[str, HeldOutResponses]]) -> Evaluation:
    """Estimates and win rates from what everybody responses."""
    run, passing = setup.experiment.run, setup.algorithm.passing
    seed = run.seed

    def estimates(found: HeldOutResponses) -> dict[str, Estimate]:
        values: Values = values_by_prompt(found.sampled, found.scores, found.kl)
        if passing is not None:
            values |= passing.values(found.sampled, found.scores)
        return {name: estimate(of_prompts, seed=seed) for name, of_prompts in values.items()}

    by_label = {label: {way: estimates(found) for way, found in ways.items()} for label, ways in responses.items()}
    rates = [
        WinRate(
            later,
            earlier,
            by,
            way,
            estimate(rates_by_prompt(responses[later][way], responses[earlier][way], by), seed=seed),
        )
        for earlier, later in combinations(responses, 2)
        for way in responses[later]
        for by in responses[later][way].rewards
    ]
    return Evaluation(len(setup.task.held_out), run.evaluation_samples, by_label, rates, responses)


def rates_by_prompt(mine: HeldOutResponses, theirs: HeldOutResponses, by: str) -> list[float]:
    """The win rate at each prompt to which both gave a response with a score."""
    rates = []
    for rows in rows_by_prompt(mine.sampled):
        pair = [side.rewards[by][rows] for side in (mine, theirs)]
        ours, others = (scores[~scores.isnan()] for scores in pair)
        if len(ours) and len(others):
            rates.append(win_rate(ours, others))
    return rates


def _answers(
    setup: Setup, shared: SharedBase, progress: Progress, *, greedy: bool, kl: bool
) -> dict[str, HeldOutResponses]:
    """What the contestant that is the policy of ``shared`` says."""
    packing = packs(setup.experiment.update.packing, shared)
    scored_sampler = make_scored_sampler(setup, packing=packing, on_tokens=progress.on_tokens, trains=False)
    scored_sampler.clock.onlooker = progress
    prompts, samples = setup.task.held_out, setup.experiment.run.evaluation_samples
    found = dict[str, HeldOutResponses]()
    with scored_sampler.opened(shared) as opened:
        if greedy:
            found[GREEDY] = held_out_responses(scored_sampler, opened, prompts, greedy=True, kl=kl)
        if samples:
            found[SAMPLED] = held_out_responses(scored_sampler, opened, prompts, samples=samples, kl=kl)
    return found


def load_contestant(setup: Setup, config: PretrainedConfig, folder: str | None) -> SharedBase:
    """The contestant as policy; the bare base speaks through a new adapter, which adds nothing."""
    model, reward = setup.experiment.model, setup.experiment.reward
    base, adapter = load_adapted_base(model, config, setup.topology)
    shared = build_ppo_roles(
        base,
        adapter,
        policy_adapter=folder,
        reference_adapter=model.policy_adapter,
        reward_adapter=reward.adapter,
        value_on=NOWHERE,
    )
    return shared.to(setup.topology.device)


def _lines(label: str, way: str, responses: HeldOutResponses) -> list[dict[str, Any]]:
    sampled, seen, lines = responses.sampled, dict[int, int](), list[dict[str, Any]]()
    rewards = {name: column.tolist() for name, column in responses.rewards.items()}
    for i, row in enumerate(sampled.groups.tolist()):
        number = seen[row] = seen.get(row, -1) + 1
        lines.append(
            {
                "contestant": label,
                "decoding": way,
                "row": row,
                "sample": number,
                "prompt": sampled.prompts[i],
                "response": sampled.responses[i],
                "finished": bool(sampled.finished[i]),
                "tokens": int(sampled.response_lengths[i]),
                **({} if responses.kl is None else {"ref_kl": responses.kl[i].item()}),
                **{name: None if column[i] != column[i] else column[i] for name, column in rewards.items()},
            }
        )
    return lines
