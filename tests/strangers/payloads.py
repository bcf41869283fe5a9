"""Texts and values that strangers send, by kind; every door plants them where it takes something."""

from __future__ import annotations

import random
import sys
from types import CodeType
from typing import Any

from tests.strangers import ground

TOKEN = "strangers_canary"
"""Stands in every payload that is code: what is evaluated names it."""
PWNED = f"../outside/{ground.PWNED}_{TOKEN}"
"""The file that a payload makes where it is run, seen from the folder of a case."""
COMMAND = f"touch {PWNED}"
CALL = f"__import__('os').system('{COMMAND}')"

CODE = [
    CALL,
    f"[{CALL}]",
    f"({CALL} or 1)",
    f"open('{PWNED}', 'w').write('x')",
    f"(lambda: {CALL})()",
    f"[x for x in [{CALL}]]",
    f'f"{{{CALL}}}"',
    f'exec("{CALL}")',
    f'sympify("{CALL}")',
    f"x.__class__.__init__.__globals__['__builtins__']['eval'](\"{CALL}\")",
    f"\uff3f_import__('os').system('{COMMAND}')",
    f"!!python/object/apply:os.system ['{COMMAND}']",
    f"cos\nsystem\n(S'{COMMAND}'\ntR.",
    f"{{{{ ''.__class__.__mro__[1].__subclasses__() }}}}{{% set x = '{TOKEN}' %}}",
    "{0.__class__.__init__.__globals__}",
    f"\\boxed{{{CALL}}}",
    f"$({COMMAND})",
    f"`{COMMAND}`",
    f"; {COMMAND} #",
]
HUGE = [
    "1e9999999",
    "1e99999999",
    "-1e999999999",
    "1e-999999999",
    "1E+1_000_000_0",
    "1e\uff19\uff19\uff19\uff19\uff19\uff19\uff19\uff19",
    "\uff11e99999999",
    ".5e+00009999999",
    "x1e9999999",
    "1e9999999/3",
    "1/1e9999999",
    "9**9**9**9",
    "9^9^9^9",
    "(9**999)**(9**999)",
    "exp(exp(exp(9)))",
    "factorial(99999999)",
    "99999999!!!",
    "2**(2**(2**(2**9)))",
    "1 << 99999999999",
    "0x1 << 0xffffffffff",
    "\\boxed{9^{9^{9^{9}}}}",
    "10**10**10 + x",
    "binomial(10**9, 10**8)",
    "9" * 5000,
    "9" * 9999,
    "9," * 5000,
    "0." + "3" * 9000,
    "*".join(["99999"] * 1500),
    "range(10**10)",
    "'a'*10**10",
    "[0]*10**10",
]
NOT_FINITE = [
    "nan",
    "NaN",
    "-nan",
    "+NAN",
    "inf",
    "-inf",
    "Infinity",
    "-Infinity",
    "nan+nanj",
    "(nan+nanj)",
    "infj",
    "1e400",
    "-1e999",
    "1e400j",
    "1e400+1e400i",
    "nan + nani",
    "[NaN, NaN, NaN]",
    "['nan', 'nan', 'nan']",
    "nan/1",
    "oo",
    "zoo",
    "\uff4e\uff41\uff4e",
    "sNaN",
    "NaN123",
    "$nan$",
    "nan%",
    "#### nan",
    "\u221e",
]
DEEP = [
    "(" * 5000 + "1" + ")" * 5000,
    "[" * 4990 + "]" * 4990,
    "-" * 9000 + "1",
    '{"a":' * 1500 + "1" + "}" * 1500,
    "~" * 9000 + "1",
    "not " * 2400 + "True",
]
SLOW = [
    "a" * 9999 + "!",
    "(a+)+" * 1900,
    "x " * 4999,
    "1+" * 4999 + "1",
    "\n" * 9999,
    "<answer>" * 1200,
    " " * 9990 + "x",
    "((((((((((" * 20 + "x" + "**2+1))))))))))" * 20,
]
ODD = [
    "\x1b[2J\x1b]0;pwned\x07",
    "a\r\nb\x00c",
    "\ud800",
    "\u202e\u2066",
    "",
    " ",
    "None",
    "True",
    "null",
    "{}",
    "[]",
    "../../../etc/passwd",
    "/etc/passwd",
    "file:///etc/passwd",
    "http://127.0.0.1:9/x",
    "%s%s%n",
    "{}" * 50,
    "\\" * 50,
    "'\"`",
    "--help",
]
TEXTS = {"code": CODE, "huge": HUGE, "not finite": NOT_FINITE, "deep": DEEP, "slow": SLOW, "odd": ODD}
VALUES: list[Any] = [
    None,
    True,
    0,
    -1,
    10**18,
    -(10**18),
    1.5,
    float("nan"),
    float("inf"),
    1e308,
    [],
    {},
    [[]],
    [None],
    {"a": None},
    [[[[[[1]]]]]],
    "x",
    ["x"] * 50,
    [10**9],
    {"__tuple__": []},
    {"__mapping__": [[1, 2]]},
    {"__mapping__": [[[1], 2]]},
    {"__tuple__": 3},
]
"""What may stand in JSON where something else is expected."""


def text(chance: random.Random) -> tuple[str, str]:
    """(kind, text): one of the texts above, at times a little changed or put together."""
    kind = chance.choice(list(TEXTS))
    one = chance.choice(TEXTS[kind])
    change = chance.randrange(6)
    if change == 0:
        one = f" {one} "
    elif change == 1:
        one = f"[{one}]"
    elif change == 2:
        other = chance.choice(TEXTS[chance.choice(list(TEXTS))])
        one = one + chance.choice([" ", ", ", "\n", "+"]) + other
    return kind, one


def notice_evaluation() -> None:
    """Note every payload that reaches ``eval`` or ``exec``, also one that does nothing there. Once in a process."""
    sys.addaudithook(_evaluated)


def _evaluated(event: str, values: tuple[Any, ...]) -> None:
    if event == "exec" and isinstance(values[0], CodeType) and _names_token(values[0]):
        ground.noticed.append(f"executed: eval of {values[0].co_consts!r:.200}")


def _names_token(code: CodeType) -> bool:
    parts = (*code.co_consts, *code.co_names)
    return any(
        _names_token(each) if isinstance(each, CodeType) else isinstance(each, str) and TOKEN in each for each in parts
    )
