"""The verifiable rewards that need no library of their own: gsm8k, countdown and the format, by hard cases."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from typing import Any

import pytest

from rlhf_toolkit.errors import ConfigError, DataError
from rlhf_toolkit.plugins import load_function
from rlhf_toolkit.rewards import texts
from rlhf_toolkit.rewards.calls import Batch
from rlhf_toolkit.rewards.countdown import LONGEST_EXPRESSION, parsed
from rlhf_toolkit.rewards.pool import worker_pool
from rlhf_toolkit.rewards.specification import RewardSpec
from rlhf_toolkit.rewards.verifiable import countdown, gsm8k, think_answer_format
from tests.support.offenders import for_each

HUGE = "blah 7 #### " * 100_000
MINUS, TIMES, OVER = "\u2212", "\u00d7", "\u00f7"


@for_each("name", ["math", "gsm8k", "countdown", "think_answer_format", "reasoning_gym"])
def test_yaml_finds_every_reward(name: str) -> None:
    assert load_function(f"rlhf_toolkit.rewards.verifiable:{name}", "reward.function").__name__ == name


# ---- gsm8k -----------------------------------------------------------------------------------------------------------

GSM8K = [
    # response, truth, strict, flexible
    ("so 6 * 7 = 42\n#### 42", "42", 1, 1),
    ("#### 41\n... no:\n#### 42", "42", 1, 1),
    ("#### 42\n... no:\n#### 41", "42", 0, 0),
    ("#### 1,000", "1000", 1, 1),
    ("#### 1000", "1,000", 1, 1),
    ("#### 1,000.00", 1000, 1, 1),
    ("#### 0.1", 0.1, 1, 1),
    ("#### -5", "-5", 1, 1),
    (f"#### {MINUS}5", "-5", 1, 1),
    ("#### 5", "-5", 0, 0),
    ("#### 42.", "42", 1, 1),
    ("#### 42.5", "42", 0, 0),
    ("#### 1.2.3", "1.2", 0, 0),
    ("#### .5", "0.5", 1, 1),
    ("#### 50%", "50", 1, 1),
    ("#### 3/4", "3", 1, 0),  # what follows the number is not looked at, as in GSM8K's own rule
    ("#### $42", "42", 0, 1),
    ("#### about 42", "42", 0, 1),
    ("####42", "42", 0, 1),
    ("### 42", "42", 0, 1),
    ("#### ,", "42", 0, 0),
    ("#### \u0664\u0662", "42", 0, 0),  # digits of another script are no digits
    ("The answer is 42", "42", 0, 1),
    ("42 eggs, 3 baskets", "42", 0, 0),
    ("", "0", 0, 0),
    ("####", "0", 0, 0),
    ("#### " + "9" * 250, "9", 0, 0),
    ("#### 42" + " " * 300, "42", 0, 0),  # only the end is looked at
    ("#### 42" + " " * 293, "42", 1, 1),
    (HUGE, "7", 0, 1),
    ("#### 42", "She has 6 * 7 = <<6*7=42>>42 eggs.\n#### 42", 1, 1),
    ("#### 1234", "He pays 1,234 dollars.\n#### 1,234", 1, 1),
]


@for_each("response, truth, strict, flexible", GSM8K)
def test_gsm8k_by_hand(response: str, truth: Any, strict: int, flexible: int) -> None:
    assert gsm8k(["p"], [response], answer=[truth]) == [strict]
    assert gsm8k(["p"], [response], answer=[truth], flexible=True) == [flexible]


def test_gsm8k_scores_each_row_by_its_own_truth_and_ignores_other_columns() -> None:
    answers = ["1", "2", "3"]
    assert gsm8k(["p"] * 3, ["#### 3", "#### 2", "#### 1"], answer=answers, solution=["x"] * 3) == [0, 1, 0]
    assert gsm8k([], [], answer=[]) == []


@for_each("truth", ["", "forty-two", None, "#### x", True, float("nan"), float("inf"), "1e3"])
def test_gsm8k_refuses_a_truth_that_is_no_number(truth: Any) -> None:
    with pytest.raises(DataError, match="give a number"):
        gsm8k(["p"], ["#### 1"], answer=[truth])


@pytest.mark.parametrize("column", [["1"], ["1", "2", "3"], "12"])
def test_columns_of_another_length_are_refused(column: Any) -> None:
    with pytest.raises(DataError, match="answer for 2 responses"):
        gsm8k(["p"] * 2, ["#### 1"] * 2, answer=column)


# ---- countdown -------------------------------------------------------------------------------------------------------


def score(answer: str, numbers: list[int], target: Any, **options: Any) -> float:
    """Of one response that puts `answer` into the tags."""
    return countdown(
        ["p"], [f"<think>hm</think> <answer>{answer}</answer>"], numbers=[numbers], target=[target], **options
    )[0]


COUNTDOWN = [
    ("44 + 19 - 35", [44, 19, 35], 28, 1),
    ("(1 + 2) / 3", [1, 2, 3], 1, 1),
    ("8 / (3 - 8 / 3)", [8, 3, 8, 3], 24, 1),  # exact; floats give 23.99999999999999
    ("1/3 + 1/3 + 1/3", [1, 3, 1, 3, 1, 3], 1, 1),
    ("2 - 5", [2, 5], -3, 1),
    ("-5 + 2", [2, 5], -3, 1),
    (f"2 {MINUS} 5", [2, 5], -3, 1),
    (f"6 {TIMES} 7", [6, 7], 42, 1),
    (f"84 {OVER} 2", [84, 2], 42, 1),
    ("6\n * 7", [6, 7], 42, 1),
    ("1 / 2", [1, 2], "1/2", 1),
    ("1 / 2", [1, 2], 0.5, 1),
    ("((((6)))) * 7", [6, 7], 42, 1),
    ("6 + 7", [6, 7], 42, 0.1),  # another value
    ("42", [6, 7], 42, 0.1),  # another number
    ("6 * 7 * 1", [6, 7], 42, 0.1),
    ("6 * 6 + 6", [6], 42, 0.1),  # a number used again
    ("6 * 7 + 1 - 1", [6, 7, 1], 42, 0.1),
    ("6 * 7", [6, 7, 3], 42, 0.1),  # a number left over
    ("6 / (7 - 7)", [6, 7, 7], 42, 0.1),
    ("1 / (1 / 0)", [1, 1, 2], 42, 0.1),
    ("6 * 7 = 42", [6, 7], 42, 0),
    ("42 = 6 * 7", [6, 7], 42, 0),
    ("6 == 6", [6, 6], 42, 0),
    ("6 ** 7", [6, 7], 6**7, 0),
    ("9 ** 9 ** 9 ** 9", [9] * 4, 1, 0),
    ("85 // 2", [85, 2], 42, 0),
    ("85 % 43", [85, 43], 42, 0),
    ("6 << 7", [6, 7], 768, 0),
    ("6 * ~7", [6, 7], 42, 0),
    ("6 x 7", [6, 7], 42, 0),
    ("6 * x", [6, 7], 42, 0),
    ("6.0 * 7", [6, 7], 42, 0),
    ("4.2e1", [4, 2], 42, 0),
    ("0x2A", [42], 42, 0),
    ("4_2", [42], 42, 0),
    ("042", [42], 42, 0),
    ("6 7", [6, 7], 67, 0),
    ("6(7)", [6, 7], 42, 0),
    ("(6)(7)", [6, 7], 42, 0),  # parses, as a call
    ("6, 7", [6, 7], 42, 0),
    ("\u0666 * \u0667", [6, 7], 42, 0),
    ("__import__('os').getcwd()", [6, 7], 42, 0),
    ("(lambda: 42)()", [6, 7], 42, 0),
    ("\\boxed{6 * 7}", [6, 7], 42, 0),
    ("6 * 7 # ok", [6, 7], 42, 0),
    ("(6 * 7", [6, 7], 42, 0),
    ("", [6, 7], 42, 0),
    ("()", [6, 7], 42, 0),
    ("I cannot", [6, 7], 42, 0),
    ("(" * 120 + "6" + ")" * 120 + " * 7", [6, 7], 42, 1),
    ("(" * 250 + "6", [6, 7], 42, 0),
    ("-" * 254 + "6", [6], 6, 1),
    ("-" * 300 + "6", [6], 6, 0),
    ("9" * (LONGEST_EXPRESSION + 1), [9], 9, 0),
    ("9" * LONGEST_EXPRESSION, [9], 9, 0.1),
    ("1+" * 100_000 + "1", [1], 1, 0),
]


@for_each("answer, numbers, target, expected", COUNTDOWN)
def test_countdown_by_hand(answer: str, numbers: list[int], target: Any, expected: float) -> None:
    assert score(answer, numbers, target) == expected


@for_each(
    "response, expected",
    [
        ("<answer>6 + 7</answer> no: <answer>6 * 7</answer>", 1),
        ("<answer>6 * 7</answer> no: <answer>6 + 7</answer>", 0.1),
        ("<answer>6 * 7</answer> <answer>6 +", 1),  # the last one that is closed
        ("<answer> <answer>6 * 7</answer>", 1),
        ("6 * 7</answer>", 0),
        ("<answer>6 * 7", 0),
        ("</answer><answer>6 * 7", 0),
        ("<Answer>6 * 7</Answer>", 0),
        ("6 * 7", 0),
        ("", 0),
        ("<answer>" * 100_000, 0),
        ("x" * 1_000_000 + "<answer>6 * 7</answer>", 1),
    ],
)
def test_countdown_takes_the_last_closed_tag(response: str, expected: float) -> None:
    assert countdown(["p"], [response], numbers=[[6, 7]], target=[42]) == [expected]


def test_countdown_options() -> None:
    assert score("6 * 7", [6, 7, 3], 42, use_all=False) == 1
    assert score("6 * 7 + 3 - 3", [6, 7, 3], 42, use_all=False) == 0.1
    assert score("6 + 7", [6, 7], 42, format_score=0.0) == 0
    assert score("6 + 7", [6, 7], 42, format_score=0.25) == 0.25


@for_each("numbers", [[1, -2], [0], [1.5], ["1"], [True], "12"])
def test_countdown_refuses_other_numbers(numbers: Any) -> None:
    with pytest.raises(DataError, match="positive integers"):
        countdown(["p"], ["x"], numbers=[numbers], target=[1])


@for_each("target", ["", "x", None, "1/0", float("nan")])
def test_countdown_refuses_other_targets(target: Any) -> None:
    with pytest.raises(DataError, match="give a number"):
        countdown(["p"], ["x"], numbers=[[1]], target=[target])


def every_expression(numbers: tuple[int, ...]) -> dict[str, Fraction | None]:
    """All ways to combine `numbers`, in this order, with + - * / and parentheses, and their values."""
    if len(numbers) == 1:
        return {str(numbers[0]): Fraction(numbers[0])}
    found: dict[str, Fraction | None] = {}
    for cut in range(1, len(numbers)):
        lefts, rights = every_expression(numbers[:cut]), every_expression(numbers[cut:])
        for (left, a), (right, b), sign in itertools.product(lefts.items(), rights.items(), "+-*/"):
            if a is None or b is None or (sign == "/" and b == 0):
                value = None
            else:
                value = {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else a}[sign]
            found[f"({left} {sign} {right})"] = value
    return found


@pytest.mark.parametrize("numbers", [(3, 8), (2, 2, 5), (1, 3, 4, 6), (8, 3, 8, 3)])
def test_countdown_agrees_with_brute_force(numbers: tuple[int, ...]) -> None:
    """1, 3, 4, 6 reaches 24 in one way, 6 / (1 - 3 / 4), and it is a fraction's."""
    values: dict[str, Fraction | None] = {}
    for order in set(itertools.permutations(numbers)):
        values |= every_expression(order)
    targets = [Fraction(24), *random.Random(0).sample(sorted({v for v in values.values() if v is not None}), 3)]
    for target in targets:
        right = {text for text, value in values.items() if value == target}
        wanted = [1.0 if text in right else 0.1 for text in values]
        responses = [f"<answer>{text}</answer>" for text in values]
        rows = len(values)
        given = countdown(["p"] * rows, responses, numbers=[list(numbers)] * rows, target=[str(target)] * rows)
        assert given == wanted
    solutions = Counter(value == 24 for value in values.values())
    assert (solutions[True] > 0) == (numbers not in [(2, 2, 5)])


