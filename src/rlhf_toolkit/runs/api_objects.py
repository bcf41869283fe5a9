"""What a program brings, as a YAML file would name it: functions, rows, a model and a tokenizer under names, with a
word about each for ``run.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_toolkit.checkpoints import fingerprint
from rlhf_toolkit.data.given_rows import rows_of
from rlhf_toolkit.errors import ConfigError, shortened
from rlhf_toolkit.given import MARK, MODEL, ROWS, TOKENIZER, What
from rlhf_toolkit.models.given_model import require_usable
from rlhf_toolkit.runs.api_functions import source_fingerprint

SPLIT_OF = {"data.train": "train_split", "data.evaluation": "evaluation_split"}


@dataclass
class Brought:
    """Objects by kind and name, and ``about``: for each setting that names one, what it is, in words."""

    objects: dict[tuple[What, str], Any] = field(default_factory=dict)
    about: dict[str, str] = field(default_factory=dict)

    def functions(self, functions: Mapping[tuple[What, str], Any]) -> None:
        """Take functions under the names that settings have for them."""
        self.objects |= functions
        for (_, name), function in functions.items():
            self.about[f"functions.{name}"] = f"source {source_fingerprint(function)}"

    def refuse_for_rewards(self, name: str | None) -> None:
        """Raise ConfigError where a reward model has the name that an object stands under: it would be taken for it."""
        if name is not None and {(MODEL, name), (TOKENIZER, name)} & self.objects.keys():
            raise ConfigError(
                f"reward.model={shortened(name)} is also what the given model or tokenizer came from; give the reward "
                "model's folder in another spelling, or the policy's name in place of the object"
            )

    def rows(self, value: Any, setting: str) -> str:
        """The name of rows; a file's or a hub dataset's is its own."""
        if isinstance(value, str):
            return value
        if hasattr(value, "__fspath__"):
            return str(value)
        rows, name = rows_of(value, setting), f"{MARK}{setting}"
        self.objects[ROWS, name] = rows
        self.about[setting] = f"{type(value).__name__} of {len(rows)} rows, fingerprint {fingerprint(rows)}"
        return name

    def model(self, value: Any, tokenizer: PreTrainedTokenizerBase | None) -> str:
        """The name of a model, and of its ``tokenizer``. One that is loaded already has that of what it came from."""
        if isinstance(value, str) or hasattr(value, "__fspath__"):
            name = str(value)
        else:
            require_usable(value)
            name = value.name_or_path or f"{MARK}{type(value).__name__}"
            self.objects[MODEL, name] = value
            size, dtype = sum(p.numel() for p in value.parameters()), str(value.dtype).removeprefix("torch.")
            self.about["model.name"] = f"{type(value).__name__} in {dtype}, {size} weights"
        if tokenizer is not None:
            if not isinstance(tokenizer, PreTrainedTokenizerBase):
                raise ConfigError(f"processing_class is a {type(tokenizer).__name__}, no tokenizer of transformers")
            self.objects[TOKENIZER, name] = tokenizer
            self.about["tokenizer"] = f"{type(tokenizer).__name__} of {len(tokenizer)} tokens"
        elif name.startswith(MARK):
            raise ConfigError("the model came from no folder that would have a tokenizer; give one as processing_class")
        return name
