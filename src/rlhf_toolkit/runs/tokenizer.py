"""A run's tokenizer, as the settings want it: the model's own, with another chat template, with other stop tokens; and
what the settings say of how rows become its tokens."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from rlhf_toolkit.checkpoints import fingerprint
from rlhf_toolkit.data.template_files import TemplateFile, use_template
from rlhf_toolkit.data.tokenizers import end_with, stop_token_ids
from rlhf_toolkit.files import write_text
from rlhf_toolkit.given import TOKENIZER, given_object
from rlhf_toolkit.models.loading import generation_eos_of, load_tokenizer
from rlhf_toolkit.settings.configs import DataConfig, ModelConfig
from rlhf_toolkit.settings.supervised import DatasetConfig


def load_run_tokenizer(
    model: ModelConfig, chat_template: bool | str, config: PretrainedConfig, *, stop_strings: Sequence[str] = ()
) -> tuple[PreTrainedTokenizerBase, tuple[int, ...]]:
    """The tokenizer, and the ids that end a response: its EOS (with ``model.eos_token`` the first of these), those that
    ``model.eos_token`` names beside, and those of the model's generation config."""
    tokenizer = load_tokenizer(model.name, trust_remote_code=model.trust_remote_code, revision=model.revision)
    if isinstance(chat_template, str):
        use_template(tokenizer, chat_template)
    also: tuple[int, ...] = ()
    if model.eos_token is not None:
        tokens = [model.eos_token] if isinstance(model.eos_token, str) else model.eos_token
        also = end_with(tokenizer, tokens, vocab_size=config.get_text_config().vocab_size)
    generation_eos = generation_eos_of(model.name, config, model.revision)
    return tokenizer, stop_token_ids(tokenizer, generation_eos, also=also, stop_strings=stop_strings)


def reading(data: DataConfig | DatasetConfig) -> dict[str, Any]:
    """What the settings of data say to ``load_rows``."""
    return {"streaming": data.streaming, "max_rows": data.max_rows}


def rendering(data: DataConfig | DatasetConfig) -> dict[str, Any]:
    """What they say to whatever makes texts and tokens of rows: prompts, examples, pairs."""
    return {
        "chat_template": bool(data.chat_template),
        "system_prompt": data.system_prompt,
        "template_values": data.chat_template_kwargs,
    }


def identity_of_template(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The fingerprint of a chat template that is a file, for ``checkpoints.CHANGED``."""
    template = tokenizer.chat_template
    return {"template": fingerprint([str(template)])} if isinstance(template, TemplateFile) else {}


def travelling(model: ModelConfig, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]) -> partial[None] | None:
    """What writes the tokenizer and the stop tokens into a folder, where they are others than the base's: whoever
    merges the adapter or talks to it finds them beside its weights.

    It writes the tokenizer as it is now. Checkpoints are written in a thread, and whoever calls a tokenizer with
    padding or truncation leaves both in its files until the next call.
    """
    given = given_object(TOKENIZER, model.name) is not None
    if not given and model.eos_token is None and not isinstance(tokenizer.chat_template, TemplateFile):
        return None
    with tempfile.TemporaryDirectory() as saved:
        tokenizer.save_pretrained(saved)
        files = {path.relative_to(saved): path.read_bytes() for path in Path(saved).rglob("*") if path.is_file()}
    return partial(_write, files, [*stop_ids])


def _write(files: Mapping[Path, bytes], stop_ids: list[int], folder: Path) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    if not (folder / "config.json").is_file():  # a whole model's generation config names them already
        write_text(folder / "generation_config.json", json.dumps({"eos_token_id": stop_ids}) + "\n")