def test_parsing_builds_nothing_but_arithmetic() -> None:
    assert parsed("1 + (2 * 3)") is not None
    assert parsed("1 if 2 else 3") is None and parsed("[1]") is None and parsed("1 < 2") is None


# ---- format ----------------------------------------------------------------------------------------------------------

FORMS = [
    ("<think>a</think><answer>b</answer>", 1),
    ("<think>a\nb</think>\n\n<answer>\nc\n</answer>", 1),
    ("  <think>a</think> <answer>b</answer>\n", 1),
    ("<think></think><answer></answer>", 1),
    ("<think>a < b and c > d</think><answer>b</answer>", 1),
    ("<think>a</think> so <answer>b</answer>", 0),
    ("Sure: <think>a</think><answer>b</answer>", 0),
    ("<think>a</think><answer>b</answer> Done.", 0),
    ("<think>a</think><answer>b</answer><answer>c</answer>", 0),
    ("<think>a</think><think>a</think><answer>b</answer>", 0),
    ("<think>a <answer>b</answer></think>", 0),
    ("<think>a<think></think><answer>b</answer>", 0),
    ("<answer>b</answer><think>a</think>", 0),
    ("<think>a</think><answer>b", 0),
    ("<think>a<answer>b</answer>", 0),
    ("<answer>b</answer>", 0),
    ("<THINK>a</THINK><ANSWER>b</ANSWER>", 0),
    ("< think>a</think><answer>b</answer>", 0),
    ("", 0),
    ("<think>" * 100_000, 0),
    ("<think>" + "a" * 1_000_000 + "</think><answer>b</answer>", 1),
]


