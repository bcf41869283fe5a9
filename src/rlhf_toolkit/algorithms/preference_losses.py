"""Losses on pairs of responses, one preferred to the other: Bradley-Terry for reward models, DPO for policies.

All tensors (P,), one number for each pair, fp32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def bradley_terry(chosen: Tensor, rejected: Tensor, margins: Tensor, *, centring: float = 0.0) -> Tensor:
    """Give the loss of each pair's scores: ``-log sigmoid(c - r - margin) + centring (c + r)^2``.

    A ``margin`` says how much better the chosen response is known to be. ``centring`` pulls the scores of a pair
    towards opposite numbers, since the first term knows only their difference.

    Shapes: all (P,) -> (P,). Source: Bradley and Terry (1952); margin: Touvron et al., arXiv 2307.09288, equation 2;
    centring: Eisenstein et al., arXiv 2312.09244, section 5.
    """
    return -logsigmoid(chosen - rejected - margins) + centring * (chosen + rejected).square()


def dpo_sigmoid(difference: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Give DPO's loss: ``-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)``, e = ``label_smoothing``.

    ``difference`` is ``h = (log pi(c) - log pi_ref(c)) - (log pi(r) - log pi_ref(r))``, whole responses c and r.

    Shapes: (P,) -> (P,). Source: Rafailov et al., arXiv 2305.18290, equation 7; smoothing: Mitchell (2023), cDPO.
    """
    return -(1 - label_smoothing) * logsigmoid(beta * difference) - label_smoothing * logsigmoid(-beta * difference)


def dpo_ipo(difference: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Give IPO's loss, ``(h - 1 / (2 beta))^2``: it has a target for the difference instead of pushing it for ever.

    Shapes: (P,) -> (P,). Source: Azar et al., arXiv 2310.12036, equation 17. ``label_smoothing`` moves the target to
    ``(1 - 2 e) / (2 beta)``.
    """
    return (difference - (1 - 2 * label_smoothing) / (2 * beta)).square()


DPO_LOSSES: dict[str, Callable[..., Tensor]] = {"sigmoid": dpo_sigmoid, "ipo": dpo_ipo}


def implicit_rewards(logprobs: Tensor, ref_logprobs: Tensor, *, beta: float) -> Tensor:
    """Give the reward that a policy stands for, ``beta (log pi - log pi_ref)`` of a response. Shapes: (n,) -> (n,)."""
    return beta * (logprobs - ref_logprobs).detach()


def share_above(first: Tensor, second: Tensor) -> Tensor:
    """Give 1 where ``first`` is above ``second``, 0.5 where they are equal, else 0: the accuracy of each pair."""
    return torch.where(first == second, 0.5, (first > second).float())
