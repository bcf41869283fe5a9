"""ScoredSampler: responses with their scores, and what roles say about them. Training and evaluation both use it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor, nn

from rlhf_toolkit.data.response_texts import unread_tokens
from rlhf_toolkit.distributed import stopping
from rlhf_toolkit.distributed.collectives import agreement, rank
from rlhf_toolkit.errors import OutOfMemoryError, shortened
from rlhf_toolkit.models.role_outputs import RoleOutputs
from rlhf_toolkit.models.shared_base import SharedBase
from rlhf_toolkit.reporting.meters import Clock
from rlhf_toolkit.rewards.scores import Scores
from rlhf_toolkit.rollout.cutting import Cutting, Plan
from rlhf_toolkit.rollout.dealing import LastMeans
from rlhf_toolkit.rollout.decoding import Sampling
from rlhf_toolkit.rollout.model_rewards import ModelReward
from rlhf_toolkit.rollout.role_pass import run_role_pass
from rlhf_toolkit.rollout.sampled import Sampled, gather_rollout, sampled_here
from rlhf_toolkit.rollout.sampler import Sampler, tokens_of
from rlhf_toolkit.rollout.shaping import ScoreShaping
from rlhf_toolkit.texts import say
from rlhf_toolkit.types import Prompt, PromptBatch


class Scorer(Protocol):
    """What gives scores; ``rewards.compose.Rewards`` is one."""

    def submit(self, row: int, prompt: Prompt, response: str, token_ids: list[int]) -> None:
        """A response is there, while others are still being decoded."""

    def collect(
        self,
        prompts: Sequence[Prompt],
        responses: list[str],
        token_ids: list[list[int]],
        turns: Sequence[Sequence[dict[str, Any]]] | None = None,
    ) -> Scores:
        """The scores of all of a rank's responses. ``turns`` are their messages, None where each is one turn."""

    def close(self) -> None:
        """End what it has started."""