@for_each("response, expected", FORMS)
def test_format_by_hand(response: str, expected: int) -> None:
    assert think_answer_format(["p"], [response], other=[1]) == [expected]
    if expected:
        continued = response.strip().removeprefix("<think>")
        assert think_answer_format(["p"], [continued], prefilled=True) == [1]
        assert think_answer_format(["p"], [response], prefilled=True) == [0]
        assert think_answer_format(["p"], [continued]) == [0]
        prompts = ["p", "<assistant> <think>\n", "a <think> in the middle"]  # each prompt's own end decides
        assert think_answer_format(prompts, [response, continued, response]) == [1, 1, 1]
        assert think_answer_format(prompts, [continued, response, continued]) == [0, 0, 0]


@for_each(
    "response, expected",
    [
        ("[THINK]a[/THINK] b", 1),
        (" [THINK]a\n[/THINK]b\nc ", 1),
        ("[THINK]a[/THINK] ", 0),
        ("[THINK]a[/THINK]b[/THINK]c", 0),
        ("so [THINK]a[/THINK]b", 0),
        ("THINKa/THINK b", 0),
        ("<think>a</think><answer>b</answer>", 0),
    ],
)
def test_a_format_of_other_tags(response: str, expected: int) -> None:
    tags = ["[THINK]", "[/THINK]"]
    assert think_answer_format(["p"], [response], format_tags=tags) == [expected]
    if expected:
        continued = response.strip().removeprefix("[THINK]")
        assert think_answer_format(["p [THINK]", "<think>"], [continued] * 2, format_tags=tags) == [1, 0]


