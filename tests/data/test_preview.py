"""What the model will see, spelled out; and put together again from what is shown."""

from __future__ import annotations

import re

import datasets
import pytest

from rlhf_toolkit.data.instructions import Example, ExampleSet, tokenise_examples
from rlhf_toolkit.data.preferences import tokenise_pairs
from rlhf_toolkit.data.preview import preview
from rlhf_toolkit.errors import DataError
from tests.support.chat_tokenizers import ask, byte_tokenizer, said, word_tokenizer

ROWS = [
    {"messages": [said("system", "be brief"), *ask("a", "b c", "hello", "world")]},
    {"messages": ask("a", "")},
    {"messages": ask("hello world a b c", "a")},
    {"messages": ask("a", "b")},
]


def kept(count: int = 4) -> ExampleSet:
    return tokenise_examples(datasets.Dataset.from_list(ROWS[:count]), word_tokenizer(), max_tokens=14)


def test_examples() -> None:
    assert preview(kept(), word_tokenizer(), 1).splitlines() == [
        "row 0: 14 tokens = 6 prompt + 8 response, 5 trained on",
        "  prompt       6 | <system> be brief <user> a <assistant>",
        "  trained      3 > b c </s>",
        "  context      3 | <user> hello <assistant>",
        "  trained      2 > world </s>",
        "  mask 6x0 3x1 3x0 2x1",
        "3 of 4 examples, 5 to 14 tokens, 2 to 5 of them trained on; dropped 1 empty response; loss on every assistant "
        "message of messages",
    ]


def test_pairs() -> None:
    rows = [
        {"prompt": "hello", "chosen": "world", "rejected": "a b", "margin": 0.5},
        {"prompt": "hello", "chosen": "a", "rejected": "a", "margin": 1.0},
    ]
    found = tokenise_pairs(datasets.Dataset.from_list(rows), word_tokenizer(), max_tokens=14)
    assert preview(found, word_tokenizer(), 5).splitlines() == [
        "row 0: 3 tokens of prompt + 2 chosen or 3 rejected, margin 0.5",
        "  prompt       3 | <user> hello <assistant>",
        "  chosen       2 > world </s>",
        "  rejected     3 > a b </s>",
        "1 of 2 pairs, 3 to 3 tokens of prompt, 2 to 2 of chosen and 3 to 3 of rejected response; dropped 1 chosen "
        "equals rejected; from columns prompt, chosen, rejected, margin",
    ]


@pytest.mark.parametrize(("count", "rows"), [(1, [0]), (2, [0, 2]), (3, [0, 2, 3]), (100, [0, 2, 3])])
def test_as_many_as_asked_for(count: int, rows: list[int]) -> None:
    shown = re.findall(r"^row (\d+):", preview(kept(), word_tokenizer(), count), flags=re.MULTILINE)
    assert list(map(int, shown)) == rows


@pytest.mark.parametrize("count", [0, -1])
def test_none_to_show(count: int) -> None:
    with pytest.raises(DataError, match=rf"^count={count} rows to show is less than 1; give at least 1$"):
        preview(kept(), word_tokenizer(), count)


def test_lines_and_mask_can_be_put_together_again() -> None:
    """The text, unescaped, is the conversation; the runs are the mask; the boundary is the prompt's length."""
    tokenizer = byte_tokenizer()
    rows = datasets.Dataset.from_list([{"messages": ask("two\nlines \\n", "tab\tand Δ🙂", "a | b > c", "\u200b x")}])
    found = tokenise_examples(rows, tokenizer, max_tokens=1000)
    (example,) = found.examples
    lines = preview(found, tokenizer, 1).splitlines()
    runs = [match for line in lines if (match := re.fullmatch(r"  (\w+) +(\d+) ([|>]) (.*)", line))]
    escapes = re.compile(r"\\(\\|n|t|u[0-9a-f]{4})")
    text = escapes.sub(lambda match: match[0].encode().decode("unicode_escape"), "".join(match[4] for match in runs))
    assert text == tokenizer.decode(list(example.token_ids))
    mask = [match[3] == ">" for match in runs for _ in range(int(match[2]))]
    assert tuple(mask) == example.trained
    spelled = re.findall(r"(\d+)x([01])", next(line for line in lines if line.startswith("  mask")))
    assert tuple(bit == "1" for size, bit in spelled for _ in range(int(size))) == example.trained
    assert [match[1] for match in runs] == ["prompt", "trained", "context", "trained"]
    assert int(runs[0][2]) == example.prompt_length


def test_special_tokens_are_shown_even_where_they_are_padding() -> None:
    tokenizer = word_tokenizer(pad="</s>")
    ids = tuple(tokenizer("a </s> </s>").input_ids)
    shown = preview(ExampleSet((Example(4, ids, (False, True, True)),), 1), tokenizer, 1)
    assert "  trained      2 > </s> </s>" in shown.splitlines()
    assert shown.splitlines()[-1] == "1 of 1 examples, 3 to 3 tokens, 2 to 2 of them trained on; none dropped"
