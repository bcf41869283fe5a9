"""The roles that one base plays."""

from __future__ import annotations

from enum import StrEnum


class Role(StrEnum):
    """What a base plays. A role's name is also that of its adapter and of its folder in a checkpoint."""

    POLICY = "policy"
    VALUE = "value"
    REFERENCE = "reference"
    REWARD = "reward"


POLICY: str = Role.POLICY
VALUE: str = Role.VALUE
REFERENCE: str = Role.REFERENCE
REWARD: str = Role.REWARD
LANGUAGE_ROLES = (POLICY, REFERENCE)
SCALAR_ROLES = (VALUE, REWARD)
TRAINED_ROLES = (POLICY, VALUE)
ROLES_OF_THEIR_OWN = (POLICY, REWARD)
"""Those that people take from a run's folder and load by themselves: with a tokenizer."""