@for_each("tags", [[], ["<a>"], ["<a>", "<a>"], ["<a>", " "], ["<a>", 3], ["a", "b", "c"], "ab" * 3])
def test_tags_that_are_no_pairs_are_refused(tags: Any) -> None:
    with pytest.raises(DataError, match=r"think_answer_format got format_tags=.*; give two or four texts"):
        think_answer_format(["p"], ["r"], format_tags=tags)


# ---- texts -----------------------------------------------------------------------------------------------------------


@for_each(
    "text, box",
    [
        (r"\boxed{5}", "5"),
        (r"\boxed{1} or \boxed{ 2 }", "2"),
        (r"\boxed{\frac{1}{2}} is it", r"\frac{1}{2}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{1} and then \boxed{2", None),
        (r"\boxed{", None),
        (r"\boxed{a\\}", r"a\\"),
        ("5", None),
        ("", None),
    ],
)
def test_the_last_boxed_answer_is_found(text: str, box: str | None) -> None:
    assert texts.last_boxed(text) == box


def test_a_missing_library_is_named_with_the_way_to_get_it() -> None:
    with pytest.raises(ConfigError, match=r"reward math needs .*no_such_library.*pip install 'rlhf_toolkit\[tasks\]'"):
        texts.optional_library("no_such_library", "math")


# ---- workers ---------------------------------------------------------------------------------------------------------


def test_a_worker_need_not_load_torch() -> None:
    script = "import sys, rlhf_toolkit.rewards.verifiable; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_math_runs_in_workers() -> None:
    """The fourth box would take hours, and is wrong before anybody computes it."""
    functions = {
        "function": "rlhf_toolkit.rewards.verifiable:math",
        "kwargs": {"time_limit": None},
        **{"workers": 1, "timeout": 20, "on_failure": "score", "failure_score": -1.0},
    }
    boxes = ["7", "8", "3+4", "9^{9^{9^{9}}}", "7.0"]
    pool = worker_pool(RewardSpec.parse(functions))
    try:
        batches = [Batch(["p"], [rf"\boxed{{{box}}}"], [[1]], {"answer": ["7"]}) for box in boxes]
        outcomes = [pool.start(batch).result(timeout=200) for batch in batches]
    finally:
        pool.close()
    assert outcomes == [[1.0], [0.0], [1.0], [0.0], [1.0]]