class ScoredSampler:
    """Samples responses with an engine's policy, has them scored, and asks roles about them.

    Args:
        sampler: decodes.
        scorer: the rewards that read texts; ``model_rewards`` are those that are models.
        sampling: how tokens are chosen; ``responses(greedy=True)`` takes the likeliest instead.
        cutting: how the rows of a role pass are cut.
        score_shaping: what happens to scores before they count.
        seed: names the random streams.

    ``expected`` knows how long responses were last time, so that the long ones begin first. ``clock`` adds up the
    seconds of the phases of a step, the trainer's too.
    """

    def __init__(
        self,
        sampler: Sampler,
        scorer: Scorer,
        sampling: Sampling,
        cutting: Cutting,
        *,
        score_shaping: ScoreShaping = ScoreShaping(),  # noqa: B008  frozen
        model_rewards: Sequence[ModelReward] = (),
        seed: int = 0,
    ) -> None:
        self.sampler, self.scorer, self.sampling, self.cutting = sampler, scorer, sampling, cutting
        self.score_shaping, self.model_rewards, self.seed = score_shaping, model_rewards, seed
        self.expected, self.clock = LastMeans(), Clock()
        self._told_unread = False

    def opened(self, model: nn.Module) -> AbstractContextManager[SharedBase]:
        """Inside, the SharedBase of the engine ``model`` can sample and run roles, without autograd. A collective."""
        return self.sampler.opened(model)

    def responses(
        self,
        shared: SharedBase,
        rows: PromptBatch,
        shares: Sequence[Sequence[int]],
        *,
        stream: Sequence[int | str] = (),
        greedy: bool = False,
    ) -> Sampled:
        """One scored response for each of ``rows``, in their order and on every rank; this rank samples the row numbers
        ``shares[rank]``. A collective, only inside ``opened``.

        ``stream`` names the random numbers, beside the seed and each row's prompt and sample; ``greedy`` needs none.
        """
        batch, sampling = rows.subset(shares[rank()]), replace(self.sampling, greedy=greedy)
        names = () if greedy else (self.seed, *stream)

        def submit(row: int, tokens: list[int]) -> None:
            """Slow rewards work on a response while others are still being decoded; those of several turns come to
            their end together."""
            if self.sampler.environment is None:
                self.scorer.submit(row, batch.prompts[row], self.sampler.texts([tokens])[0], tokens)
            self.clock.advance()

        with self.clock.phase("gen", len(batch)):
            rollout = self.sampler.decode(
                shared, batch, sampling, stream=names, expected=self.expected, on_finished=submit
            )
        tokens = tokens_of(rollout)
        texts = self.sampler.texts(tokens)
        self._tell_unread(tokens)
        with self.clock.phase("reward"), agreement("the reward"), stopping.interruptible():
            scores = self.scorer.collect(batch.prompts, texts, tokens, rollout.turns)
        mine = sampled_here(batch, rollout, texts, scores, pad_id=sampling.pad_id)
        sampled = gather_rollout(mine, shares, pad_id=sampling.pad_id)
        with self.clock.phase("reward"):
            for reward in self.model_rewards:
                sampled = sampled.plus(reward.name, reward(shared, sampled, rows.prompts, self), reward.weight)
        return sampled

    def _tell_unread(self, tokens: list[list[int]]) -> None:
        """Say once, on rank 0, which special tokens the first responses hold that no reward reads."""
        if self._told_unread or self.sampler.left_out is not None or rank() != 0:
            return
        self._told_unread = True
        unread = unread_tokens(tokens, self.sampler.tokenizer, self.sampling.stop_ids)
        if unread:
            named = ", ".join(f"{shortened(token, 40)} in {count}" for token, count in list(unread.items())[:3])
            say(
                f"special tokens that neither rewards nor an environment read, of {len(tokens)} responses: {named}; "
                "rollout.keep_special_tokens: true shows them"
            )

    def planned_pass(
        self,
        shared: SharedBase,
        sampled: Sampled,
        plan_of: Callable[[Cutting], Plan],
        roles_of: Callable[[Plan], Sequence[str]],
    ) -> tuple[Plan, RoleOutputs]:
        """``role_outputs`` by the plan that ``plan_of`` makes, and that plan. Where memory runs out on a rank, all try
        again with smaller passes, and keep to them: results do not depend on the cut."""
        while True:
            plan = plan_of(self.cutting)
            try:
                return plan, self.role_outputs(shared, sampled, plan, roles=roles_of(plan))
            except OutOfMemoryError as error:
                if plan.most_rows <= 1:
                    raise
                said = str(error)
            while plan_of(self.cutting) == plan:
                self.cutting = self.cutting.halved()
            self.sampler.note_retry(f"a role pass is run again with at most {self.cutting.role_tokens} tokens", said)

    def pass_in_order(self, shared: SharedBase, sampled: Sampled, *, roles: Sequence[str]) -> RoleOutputs:
        """``planned_pass`` over responses in their own order, on which nothing is trained."""
        return self.planned_pass(shared, sampled, lambda cutting: cutting.in_order(sampled), lambda plan: roles)[1]

    def role_outputs(self, shared: SharedBase, sampled: Sampled, plan: Plan, *, roles: Sequence[str]) -> RoleOutputs:
        """What ``roles`` say about the responses, cut as ``plan`` is. A collective, only inside ``opened``."""
        layout, temperature = self.cutting.layout, self.sampling.temperature
        return run_role_pass(shared, sampled, plan, layout, temperature=temperature, roles=roles)

    def scores(self, sampled: Sampled) -> Tensor:
        """(B,) scores after penalties, clip, scale and whitening: what training sees."""
        return self.score_shaping(sampled, budget=self.sampling.max_new_tokens)

    def unwhitened_scores(self, sampled: Sampled) -> Tensor:
        """(B,) the same without whitening, after which the mean of an evaluation would always be 0."""
        return self.score_shaping.before_whitening(sampled, budget=self.sampling.max_new_tokens)

    def baselines(self, greedy: Sampled, sampled: Sampled) -> Tensor:
        """(B,) scores of ``greedy`` on the scale of those of ``sampled``."""
        return self.score_shaping.baselines(greedy, sampled, budget=self.sampling.max_new_tokens)
