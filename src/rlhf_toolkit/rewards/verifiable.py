"""Rewards that check an answer: no model, no judge, the same score for the same text.

A YAML file names them as ``rlhf_toolkit.rewards.verifiable:NAME`` with NAME one of ``math``, ``gsm8k``, ``countdown``,
``think_answer_format`` and ``reasoning_gym``. Columns that a function does not use are ignored. ``math`` and
``reasoning_gym`` need the tasks extra, and both run code of others on what a model wrote: give them worker processes
with a time limit (``reward.functions``: ``workers``, ``timeout``).
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from typing import Any

from rlhf_toolkit.errors import DataError, shortened
from rlhf_toolkit.rewards.countdown import countdown
from rlhf_toolkit.rewards.gym import reasoning_gym
from rlhf_toolkit.rewards.math_texts import is_small, without_large
from rlhf_toolkit.rewards.texts import each, last_boxed, number, optional_library

__all__ = ["countdown", "gsm8k", "math", "reasoning_gym", "think_answer_format"]

# ---- math ------------------------------------------------------------------------------------------------------------

MATH_TAIL = 2000
"""Characters at the end of a response in which an answer outside a box is looked for: the search is quadratic."""


def math(
    prompts: list[str],
    responses: list[str],
    *,
    answer: Sequence[Any],
    require_box: bool = False,
    time_limit: int | None = 5,
    **columns: Any,
) -> list[float]:
    r"""1.0 where the answer of a response equals column ``answer`` by math-verify, else 0.0.

    The answer is the content of the last ``\boxed{}``; one that is never closed, or is not ``math_texts.is_small``,
    such as ``9^{9^9}`` or a formula of many hundred characters, scores 0.0. Without a box it is the last small
    expression in the last ``MATH_TAIL`` characters that math-verify finds (``final answer is``, ``answer:``, ``$...$``,
    a number), or nothing with ``require_box``.

    What counts as equal is math-verify's: values, not their form (``3+4`` equals 7), 6 decimals for floats, a
    percentage equals its number and its fraction, units and thousands separators are dropped, ``x = 5`` equals 5, sets
    without order.

    ``time_limit`` seconds go to each parse and each comparison; what takes longer scores 0.0, so that a score near the
    limit depends on the machine. math-verify keeps time with SIGALRM, which works in the main thread of a process alone
    and replaces any alarm that is running there; in another thread its limit is left out, because it would raise. A
    signal also waits for a single long operation in C. So let it run in workers, whose limit ends the process.

    Column ``answer``: text with or without a box or ``$``, or a number. DataError where it is not small or math-verify
    cannot read it.
    Needs the tasks extra (``math-verify``), else ConfigError.
    """
    library = optional_library("math_verify", "math")
    seconds = time_limit if threading.current_thread() is threading.main_thread() else None
    return [
        _math_score(library, response, gold, require_box, seconds)
        for response, gold in zip(responses, each(answer, responses, "answer", "math"), strict=True)
    ]


def _math_score(library: Any, response: str, gold: Any, require_box: bool, seconds: int | None) -> float:
    is_number = isinstance(gold, (int, float)) and not isinstance(gold, bool) and abs(gold) < float("inf")
    given = str(gold).strip() if is_number or isinstance(gold, str) else ""
    inside = last_boxed(given)
    bare = given.removeprefix("$").removesuffix("$") if inside is None else inside
    truth = _boxed(library, bare, seconds)
    if not truth:
        raise DataError(f"math cannot read answer={shortened(gold)}; give LaTeX or a number")
    box = last_boxed(response)
    if box is not None:
        found = _boxed(library, box, seconds)
    elif require_box or r"\boxed{" in response:
        found = []
    else:
        found = library.parse(without_large(response[-MATH_TAIL:]), parsing_timeout=seconds)
    return float(bool(found) and library.verify(truth, found, timeout_seconds=seconds))


def _boxed(library: Any, text: str, seconds: int | None) -> list[Any]:
    """What math-verify reads in a box of ``text``; empty where it reads nothing."""
    if not text or not is_small(text):
        return []
    latex = library.LatexExtractionConfig(boxed_match_priority=0)
    found: list[Any] = library.parse(rf"\boxed{{{text}}}", extraction_config=[latex], parsing_timeout=seconds)
    return found


# ---- gsm8k -----------------------------------------------------------------------------------------------------------

GSM8K_TAIL = 300
"""Characters at the end of a response that are looked at, as in verl."""
_STRICT = re.compile(r"#### ([-\u2212]?[0-9.,]+)")
_ANY_NUMBER = re.compile(r"[-\u2212]?[0-9.,]*[0-9][0-9.,]*")


def gsm8k(
    prompts: list[str], responses: list[str], *, answer: Sequence[Any], flexible: bool = False, **columns: Any
) -> list[float]:
    """1.0 where the last ``#### number`` of a response equals the number of column ``answer``, else 0.0.

    Only the last ``GSM8K_TAIL`` characters count. Commas are dropped and numbers are compared exactly: ``#### 1,000.0``
    equals 1000. As in GSM8K's own rule a ``$`` or a word between ``####`` and the number is not accepted, and what
    follows the number is ignored (``#### 3/4`` reads as 3). ``flexible`` takes the last number in the text instead,
    wherever it stands.

    Column ``answer``: a number, its text, or the dataset's text that ends in ``#### 42``. DataError for anything else.
    Source: Cobbe et al. 2021, ``grade-school-math``; the strict rule of verl's ``reward_score/gsm8k.py``, which
    compares texts, so that there ``42.0`` does not equal 42.
    """
    pattern = _ANY_NUMBER if flexible else _STRICT
    scores = []
    for response, gold in zip(responses, each(answer, responses, "answer", "gsm8k"), strict=True):
        truth = number(str(gold).rpartition("####")[2])
        if truth is None:
            raise DataError(f"gsm8k got answer={shortened(gold)}; give a number, or text that ends in '#### number'")
        found = pattern.findall(response[-GSM8K_TAIL:])
        scores.append(float(bool(found) and number(found[-1]) == truth))
    return scores


# ---- format ----------------------------------------------------------------------------------------------------------

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def think_answer_format(
    prompts: list[str],
    responses: list[str],
    *,
    prefilled: bool | None = None,
    format_tags: Sequence[str] = _TAGS,
    **columns: Any,
) -> list[float]:
    """1.0 where a whole response is ``<think>...</think> <answer>...</answer>``, each tag exactly once, else 0.0.

    White space may stand around and between the two blocks, any text or none inside them. ``format_tags`` are the four,
    or the first two alone, such as ``[THINK]`` and ``[/THINK]``: then any text but white space follows. Behind a prompt
    that ends in the first tag, which the chat templates of thinking models write, the response goes on and must not
    write it again; ``prefilled`` says whether that is so of all prompts, without a look at them. Tags that are special
    tokens are there to be seen with ``rollout.keep_special_tokens``. DataError for other ``format_tags``.
    Source: DeepSeek-R1 (2025), section 2.2.2, format rewards.
    """
    tags = tuple(format_tags)
    if len(tags) not in (2, 4) or not all(isinstance(t, str) and t.strip() for t in tags) or len({*tags}) < len(tags):
        raise DataError(
            f"think_answer_format got format_tags={shortened(format_tags)}; give two or four texts, no two the same"
        )
    opening, closing, *answer = map(re.escape, tags)
    rest = rf"\s*{answer[0]}.*{answer[1]}" if answer else r".*\S.*"
    form = re.compile(f"{opening}.*{closing}{rest}", re.DOTALL)
    scores = []
    for prompt, response in zip(prompts, responses, strict=True):
        begun = prompt.rstrip().endswith(tags[0]) if prefilled is None else prefilled
        text = tags[0] + response if begun else response
        good = all(text.count(tag) == 1 for tag in tags) and form.fullmatch(text.strip()) is not None
        scores.append(float(good))
    return scores
