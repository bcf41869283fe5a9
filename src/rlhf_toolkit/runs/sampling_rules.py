"""From settings to the rules by which logits are changed, and what a start says about how tokens are drawn."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_toolkit.data.chat import rendered_ids
from rlhf_toolkit.errors import ConfigError, shortened
from rlhf_toolkit.rollout.logit_changes import LogitRules
from rlhf_toolkit.settings.configs import RolloutConfig
from rlhf_toolkit.settings.experiment import Experiment
from rlhf_toolkit.settings.idle import default_value, value_of

OTHER_DISTRIBUTION = ("top_k", "top_p", "min_p", "repetition_penalty", "logit_bias", "bad_words")
"""Settings of rollout by which tokens are drawn from another distribution than the policy's whole one."""


def logit_rules(
    rollout: RolloutConfig, tokenizer: PreTrainedTokenizerBase, *, stop_ids: Collection[int], vocab_size: int
) -> LogitRules:
    """The rules that the settings ask for. ConfigError for a token that the model lacks, and for a bad word that no
    tokens are or that ends responses."""
    bias = tuple(sorted((int(token), float(number)) for token, number in rollout.logit_bias.items()))
    if bias and bias[-1][0] >= vocab_size:
        raise ConfigError(
            f"rollout.logit_bias has the token id {bias[-1][0]}, but the model has {vocab_size} tokens; give ids below "
            "that"
        )
    words = [ids for word in rollout.bad_words for ids in _spellings(word, tokenizer, stop_ids)]
    return LogitRules(bias, rollout.repetition_penalty, tuple(dict.fromkeys(words)))


def _spellings(word: str, tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int]) -> list[tuple[int, ...]]:
    """The token ids of a bad word where a text begins and behind a space, as vLLM takes ``bad_words``."""
    found = [rendered_ids(text, tokenizer) for text in (word.strip(), f" {word.strip()}")]
    for ids in found:
        if not ids or tokenizer.unk_token_id in ids:
            raise ConfigError(
                f"rollout.bad_words has {shortened(word)}, which the model's tokens cannot spell; leave it out"
            )
        if len(ids) == 1 and ids[0] in stop_ids:
            raise ConfigError(
                f"rollout.bad_words has {shortened(word)}, a token that ends responses, so that none could end by "
                "itself; leave it out"
            )
    return found


def uncorrected(experiment: Experiment) -> list[str]:
    """A line where tokens are drawn from another distribution than the policy's, and no importance weight says so."""
    names = [f"rollout.{name}" for name in OTHER_DISTRIBUTION]
    changed = [name for name in names if value_of(experiment, name) != default_value(experiment, name)]
    if not changed or experiment.ppo.importance_correction != "none":
        return []
    settings = ", ".join(f"{name}={shortened(value_of(experiment, name), 60)}" for name in changed)
    return [
        f"{settings}: tokens are drawn from another distribution than the policy's own, whose log-probs PPO uses, so "
        "that its gradient is biased; ppo.importance_correction weighs for that (docs/ppo_details.md)"
    ]


def unheeded(name: str, wishes: dict[str, Any], rollout: RolloutConfig) -> list[str]:
    """A line where the generation config of the model ``name`` has ``wishes`` about sampling that the settings do not
    follow: other tools apply them unasked."""
    known = {wish: getattr(rollout, wish) for wish in wishes if hasattr(rollout, wish)}
    other = {wish: value for wish, value in wishes.items() if wish not in known or value != known[wish]}
    if not other:
        return []
    asked = ", ".join(f"{wish}={shortened(value, 60)}" for wish, value in other.items())
    ours = ", ".join(f"rollout.{wish}={shortened(known[wish], 60)}" for wish in other if wish in known)
    lacking = ", ".join(wish for wish in other if wish not in known)
    here = [f"it is {ours}" if ours else "", f"nothing gives {lacking}" if lacking else ""]
    return [
        f"{name} asks in its generation_config.json for {asked}; only the settings count, and here "
        f"{' and '.join(filter(None, here))}"
    ]
