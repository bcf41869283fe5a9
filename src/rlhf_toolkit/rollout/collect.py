"""The page to read first: how prompts become experience.

    prompts -> rollout -> scores -> passes of policy, value and reference -> rewards -> advantages -> Experience

Everything up to the passes happens inside one gather of the base. Each rank samples and scores its share; then all
ranks hold the whole rollout, so every statistic below is over all of it and needs no collective. Arithmetic:
docs/ppo_details.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rlhf_toolkit.algorithms.advantages import gae
from rlhf_toolkit.algorithms.importance import Correction
from rlhf_toolkit.algorithms.kl import kl_penalty
from rlhf_toolkit.algorithms.kl_control import AdaptiveKL, FixedKL
from rlhf_toolkit.algorithms.masking import centre_and_scale, masked_mean, response_mask
from rlhf_toolkit.algorithms.rewards import missing_eos_penalty, shape_rewards
from rlhf_toolkit.data.layout import TokenLayout, join, packed, padded, stack_rows, unpack
from rlhf_toolkit.data.packing import Rows, mini_batches, packed_micro_batches, padded_micro_batches
from rlhf_toolkit.data.prompts import PromptSchedule
from rlhf_toolkit.distributed.collectives import agreement, all_gather, rank, world_size
from rlhf_toolkit.errors import DataError, TrainingPathError
from rlhf_toolkit.models.shared_base import REFERENCE, SharedBase
from rlhf_toolkit.reporting.meters import Clock
from rlhf_toolkit.reporting.metrics import policy_metrics, rollout_metrics
from rlhf_toolkit.rollout.decoding import Sampling
from rlhf_toolkit.rollout.passes import SCORED_ROLES, Passes, present
from rlhf_toolkit.rollout.sampler import Sampler
from rlhf_toolkit.rollout.schedule import ExpectedLengths, deal, rollout_rows
from rlhf_toolkit.types import Experience, Prompt, PromptBatch, Rollout

Sample = dict[str, str | float]
Scorer = Callable[[Sequence[Prompt], list[str]], list[float]]
Layout = Callable[[Tensor, Tensor, Tensor], TokenLayout]


@dataclass(frozen=True)
class Plan:
    """How one pass over a rollout is cut: ``batches[mini-batch][rank][micro-batch]`` to row numbers."""

    batches: list[list[list[Rows]]]

    def of_rank(self, number: int) -> list[list[Rows]]:
        """``[mini-batch][micro-batch]`` of one rank."""
        return [batch[number] for batch in self.batches]


@dataclass(frozen=True)
class Sampled:
    """A rollout of all ranks on every rank, with its scores: rows are in the rollout's own order, whichever rank has
    sampled them."""

    sequences: Tensor
    prompt_lengths: Tensor
    response_lengths: Tensor
    rollout_logprobs: Tensor
    finished: Tensor
    raw_scores: Tensor
    prompts: list[str] = field(repr=False)
    responses: list[str] = field(repr=False)

    @property
    def token_mask(self) -> Tensor:
        """(B, R) bool, True at real response tokens."""
        return response_mask(self.response_lengths, self.rollout_logprobs.shape[1])

    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return (self.prompt_lengths + self.response_lengths).tolist()


@dataclass(frozen=True)
class Shaping:
    """How scores become rewards and advantages."""

    gamma: float
    gae_lambda: float
    whiten_advantages: bool
    kl_in_reward: bool
    kl_estimator: str
    missing_eos_penalty: float
    truncated: str


@dataclass(frozen=True)
class Cutting:
    """How a rollout is cut into optimizer steps and forward passes."""

    mini_batches: int
    micro_batch_tokens: int
    packing: bool = False

    @property
    def layout(self) -> Layout:
        """Sequences (n, T) and both lengths (n,) to the layout of a forward pass."""
        return packed if self.packing else padded

    def among_ranks(self, rows: Sequence[int], sampled: Sampled | Experience) -> list[list[Rows]]:
        """``[rank][micro-batch]`` to row numbers, for a mini-batch of ``rows``."""
        cut = {"ranks": world_size(), "budget": self.micro_batch_tokens}
        lengths = sampled.lengths()
        if not self.packing:
            return padded_micro_batches(rows, lengths, **cut)
        both = zip(sampled.sequences.tolist(), sampled.prompt_lengths.tolist(), strict=True)
        return packed_micro_batches(rows, lengths, [tuple(row[:length]) for row, length in both], **cut)


class Collector:
    """Collects rollouts with the model that ``model`` gives, which its trainer sets: the engine exists only once
    training begins."""

    model: Callable[[], nn.Module]

    def __init__(
        self,
        sampler: Sampler,
        prompts: Sequence[Prompt],
        schedule: PromptSchedule,
        scorer: Scorer,
        sampling: Sampling,
        shaping: Shaping,
        cutting: Cutting,
        kl_control: FixedKL | AdaptiveKL,
        *,
        responses_per_prompt: int,
        seed: int,
        tolerance: float | None = None,
        roles: Sequence[str] = SCORED_ROLES,
        correction: Correction = Correction(),  # noqa: B008  frozen
    ) -> None:
        self.sampler, self.expected = sampler, ExpectedLengths()
        self.prompts, self.schedule, self.scorer = prompts, schedule, scorer
        self.sampling, self.shaping, self.cutting, self.kl_control = sampling, shaping, cutting, kl_control
        self.responses_per_prompt, self.seed, self.tolerance = responses_per_prompt, seed, tolerance
        self.roles, self.correction = tuple(roles), correction
        self.clock = Clock()
        self.metrics: dict[str, float] = {}
        self.samples: list[Sample] = []

    def collect(self, rollout: int) -> Experience:
        """Sample, score and shape rollout number ``rollout``; leaves its metrics and samples behind for the log."""
        chosen = [self.prompts[i] for i in self.schedule.indices(rollout)]
        rows = rollout_rows(chosen, self.responses_per_prompt)
        shares = deal(rows, self.responses_per_prompt, world_size(), self.expected)
        with self.sampler.opened(self.model()) as shared:
            sampled = self.sample(shared, rows, shares, self.sampling, stream=(self.seed, "sample", rollout))
            with self.clock.phase("old_log_prob"):
                plan, roles = self.plan(sampled, rollout, epoch=0), self.roles_of(rollout)
                passes = score(shared, sampled, plan, self.cutting.layout, self.sampling.temperature, roles=roles)
        self._check_paths(sampled, passes, rollout)
        self.expected.update(rows.prompts, sampled.response_lengths.tolist())
        return self._experience(sampled, passes)

    def sample(
        self,
        shared: SharedBase,
        rows: PromptBatch,
        shares: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        stream: Sequence[int | str],
    ) -> Sampled:
        """Sample this rank's share of ``rows`` (``shares[rank]`` are row numbers), have it scored, and return all rows
        of all ranks in the order of ``rows``."""
        batch = rows.subset(shares[rank()])
        with self.clock.phase("gen"):
            rollout = self.sampler.decode(shared, batch, sampling, stream=stream, expected=self.expected)
        texts = self._texts(rollout)
        with self.clock.phase("reward"), agreement("the reward"):
            scores = self.scorer(batch.prompts, texts)
        return gather_rollout(batch, rollout, texts, scores, shares, pad_id=sampling.pad_id)

    def plan(self, sampled: Sampled | Experience, rollout: int, *, epoch: int) -> Plan:
        """How pass number ``epoch`` over rollout number ``rollout`` is cut. Scoring uses that of epoch 0."""
        rows = len(sampled.sequences)
        parts = mini_batches(rows, self.cutting.mini_batches, seed=self.seed, rollout=rollout, epoch=epoch)
        return Plan([self.cutting.among_ranks(part, sampled) for part in parts])

    def evaluation_plan(self, sampled: Sampled) -> Plan:
        """One pass over a rollout in its own order; nothing is trained on it."""
        return Plan([self.cutting.among_ranks(range(len(sampled.sequences)), sampled)])

    def roles_of(self, rollout: int) -> tuple[str, ...]:
        """The roles that score rollout number ``rollout``: all of them in the first, which ``_check_paths`` looks at,
        and then those whose numbers something needs."""
        return SCORED_ROLES if rollout == 0 else self.roles

    def penalised(self, sampled: Sampled) -> Tensor:
        """(B,) scores after the penalty for responses that were cut off."""
        return missing_eos_penalty(sampled.raw_scores, sampled.finished, penalty=self.shaping.missing_eos_penalty)

    def _texts(self, rollout: Rollout) -> list[str]:
        rows = [row[:length] for row, length in zip(rollout.responses.tolist(), rollout.lengths.tolist(), strict=True)]
        return list(self.sampler.tokenizer.batch_decode(rows, skip_special_tokens=True))

    def _experience(self, sampled: Sampled, passes: Passes) -> Experience:
        """Rewards, advantages and the record of both, over the whole rollout."""
        scores, tokens, kl_coef = self.penalised(sampled), sampled.token_mask, self.kl_control.coefficient
        rewards = self._rewards(scores, sampled, passes)
        trained, advantages, returns = self._advantages(rewards, sampled, passes)
        experience = Experience(
            sequences=sampled.sequences,
            prompt_lengths=sampled.prompt_lengths,
            response_lengths=sampled.response_lengths,
            response_mask=trained,
            old_logprobs=passes.old_logprobs,
            ref_logprobs=passes.ref_logprobs,
            rollout_logprobs=sampled.rollout_logprobs,
            values=present(passes.values),
            advantages=advantages,
            returns=returns,
        )
        self.samples = as_samples(sampled, scores)
        self.metrics = {
            **rollout_metrics(
                experience,
                scores=scores,
                raw_scores=sampled.raw_scores,
                rewards=rewards,
                finished=sampled.finished,
            ),
            "actor/reward_kl_penalty_coeff": kl_coef,
            "perf/total_num_tokens": float(sum(sampled.lengths())),
        }
        told = {"old_logprobs": passes.old_logprobs, "entropies": passes.entropies, "ref_logprobs": passes.ref_logprobs}
        if passes.old_logprobs is not None:
            self.record_policy(
                **{name: column for name, column in told.items() if column is not None},
                rollout_logprobs=sampled.rollout_logprobs,
                token_mask=tokens,
                trained=trained,
            )
        if "actor/reward_kl_penalty" in self.metrics:
            self.kl_control.update(self.metrics["actor/reward_kl_penalty"], len(experience))
        return experience

    def record_policy(self, **columns: Tensor) -> None:
        """Add what the policy's pass says to the rollout's metrics; ``columns`` are those of ``policy_metrics``.

        Called from here, or by the trainer after the update whose pass stands in for scoring's.
        """
        kl_estimator, correction = self.shaping.kl_estimator, self.correction
        self.metrics |= policy_metrics(**columns, kl_estimator=kl_estimator, correction=correction)

    def _rewards(self, scores: Tensor, sampled: Sampled, passes: Passes) -> Tensor:
        """(B, R): the scores on the last tokens, less the KL where it is in the reward."""
        tokens, kl, kl_coef = sampled.token_mask, torch.zeros_like(sampled.rollout_logprobs), 0.0
        if self.shaping.kl_in_reward and REFERENCE in self.roles:
            old, ref = present(passes.old_logprobs), present(passes.ref_logprobs)
            kl = kl_penalty(old, ref, tokens, estimator=self.shaping.kl_estimator)
            kl_coef = self.kl_control.coefficient
        return shape_rewards(scores, kl, tokens, kl_coef=kl_coef)

    def _advantages(self, rewards: Tensor, sampled: Sampled, passes: Passes) -> tuple[Tensor, Tensor, Tensor]:
        """The mask of trained tokens, advantages whitened over them, and returns; each (B, R).

        A response cut by the budget ends as if it were finished (terminal), goes on with the value of its last state
        (bootstrap), or is left out of the loss and of the whitening (mask).
        """
        shaping, tokens = self.shaping, sampled.token_mask
        final_values = present(passes.final_values)
        cut_off_value = final_values if shaping.truncated == "bootstrap" else torch.zeros_like(final_values)
        advantages, returns = gae(
            rewards,
            present(passes.values),
            tokens,
            gamma=shaping.gamma,
            gae_lambda=shaping.gae_lambda,
            bootstrap=torch.where(sampled.finished, 0.0, cut_off_value),
        )
        trained = tokens & sampled.finished[:, None] if shaping.truncated == "mask" else tokens
        if int(trained.sum()) < 2:  # the whitening needs two
            raise DataError(
                "rollout.max_new_tokens cut off the responses of a rollout, and ppo.truncated=mask leaves "
                f"{int(trained.sum())} tokens to train on; raise max_new_tokens or use truncated: bootstrap"
            )
        return trained, centre_and_scale(advantages, trained) if shaping.whiten_advantages else advantages, returns

    def _check_paths(self, sampled: Sampled, passes: Passes, rollout: int) -> None:
        """Sampling and training must see one policy; before the first update the policy must be the reference."""
        if self.tolerance is None or rollout > 0:
            return
        mask, old, ref = sampled.token_mask, present(passes.old_logprobs), present(passes.ref_logprobs)
        gap = masked_mean((sampled.rollout_logprobs - old).abs(), mask).item()
        if gap > self.tolerance:
            raise TrainingPathError(
                f"the policy's log-probs differ by {gap:.3g} a token between sampling and the training pass, more than "
                f"{self.tolerance:g}: dropout, a temperature on one side, or an output layer the toolkit does not know"
            )
        kl = (old - ref)[mask].abs().max().item()
        if kl > self.tolerance:
            raise TrainingPathError(
                f"before the first update policy and reference differ by {kl:.3g} in a log-prob, more than "
                f"{self.tolerance:g}: the "
                "reference must be what the policy starts from; set model.policy_adapter to the adapter it was "
                "loaded with"
            )


def as_samples(sampled: Sampled, scores: Tensor) -> list[Sample]:
    """Prompt, response and score of every row, for the logs."""
    rows = zip(sampled.prompts, sampled.responses, scores.tolist(), strict=True)
    return [{"prompt": prompt, "response": response, "score": value} for prompt, response, value in rows]


def gather_rollout(
    batch: PromptBatch,
    rollout: Rollout,
    texts: list[str],
    scores: list[float],
    shares: Sequence[Sequence[int]],
    *,
    pad_id: int,
) -> Sampled:
    """Put the ranks' shares together on every rank, rows in their own order whichever rank has sampled them."""
    ids = [prompt.token_ids for prompt in batch.prompts]
    mine = {
        "sequences": join(ids, rollout.responses, rollout.lengths, pad_id=pad_id),
        "prompt_lengths": torch.tensor([len(i) for i in ids]),
        "response_lengths": rollout.lengths,
        "rollout_logprobs": rollout.rollout_logprobs,
        "finished": rollout.finished,
        "raw_scores": torch.tensor(scores, dtype=torch.float32),
    }
    everyone = all_gather((mine, [prompt.text for prompt in batch.prompts], texts))
    place = torch.tensor([row for share in shares for row in share]).argsort()
    fills = {"sequences": pad_id}
    columns = {name: stack_rows([part[name] for part, _, _ in everyone], fill=fills.get(name, 0)) for name in mine}
    prompts = [text for _, texts, _ in everyone for text in texts]
    responses = [text for _, _, texts in everyone for text in texts]
    return Sampled(
        **{name: column[place] for name, column in columns.items()},
        prompts=[prompts[i] for i in place.tolist()],
        responses=[responses[i] for i in place.tolist()],
    )


