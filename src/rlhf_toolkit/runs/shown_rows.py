"""``rlhf data show``: rows as a run would see them, without one: its tokenizer, its template, its stop tokens."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from rlhf_toolkit.data.endings import check_turn_end
from rlhf_toolkit.data.instructions import ExampleSet, is_example_shape, tokenise_examples
from rlhf_toolkit.data.preferences import PairSet, tokenise_pairs
from rlhf_toolkit.data.preview import is_rendered, preview, rows_of, template_lines
from rlhf_toolkit.data.prompts import PromptSet, load_rows, tokenise_prompts
from rlhf_toolkit.data.streams import Rows
from rlhf_toolkit.data.template_values import template_values
from rlhf_toolkit.errors import ConfigError, DataError, shortened
from rlhf_toolkit.export.folders import revision_of
from rlhf_toolkit.models.loading import load_model_config
from rlhf_toolkit.runs.opening import model_text
from rlhf_toolkit.runs.tokenizer import load_run_tokenizer, reading, rendering
from rlhf_toolkit.settings.configs import ModelConfig
from rlhf_toolkit.settings.supervised import DatasetConfig
from rlhf_toolkit.settings.yaml_text import read_yaml

EXAMPLES, PAIRS, PROMPTS = KINDS = ("examples", "pairs", "prompts")
COLUMN = "prompt"
"""Of prompts, where none is named."""


@dataclass(frozen=True)
class Asked:
    """Which rows: of ``data.train``, read as ``kind`` (None: as their columns say), the first ``count``; ``column``
    holds the prompts, ``turns`` is as in ``sft.turns`` and ``stop_strings`` as in ``rollout.stop_strings``."""

    model: ModelConfig
    data: DatasetConfig
    kind: str | None = None
    column: str = COLUMN
    turns: str = "all"
    stop_strings: tuple[str, ...] = ()
    count: int = 3


def asked(words: Mapping[str, Any]) -> Asked:
    """What a command line has asked for, by the names of its arguments. Raises ConfigError as settings do."""
    if words["chat_template"] and words["no_chat_template"]:
        raise ConfigError("--chat-template and --no-chat-template exclude one another; leave one of them out")
    pairs = [(text, *text.partition("=")[::2]) for text in words["template_value"]]
    values = {name: read_yaml(value, f"--template-value {shortened(text)[1:-1]}") for text, name, value in pairs}
    name, revision = revision_of(words["model"])
    data = DatasetConfig(
        train=words["source"],
        train_split=words["split"],
        chat_template=words["chat_template"] or not words["no_chat_template"],
        chat_template_kwargs=values,
        **{name: words[name] for name in ("streaming", "max_rows", "system_prompt", "max_tokens")},
    )
    model = ModelConfig(name=name, revision=revision, eos_token=words["eos_token"] or None)
    strings = tuple(words["stop_string"])
    return Asked(
        model, data, stop_strings=strings, **{name: words[name] for name in ("kind", "column", "turns", "count")}
    )


def shown_rows(asked: Asked) -> str:
    """Model, template and stop tokens, the rows token by token, and what was left out. Raises a subclass of RLHFError
    for what a run would refuse, but for a turn that no stop token ends, which stands behind the rows."""
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what it logs of a broken file is in the error, too
    model, data, strings = asked.model, asked.data, asked.stop_strings
    config = load_model_config(model.name, trust_remote_code=model.trust_remote_code, revision=model.revision)
    tokenizer, stop_ids = load_run_tokenizer(model, data.chat_template, config, stop_strings=strings)
    rows = load_rows(data.train, data.train_split, **reading(data))
    kind = asked.kind or kind_of(rows, asked.column)
    refuse_idle(asked, kind)
    if kind == PROMPTS and asked.column not in rows.column_names:
        columns = shortened(", ".join(rows.column_names), 400)[1:-1]
        raise ConfigError(f"no column {shortened(asked.column, 80)}; name one of these with --column: {columns}")
    found = tokenised(asked, kind, rows, tokenizer, stop_ids)
    about = template_lines(tokenizer, stop_ids, used=is_rendered(rows_of(found)[0]), stop_strings=strings)
    shown = preview(found, tokenizer, asked.count, data.chat_template_kwargs)
    more = turn_lines(asked, found, tokenizer, stop_ids) if isinstance(found, PromptSet) else []
    return "\n".join([f"model: {model_text(model, config)}", *about, shown, *more])


def kind_of(rows: Rows, column: str) -> str:
    """What rows with such columns are read as."""
    if {"chosen", "rejected"} <= {*rows.column_names}:
        return PAIRS
    return PROMPTS if column in rows.column_names and not is_example_shape(rows) else EXAMPLES


def refuse_idle(asked: Asked, kind: str) -> None:
    """Raise ConfigError for an option that says nothing about rows that are read as ``kind``."""
    options = (
        ("--column", asked.column != COLUMN, PROMPTS),
        ("--stop-string", bool(asked.stop_strings), PROMPTS),
        ("--turns last", asked.turns != "all", EXAMPLES),
    )
    for option, given, of in options:
        if given and kind != of:
            raise ConfigError(
                f"{option} is about {of}, and these rows are read as {kind}; leave it out, or say --as {of}"
            )


def tokenised(
    asked: Asked, kind: str, rows: Rows, tokenizer: PreTrainedTokenizerBase, stop_ids: tuple[int, ...]
) -> ExampleSet | PairSet | PromptSet:
    """The set of examples, pairs or prompts, by ``kind``."""
    most, options = asked.data.max_tokens, rendering(asked.data)
    if kind == PROMPTS:
        return tokenise_prompts(rows, tokenizer, column=asked.column, max_prompt_tokens=most, **options)
    options |= {"max_tokens": most, "stop_ids": stop_ids}
    if kind == PAIRS:
        return tokenise_pairs(rows, tokenizer, **options)
    return tokenise_examples(rows, tokenizer, turns=asked.turns, **options)


def turn_lines(
    asked: Asked, found: PromptSet, tokenizer: PreTrainedTokenizerBase, stop_ids: tuple[int, ...]
) -> list[str]:
    """What a run of PPO would say or raise about the end of the assistant's turn."""
    chat = next((prompt for prompt in found.prompts if prompt.messages), None)
    if chat is None:
        return []
    try:
        said = check_turn_end(
            chat.messages or (),
            tokenizer,
            template_values(chat.columns, asked.data.chat_template_kwargs, index=chat.index),
            index=chat.index,
            stop_ids=stop_ids,
            stop_strings=asked.stop_strings,
            chosen=asked.model.eos_token is not None,
        )
    except DataError as error:
        return [f"a run would be refused: {error}"]
    return [] if said is None else [said]
