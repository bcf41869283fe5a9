"""What a run takes for granted, said at its start, before it costs anything.

The model, the chat template, what ends a response, the first row as the model will see it, and what is trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from rlhf_toolkit.data.endings import stop_names
from rlhf_toolkit.data.instructions import Example
from rlhf_toolkit.data.preferences import Pair
from rlhf_toolkit.data.preview import is_rendered, row_lines, template_lines
from rlhf_toolkit.errors import shortened
from rlhf_toolkit.export.own_tokenizer import TEMPLATE, stops_beside
from rlhf_toolkit.models.folders import commit_of
from rlhf_toolkit.models.loading import MAIN
from rlhf_toolkit.settings.configs import ModelConfig
from rlhf_toolkit.types import Prompt

LONGEST = 400
"""Characters of a text of the first row."""


@dataclass(frozen=True)
class Opening:
    """What there is to say once a run's data is loaded. ``row`` is the first of the training rows, ``values`` the
    experiment's for the template, ``trained`` names what is trained, in words, and ``adapters`` are the folders that
    the run starts from or is rewarded by."""

    tokenizer: PreTrainedTokenizerBase
    stop_ids: Sequence[int]
    row: Example | Pair | Prompt
    values: Mapping[str, Any]
    trained: str
    stop_strings: Sequence[str] = ()
    adapters: Sequence[str] = ()

    def text(self, model: ModelConfig, config: PretrainedConfig) -> str:
        """Some ten lines, whatever is in the row."""
        shown = row_lines(self.row, self.tokenizer, self.values, longest=LONGEST)
        used = is_rendered(self.row)
        about = template_lines(self.tokenizer, self.stop_ids, used=used, stop_strings=self.stop_strings)
        lines = [f"model: {model_text(model, config)}", *about, *shown, f"trained: {self.trained}"]
        for folder in self.adapters:
            lines += taught_otherwise(Path(folder), self.tokenizer, self.stop_ids, config, template=used)
        return "\n".join(lines)


def model_text(model: ModelConfig, config: PretrainedConfig) -> str:
    """The model's name, its kind and, of the hub's, the revision and the commit that it is."""
    commit = commit_of(model.name, model.revision or MAIN)
    at = [f"revision {model.revision}"] if model.revision is not None else []
    at += [f"commit {commit[:12]}"] if commit is not None else []
    return ", ".join([f"{model.name} ({config.model_type})", *at])


def taught_otherwise(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Sequence[int],
    config: PretrainedConfig,
    *,
    template: bool,
) -> list[str]:
    """A line where the adapter in ``folder`` was trained with another chat template than the run's, which uses one with
    ``template``, or to stop at tokens that are none of ``stop_ids``: both lie beside it, where a run had its own."""
    others, ways_out, own, text = [], [], folder / TEMPLATE, str(tokenizer.chat_template).encode()
    if template and own.is_file() and (own.stat().st_size != len(text) or own.read_bytes() != text):
        others.append("another chat template")
        ways_out.append(f"data.chat_template: {shortened(str(own), 200)}")
    missing = {*stops_beside(folder, config)} - {*stop_ids}
    if missing:
        others.append("other stop tokens")
        ways_out.append(f"model.eos_token: {stop_names(missing, tokenizer)}")
    if not others:
        return []
    return [f"{folder} was trained with {' and '.join(others)} than this run has; set {' and '.join(ways_out)}"]


def adapters_text(model: ModelConfig, role: str, start: str | None) -> str:
    """The adapter of ``role``, new or going on from the folder ``start``, in words."""
    if start is not None:
        return f"the {role}'s adapter, from {start}"
    where = model.target_modules if isinstance(model.target_modules, str) else ", ".join(model.target_modules)
    return f"the {role}'s adapter (LoRA of rank {model.lora_rank} on {shortened(where)[1:-1]})"
