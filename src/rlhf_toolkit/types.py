"""The nouns of a run. Each record is made in one place and frozen; shapes are checked where they are born and trusted
inside.

    PromptBatch --rollout/decoding--> Rollout --rollout/scored_sampler--> Sampled --rollout/experience--> Experience
    --rollout/loader--> mini-batches --trainers/ppo

Letters: B sequences, P prompt width, R response width, T = P + R.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import torch

from rlhf_toolkit.errors import DataError


@dataclass(frozen=True)
class Prompt:
    """One row of the prompt dataset after tokenisation.

    ``index`` is its position in the dataset, which names its random stream; ``columns`` are the dataset's other
    columns, which rewards receive by name; ``messages`` are the chat messages it was rendered from, None for a text.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    columns: dict[str, Any]
    messages: tuple[dict[str, Any], ...] | None = None


@dataclass(frozen=True)
class PromptBatch:
    """The prompts of a rollout or of one rank's share, each as often as it gets responses. Made by
    ``rollout/dealing.py``, and of some of its prompts by what needs these alone.

    ``samples[i]`` counts the responses of one prompt from 0, so that ``(prompts[i].index, samples[i])`` is unique in a
    rollout.
    """

    prompts: tuple[Prompt, ...]
    samples: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.prompts) != len(self.samples):
            raise DataError(f"{len(self.prompts)} prompts but {len(self.samples)} sample numbers")

    def __len__(self) -> int:
        return len(self.prompts)

    def subset(self, rows: Sequence[int]) -> PromptBatch:
        """The rows with these numbers, in the order given."""
        return PromptBatch(tuple(self.prompts[row] for row in rows), tuple(self.samples[row] for row in rows))


@dataclass(frozen=True)
class Rollout:
    """What sampling gave: made by ``rollout/decoding.py``, consumed by rewards and by ``rollout/scored_sampler.py``.

    ``responses`` (B, R) token ids, right-padded, the stop token included; ``lengths`` (B,); ``rollout_logprobs`` (B, R)
    fp32, the policy's log-probs on the decoding path; ``finished`` (B,) bool, True where a stop token or stop string
    ended the response and False where the token budget did; ``written`` (B, R) bool, True where the policy wrote the
    token, and False at what an environment answered; None: it wrote all of them; ``drawn_logprobs`` (B, R) fp32, the
    tokens' log-probs in the distribution that they were drawn from, None where that is the policy's whole one;
    ``turns``, for each row the messages of policy and environment, None where a response is one turn.
    """

    responses: torch.Tensor
    lengths: torch.Tensor
    rollout_logprobs: torch.Tensor
    finished: torch.Tensor
    written: torch.Tensor | None = None
    drawn_logprobs: torch.Tensor | None = None
    turns: tuple[tuple[dict[str, Any], ...], ...] | None = None

    def __post_init__(self) -> None:
        rows, width = self.responses.shape
        _expect("lengths", self.lengths, (rows,))
        _expect("rollout_logprobs", self.rollout_logprobs, (rows, width))
        _expect("finished", self.finished, (rows,))
        for name in ("written", "drawn_logprobs"):
            if getattr(self, name) is not None:
                _expect(name, getattr(self, name), (rows, width))


@dataclass(frozen=True, kw_only=True)
class RolloutTokens:
    """The tokens of a rollout that are trained on: a row for each sequence of the whole rollout, on every rank.

    ``sequences`` (B, T) prompt and response, right-padded; ``prompt_lengths`` (B,) and ``response_lengths`` (B,); the
    rest (B, R), aligned so that column 0 is the first response token: ``token_mask`` bool, True where the policy wrote
    the token, and ``response_mask``, True where it is trained on; ``rollout_logprobs`` of the decoding path;
    ``ref_logprobs``, None where no KL is asked for and it is not the first rollout; and ``drawn_logprobs`` in what the
    tokens were drawn from, None where that is the policy's whole distribution; all fp32.
    """

    sequences: torch.Tensor
    prompt_lengths: torch.Tensor
    response_lengths: torch.Tensor
    token_mask: torch.Tensor
    response_mask: torch.Tensor
    rollout_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor | None = None
    drawn_logprobs: torch.Tensor | None = None

    def __post_init__(self) -> None:
        rows, width = self.response_mask.shape
        shapes = {"sequences": (rows, self.sequences.shape[-1]), "prompt_lengths": (rows,), "response_lengths": (rows,)}
        for field in fields(self):
            column = getattr(self, field.name)
            if column is not None:
                _expect(field.name, column, shapes.get(field.name, (rows, width)))

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def sampler_logprobs(self) -> torch.Tensor:
        """(B, R) log-probs of the tokens in what they were drawn from, which an importance weight divides by."""
        return self.rollout_logprobs if self.drawn_logprobs is None else self.drawn_logprobs

    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return (self.prompt_lengths + self.response_lengths).tolist()  # type: ignore[no-any-return]

    def columns(self) -> dict[str, torch.Tensor]:
        """The fields that are not None, as a plain dict of tensors; ``of`` brings the record back."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: column for name, column in found.items() if column is not None}

    def rows(self, index: Sequence[int] | torch.Tensor) -> dict[str, torch.Tensor]:
        """``columns`` of the rows ``index``, which is what Trainer handles."""
        index = torch.as_tensor(index)
        return {name: column[index] for name, column in self.columns().items()}

    @classmethod
    def of(cls, columns: Mapping[str, torch.Tensor]) -> Self:
        """The record from the columns of ``rows``; others among them are left alone."""
        return cls(**{field.name: columns[field.name] for field in fields(cls) if field.name in columns})


@dataclass(frozen=True, kw_only=True)
class Experience(RolloutTokens):
    """A rollout with its advantages, ready for the update.

    ``advantages`` and ``returns`` (B, R); ``values`` (B, R), None where no value is trained; ``old_logprobs`` (B, R),
    None where the rollout's only update makes its own; all fp32.
    """

    advantages: torch.Tensor
    returns: torch.Tensor
    values: torch.Tensor | None = None
    old_logprobs: torch.Tensor | None = None

    @property
    def old_values_and_returns(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Values at the rollout and returns, (B, R) each. RuntimeError, a defect, where no value is trained."""
        if self.values is None:
            raise RuntimeError("an experience without values has nothing that a value could learn")
        return self.values, self.returns


def _expect(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise DataError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
