"""The page to read first: how prompts become experience.

    prompts -> rollout -> scores -> passes of policy, value and reference -> rewards -> advantages -> Experience

Everything up to the passes happens inside one gather of the base. Each rank samples and scores its share; then all
ranks hold the whole rollout, so every statistic below is over all of it and needs no collective. Arithmetic:
docs/ppo_details.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rlhf_toolkit.algorithms.advantages import gae
from rlhf_toolkit.algorithms.importance import Correction
from rlhf_toolkit.algorithms.kl import kl_penalty
from rlhf_toolkit.algorithms.kl_control import AdaptiveKL, FixedKL
from rlhf_toolkit.algorithms.masking import centre_and_scale, masked_mean
from rlhf_toolkit.algorithms.rewards import missing_eos_penalty, shape_rewards
from rlhf_toolkit.data.packing import mini_batches
from rlhf_toolkit.data.prompts import PromptSchedule
from rlhf_toolkit.distributed.collectives import agreement, rank, world_size
from rlhf_toolkit.errors import DataError, TrainingPathError
from rlhf_toolkit.models.shared_base import SharedBase
from rlhf_toolkit.reporting.meters import Clock
from rlhf_toolkit.reporting.metrics import policy_metrics, rollout_metrics
from rlhf_toolkit.rollout.cutting import Cutting, Plan
from rlhf_toolkit.rollout.decoding import Sampling
from rlhf_toolkit.rollout.passes import EVERYTHING, SCORED_ROLES, Needs, Passes, gather_passes, score
from rlhf_toolkit.rollout.sampled import Sample, Sampled, as_samples, gather_rollout
from rlhf_toolkit.rollout.sampler import Sampler
from rlhf_toolkit.rollout.schedule import ExpectedLengths, deal, rollout_rows
from rlhf_toolkit.types import Experience, Prompt, PromptBatch, Rollout, present

Scorer = Callable[[Sequence[Prompt], list[str]], list[float]]


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
        needs: Needs = EVERYTHING,
        correction: Correction = Correction(),  # noqa: B008  frozen
    ) -> None:
        self.sampler, self.expected = sampler, ExpectedLengths()
        self.prompts, self.schedule, self.scorer = prompts, schedule, scorer
        self.sampling, self.shaping, self.cutting, self.kl_control = sampling, shaping, cutting, kl_control
        self.responses_per_prompt, self.seed, self.tolerance = responses_per_prompt, seed, tolerance
        self.needs, self.correction = needs, correction
        self.clock = Clock()
        self.metrics: dict[str, float] = {}
        self.samples: list[Sample] = []
        self._incomplete: tuple[Sampled, Passes] | None = None

    def collect(self, rollout: int) -> Experience:
        """Sample, score and shape rollout number ``rollout``; leaves its metrics and samples behind for the log.

        Where its only update is one forward pass on each rank, that pass is what ``complete`` waits for.
        """
        chosen = [self.prompts[i] for i in self.schedule.indices(rollout)]
        rows = rollout_rows(chosen, self.responses_per_prompt)
        shares = deal(rows, self.responses_per_prompt, world_size(), self.expected)
        with self.sampler.opened(self.model()) as shared:
            sampled = self.sample(shared, rows, shares, self.sampling, stream=(self.seed, "sample", rollout))
            with self.clock.phase("old_log_prob"):
                plan = self.plan(sampled, rollout, epoch=0)
                roles = self.roles_of(rollout, plan)
                passes = score(shared, sampled, plan, self.cutting.layout, self.sampling.temperature, roles=roles)
        self._check_paths(sampled, passes, rollout)
        self.expected.update(rows.prompts, sampled.response_lengths.tolist())
        if passes.values is None:
            self._incomplete = (sampled, passes)
            return self._tokens_of(sampled, passes)
        return self._experience(sampled, passes)

    def complete(self, rows: Sequence[int], **said: Tensor) -> Experience:
        """The experience that ``collect`` left open, from what each rank's forward pass has ``said`` about its
        ``rows``: columns of ``Passes``. A collective."""
        if self._incomplete is None:
            raise RuntimeError("the rollout's experience is complete already")
        (sampled, passes), self._incomplete = self._incomplete, None
        whole = gather_passes([(list(rows), {name: column.detach().cpu() for name, column in said.items()})])
        return self._experience(sampled, replace(passes, **whole))

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

    def roles_of(self, rollout: int, plan: Plan) -> tuple[str, ...]:
        """The roles that score rollout number ``rollout``: all of them in the first, which ``_check_paths`` looks at,
        and then those whose numbers the update does not make itself."""
        return SCORED_ROLES if rollout == 0 else self.needs.roles(one_forward=plan.one_forward)

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
        experience = self._tokens_of(sampled, passes)
        advantages, returns = self._advantages(rewards, experience.response_mask, sampled, passes)
        experience = replace(experience, values=passes.values, advantages=advantages, returns=returns)
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
                trained=experience.response_mask,
            )
        if "actor/reward_kl_penalty" in self.metrics:
            self.kl_control.update(self.metrics["actor/reward_kl_penalty"], len(experience))
        return experience

    def _tokens_of(self, sampled: Sampled, passes: Passes) -> Experience:
        """An experience without values, advantages and returns: what is trained on, and what is known of it."""
        return Experience(
            sequences=sampled.sequences,
            prompt_lengths=sampled.prompt_lengths,
            response_lengths=sampled.response_lengths,
            response_mask=self._trained(sampled),
            old_logprobs=passes.old_logprobs,
            ref_logprobs=passes.ref_logprobs,
            rollout_logprobs=sampled.rollout_logprobs,
        )

    def record_policy(self, **columns: Tensor) -> None:
        """Add what the policy's pass says to the rollout's metrics; ``columns`` are those of ``policy_metrics``.

        Called from here, or by the trainer after the update whose pass stands in for scoring's.
        """
        kl_estimator, correction = self.shaping.kl_estimator, self.correction
        self.metrics |= policy_metrics(**columns, kl_estimator=kl_estimator, correction=correction)

    def _rewards(self, scores: Tensor, sampled: Sampled, passes: Passes) -> Tensor:
        """(B, R): the scores on the last tokens, less the KL where it is in the reward."""
        tokens, kl, kl_coef = sampled.token_mask, torch.zeros_like(sampled.rollout_logprobs), 0.0
        if self.shaping.kl_in_reward and self.needs.kl_asked:
            old, ref = present(passes.old_logprobs), present(passes.ref_logprobs)
            kl = kl_penalty(old, ref, tokens, estimator=self.shaping.kl_estimator)
            kl_coef = self.kl_control.coefficient
        return shape_rewards(scores, kl, tokens, kl_coef=kl_coef)

    def _trained(self, sampled: Sampled) -> Tensor:
        """(B, R) bool, the tokens of the loss: all, or with ``truncated: mask`` those of finished responses."""
        tokens = sampled.token_mask
        trained = tokens & sampled.finished[:, None] if self.shaping.truncated == "mask" else tokens
        if int(trained.sum()) < 2:  # the whitening needs two
            raise DataError(
                "rollout.max_new_tokens cut off the responses of a rollout, and ppo.truncated=mask leaves "
                f"{int(trained.sum())} tokens to train on; raise max_new_tokens or use truncated: bootstrap"
            )
        return trained

    def _advantages(self, rewards: Tensor, trained: Tensor, sampled: Sampled, passes: Passes) -> tuple[Tensor, Tensor]:
        """Advantages, whitened over the tokens ``trained``, and returns; each (B, R).

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
        return centre_and_scale(advantages, trained) if shaping.whiten_advantages else advantages, returns

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