def score(
    shared: SharedBase,
    sampled: Sampled,
    plan: Plan,
    layout: Layout,
    temperature: float,
    *,
    roles: Sequence[str] = SCORED_ROLES,
) -> Passes:
    """One pass of ``roles`` over the rollout, each rank its share of ``plan``, gathered on every rank; without roles
    none runs."""
    if not roles:
        return Passes()
    mine = [rows for part in plan.of_rank(rank()) for rows in part]
    done = [(rows, _score_rows(shared, sampled, rows, layout, temperature, roles)) for rows in mine]
    columns: dict[str, Tensor] = {}
    for rows, results in (item for share in all_gather(done) for item in share):
        for name, result in results.items():
            column = columns.setdefault(name, torch.zeros(len(sampled.finished), *result.shape[1:]))
            column[rows] = result
    return Passes(**columns)


PACKED_RESULTS = {
    "policy_logprobs": "old_logprobs",
    "policy_entropies": "entropies",
    "reference_logprobs": "ref_logprobs",
    "values": "values",
}
"""What ``SharedBase.forward`` calls a result, and ``Passes``."""


def _score_rows(
    shared: SharedBase, sampled: Sampled, rows: Rows, layout: Layout, temperature: float, roles: Sequence[str]
) -> dict[str, Tensor]:
    lengths, width = sampled.response_lengths[rows], sampled.rollout_logprobs.shape[1]
    laid_out = layout(sampled.sequences[rows], sampled.prompt_lengths[rows], lengths)
    out = shared(laid_out.to(next(shared.parameters()).device), roles=roles, temperature=temperature)
    results = {ours: unpack(out[name].cpu(), lengths, width) for name, ours in PACKED_RESULTS.items() if name in out}
    return results | {name: out[name].cpu() for name in ("final_values",) if name in out}
