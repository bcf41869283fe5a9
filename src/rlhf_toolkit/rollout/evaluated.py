"""An evaluation: answers to held-out prompts, and a value for each prompt and quantity, whose mean over prompts counts.

A run evaluates with these functions while it trains, and ``rlhf evaluate`` with the same."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_toolkit.algorithms.evaluation import majority_at_k, pass_at_k
from rlhf_toolkit.errors import RewardError, described, shortened
from rlhf_toolkit.models.roles import POLICY, REFERENCE
from rlhf_toolkit.models.shared_base import SharedBase
from rlhf_toolkit.reporting.metrics import spread
from rlhf_toolkit.rollout.dealing import in_turn, rollout_rows
from rlhf_toolkit.rollout.sampled import Sampled
from rlhf_toolkit.rollout.scored_sampler import ScoredSampler
from rlhf_toolkit.types import Prompt

Values = dict[str, list[float]]
ReadAnswers = Callable[[list[str]], Sequence[Hashable | None]]


@dataclass(frozen=True)
class HeldOutResponses:
    """Responses to held-out prompts, rows in the order of the prompts; scores and KL (B,), None where nobody asked for
    the KL."""

    sampled: Sampled
    scores: Tensor
    kl: Tensor | None

    @property
    def rewards(self) -> dict[str, Tensor]:
        """(B,) ``score``, NaN where there is none, and each reward where there are several."""
        return {"score": torch.where(self.sampled.kept, self.scores, torch.nan), **single_rewards(self.sampled)}


def held_out_responses(
    scored_sampler: ScoredSampler,
    shared: SharedBase,
    prompts: Sequence[Prompt],
    *,
    kl: bool,
    samples: int = 1,
    greedy: bool = False,
) -> HeldOutResponses:
    """``samples`` responses to each prompt, ``greedy`` or sampled, with scores that are not whitened. A collective,
    only inside ``ScoredSampler.opened``.

    They are sampled as in training, from the same random numbers in every evaluation. With ``kl`` policy and reference
    run over them.
    """
    rows = rollout_rows(prompts, samples)
    shares = in_turn(len(rows))
    sampled = scored_sampler.responses(shared, rows, shares, stream=("evaluation",), greedy=greedy)
    found = None
    if kl:
        outputs = scored_sampler.pass_in_order(shared, sampled, roles=(POLICY, REFERENCE))
        found = response_kl(outputs.policy_logprobs, outputs.reference_logprobs, sampled.token_mask)
    return HeldOutResponses(sampled, scored_sampler.unwhitened_scores(sampled), found)


@dataclass(frozen=True)
class Passing:
    """When a response passes: its score is ``at`` or more. ``read_answers`` reads the answer that it votes for, None
    where it has none; without that function there is no vote."""

    at: float
    read_answers: ReadAnswers | None = None

    def values(self, sampled: Sampled, scores: Tensor) -> Values:
        """``pass@k`` and ``maj@k`` for k = 1, 2, 4, ... up to the samples of a prompt. A response without a score does
        not pass. Raises RewardError where ``read_answers`` raises, or returns anything but an answer for each."""
        groups = rows_by_prompt(sampled)
        passed, answers = ((scores >= self.at) & sampled.kept).tolist(), list[Hashable | None]()
        if self.read_answers is not None:
            try:
                answers = list(self.read_answers(list(sampled.responses)))
                set(answers)
            except Exception as error:  # it may raise whatever it likes
                raise RewardError(
                    f"reward.answer failed on {len(passed)} responses ({described(error)}); repair it: it returns a "
                    "text, a number or None for each"
                ) from error
            if len(answers) != len(passed):
                raise RewardError(
                    f"reward.answer gave {len(answers)} answers for {len(passed)} responses ({shortened(answers)}); "
                    "give one for each, None where there is none"
                )
        values: Values = {}
        for k in powers_of_two(min(map(len, groups))):
            values[f"pass@{k}"] = [pass_at_k(len(rows), sum(passed[i] for i in rows), k) for rows in groups]
            if self.read_answers is not None:
                values[f"maj@{k}"] = [
                    majority_at_k([answers[i] for i in rows], [passed[i] for i in rows], k) for rows in groups
                ]
        return values


def values_by_prompt(sampled: Sampled, scores: Tensor, kl: Tensor | None) -> Values:
    """A prompt's means of ``score``, of each reward where there are several, of ``response_length``, of ``ref_kl`` and
    of ``clip_ratio``, the share cut off by the budget.

    Means of scores are over responses that have one; a prompt whose responses have none is left out of them.
    """
    columns = {
        "score": torch.where(sampled.kept, scores, torch.nan),
        **single_rewards(sampled),
        "response_length": sampled.response_lengths.float(),
        **({} if kl is None else {"ref_kl": kl}),
        "clip_ratio": (~sampled.finished).float(),
    }
    groups = rows_by_prompt(sampled)
    means = {name: [column[rows].double().nanmean().item() for rows in groups] for name, column in columns.items()}
    return {name: [value for value in values if value == value] for name, values in means.items()}


def single_rewards(sampled: Sampled) -> dict[str, Tensor]:
    """``reward/NAME`` (B,) of each reward before its weight, where there are several."""
    return {f"reward/{name}": part for name, part in sampled.parts.items()} if len(sampled.parts) > 1 else {}


def response_kl(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """(B,) each response's sum of log(policy / reference), whose mean over samples of the policy is their KL."""
    return torch.where(mask, logprobs - ref_logprobs, 0.0).sum(1)


def rows_by_prompt(sampled: Sampled) -> list[list[int]]:
    """The rows of each prompt, in the order in which prompts first come."""
    rows: dict[int, list[int]] = {}
    for row, group in enumerate(sampled.groups.tolist()):
        rows.setdefault(group, []).append(row)
    return list(rows.values())


def powers_of_two(largest: int) -> list[int]:
    """1, 2, 4, ... up to ``largest``, and ``largest``."""
    return sorted({*(1 << i for i in range(largest.bit_length())), largest})


@dataclass(frozen=True)
class HeldOut:
    """What ``PPOTrainer.evaluate`` asks for: a greedy response to each of ``prompts``, and ``samples`` random ones;
    ``passing`` says which of these pass."""

    prompts: Sequence[Prompt] = ()
    samples: int = 0
    passing: Passing | None = None

    def __len__(self) -> int:
        return len(self.prompts)


def greedy_metrics(found: HeldOutResponses, prefix: str) -> dict[str, float]:
    """What an evaluation logs of greedy answers."""
    sampled = found.sampled
    assert found.kl is not None, "evaluation asks for the KL of greedy answers"
    return {
        **spread(f"{prefix}/score", found.scores[sampled.kept]),
        f"{prefix}/ref_kl": found.kl.mean().item(),
        f"{prefix}/response_length": sampled.response_lengths.float().mean().item(),
        f"{prefix}/clip_ratio": (~sampled.finished).float().mean().item(),
    }


def sampled_metrics(found: HeldOutResponses, passing: Passing | None, prefix: str) -> dict[str, float]:
    """The spread of the scores of sampled answers, and pass@k and maj@k where the experiment says what passes."""
    values = {} if passing is None else passing.values(found.sampled, found.scores)
    means = {f"{prefix}/{name}": sum(of_prompts) / len(of_prompts) for name, of_prompts in values.items()}
    return {**spread(f"{prefix}/sampled_score", found.scores[found.sampled.kept]), **means}
