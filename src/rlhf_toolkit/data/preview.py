"""What the model will see, for people: text as it is tokenised, with what is trained on marked, and what was left out.

row 3: 24 tokens = 14 prompt + 10 response, 7 of them trained on
  context 14 | <|im_start|>user\\nWhat is 2 + 2?<|im_end|>\\n<|im_start|>assistant\\n
  trained  4 > 4<|im_end|>
  ...
  mask 14x0 4x1 3x0 3x1
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_toolkit.data.endings import stop_names
from rlhf_toolkit.data.instructions import Example, ExampleSet
from rlhf_toolkit.data.preferences import Pair, PairSet
from rlhf_toolkit.data.prompts import PromptSet
from rlhf_toolkit.data.template_files import TemplateFile
from rlhf_toolkit.data.template_values import template_values, values_text
from rlhf_toolkit.data.templates import NOTHING
from rlhf_toolkit.errors import DataError, shortened
from rlhf_toolkit.texts import printable
from rlhf_toolkit.types import Prompt

MOST_RUNS = 6
"""Lines of tokens that a row which is cut short has; two of them its last."""


def preview(
    rows: ExampleSet | PairSet | PromptSet,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    values: Mapping[str, Any] = NOTHING,
) -> str:
    """The first ``count`` examples, pairs or prompts, each as lines of one kind of token, then the set's summary.

    A line has the number of its tokens and their text, special tokens and all, line breaks and other invisible
    characters escaped as in a Python string: ``|`` stands before text that is given, ``>`` before text that gets a
    loss. The line ``mask`` spells the mask of an example as runs, ``14x0 10x1``; its prompt ends where the first ``>``
    begins. ``values`` are the experiment's for the template. DataError where ``count`` is less than 1.
    """
    if count < 1:
        raise DataError(f"count={count} rows to show is less than 1; give at least 1")
    lines = []
    for row in rows_of(rows)[:count]:
        lines += row_lines(row, tokenizer, values)
        if isinstance(row, Example):
            lines.append("  mask " + " ".join(f"{size}x{int(trained)}" for trained, size in runs_of(row)))
    return "\n".join([*lines, rows.summary()])


def rows_of(rows: ExampleSet | PairSet | PromptSet) -> Sequence[Example | Pair | Prompt]:
    """What a set holds."""
    if isinstance(rows, ExampleSet):
        return rows.examples
    return rows.pairs if isinstance(rows, PairSet) else rows.prompts


def row_lines(
    row: Example | Pair | Prompt,
    tokenizer: PreTrainedTokenizerBase,
    values: Mapping[str, Any] = NOTHING,
    *,
    longest: int | None = None,
) -> list[str]:
    """One row: its counts with what else its template was given, and a line for each run of tokens of one kind. With
    ``longest``, at most ``MOST_RUNS`` of these, and of each text at most so many characters, its middle left out."""
    if isinstance(row, Example):
        head, parts = example_parts(row)
    elif isinstance(row, Pair):
        head, parts = pair_parts(row)
    else:
        head, parts = prompt_parts(row, values)
    lines = [_line(kind, ids, tokenizer, trained, longest) for kind, ids, trained in parts]
    if longest is not None and len(lines) > MOST_RUNS:
        lines[MOST_RUNS - 2 : -2] = [f"  ... {len(lines) - MOST_RUNS} more"]
    return [head, *lines]


Parts = list[tuple[str, Sequence[int], bool]]
"""Runs of tokens: of which kind, their ids, and whether there is a loss on them."""


def example_parts(example: Example) -> tuple[str, Parts]:
    """An example's counts, and its runs of tokens."""
    head = (
        f"row {example.index}: {len(example.token_ids)} tokens = {example.prompt_length} prompt + "
        f"{example.response_length} response, {sum(example.trained)} trained on{_given(example.given)}"
    )
    start, parts = 0, Parts()
    for number, (trained, size) in enumerate(runs_of(example)):
        kind = "trained" if trained else "context" if number else "prompt"
        parts.append((kind, example.token_ids[start : start + size], trained))
        start += size
    return head, parts


def runs_of(example: Example) -> list[tuple[bool, int]]:
    """Whether there is a loss, and on how many tokens in a row."""
    return [(trained, len(list(run))) for trained, run in groupby(example.trained)]


def pair_parts(pair: Pair) -> tuple[str, Parts]:
    """A pair's counts, its prompt, and both responses."""
    head = (
        f"row {pair.index}: {len(pair.prompt_ids)} tokens of prompt + {len(pair.chosen_ids)} chosen or "
        f"{len(pair.rejected_ids)} rejected, margin {pair.margin:g}{_given(pair.given)}"
    )
    parts: Parts = [("prompt", pair.prompt_ids, False), ("chosen", pair.chosen_ids, True)]
    return head, [*parts, ("rejected", pair.rejected_ids, True)]


def prompt_parts(prompt: Prompt, values: Mapping[str, Any]) -> tuple[str, Parts]:
    """A prompt's count, and what the response continues; all that follows is sampled."""
    given = "" if prompt.messages is None else values_text(template_values(prompt.columns, values, index=prompt.index))
    head = f"row {prompt.index}: {len(prompt.token_ids)} tokens of prompt{_given(given)}"
    if prompt.messages is not None and prompt.messages[-1]["role"] == "assistant":
        head += f"; the response continues {shortened(prompt.messages[-1]['content'], 80)}"
    return head, [("prompt", prompt.token_ids, False)]


def is_rendered(row: Example | Pair | Prompt) -> bool:
    """Whether a chat template has made the row's text."""
    return row.messages is not None if isinstance(row, Prompt) else row.given is not None


def _given(words: str | None) -> str:
    return f"; with {words}" if words else ""


def template_lines(
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Collection[int],
    *,
    used: bool,
    stop_strings: Sequence[str] = (),
) -> list[str]:
    """How texts become tokens, where a chat template is ``used``, and what ends a response."""
    template = "none, texts are taken as they stand"
    if used:
        own = tokenizer.chat_template
        place = own.path if isinstance(own, TemplateFile) else "the tokenizer's own"
        template = f"{place}, {len(str(own))} characters"
    strings = f"; stop strings: {', '.join(shortened(string, 40) for string in stop_strings)}" if stop_strings else ""
    return [f"chat template: {template}", f"stop tokens: {stop_names(stop_ids, tokenizer)}{strings}"]


def _line(kind: str, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, trained: bool, longest: int | None) -> str:
    """Tokens of one ``kind`` as a line. Characters that would not print are escaped; others, of any language, stay."""
    text = str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
    if longest is not None and len(text) > longest:
        text = f"{text[: longest // 2]} ... {text[-(longest // 2) :]}"
    escaped = printable(text.replace("\\", "\\\\"))
    return f"  {kind:<8} {len(ids):>5} {'>' if trained else '|'} {escaped}"
