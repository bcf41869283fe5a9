"""Derived seeds: a function of every name, the same on every machine."""

from __future__ import annotations

import torch

from rlhf_toolkit.seeding import derive_seed, derived_generator


def test_seeds_are_the_same_for_ever() -> None:
    """Another derivation would change every run that is resumed across versions."""
    assert derive_seed(0, "sample", 3, 17, 1) == 3194632267928430048


def test_every_name_and_their_order_matters() -> None:
    names = [(1, 2), (2, 1), (1, 2, 0), (12,), (1, 23), (1, 2, 3, "a"), ("a", 1, 2, 3), ()]
    assert len({derive_seed(*each) for each in names}) == len(names)


def test_seeds_fit_a_generator_and_streams_repeat() -> None:
    assert 0 <= derive_seed("x") < 2**63
    first, second = (torch.rand(4, generator=derived_generator(5, "a")) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, torch.rand(4, generator=derived_generator(5, "b")))
