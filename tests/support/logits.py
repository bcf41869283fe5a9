"""How transformers' ``generate`` makes of next-token logits what tokens are drawn from: the oracle of sampling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rlhf_toolkit.rollout.decoding import Sampling


def by_transformers(logits: Tensor, context: list[int], sampling: Sampling) -> Tensor:
    """The logits (V,) behind ``context`` after all that ``sampling`` asks for, temperature included, in the order of
    ``GenerationMixin._get_logits_processor``. What cannot be drawn is minus infinity."""
    rules, steps = sampling.rules, LogitsProcessorList()
    context_ids: Any = torch.tensor([context])
    if rules.bias:
        steps.append(SequenceBiasLogitsProcessor([[[token], number] for token, number in rules.bias]))
    if rules.penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(rules.penalty))
    if rules.bad_words:
        steps.append(NoBadWordsLogitsProcessor([list(word) for word in rules.bad_words]))
    steps.append(TemperatureLogitsWarper(sampling.temperature))
    if not sampling.greedy:
        filters: list[Any] = [
            TopKLogitsWarper(sampling.top_k) if sampling.top_k else None,
            TopPLogitsWarper(sampling.top_p) if sampling.top_p < 1 else None,
            MinPLogitsWarper(sampling.min_p) if sampling.min_p else None,
        ]
        steps.extend(each for each in filters if each is not None)
    return steps(context_ids, logits[None].float())[0]
