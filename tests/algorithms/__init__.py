"""Mirrors ``rlhf_toolkit.algorithms``: plain-Python oracles, identities, hand-computed numbers."""
