"""The mini-batches of PPO in parts, and what its evaluations are of and give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from rlhf_toolkit.reporting.metrics import spread
from rlhf_toolkit.rollout.evaluated import HeldOutResponses, Passing
from rlhf_toolkit.rollout.loader import MiniBatch
from rlhf_toolkit.types import Experience, Prompt


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


COLUMNS = (*(field.name for field in fields(Experience)), "row", "selected")
COUNTS = ("token_count", "sequence_count", "fresh")


def least(part: MiniBatch) -> MiniBatch:
    """One row of a micro-batch with one token of its prompt and one of its response: what a rank runs that has run out
    of memory, as the partner of the others."""
    small = {name: column[:1, :1] if column.ndim == 2 else column[:1] for name, column in part.items() if column.ndim}
    one = torch.ones(1, dtype=part["prompt_lengths"].dtype)
    return {**part, **small, "sequences": part["sequences"][:1, :2], "prompt_lengths": one, "response_lengths": one}


def cut(mini_batch: MiniBatch) -> list[MiniBatch]:
    """A mini-batch's micro-batches; the counts of the whole go with every one."""
    number = mini_batch["micro_batch"]
    parts = []
    columns = [name for name in COLUMNS if name in mini_batch]
    for i in range(int(number.max()) + 1):
        part = {name: mini_batch[name][number == i] for name in columns}
        parts.append({**part, **{name: mini_batch[name] for name in COUNTS}})
    return parts
