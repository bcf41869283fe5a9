"""What the model will see, for people: text as it is tokenised, with what is trained on marked, and what was left out.

row 3: 24 tokens = 14 prompt + 10 response, 7 of them trained on
  context 14 | <|im_start|>user\\nWhat is 2 + 2?<|im_end|>\\n<|im_start|>assistant\\n
  trained  4 > 4<|im_end|>
  ...
  mask 14x0 4x1 3x0 3x1
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from rlhf_toolkit.data.instructions import Example, ExampleSet
from rlhf_toolkit.data.preferences import Pair, PairSet
from rlhf_toolkit.errors import DataError
from rlhf_toolkit.texts import printable


def preview(rows: ExampleSet | PairSet, tokenizer: PreTrainedTokenizerBase, count: int) -> str:
    """The first ``count`` examples or pairs, each as lines of one kind of token, then the set's summary.

    A line has the number of its tokens and their text, special tokens and all, line breaks and other invisible
    characters escaped as in a Python string: ``|`` stands before text that is given, ``>`` before text that gets a
    loss. The line ``mask`` spells the mask of an example as runs, ``14x0 10x1``; its prompt ends where the first ``>``
    begins. DataError where ``count`` is less than 1.
    """
    if count < 1:
        raise DataError(f"count={count} rows to show is less than 1; give at least 1")
    if isinstance(rows, ExampleSet):
        shown = [line for example in rows.examples[:count] for line in example_lines(example, tokenizer)]
    else:
        shown = [line for pair in rows.pairs[:count] for line in pair_lines(pair, tokenizer)]
    return "\n".join([*shown, rows.summary()])


def example_lines(example: Example, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """One example: its counts, a line for each run of tokens of one kind, and its mask."""
    yield (
        f"row {example.index}: {len(example.token_ids)} tokens = {example.prompt_length} prompt + "
        f"{example.response_length} response, {sum(example.trained)} trained on"
    )
    start, runs = 0, [(trained, len(list(run))) for trained, run in groupby(example.trained)]
    for number, (trained, size) in enumerate(runs):
        kind = "trained" if trained else "context" if number else "prompt"
        yield _line(kind, example.token_ids[start : start + size], tokenizer, trained)
        start += size
    yield "  mask " + " ".join(f"{size}x{int(trained)}" for trained, size in runs)


def pair_lines(pair: Pair, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """One pair: its counts, the prompt, and both responses."""
    yield (
        f"row {pair.index}: {len(pair.prompt_ids)} tokens of prompt + {len(pair.chosen_ids)} chosen or "
        f"{len(pair.rejected_ids)} rejected, margin {pair.margin:g}"
    )
    yield _line("prompt", pair.prompt_ids, tokenizer, False)
    yield _line("chosen", pair.chosen_ids, tokenizer, True)
    yield _line("rejected", pair.rejected_ids, tokenizer, True)


def _line(kind: str, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, trained: bool) -> str:
    """Tokens of one ``kind`` as a line. Characters that would not print are escaped; others, of any language, stay."""
    text = str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
    escaped = printable(text.replace("\\", "\\\\"))
    return f"  {kind:<8} {len(ids):>5} {'>' if trained else '|'} {escaped}"
