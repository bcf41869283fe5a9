"""Every policy loss and every advantage estimator gives the CPU's numbers on the pretended GPU.

Losses as the trainer runs them, from the loader's mini-batch to gradients; estimators as functions, since the toolkit
runs them on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_toolkit.algorithms.advantages import ADVANTAGE_ESTIMATORS, WHITENED
from rlhf_toolkit.algorithms.importance import NO_CORRECTION, WEIGHTS, Correction
from rlhf_toolkit.algorithms.masking import centre_and_scale
from rlhf_toolkit.algorithms.policy_losses import POLICY_LOSSES
from rlhf_toolkit.algorithms.token_selection import covariance_within, highest_covariance
from rlhf_toolkit.plugins import takes
from rlhf_toolkit.rollout.loader import OverMiniBatch
from rlhf_toolkit.trainers.mini_batches import cut
from rlhf_toolkit.trainers.ppo_loss import PolicyLoss
from tests.cuda_rules.device import GPU, Rules, numbers
from tests.cuda_rules.subjects import TERMS, gradients, move, on_both, ppo_trainer, unlike

CONSTANTS: dict[str, dict[str, Any]] = {"dro": {"beta": 0.1}}


def losses_and_gradients(folder: Path) -> dict[str, Tensor]:
    """Of every policy loss, each under another correction of the sampler, of a policy that has moved since the
    rollout."""
    trainer = ppo_trainer(folder, {"ppo.num_ppo_epochs": 2, "update.micro_batch_tokens": 32})
    trainer.rollouts.over_mini_batch = OverMiniBatch(
        select=partial(covariance_within, share=0.3, lowest=-9.0, highest=9.0)
    )
    rows = next(iter(trainer.get_train_dataloader()))
    move(trainer)
    found: dict[str, Tensor] = {}
    corrections = [NO_CORRECTION, *WEIGHTS]
    for number, (name, function) in enumerate(POLICY_LOSSES.items()):
        loss = PolicyLoss(function, CONSTANTS.get(name, {}))
        correction = Correction(corrections[number % len(corrections)])
        trainer.loss = replace(trainer.loss, policy_loss=loss, correction=correction, **TERMS)
        trainer.model.zero_grad()
        parts = [trainer.micro_batch_loss(trainer.model, part) for part in cut(rows)]
        torch.stack(parts).sum().backward()
        found[name] = numbers(torch.stack(parts).detach())
        found |= {f"{name} {key}": gradient for key, gradient in gradients(trainer.model).items()}
    assert len(parts) > 1, "one micro-batch would not test the cut"
    return found


def test_every_policy_loss(tmp_path: Path) -> None:
    expected, found = on_both(losses_and_gradients, tmp_path)
    assert unlike(found, expected, tolerance=1e-3) == []


def test_every_estimator() -> None:
    """And both ways of choosing tokens. The estimators whose sources whiten are whitened."""
    generator, drawn = torch.Generator().manual_seed(2), torch.Generator()
    given: dict[str, Any] = {
        **{name: torch.randn(4, 6, generator=generator) for name in ("rewards", "values", "logprobs", "advantages")},
        **{name: torch.randn(4, generator=generator) for name in ("baselines", "bootstrap")},
        "mask": torch.arange(6) < torch.tensor([5, 3, 6, 1])[:, None],
        "groups": torch.tensor([3, 1, 3, 1]),
    }
    functions: dict[str, Callable[..., Any]] = {
        **ADVANTAGE_ESTIMATORS,
        "highest": partial(highest_covariance, share=0.3),
        "within": partial(covariance_within, share=0.3, lowest=-1.0, highest=1.0, generator=drawn),
    }
    wrong = []
    with Rules():
        there = {name: column.to(GPU) for name, column in given.items()}
        for name, function in functions.items():
            results = []
            for columns in (given, there):
                arguments = {**columns, "gamma": 0.9, "gae_lambda": 0.8}
                drawn.manual_seed(0)
                made = function(**{key: value for key, value in arguments.items() if takes(function, key)})
                first, *rest = made if isinstance(made, tuple) else (made,)
                whitened = centre_and_scale(first, columns["mask"]) if name in WHITENED else first
                results.append([numbers(each).float() for each in (whitened, *rest)])
            if not all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*results, strict=True)):
                wrong.append(name)
    assert wrong == []
