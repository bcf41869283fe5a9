"""The page to read first: how prompts become experience.

    1. prompts      a PromptSource chooses them                                                  prompt_source.py
    2. responses    each rank samples its share, rewards score it, every rank holds all of it    scored_sampler.py
    3. role pass    policy, value and reference say their numbers about it                       role_pass.py
    4. checks       in the first rollout: do sampling, role pass and reference see one policy?   path_checks.py
    5. experience   scores become rewards, rewards advantages                                    shaping.py

Steps 1 to 4 happen inside one gather of the base. From step 2 on all ranks hold the whole rollout, so every statistic
is over all of it and needs no collective. Arithmetic: docs/ppo_details.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import nn

from rlhf_toolkit.algorithms.importance import Correction
from rlhf_toolkit.algorithms.kl_control import AdaptiveKL, FixedKL
from rlhf_toolkit.distributed.collectives import rank, world_size
from rlhf_toolkit.errors import located
from rlhf_toolkit.models.role_outputs import RoleOutputs
from rlhf_toolkit.models.roles import POLICY, REFERENCE
from rlhf_toolkit.models.shared_base import SharedBase
from rlhf_toolkit.reporting.metrics import penalty_kl, policy_metrics, reward_metrics, rollout_metrics
from rlhf_toolkit.rollout.constant_rewards import ConstantRewards
from rlhf_toolkit.rollout.dealing import deal, in_turn
from rlhf_toolkit.rollout.deferred import DeferredExperience
from rlhf_toolkit.rollout.path_checks import PathChecks
from rlhf_toolkit.rollout.prompt_source import PromptSource
from rlhf_toolkit.rollout.role_pass import Needs
from rlhf_toolkit.rollout.sampled import Sample, Sampled, as_samples, joined
from rlhf_toolkit.rollout.scored_sampler import ScoredSampler
from rlhf_toolkit.rollout.shaping import Shaping
from rlhf_toolkit.texts import say
from rlhf_toolkit.types import Experience, PromptBatch, RolloutTokens


@dataclass
class Collected:
    """What collecting a rollout gave: what is trained on, and what the log says about it.

    Where ``deferred`` is there, ``tokens`` are without advantages, and ``deferred.complete`` gives the experience in
    the update; it fills ``metrics`` and ``samples``, too.
    """

    tokens: RolloutTokens
    metrics: dict[str, float] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    deferred: DeferredExperience | None = None

    @property
    def experience(self) -> Experience:
        """The experience. RuntimeError, a defect, where it is deferred."""
        if not isinstance(self.tokens, Experience):
            raise RuntimeError("the experience is deferred: the update's forward pass completes it")
        return self.tokens


class ExperienceMaker:
    """Makes experience: ``collect`` is one rollout of it.

    Args:
        scored_sampler: samples and scores, and runs the role pass.
        source: chooses prompts.
        shaping: from scores to advantages.
        needs: decides which roles run before the update.
        kl_control: gives the KL's coefficient, and is told the KL of each rollout.
        checks: stop the first rollout where its numbers contradict one another; None: nothing is checked.
        correction: the importance weights that the metrics report.
    """

    def __init__(
        self,
        scored_sampler: ScoredSampler,
        source: PromptSource,
        shaping: Shaping,
        needs: Needs,
        kl_control: FixedKL | AdaptiveKL,
        *,
        checks: PathChecks | None = None,
        correction: Correction = Correction(),  # noqa: B008  frozen
    ) -> None:
        self.scored_sampler, self.source, self.shaping, self.needs = scored_sampler, source, shaping, needs
        self.kl_control, self.checks, self.correction = kl_control, checks, correction
        self.constant_rewards = ConstantRewards()

    def collect(self, model: nn.Module, rollout: int) -> Collected:
        """Rollout number ``rollout`` of the engine ``model``, from its prompts to its experience. A collective."""
        scored_sampler, checks = self.scored_sampler, self.checks
        with located(f"rollout {rollout}"), scored_sampler.opened(model) as shared:
            sampled = self.responses_to(shared, self.source.positions(rollout), rollout)
            warnings = self.constant_rewards.look(sampled)
            if warnings and rank() == 0:
                say("\n".join(warnings))
            sampled = self._without_uniform_groups(shared, sampled, rollout)
            if self.shaping.estimator.needs("baselines"):
                sampled = self._with_baselines(shared, sampled)
            with scored_sampler.clock.phase("old_log_prob"):
                plan, outputs = scored_sampler.planned_pass(
                    shared,
                    sampled,
                    lambda cutting: cutting.plan(sampled, rollout, epoch=0),
                    lambda plan: self.needs.roles(rollout=rollout, one_forward=plan.one_forward),
                )
                if checks is not None:
                    checks.look(
                        shared, sampled, outputs, plan, partial(scored_sampler.role_outputs, shared, sampled), rollout
                    )
        if checks is not None:
            checks.check_role_pass(sampled, outputs, rollout)
        collected = Collected(self._tokens_of(sampled, outputs))
        finish = partial(self._finish, collected)
        if self.needs.defers(rollout=rollout, one_forward=plan.one_forward):
            collected.deferred = DeferredExperience(sampled, outputs, finish)
        else:
            collected.tokens = finish(sampled, outputs)
        return collected

    def responses_to(self, shared: SharedBase, positions: list[int], rollout: int) -> Sampled:
        """Scored responses to the prompts at ``positions``, dealt among ranks by how long they were last time."""
        rows, expected = self.source.rows(positions), self.scored_sampler.expected
        shares = deal(rows, self.source.responses_per_prompt, world_size(), expected)
        return self.scored_sampler.responses(shared, rows, shares, stream=("sample", rollout))

    def _remember(self, sampled: Sampled) -> None:
        """Note lengths and scores of prompts, also of those that are replaced, for the next time they are there."""
        self.scored_sampler.expected.update(sampled.groups.tolist(), sampled.response_lengths.tolist())
        self.source.remember(sampled)

    def _without_uniform_groups(self, shared: SharedBase, sampled: Sampled, rollout: int) -> Sampled:
        """The rollout with prompts replaced whose responses all have one score, as far as others do better: DAPO's
        dynamic sampling (arXiv 2503.14476, section 3.2), for at most ``replacement_rounds`` rounds.

        All ranks see all scores and draw the same other prompts, as many as there are to replace. No prompt is drawn
        that is in the rollout or was.
        """
        source = self.source
        self._remember(sampled)
        seen = {source.position_of[group] for group in sampled.groups.tolist()}
        for number in range(source.replacement_rounds):
            uniform = source.uniform(sampled)
            drawn = source.schedule.others(rollout, number, count=len(uniform), without=seen)
            if not drawn:
                break
            seen |= set(drawn)
            # A share that is not full gets further responses, which are left out again: ranks have equally many to do.
            more = (drawn * world_size())[: -len(drawn) % world_size()]
            others = self.responses_to(shared, drawn + more, rollout)
            others = others.rows(range(len(drawn) * source.responses_per_prompt))
            self._remember(others)
            better = set(others.groups.tolist()) - set(source.uniform(others))
            replaced = uniform[: len(better)]
            kept = [row for row, group in enumerate(sampled.groups.tolist()) if group not in replaced]
            added = [row for row, group in enumerate(others.groups.tolist()) if group in better]
            sampled = joined([sampled.rows(kept), others.rows(added)], pad_id=self.scored_sampler.sampling.pad_id)
        return sampled

    def _with_baselines(self, shared: SharedBase, sampled: Sampled) -> Sampled:
        """The rollout with the score of the greedy response to each row's prompt. A row is dropped where that response
        has no score."""
        groups = sampled.groups.unique().tolist()
        groups += groups[:1] * (world_size() - len(groups))  # each rank needs one
        chosen = tuple(self.source.prompts[self.source.position_of[group]] for group in groups)
        rows = PromptBatch(chosen, samples=(0,) * len(groups))
        greedy = self.scored_sampler.responses(shared, rows, in_turn(len(groups)), greedy=True)
        place = [groups.index(group) for group in sampled.groups.tolist()]
        return replace(
            sampled,
            baselines=self.scored_sampler.baselines(greedy, sampled)[place],
            kept=sampled.kept & greedy.kept[place],
            dropped={
                **{row: f"greedy: {greedy.dropped[i]}" for row, i in enumerate(place) if i in greedy.dropped},
                **sampled.dropped,
            },
            failures={name: failed + greedy.failures.get(name, 0) for name, failed in sampled.failures.items()},
        )

    def _tokens_of(self, sampled: Sampled, outputs: RoleOutputs) -> RolloutTokens:
        return RolloutTokens(
            sequences=sampled.sequences,
            prompt_lengths=sampled.prompt_lengths,
            response_lengths=sampled.response_lengths,
            token_mask=sampled.token_mask,
            response_mask=self.shaping.trained(sampled),
            rollout_logprobs=sampled.rollout_logprobs,
            ref_logprobs=outputs.get("reference_logprobs"),
            drawn_logprobs=sampled.drawn_logprobs,
        )

    def _finish(self, collected: Collected, sampled: Sampled, outputs: RoleOutputs) -> Experience:
        """Rewards, advantages and, in ``collected``, the record of both, over the whole rollout."""
        scores, coefficient = self.scored_sampler.scores(sampled), self.kl_control.coefficient
        shaped_by_kl = self.shaping.kl_in_reward and self.needs.kl_asked
        rewards = self.shaping.rewards(scores, sampled, outputs, kl_coef=coefficient if shaped_by_kl else None)
        mask = collected.tokens.response_mask
        advantages, returns = self.shaping.advantages(rewards, mask, sampled, outputs)
        experience = Experience(
            **vars(collected.tokens),
            advantages=advantages,
            returns=returns,
            values=outputs.get("token_values"),
            old_logprobs=outputs.get("policy_logprobs"),
        )
        kept = sampled.kept
        collected.samples = as_samples(sampled, scores)
        collected.metrics = {
            **rollout_metrics(
                experience,
                scores=scores[kept],
                raw_scores=sampled.raw_scores[kept],
                rewards=rewards[kept],
                finished=sampled.finished,
            ),
            **reward_metrics(sampled.parts, kept, sampled.failures, scores, sampled.groups),
            "actor/reward_kl_penalty_coeff": coefficient,
            "perf/total_num_tokens": float(sum(sampled.lengths())),
        }
        if outputs.says(POLICY):
            collected.metrics |= self.policy_metrics(
                old_logprobs=outputs.policy_logprobs,
                entropies=outputs.policy_entropies,
                ref_logprobs=experience.ref_logprobs,
                rollout_logprobs=sampled.rollout_logprobs,
                drawn_logprobs=sampled.drawn_logprobs,
                token_mask=sampled.token_mask,
                trained=mask,
            )
        if outputs.says(POLICY) and outputs.says(REFERENCE):
            old, ref, estimator = outputs.policy_logprobs, outputs.reference_logprobs, self.shaping.kl_estimator
            kl = penalty_kl(old, ref, sampled.token_mask, estimator)
            if math.isfinite(kl):  # the update of a deferred experience says it, and may be left out
                self.kl_control.update(kl, len(experience))
        return experience

    def policy_metrics(self, **columns: Any) -> dict[str, float]:
        """``reporting.metrics.policy_metrics`` of ``columns``, with this run's KL estimator and correction."""
        return policy_metrics(**columns, kl_estimator=self.shaping.kl_estimator, correction=self.correction)
