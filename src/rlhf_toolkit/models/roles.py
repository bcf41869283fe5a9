"""The roles that one base plays."""

from __future__ import annotations

POLICY, VALUE, REFERENCE, REWARD = "policy", "value", "reference", "reward"
LANGUAGE_ROLES = (POLICY, REFERENCE)
SCALAR_ROLES = (VALUE, REWARD)
TRAINED_ROLES = (POLICY, VALUE)
