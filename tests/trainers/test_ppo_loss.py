"""The loss of a mini-batch, cut into micro-batches, against PPO written out token by token."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_toolkit.algorithms.importance import Correction
from rlhf_toolkit.data.layout import padded_layout
from rlhf_toolkit.models.shared_base import SharedBase
from rlhf_toolkit.rollout.loader import share_of_mini_batch
from rlhf_toolkit.runs.ppo import prepare
from rlhf_toolkit.settings.loading import experiment_from_dict
from rlhf_toolkit.trainers.micro_batches import cut
from rlhf_toolkit.trainers.ppo import PPOTrainer
from rlhf_toolkit.types import Experience
from tests.support.tiny import merged, write_task
from tests.support.values import named

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "everything": {
        "ppo.clip_range_low": 0.05,
        "ppo.clip_range_high": 0.1,
        "ppo.dual_clip": 1.5,
        "ppo.value_clip_range": 0.05,
        "ppo.value_coef": 0.7,
        "ppo.entropy_coef": 0.2,
        "ppo.kl_in": "loss",
        "ppo.kl_estimator": "k3",
        "ppo.loss_aggregation": "seq-mean-token-mean",
        "ppo.truncated": "mask",
        "rollout.temperature": 0.7,
    },
    "token weights": {"ppo.importance_correction": "token", "ppo.importance_cap": 1.1, "ppo.dual_clip": 1.5},
    "sequence weights": {
        "ppo.importance_correction": "sequence",
        "ppo.importance_cap": 1.3,
        "rollout.repetition_penalty": 1.2,
        "ppo.truncated": "mask",
        "ppo.entropy_coef": 0.2,
    },
    "value on the policy's trunk": {"model.value_on": "policy_trunk", "ppo.value_coef": 0.7},
    "sums": {"ppo.loss_aggregation": "seq-mean-token-sum-norm", "ppo.value_clip_range": None},
}


@pytest.fixture(params=OPTIONS)
def trainer(request: pytest.FixtureRequest, tmp_path: Path) -> PPOTrainer:
    """A trainer whose policy and value have moved away from where the rollout was made."""
    experiment = merged(
        write_task(tmp_path), {"update.micro_batch_tokens": 64, "rollout.max_new_tokens": 20, **OPTIONS[request.param]}
    )
    run = prepare(experiment_from_dict(experiment))
    run.progress.close()
    return run.trainer


def with_gap(experience: Experience) -> Experience:
    """As if the sampler had been another model: log-probs that differ by about 0.3 a token."""
    noise = torch.randn(experience.rollout_logprobs.shape, generator=torch.Generator().manual_seed(5))
    return replace(experience, rollout_logprobs=experience.rollout_logprobs + 0.3 * noise)


def moved(shared: SharedBase) -> None:
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in shared.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=g) * 0.2)


def test_loss_and_gradient_equal_ppo_written_out(trainer: PPOTrainer) -> None:
    shared = trainer.model
    trainer.rollouts.newest = trainer.maker.collect(shared, 0)
    experience = with_gap(trainer.rollouts.newest.experience)
    plan = trainer.maker.scored_sampler.cutting.plan(experience, 0, epoch=0)
    mini_batch = share_of_mini_batch(experience, plan.batches[0], 0, fresh=False)
    moved(shared)
    parts = cut(mini_batch)
    assert len(parts) > 1, "one micro-batch would not test the cut"

    losses = [trainer.micro_batch_loss(shared, part) for part in parts]
    torch.stack(losses).sum().backward()
    gradients = {name: p.grad.clone() for name, p in shared.named_parameters() if p.grad is not None}
    shared.zero_grad()
    expected = written_out(trainer, mini_batch)
    expected.backward()

    assert torch.stack(losses).sum().item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    assert gradients.keys() == {name for name, p in shared.named_parameters() if p.requires_grad}
    for name, parameter in shared.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=named(name))


def written_out(trainer: PPOTrainer, batch: dict[str, Tensor]) -> Tensor:
    """PPO by its definition: one pass over the whole mini-batch, then a loop over rows and tokens."""
    knobs = trainer.loss
    lengths = batch["response_lengths"].tolist()
    layout = padded_layout(batch["sequences"], batch["prompt_lengths"], batch["response_lengths"])
    out = trainer.model(layout, roles=("policy", "value"), temperature=knobs.temperature, entropy_gradient=True)
    split = [out[name].split(lengths) for name in ("policy_logprobs", "policy_entropies", "token_values")]
    rows = [b for b, mask in enumerate(batch["response_mask"].tolist()) if any(mask)]
    tokens = sum(lengths[b] for b in rows)
    importance = weights_written_out(batch, lengths, knobs.correction)
    total = torch.zeros(())
    for b in rows:
        weight = {
            "token-mean": 1 / tokens,
            "seq-mean-token-mean": 1 / (len(rows) * lengths[b]),
            "seq-mean-token-sum-norm": 1 / (len(rows) * knobs.width),
        }[knobs.loss_aggregation]
        for t in range(lengths[b]):
            logprob, entropy, value = (column[b][t] for column in split)
            old, ref, advantage = (batch[name][b, t].item() for name in ("old_logprobs", "ref_logprobs", "advantages"))
            total = total + weight * importance[b][t] * policy_term(logprob, old, advantage, knobs)
            total = total + weight * knobs.value_coef * value_term(value, batch, b, t, knobs.value_clip_range)
            total = total - weight * knobs.entropy_coef * entropy
            if knobs.kl_in_loss:
                y = ref - logprob
                total = total + weight * trainer.maker.kl_control.coefficient * (torch.exp(y) - 1 - y)
    return total


def weights_written_out(batch: dict[str, Tensor], lengths: list[int], correction: Correction) -> list[list[float]]:
    sampler = batch.get("drawn_logprobs", batch["rollout_logprobs"])
    gaps = [(batch["old_logprobs"][b, :n] - sampler[b, :n]).tolist() for b, n in enumerate(lengths)]
    if correction.kind == "token":
        return [[min(math.exp(x), correction.cap) for x in row] for row in gaps]
    if correction.kind == "sequence":
        return [[min(math.exp(math.fsum(row)), correction.cap)] * len(row) for row in gaps]
    return [[1.0] * len(row) for row in gaps]


def policy_term(logprob: Tensor, old: float, advantage: float, knobs: Any) -> Tensor:
    ratio = torch.exp(logprob - old)
    clipped = min(max(ratio.item(), 1 - knobs.clip_range_low), 1 + knobs.clip_range_high)
    worst = (
        -advantage * ratio if -advantage * ratio.item() >= -advantage * clipped else torch.tensor(-advantage * clipped)
    )
    if knobs.dual_clip is not None and advantage < 0 and worst.item() > -advantage * knobs.dual_clip:
        return torch.tensor(-advantage * knobs.dual_clip)
    return worst


def value_term(value: Tensor, batch: dict[str, Tensor], b: int, t: int, clip_range: float | None) -> Tensor:
    target, old = batch["returns"][b, t].item(), batch["values"][b, t].item()
    plain = 0.5 * (value - target) ** 2
    if clip_range is None or math.isinf(clip_range):
        return plain
    limited = 0.5 * (torch.clamp(value, old - clip_range, old + clip_range) - target) ** 2
    return plain if plain.item() >= limited.item() else limited
