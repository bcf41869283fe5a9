"""Which prompts a rollout has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from rlhf_toolkit.data.prompts import PromptSchedule
from rlhf_toolkit.reporting.metrics import uniform_groups
from rlhf_toolkit.rollout.curriculum import Curriculum
from rlhf_toolkit.rollout.dealing import LastMeans, rollout_rows
from rlhf_toolkit.rollout.sampled import Sampled
from rlhf_toolkit.types import Prompt, PromptBatch


@dataclass
class PromptSource:
    """The prompts of each rollout, by their positions in ``prompts``: the schedule's, or the curriculum's where there
    is one.

    ``replacement_rounds``: how often prompts whose responses all have one score are replaced by others of the schedule.
    ``mean_scores`` of a prompt when it was last in a rollout are what a curriculum chooses by.
    """

    prompts: Sequence[Prompt]
    schedule: PromptSchedule
    responses_per_prompt: int
    curriculum: Curriculum | None = None
    replacement_rounds: int = 0
    mean_scores: LastMeans = field(default_factory=LastMeans)
    position_of: dict[int, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.position_of = {prompt.index: position for position, prompt in enumerate(self.prompts)}

    def positions(self, rollout: int) -> list[int]:
        """The positions of rollout number ``rollout``."""
        if self.curriculum is None:
            return self.schedule.indices(rollout)
        return self.curriculum.indices(rollout, self.mean_scores)

    def rows(self, positions: Sequence[int]) -> PromptBatch:
        """The prompts at ``positions``, each as often as it gets responses."""
        return rollout_rows([self.prompts[position] for position in positions], self.responses_per_prompt)

    def remember(self, sampled: Sampled) -> None:
        """Note the prompts' scores. A response without one says nothing."""
        self.mean_scores.update(sampled.groups[sampled.kept].tolist(), sampled.raw_scores[sampled.kept].tolist())

    def uniform(self, sampled: Sampled) -> list[int]:
        """Groups to replace: those with one score for all responses, and as many responses as a prompt gets. A prompt
        that is there twice is left alone."""
        once = {group for group, rows in Counter(sampled.groups.tolist()).items() if rows == self.responses_per_prompt}
        return [g for g in uniform_groups(sampled.raw_scores, sampled.groups, sampled.kept) if g in once]
