"""Names that transformers changed between 5.17 and 5.24, the oldest and the newest version the tests run with."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel, cache_utils

CACHELESS: tuple[type, ...] = tuple(vars(cache_utils)[name] for name in ("DummyLayer",) if name in vars(cache_utils))
"""Layers of a cache that keep nothing: the decoder's layer reads the keys and values of an earlier one, or has no
attention. Older versions have none in such a place."""

INDEXED: tuple[type, ...] = tuple(
    vars(cache_utils)[name] for name in ("DynamicIndexedLayer",) if name in vars(cache_utils)
)
"""Layers of a cache that keep an indexer's keys beside those of attention. Older versions have none."""


def cache_argument(base: PreTrainedModel) -> str | None:
    """How ``base.forward`` calls its key-value cache: ``cache``, before 5.24 ``past_key_values``; None where it takes
    none."""
    taken = signature(base.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in taken), None)


def recompute_layers(base: PreTrainedModel, settings: dict[str, Any]) -> None:
    """Have ``base`` recompute its layers in backward; ``settings`` go to ``torch.utils.checkpoint.checkpoint``."""
    newer: Callable[..., Any] | None = getattr(base, "activation_checkpointing_enable", None)
    (newer or base.gradient_checkpointing_enable)(settings)


def config_value(config: PretrainedConfig, name: str) -> Any:
    """``config.<name>``, or None without such an attribute. Where layers differ in it, the largest that one of them
    has: newer versions raise where the whole config is asked."""
    if name not in (getattr(config, "per_layer_attributes", None) or ()):
        return getattr(config, name, None)
    values = [getattr(layer, name, None) for layer in config.per_layer_config]  # type: ignore[attr-defined]
    return max((value for value in values if value is not None), default=None)
