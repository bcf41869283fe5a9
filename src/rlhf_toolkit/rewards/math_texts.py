"""Which formulas math-verify may get: those that it has read and compared after a moment.

It hands what it reads to sympy, which writes out ``9^{9^9}``, ``99999999!`` or ``(x + 1)^{9999}``; nothing interrupts
that, since it is one operation in C. So a formula is looked at before, as text, and what could grow is no answer.
"""

from __future__ import annotations

import re

LONGEST_FORMULA = 400
"""Characters; the parser takes seconds for a sum of as many terms."""
DEEPEST_FORMULA = 12
"""Brackets inside one another."""
LARGEST_EXPONENT, LARGEST_OF_SUM = 999, 20
"""Of a number or a name, and of what stands in brackets and holds a name, which sympy multiplies out."""
MOST_SEPARATORS = 60
"""Commas, plus signs and the like."""

_COMPUTED = re.compile(r"\\(sum|prod|int|iint|oint|lim|binom|dbinom|tbinom|choose|Gamma|zeta)(?![A-Za-z])")
_LONG_NUMBER = re.compile(r"[0-9]{101}|[0-9.][eE][+-]?[0-9]{3}")
_FACTORIAL = re.compile(r"(?<![0-9])[0-9]{1,2}!(?!\s*!)|(?<![A-Za-z\\])[A-Za-z]!(?!\s*!)")
_POWER = re.compile(r"\^|\*\*")
_FORMULAS = re.compile(
    r"\$\$.*?\$\$|\$[^$]*\$|\\\(.*?\\\)|\\\[.*?\\\]|\s\[[^\n\]\[]*\]\s|[0-9(][0-9.,\s+\-*/^()!\u00d7\u00f7]*", re.DOTALL
)
_CLOSING = {"}": "{", ")": "(", "]": "["}


def is_small(formula: str) -> bool:
    """Whether ``formula``, LaTeX or plain, has no power, factorial, sum or number that could get large, and neither
    many parts nor deep brackets."""
    plain = re.sub(r"\\(left|right|[bB]igg?[lr]?|,|;|!|:| )", "", formula).translate(str.maketrans("", "", " \t\r\n"))
    if len(plain) > LONGEST_FORMULA or _COMPUTED.search(formula) or _LONG_NUMBER.search(plain):
        return False
    if "!" in _FACTORIAL.sub("", plain) or len(re.findall(r"[-+,;&%=]", plain)) > MOST_SEPARATORS:
        return False
    depth = deepest = 0
    for letter in plain:
        depth += (letter in "{([") - (letter in "})]")
        deepest = max(deepest, abs(depth))  # closing ones that were never opened count, too
    return deepest <= DEEPEST_FORMULA and all(_is_small_power(plain, m) for m in _POWER.finditer(plain))


def without_large(text: str) -> str:
    """``text`` with a space in place of each formula, in ``$`` or of digits and signs, that is not small."""
    return _FORMULAS.sub(lambda found: found[0] if is_small(found[0]) else " ", text)


def _is_small_power(text: str, power: re.Match[str]) -> bool:
    whole = _exponent(text[power.end() :])
    after = text[power.end() + len(whole) :]
    exponent = re.sub(r"[A-Za-z](\^|\*\*)(\{[0-9]\}|[0-9])(?![0-9^*])", "x", whole)  # as in e^{-x^2}
    if _POWER.search(exponent) or _POWER.match(after) or re.search(r"\\(?!d?t?frac|circ|prime|top|pi)", exponent):
        return False
    base = _group_before(text[: power.start()])
    if base is None:
        most = LARGEST_EXPONENT
    elif _POWER.search(base) or re.search(r"[A-Za-z]", base):
        most = LARGEST_OF_SUM
    else:
        most = LARGEST_EXPONENT
    numbers = [float(number) for number in re.findall(r"[0-9]+\.?[0-9]*", exponent)]
    size = 1.0
    for number in numbers:
        size *= max(1.0, number)
    return size <= most


def _exponent(text: str) -> str:
    """What stands at the beginning of ``text`` as an exponent: a group in brackets, or a number, name or letter."""
    found = re.match(r"[-+]?(?=[({\[])", text)
    if found is None:
        plain = re.match(r"[-+]?([0-9.]+|\\[A-Za-z]+|.?)", text, flags=re.DOTALL)
        return plain[0] if plain else ""
    depth = 0
    for position, letter in enumerate(text):
        depth += (letter in "{([") - (letter in "})]")
        if depth == 0 and position >= found.end():
            return text[: position + 1]
    return text


def _group_before(text: str) -> str | None:
    """The group in brackets that ``text`` ends in; None where it ends otherwise."""
    if text[-1:] not in _CLOSING:
        return None
    depth = 0
    for position in range(len(text) - 1, -1, -1):
        depth += (text[position] in "})]") - (text[position] in "{([")
        if depth == 0:
            return text[position:]
    return text
