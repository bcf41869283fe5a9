"""What a run takes for granted, said at its start, before it costs anything.

The model, the chat template, what ends a response, the first row as the model will see it, and what is trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from rlhf_toolkit.data.instructions import Example
from rlhf_toolkit.data.preferences import Pair
from rlhf_toolkit.data.preview import is_rendered, row_lines, template_lines
from rlhf_toolkit.models.loading import commit_of
from rlhf_toolkit.settings.configs import ModelConfig
from rlhf_toolkit.types import Prompt

LONGEST = 400
"""Characters of a text of the first row."""


@dataclass(frozen=True)
class Opening:
    """What there is to say once a run's data is loaded. ``row`` is the first of the training rows, ``values`` the
    experiment's for the template, and ``trained`` names what is trained, in words."""

    tokenizer: PreTrainedTokenizerBase
    stop_ids: Sequence[int]
    row: Example | Pair | Prompt
    values: Mapping[str, Any]
    trained: str
    stop_strings: Sequence[str] = ()

    def text(self, model: ModelConfig, config: PretrainedConfig) -> str:
        """Some ten lines, whatever is in the row."""
        shown = row_lines(self.row, self.tokenizer, self.values, longest=LONGEST)
        used = is_rendered(self.row)
        about = template_lines(self.tokenizer, self.stop_ids, used=used, stop_strings=self.stop_strings)
        return "\n".join([f"model: {model_text(model, config)}", *about, *shown, f"trained: {self.trained}"])


def model_text(model: ModelConfig, config: PretrainedConfig) -> str:
    """The model's name, its kind and, of the hub's, the revision and the commit that it is."""
    commit = commit_of(model.name, model.revision)
    at = [f"revision {model.revision}"] if model.revision is not None else []
    at += [f"commit {commit[:12]}"] if commit is not None else []
    return ", ".join([f"{model.name} ({config.model_type})", *at])


def adapters_text(model: ModelConfig, role: str, start: str | None) -> str:
    """The adapter of ``role``, new or going on from the folder ``start``, in words."""
    if start is not None:
        return f"the {role}'s adapter, from {start}"
    where = model.target_modules if isinstance(model.target_modules, str) else ", ".join(model.target_modules)
    return f"the {role}'s adapter (LoRA of rank {model.lora_rank} on {where})"
