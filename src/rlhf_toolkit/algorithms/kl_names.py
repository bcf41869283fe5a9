"""The names of the KL estimators, apart from their arithmetic: settings are read before torch is imported."""

from __future__ import annotations

OWN_GRADIENT = ("k1", "abs", "k2", "k3")
GRADIENT_OF_K2 = tuple(f"{name}+" for name in OWN_GRADIENT)
KL_NAMES = (*OWN_GRADIENT, *GRADIENT_OF_K2)
