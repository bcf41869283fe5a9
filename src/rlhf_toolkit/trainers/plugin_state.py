"""The state of users' plugins in a checkpoint: JSON, and tensors, of every rank its own.

A plugin that lives in a worker process is not among them: see ``plugins.with_state``.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from rlhf_toolkit.errors import CheckpointError, described
from rlhf_toolkit.plugins import with_state

States = Mapping[str, Mapping[str, Any]]
"""What ``state_dict()`` gave, by what the settings say."""


def plugin_states() -> States:
    """The state of this process's plugins, which later changes do not reach."""
    return {spec: copy.deepcopy(plugin.state_dict()) for spec, plugin in with_state.items()}


def taken_apart(ranks: Sequence[States]) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """The states of all ranks as JSON, and the tensors among their values by a name that ``put_together`` knows.

    Raises CheckpointError for a state that is neither.
    """
    values: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for number, states in enumerate(ranks):
        values.append({})
        for spec, state in states.items():
            tensors |= {f"{number} {spec} {key}": value for key, value in state.items() if isinstance(value, Tensor)}
            values[-1][spec] = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
            try:
                same = json.loads(json.dumps(values[-1][spec])) == values[-1][spec]
            except (TypeError, ValueError, RecursionError):
                same = False
            if not same:
                raise CheckpointError(
                    f"state_dict() of {spec} gave something that is neither JSON nor a tensor; give lists, text, "
                    "numbers and objects with text as keys"
                )
    return values, tensors


def put_together(
    values: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor], *, rank: int, ranks: int
) -> States:
    """The states for ``rank`` of ``ranks``: its own, or where another number of ranks wrote them those of rank 0."""
    number = rank if len(values) == ranks else 0
    found = {spec: dict(state) for spec, state in values[number].items()}
    for name, tensor in tensors.items():
        owner, rest = name.split(" ", 1)
        spec, _, key = rest.rpartition(" ")
        if int(owner) == number:
            found[spec][key] = tensor
    return found


def restore_plugins(states: States) -> None:
    """Hand each plugin its state. Raises CheckpointError where one does not take it."""
    for spec, plugin in with_state.items():
        if spec in states:
            try:
                plugin.load_state_dict(states[spec])
            except Exception as error:  # the user's code
                raise CheckpointError(
                    f"load_state_dict of {spec} raised {described(error)}; repair it, or start with --overwrite"
                ) from error
