"""What reaches a terminal."""

from __future__ import annotations

import io
import sys
import unicodedata
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from rlhf_toolkit import texts
from rlhf_toolkit.errors import DataError, described, shortened
from rlhf_toolkit.texts import LINES, WORDS, printable, quoted, say

HARMLESS = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Categories of Unicode of which no character may reach a terminal."""
VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner) | st.tuples(inner),
    max_leaves=8,
)


def test_no_character_of_a_dangerous_category_passes() -> None:
    every = [chr(number) for number in range(sys.maxunicode + 1)]
    dangerous = "".join(each for each in every if unicodedata.category(each) in HARMLESS)
    shown = printable(dangerous)
    assert shown.isprintable() and not any(unicodedata.category(each) in HARMLESS for each in set(shown))
    assert len(set(dangerous)) > 900_000  # it is most of Unicode


def test_text_of_any_language_passes_and_lines_only_where_they_may() -> None:
    plain = "Grüße, 語, سلام, हिन्दी 🙂"
    assert printable(plain) == plain
    assert printable("a\nb\tc\x1b") == "a\\nb\\tc\\x1b"
    assert printable("a\nb\tc\r", LINES) == "a\nb\tc\\r"
    assert printable("a\u3000b\u200dc\u202e", WORDS) == "a\u3000b\u200dc\\u202e"
    assert printable("x" * 50, longest=10) == "x" * 10 + "..."


@given(VALUES)
def test_a_value_is_quoted_as_python_would(value: Any) -> None:
    whole = " ".join(repr(value).split())
    assert quoted(value, 10_000) == printable(whole)
    assert quoted(value, 3) == printable(whole if len(whole) <= 3 else whole[:3] + "...")


def test_a_bomb_is_quoted_at_once() -> None:
    bomb: Any = "x"
    for _ in range(60):
        bomb = [bomb] * 10
    loop: list[Any] = []
    loop.append(loop)
    assert len(shortened(bomb)) <= 203 and len(shortened(loop)) <= 203
    assert len(shortened({"a": "y" * 10**7})) == 203
    assert "bits" in shortened(10**5000)


class Mute(Exception):
    """Its text cannot be had."""

    def __str__(self) -> str:
        raise ValueError


def test_an_error_is_one_line_that_prints_whatever_stands_in_it() -> None:
    raw = "\x1b[2J\nTraceback\u202e\ud800"
    assert str(DataError(f"column {raw}")) == "column \\x1b[2J\\nTraceback\\u202e\\ud800"
    assert described(ValueError(raw)) == "ValueError: \\x1b[2J Traceback\\u202e\\ud800"
    assert len(str(DataError("x" * 10**6))) < 5000
    assert "raises ValueError" in described(Mute())


def test_a_secret_is_not_said(monkeypatch: Any) -> None:
    monkeypatch.setattr(texts, "_secrets", set())
    texts.keep_secret("abc'def\n")
    texts.keep_secret("abc")  # too short: words would hold it
    out = io.StringIO()
    say("key abc'def\n and abc", out)
    assert out.getvalue() == f"key {texts.HIDDEN} and abc\n"
    assert "def" not in shortened(["abc'def\n"]) and "def" not in str(DataError("abc'def\n"))
