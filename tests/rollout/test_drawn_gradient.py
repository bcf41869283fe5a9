"""How far the expected gradient lies from the policy's, for each way to draw tokens and each importance weight: summed
over all responses of a tiny policy, so that chance has no part in it. docs/ppo_details.md shows the table."""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

from rlhf_toolkit.algorithms.importance import Correction
from rlhf_toolkit.rollout.decoding import Sampling
from rlhf_toolkit.rollout.logit_changes import LogitRules
from tests.support.launch import ROOT
from tests.support.logits import by_transformers

SIZE, STEPS, PROMPT, SEEDS = 5, 3, (1, 3), 5
WAYS: dict[str, dict[str, Any]] = {
    "temperature alone": {},
    "`repetition_penalty: 1.2`": {"rules": LogitRules(penalty=1.2)},
    "`logit_bias` of 1 and -1": {"rules": LogitRules(bias=((0, 1.0), (2, -1.0)))},
    "`top_p: 0.9`": {"top_p": 0.9},
    "`min_p: 0.1`": {"min_p": 0.1},
    "`bad_words`, one of 5 tokens": {"rules": LogitRules(bad_words=((0,),))},
}
KINDS = ("none", "token", "sequence")


def errors(way: dict[str, Any], seed: int) -> dict[str, float]:
    """|expected gradient - the policy's| / |the policy's|, by kind of importance weight.

    The policy's logits are a table of the step and the token before. The policy's gradient is that of its expected
    score; a response's loss at the ratio 1 is - sum_t w_t (score - mean) log pi_t, as PPO's is.
    """
    random = torch.Generator().manual_seed(seed)
    table = (torch.randn(STEPS, SIZE, SIZE, generator=random, dtype=torch.float64) * 1.5).requires_grad_()
    responses = list(product(range(SIZE), repeat=STEPS))
    scores = torch.randn(len(responses), generator=random, dtype=torch.float64)
    sampling = Sampling(STEPS, stop_ids=(), pad_id=0, temperature=1.0, **way)

    @cache
    def distributions(context: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """The policy's log-probs behind ``context``, and those that tokens are drawn from."""
        logits = table[len(context) - len(PROMPT), context[-1]]
        return logits.log_softmax(-1), by_transformers(logits.detach(), list(context), sampling).double().log_softmax(
            -1
        )

    def of(response: tuple[int, ...], which: int) -> Tensor:
        prefixes = [(*PROMPT, *response[:step]) for step in range(STEPS)]
        return torch.stack([distributions(p)[which][token] for p, token in zip(prefixes, response, strict=True)])

    policy, sampler = (torch.stack([of(response, which) for response in responses]) for which in (0, 1))
    truth = gradient(table, policy.sum(1).exp() @ scores)
    probability = sampler.sum(1).exp()
    there, found = probability > 0, {}
    old, drawn, probability, scores = policy.detach()[there], sampler[there], probability[there], scores[there]
    for kind in KINDS:
        weights = Correction(kind, cap=1e9).weights(old, drawn, torch.ones_like(old, dtype=torch.bool))
        advantages = (scores - probability @ scores)[:, None]
        terms = (torch.ones_like(old) if weights is None else weights) * advantages * policy[there]
        found[kind] = ((gradient(table, probability @ terms.sum(1)) - truth).norm() / truth.norm()).item()
    return found


def gradient(table: Tensor, value: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(value, table, retain_graph=True)
    return found


def test_what_importance_weights_mend_and_what_they_cannot() -> None:
    """Where every token can be drawn, weights of whole responses leave no bias; where some cannot, part of it stays.
    The numbers are those that the documents show."""
    found = {}
    for name, way in WAYS.items():
        each = [errors(way, seed) for seed in range(SEEDS)]
        found[name] = [sum(error[kind] for error in each) / SEEDS for kind in KINDS]
    lines = [f"| {name} | {' | '.join(f'{value:.2f}' for value in values)} |" for name, values in found.items()]
    none, penalty, bias, *truncating = found.values()
    assert max(none) < 1e-6 and max(penalty[2], bias[2]) < 1e-6
    assert all(values[0] > values[1] > values[2] for values in (penalty, bias, *truncating))
    assert min(values[2] for values in truncating) > 0.05
    shown = (ROOT / "docs/ppo_details.md").read_text()
    assert [line for line in lines if line not in shown] == []
