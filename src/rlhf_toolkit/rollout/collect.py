"""The page to read first: how prompts become experience.

    prompts -> rollout -> scores -> passes of policy, value and reference -> rewards -> advantages -> Experience

Everything up to the passes happens inside one gather of the base. Each rank samples and scores its share; then all
ranks hold the whole rollout, so every statistic below is over all of it and needs no collective. Arithmetic:
docs/ppo_details.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from torch import Tensor, nn

from rlhf_toolkit.algorithms.importance import Correction
from rlhf_toolkit.algorithms.kl_control import AdaptiveKL, FixedKL
from rlhf_toolkit.data.packing import mini_batches
from rlhf_toolkit.data.prompts import PromptSchedule
from rlhf_toolkit.distributed.collectives import agreement, rank, world_size
from rlhf_toolkit.errors import NotFiniteError, located
from rlhf_toolkit.models.finite import WAYS_OUT
from rlhf_toolkit.models.shared_base import SharedBase
from rlhf_toolkit.reporting.meters import Clock
from rlhf_toolkit.reporting.metrics import policy_metrics, reward_metrics, rollout_metrics, uniform_groups
from rlhf_toolkit.rewards.scores import Scores
from rlhf_toolkit.rollout.curriculum import Curriculum
from rlhf_toolkit.rollout.cutting import Cutting, Plan
from rlhf_toolkit.rollout.decoding import Sampling
from rlhf_toolkit.rollout.model_rewards import ModelReward
from rlhf_toolkit.rollout.passes import Needs, Passes, described_fault, gather_passes, not_finite, score
from rlhf_toolkit.rollout.path_checks import PathChecks
from rlhf_toolkit.rollout.sampled import Sample, Sampled, as_samples, gather_rollout, joined, sampled_here
from rlhf_toolkit.rollout.sampler import Sampler, tokens_of
from rlhf_toolkit.rollout.schedule import LastMeans, deal, in_turn, rollout_rows
from rlhf_toolkit.rollout.shaping import Shaping
from rlhf_toolkit.types import Experience, Prompt, PromptBatch


class Scorer(Protocol):
    """What gives scores; ``rewards.compose.Rewards`` is one."""

    def submit(self, row: int, prompt: Prompt, response: str, token_ids: list[int]) -> None:
        """A response is there, while others are still being decoded."""

    def collect(self, prompts: Sequence[Prompt], responses: list[str], token_ids: list[list[int]]) -> Scores:
        """The scores of all of a rank's responses."""

    def close(self) -> None:
        """End what it has started."""


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
        checks: PathChecks | None = None,
        needs: Needs = Needs(),  # noqa: B008  frozen
        correction: Correction = Correction(),  # noqa: B008  frozen
        replacement_rounds: int = 0,
        model_rewards: Sequence[ModelReward] = (),
        curriculum: Curriculum | None = None,
    ) -> None:
        self.sampler, self.expected = sampler, LastMeans()
        self.curriculum, self.mean_scores = curriculum, LastMeans()
        self.prompts, self.schedule, self.scorer = prompts, schedule, scorer
        self.position_of = {prompt.index: position for position, prompt in enumerate(prompts)}
        self.sampling, self.shaping, self.cutting, self.kl_control = sampling, shaping, cutting, kl_control
        self.responses_per_prompt, self.seed, self.checks = responses_per_prompt, seed, checks
        self.needs, self.correction, self.replacement_rounds = needs, correction, replacement_rounds
        self.model_rewards = model_rewards
        self.clock = Clock()
        self.metrics: dict[str, float] = {}
        self.samples: list[Sample] = []
        self._incomplete: tuple[Sampled, Passes] | None = None

    def collect(self, rollout: int) -> Experience:
        """Sample, score and shape rollout number ``rollout``; leaves its metrics and samples behind for the log.

        Where its only update is one forward pass on each rank, that pass is what ``complete`` waits for.
        """
        with located(f"rollout {rollout}"), self.sampler.opened(self.model()) as shared:
            sampled = self.responses_to(shared, self._chosen(rollout), rollout)
            self._remember(sampled)
            sampled = self._without_uniform_groups(shared, sampled, rollout)
            if self.shaping.estimator.needs("baselines"):
                sampled = self._with_baselines(shared, sampled)
            with self.clock.phase("old_log_prob"):
                plan, layout = self.plan(sampled, rollout, epoch=0), self.cutting.layout
                roles, temperature = self.roles_of(rollout, plan), self.sampling.temperature
                passes = score(shared, sampled, plan, layout, temperature, roles=roles)
                if self.checks is not None:
                    self.checks.look(shared, sampled, passes, plan, layout, temperature, rollout)
        if self.checks is not None:
            self.checks.check_scoring(sampled, passes, rollout)
        if rollout > 0 and self.needs.incomplete(one_forward=plan.one_forward):
            self._incomplete = (sampled, passes)
            return self._tokens_of(sampled, passes)
        return self._experience(sampled, passes)

    def _chosen(self, rollout: int) -> list[int]:
        """The positions of a rollout's prompts: the schedule's, or the curriculum's."""
        if self.curriculum is None:
            return self.schedule.indices(rollout)
        return self.curriculum.indices(rollout, self.mean_scores)

    def responses_to(self, shared: SharedBase, prompts: Sequence[int], rollout: int) -> Sampled:
        """Sampled and scored responses to the prompts at these positions, for rollout number ``rollout``."""
        rows = rollout_rows([self.prompts[i] for i in prompts], self.responses_per_prompt)
        shares = deal(rows, self.responses_per_prompt, world_size(), self.expected)
        return self.sample(shared, rows, shares, self.sampling, stream=(self.seed, "sample", rollout))

    def _remember(self, sampled: Sampled) -> None:
        """What to expect of the prompts next time, also of those that are replaced; a response without a score tells
        its length only."""
        self.expected.update(sampled.groups.tolist(), sampled.response_lengths.tolist())
        self.mean_scores.update(sampled.groups[sampled.kept].tolist(), sampled.raw_scores[sampled.kept].tolist())

    def complete(self, rows: Sequence[int], **said: Tensor) -> Experience:
        """The experience that ``collect`` left open, from what each rank's forward pass has ``said`` about its
        ``rows``: columns of ``Passes``. A collective."""
        if self._incomplete is None:
            raise RuntimeError("the rollout's experience is complete already")
        (sampled, passes), self._incomplete = self._incomplete, None
        whole = gather_passes([(list(rows), {name: column.detach().cpu() for name, column in said.items()})])
        passes = replace(passes, **whole)
        if (fault := not_finite(passes)) is not None:
            raise NotFiniteError(f"in the update, {described_fault(*fault, sampled)}; {WAYS_OUT}")
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
            rollout = self.sampler.decode(
                shared, batch, sampling, stream=stream, expected=self.expected, on_finished=self._early_rewards(batch)
            )
        tokens = tokens_of(rollout)
        texts = self._texts(tokens)
        with self.clock.phase("reward"), agreement("the reward"):
            scores = self.scorer.collect(batch.prompts, texts, tokens)
        mine = sampled_here(batch, rollout, texts, scores, pad_id=sampling.pad_id)
        sampled = gather_rollout(mine, shares, pad_id=sampling.pad_id)
        with self.clock.phase("reward"):
            for reward in self.model_rewards:
                sampled = sampled.plus(reward.name, reward(shared, sampled, rows.prompts), reward.weight)
        return sampled

    def _without_uniform_groups(self, shared: SharedBase, sampled: Sampled, rollout: int) -> Sampled:
        """The rollout with prompts replaced whose responses all have one score, as far as others do better: DAPO's
        dynamic sampling (arXiv 2503.14476, section 3.2), for at most ``replacement_rounds`` rounds.

        All ranks see all scores and draw the same other prompts, as many as there are to replace. None is drawn that is
        in the rollout or was.
        """
        seen = {self.position_of[group] for group in sampled.groups.tolist()}
        for number in range(self.replacement_rounds):
            uniform = self._uniform(sampled)
            drawn = self.schedule.others(rollout, number, count=len(uniform), without=seen)
            if not drawn:
                break
            seen |= set(drawn)
            others = self._responses_to_few(shared, drawn, rollout)
            self._remember(others)
            better = set(others.groups.tolist()) - set(self._uniform(others))
            replaced = uniform[: len(better)]
            kept = [row for row, group in enumerate(sampled.groups.tolist()) if group not in replaced]
            added = [row for row, group in enumerate(others.groups.tolist()) if group in better]
            sampled = joined([sampled.rows(kept), others.rows(added)], pad_id=self.sampling.pad_id)
        return sampled

    def _responses_to_few(self, shared: SharedBase, prompts: list[int], rollout: int) -> Sampled:
        """``responses_to`` any number of different prompts: some get further responses, which are left out again, so
        that each rank has as many to do."""
        more = prompts * world_size()
        everything = self.responses_to(shared, prompts + more[: -len(prompts) % world_size()], rollout)
        return everything.rows(range(len(prompts) * self.responses_per_prompt))

    def _uniform(self, sampled: Sampled) -> list[int]:
        """Groups to replace: one score for all responses, and no more of these than a prompt gets."""
        once = {group for group, rows in Counter(sampled.groups.tolist()).items() if rows == self.responses_per_prompt}
        return [g for g in uniform_groups(sampled.raw_scores, sampled.groups, sampled.kept) if g in once]

    def _with_baselines(self, shared: SharedBase, sampled: Sampled) -> Sampled:
        """The rollout with the score of the greedy response to each row's prompt. A row is dropped where that has
        none."""
        groups = sampled.groups.unique().tolist()
        groups += groups[:1] * (world_size() - len(groups))  # each rank needs one
        chosen = tuple(self.prompts[self.position_of[group]] for group in groups)
        rows = PromptBatch(chosen, samples=(0,) * len(groups))
        greedy = self.sample(shared, rows, in_turn(len(groups)), replace(self.sampling, greedy=True), stream=())
        place = [groups.index(group) for group in sampled.groups.tolist()]
        return replace(
            sampled,
            baselines=self.shaping.scores.baselines(greedy, sampled, budget=self.sampling.max_new_tokens)[place],
            kept=sampled.kept & greedy.kept[place],
            failures={name: failed + greedy.failures.get(name, 0) for name, failed in sampled.failures.items()},
        )

    def plan(self, sampled: Sampled | Experience, rollout: int, *, epoch: int) -> Plan:
        """How pass number ``epoch`` over rollout number ``rollout`` is cut. The role pass uses that of epoch 0."""
        rows = len(sampled.sequences)
        parts = mini_batches(rows, self.cutting.mini_batches, seed=self.seed, rollout=rollout, epoch=epoch)
        return Plan([self.cutting.among_ranks(part, sampled) for part in parts])

    def evaluation_plan(self, sampled: Sampled) -> Plan:
        """One pass over a rollout in its own order; nothing is trained on it."""
        return Plan([self.cutting.among_ranks(range(len(sampled.sequences)), sampled)])

    def roles_of(self, rollout: int, plan: Plan) -> tuple[str, ...]:
        """The roles that score rollout number ``rollout``: all of them in the first, which ``PathChecks`` looks at,
        and then those whose numbers the update does not make itself."""
        return self.needs.everything if rollout == 0 else self.needs.roles(one_forward=plan.one_forward)

    def shaped_scores(self, sampled: Sampled) -> Tensor:
        """(B,) scores after penalties, clip, scale and whitening."""
        return self.shaping.scores(sampled, budget=self.sampling.max_new_tokens)

    def evaluation_scores(self, sampled: Sampled) -> Tensor:
        """(B,) the same without whitening, whose mean would always be 0."""
        return self.shaping.scores.before_whitening(sampled, budget=self.sampling.max_new_tokens)

    def _early_rewards(self, batch: PromptBatch) -> Callable[[int, list[int]], None]:
        """Hands a response to the rewards as soon as it is there: slow ones work while others are being decoded."""

        def submit(row: int, tokens: list[int]) -> None:
            self.scorer.submit(row, batch.prompts[row], self._texts([tokens])[0], tokens)

        return submit

    def _texts(self, tokens: list[list[int]]) -> list[str]:
        return list(self.sampler.tokenizer.batch_decode(tokens, skip_special_tokens=True))

    def _experience(self, sampled: Sampled, passes: Passes) -> Experience:
        """Rewards, advantages and the record of both, over the whole rollout."""
        scores, tokens, kl_coef = self.shaped_scores(sampled), sampled.token_mask, self.kl_control.coefficient
        shaped_by_kl = self.shaping.kl_in_reward and self.needs.kl_asked
        rewards = self.shaping.rewards(scores, sampled, passes, kl_coef=kl_coef if shaped_by_kl else None)
        experience = self._tokens_of(sampled, passes)
        advantages, returns = self.shaping.advantages(rewards, experience.response_mask, sampled, passes)
        experience = replace(experience, values=passes.values, advantages=advantages, returns=returns)
        self.samples = as_samples(sampled, scores)
        self.metrics = {
            **rollout_metrics(
                experience,
                scores=scores[sampled.kept],
                raw_scores=sampled.raw_scores[sampled.kept],
                rewards=rewards[sampled.kept],
                finished=sampled.finished,
            ),
            **reward_metrics(sampled.parts, sampled.kept, sampled.failures, scores, sampled.groups),
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
            token_mask=sampled.token_mask,
            response_mask=self.shaping.trained(sampled),
            old_logprobs=passes.old_logprobs,
            ref_logprobs=passes.ref_logprobs,
            rollout_logprobs=sampled.rollout_logprobs,
        )

    def record_policy(self, **columns: Tensor) -> None:
        """Add what the policy's pass says to the rollout's metrics; ``columns`` are those of ``policy_metrics``.

        Called from here, or by the trainer after the update whose pass stands in for the role pass.
        """
        kl_estimator, correction = self.shaping.kl_estimator, self.correction
        self.metrics |= policy_metrics(**columns, kl_estimator=kl_estimator, correction=correction)
