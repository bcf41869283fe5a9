"""The kinds of runs, and which of them a file is about: its key ``kind`` says so, or its sections do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_toolkit.errors import ConfigError, nearest, shortened
from rlhf_toolkit.settings.experiment import DPOExperiment, Experiment, FineTuning, RewardExperiment, SFTExperiment

KIND = "kind"
"""The key of a file, beside its sections."""


@dataclass(frozen=True)
class RunKind:
    """A kind of run: what its file is read as, the sections that no other kind has, and its recipe's file."""

    experiment: type[Experiment] | type[FineTuning]
    sections: tuple[str, ...]
    recipe: str
    about: str


KINDS = {
    "ppo": RunKind(Experiment, ("ppo", "rollout", "reward", "alarms"), "ppo.py", "reinforcement learning"),
    "sft": RunKind(SFTExperiment, ("sft",), "sft.py", "supervised fine-tuning"),
    "reward": RunKind(RewardExperiment, ("reward_model",), "reward_model.py", "a reward model from pairs"),
    "dpo": RunKind(DPOExperiment, ("dpo",), "dpo.py", "direct preference optimisation"),
}


def kind_of(sections: Mapping[Any, Any], source: str) -> str:
    """The name in ``KINDS`` of what the ``sections`` of the file ``source`` describe. Raises ConfigError where they
    name no kind, or several."""
    if KIND in sections:
        return known_kind(sections[KIND], source)
    found = [name for name, kind in KINDS.items() if any(section in sections for section in kind.sections)]
    if len(found) == 1:
        return found[0]
    why = f"has sections of {' and '.join(found)}" if found else "has no section of one kind of run alone"
    raise ConfigError(f"{source} {why}; write kind: {', '.join(KINDS)} (one of them) as a line of its own in it")


def known_kind(value: Any, source: str) -> str:
    """The value of a file's key ``kind``. Raises ConfigError where it is no kind."""
    if isinstance(value, str) and value in KINDS:
        return value
    near = nearest(value, KINDS) if isinstance(value, str) else ""
    raise ConfigError(f"{source}: kind={shortened(value, 80)} is no kind of run{near}; known are {', '.join(KINDS)}")


def require_kind(value: Any, wanted: type[Any], source: str) -> None:
    """Raise ConfigError where a file's key ``kind`` is there and names another kind than that of ``wanted``."""
    if value is None:
        return
    kind = known_kind(value, source)
    if KINDS[kind].experiment is not wanted:
        needed = next((name for name, each in KINDS.items() if each.experiment is wanted), wanted.__name__)
        raise ConfigError(
            f"{source} says kind: {kind}, but this command runs {needed}; start it with rlhf train or "
            f"recipes/{KINDS[kind].recipe}, or give a file of that kind"
        )
