"""The math reward: what it takes for the answer, what it calls equal, and that nothing makes it hang."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from rlhf_toolkit.errors import ConfigError, DataError
from rlhf_toolkit.rewards.math_texts import LONGEST_FORMULA, is_small, without_large
from rlhf_toolkit.rewards.verifiable import math
from tests.support.offenders import for_each

EQUAL = [
    (r"\frac{1}{2}", "1/2"),
    (r"\frac12", "0.5"),
    (r"\dfrac{1}{2}", "1/2"),
    (r"\frac{2}{4}", "1/2"),
    ("0.333333", "1/3"),
    ("1,000", "1000"),
    ("1000", "1,000"),
    ("1{,}000", "1000"),
    (r"50\%", "50"),
    (r"50\%", "0.5"),
    ("-3", "-3"),
    ("\u22123", "-3"),
    (r"5 \text{ cm}", "5"),
    (r"5\,\text{cm}^2", "5"),
    (r"\$5", "5"),
    (r"90^\circ", "90"),
    ("x = 5", "5"),
    ("3.0", "3"),
    ("007", "7"),
    ("10^{2}", "100"),
    ("3+4", "7"),
    (r"2\sqrt{2}", r"\sqrt{8}"),
    ("(x+1)^2", "x^2+2x+1"),
    ("1, 2", r"\{2, 1\}"),
    (r"(1, 2]", "(1,2]"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"\text{(B)}", "B"),
    (r"\text{Monday}", r"\text{Monday}"),
    ("7", 7),
    ("7", r"so it is \boxed{7}"),
    ("7", "$7$"),
    ("0", "0"),
    (r"\infty", r"\infty"),
]
DIFFERENT = [
    ("0.33", "1/3"),
    ("3", "-3"),
    ("1, 2, 3", "2"),
    ("7 or 8", "7"),
    ("x", "y"),
    ("[1, 2]", "(1, 2]"),
    ("100", "1000"),
    ("1.000", "1000"),
    (r"\text{Tuesday}", r"\text{Monday}"),
    ("C", "B"),
    ("", "0"),
    (r"\text{none}", "0"),
    ("1/0", "0"),
]


def one(response: str, answer: Any, **options: Any) -> float:
    return math(["p"], [response], answer=[answer], **options)[0]


@for_each("box, answer", EQUAL)
def test_an_answer_that_equals_the_truth_scores_one(box: str, answer: Any) -> None:
    assert one(rf"... so the answer is $\boxed{{{box}}}$.", answer) == 1


@for_each("box, answer", DIFFERENT)
def test_an_answer_that_differs_scores_zero(box: str, answer: Any) -> None:
    assert one(rf"... so the answer is $\boxed{{{box}}}$.", answer) == 0


@for_each(
    "response, expected",
    [
        (r"\boxed{3} no, \boxed{7}", 1),
        (r"\boxed{7} no, \boxed{3}", 0),
        (r"\boxed{\boxed{7}}", 1),
        (r"The answer is 7, that is \boxed{3}", 0),  # the box counts, wherever another number stands
        (r"\boxed{3}. The answer is 7", 0),
        (r"\boxed{7} and \boxed{3", 0),  # cut off
        (r"\boxed{7", 0),
        (r"\boxed{}", 0),
        ("The final answer is $7$.", 1),
        ("The final answer is $7$. I hope it is correct.", 1),
        ("Answer: 7", 1),
        ("3 + 4 = 7", 1),
        ("first 3, then 7", 1),
        ("first 7, then 3", 0),
        ("seven", 0),
        ("", 0),
        (" \n", 0),
        ("7 " + "x" * 10_000, 0),  # outside a box only the end is looked at
        ("x " * 500_000 + r"\boxed{7}", 1),
        (r"\boxed{" * 100_000, 0),
    ],
)
def test_which_answer_counts(response: str, expected: int) -> None:
    assert one(response, "7") == expected


def test_a_box_can_be_required() -> None:
    assert one("The answer is 7", "7", require_box=True) == 0
    assert one(r"\boxed{7}", "7", require_box=True) == 1


def test_long_boxes_are_wrong() -> None:
    assert one(rf"\boxed{{{'7'.rjust(LONGEST_FORMULA)}}}", "7") == 1
    assert one(rf"\boxed{{{'1+' * LONGEST_FORMULA}6}}", "7") == 0


@pytest.mark.parametrize(
    "bomb", ["9^{9^{9^{9}}}", "99999999!", "10^{10^{10}} - 10^{10^{10}} + 7", "(" * 400 + "7" + ")" * 400]
)
def test_bombs_end(bomb: str) -> None:
    """They take the time limit for the parse and for the comparison, not the hours that the numbers would."""
    start = time.monotonic()
    assert one(rf"\boxed{{{bomb}}}", "8", time_limit=1) == 0
    assert time.monotonic() - start < 60


def test_other_threads_have_no_limit_and_no_error() -> None:
    scores: list[float] = []
    thread = threading.Thread(target=lambda: scores.extend(math(["p"] * 2, [r"\boxed{7}", "8"], answer=["7"] * 2)))
    thread.start()
    thread.join()
    assert scores == [1, 0]


def test_rows_keep_their_order() -> None:
    assert math(["p"] * 3, ["1", r"\boxed{2}", "4"], answer=["1", "2", "3"], level=[1, 2, 3]) == [1, 1, 0]


@for_each("answer", ["", None, " ", "$$", True, ["7"], float("nan"), float("inf")])
def test_an_answer_that_says_nothing_is_refused(answer: Any) -> None:
    with pytest.raises(DataError, match="math cannot read"):
        one("7", answer)


def test_without_math_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "math_verify", None)
    with pytest.raises(ConfigError, match=r"pip install 'rlhf_toolkit\[tasks\]'"):
        one("7", "7")


# ---- what could grow is looked at before it is computed --------------------------------------------------------------

SMALL = (
    *(r"\frac{1}{2}", "x^2+3x+1", r"\frac{x^{10}}{3}", "2^{100}", "(x+1)^2", r"\sqrt{2}", "5!", "n!", r"e^{i\pi}"),
    *(
        r"(-\infty, 3]",
        r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
        "10^{-5}",
        "3.5e-5",
        "e^{-x^2}",
        r"90^\circ",
        "x^{1/2}",
    ),
    *(
        "2^{n+1}",
        r"\left(\frac{3}{4}\right)^{10}",
        "1,000,000",
        r"\{1,2,3\}",
        r"x^{\frac{1}{2}}",
        "(x^2+1)^3",
        "5! = 120",
    ),
)
LARGE = (
    *(
        "9^{9^{9^{9}}}",
        "9^{9^9}",
        "9^9^9",
        "9**9**9",
        "(9^9)^{999}",
        "((9^9)^9)^9^9",
        "2^{99999999}",
        "2^{10 ^ 10}",
        "9^(9^9)",
    ),
    *("99999999!", "9!!", "(9!)!", "9! !", r"\binom{9}{3}", r"\sum_{i=1}^{9} i", r"\int x", "1e9999999", "9" * 101),
    *("(x+1)^{9999}", "(x+y)^{21}", "{" * 13 + "x" + "}" * 13, "1+" * 90 + "1", "x" * 401, "9^{99*99}", "9^{-99999}"),
    *(r"\left(9^9\right)^{99}", "9\t^\n{9\t^\n9}", "9^{{9^{9}}}"),
)


def test_small_and_large_formulas() -> None:
    assert [text for text in SMALL if not is_small(text)] == []
    assert [text for text in LARGE if is_small(text)] == []


def test_large_formulas_are_wrong_at_once() -> None:
    """Each takes more than a minute, or all memory, where sympy computes it; here without math-verify's time limit."""
    begun = time.monotonic()
    texts = [form.format(text) for text in LARGE[:12] for form in (r"\boxed{{{}}}", "it is ${}$", "answer: {}")]
    assert [text for text in texts if one(text, "3", time_limit=None)] == []
    assert time.monotonic() - begun < 20
    with pytest.raises(DataError, match="math cannot read answer='9"):
        one("3", "9^{9^9}")


def test_a_small_formula_beside_a_large_one_still_counts() -> None:
    assert without_large(r"first $9^{9^9}$ and 9**9**9 then $7$ and 8!") == "first   and  then $7$ and 8!"
    assert one(r"first $9^{9^{9}}$, but the final answer is $7$", "7") == 1
