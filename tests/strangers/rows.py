"""Rows of a dataset: every column that training or a reward reads holds something else than it should, and columns
have the names of options."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import datasets

from rlhf_toolkit.data.instructions import tokenise_examples
from rlhf_toolkit.data.preferences import tokenise_pairs
from rlhf_toolkit.data.prompts import tokenise_prompts
from rlhf_toolkit.errors import DataError
from rlhf_toolkit.rewards.compose import Rewards
from rlhf_toolkit.rewards.specification import RewardSpec
from rlhf_toolkit.types import Prompt
from tests.strangers import frame, payloads
from tests.support.chat_tokenizers import byte_tokenizer

COUNT, LIMIT = 700, 10.0
HEAVY = ("rlhf_toolkit.data.preferences", "math_verify", "sympy")
MESSAGES = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "It."}]
SHAPES: dict[str, dict[str, Any]] = {
    "prompts": {"prompt": "Say it.", "answer": "3"},
    "chat prompts": {"prompt": MESSAGES[:1], "answer": "3"},
    "messages": {"messages": MESSAGES},
    "completion": {"prompt": "Say it.", "completion": "It."},
    "verl": {"prompt": MESSAGES[:1], "extra_info": {"answer": "It."}, "reward_model": {"ground_truth": "It."}},
    "sharegpt": {"conversations": [{"from": "human", "value": "Say it."}, {"from": "gpt", "value": "It."}]},
    "alpaca": {"instruction": "Say it.", "input": "", "output": "It."},
    "text": {"text": "It is said."},
    "pairs": {"prompt": "Say it.", "chosen": "It.", "rejected": "No.", "margin": 0.5},
    "chat pairs": {"chosen": MESSAGES, "rejected": [MESSAGES[0], {"role": "assistant", "content": "No."}]},
    "transcripts": {
        "chosen": "\n\nHuman: Say it.\n\nAssistant: It.",
        "rejected": "\n\nHuman: Say it.\n\nAssistant: No.",
    },
}
VERIFIERS: dict[str, dict[str, Any]] = {
    "math": {"answer": "3"},
    "gsm8k": {"answer": "#### 3"},
    "countdown": {"numbers": [1, 2], "target": 3},
    "think_answer_format": {},
}
OPTIONS = ("flexible", "format_score", "use_all", "prefilled", "require_box", "time_limit", "answer_tags", "exact")
ANSWERS = ("3", r"\boxed{3}", "#### 3", "<answer>1 + 2</answer>")
FORMS = ("{}", r"\boxed{{{}}}", "#### {}", "<answer>{}</answer>", "The final answer is ${}$. I hope", "answer: {}")
LATEX = (
    *(
        "9^{9^{9^{9}}}",
        "9^{9^9}",
        "10^{10^{10}}",
        "2^{99999999}",
        "99999999!",
        "9!!!!!!!!",
        r"\binom{10^9}{10^8}",
        "1e9999999",
    ),
    *(r"\sum_{i=1}^{999999999} i", r"\prod_{i=1}^{99999999} i", r"\int_0^1 e^{e^{e^x}} dx", r"\sqrt[99999]{2}^{99999}"),
    *(
        r"\exp(\exp(\exp(9)))",
        r"e^{e^{e^{9}}}",
        r"\frac{1}{9^{9^{9}}}",
        r"0.\overline{" + "3" * 500 + "}",
        r"\log_{2}{9^{9^9}}",
    ),
    *(
        "{" * 400 + "x" + "}" * 400,
        "(" * 300 + "x" + ")" * 300,
        r"\frac{1}{" * 60 + "2" + "}" * 60,
        "x^" * 100 + "x",
        "9" * 900,
    ),
    *(
        "(x+1)^{9999}",
        "(x+y+z+1)^{200}",
        "1" + "+1" * 400,
        r"\begin{matrix}" + "1&" * 300 + r"\end{matrix}",
        r"\infty",
        r"\nan",
    ),
    *(
        r"\text{" + payloads.CALL + "}",
        payloads.CALL,
        r"\operatorname{eval}(" + payloads.CALL + ")",
        r"\input{/etc/passwd}",
    ),
    *(
        r"\lim_{x\to 0} \frac{\sin x}{x}",
        "3%" * 300,
        "1,000,000,000" * 50,
        "x = " * 200 + "3",
        r"\{" + "1," * 300 + r"2\}",
    ),
    *(
        "9**9**9**9",
        "((9^9)^9)^9^9",
        "9^(9^(9^9))",
        "9 ^ 9 ^ 9 ^ 9 ^ 9",
        "(9**9)**(9**9)",
        "1/0",
        "0^0",
        "0/0",
        "10^{-10^{10}}",
    ),
    *(
        r"\cos^{-1}(10^{10^{8}})",
        r"\left(\frac{9}{8}\right)^{10^{9}}",
        "7^{7^{7^{7}}} - 7^{7^{7^{7}}}",
        "99999999^{99999999}",
    ),
)


@dataclass(frozen=True)
class Case:
    """Either rows of a shape, to be tokenised, or one response and its columns, to be scored by a verifier."""

    name: str
    shape: str
    row: dict[str, Any]
    response: str = ""
    option: bool = False


@cache
def _tokenizer() -> Any:
    return byte_tokenizer()


def cases(seed: int, count: int) -> list[Case]:
    """A third are rows to tokenise, a third columns of verifiers, a third answers to them; all names of options."""
    chance = random.Random(f"rows {seed}")
    found = [
        Case(f"{verifier} with a column {option}", verifier, {**VERIFIERS[verifier], option: 1}, "3", option=True)
        for verifier, options in (("gsm8k", OPTIONS[:1]), ("countdown", OPTIONS[1:3]), ("math", OPTIONS[4:6]))
        for option in options
    ]
    found += [Case("a column named as the texts", "texts", {"p": 1}, "3", option=True)]
    each = max(1, (count - len(found)) // 3)
    for _ in range(each):
        found += [_row(chance), _columns(chance), _answer(chance)]
    return found[:count]


def _value(chance: random.Random) -> Any:
    return payloads.text(chance)[1] if chance.random() < 0.5 else chance.choice(payloads.VALUES)


def _row(chance: random.Random) -> Case:
    shape = chance.choice(list(SHAPES))
    row, value = dict(SHAPES[shape]), _value(chance)
    column = chance.choice(list(row))
    inner = row[column]
    how = chance.randrange(3)
    if how and isinstance(inner, list):
        where = chance.randrange(len(inner))
        part = value if how == 1 else {**inner[where], chance.choice(list(inner[where])): value}
        row[column] = [part if number == where else item for number, item in enumerate(inner)]
    elif how and isinstance(inner, dict):
        row[column] = {**inner, chance.choice(list(inner)): value}
    else:
        row[column] = value
    return Case(f"{shape}.{column} = {value!a:.60}", shape, row)


def _columns(chance: random.Random) -> Case:
    verifier = chance.choice(["math", "gsm8k", "countdown"])
    row, value = dict(VERIFIERS[verifier]), _value(chance)
    if chance.random() < 0.4:
        value = chance.choice([*LATEX, *payloads.HUGE, *payloads.NOT_FINITE])
    column = chance.choice(list(row))
    row[column] = [value] if column == "numbers" and chance.random() < 0.5 else value
    return Case(f"{verifier} column {column} = {value!a:.60}", verifier, row, chance.choice(ANSWERS))


def _answer(chance: random.Random) -> Case:
    verifier = chance.choice(["math", "math", "gsm8k", "countdown", "think_answer_format"])
    text = chance.choice(LATEX) if chance.random() < 0.5 else payloads.text(chance)[1]
    text = chance.choice(FORMS).format(text)
    return Case(f"{verifier} answer {text!a:.80}", verifier, VERIFIERS[verifier], text)


def run(case: Case) -> str:
    """Tokenise, or score."""
    if case.shape in SHAPES:
        return _tokenised(case)
    function = f"rlhf_toolkit.rewards.verifiable:{case.shape}"
    if case.shape == "texts":
        function = "tests.strangers.rows:called_otherwise"
    rewards = Rewards([RewardSpec.parse({"function": function})])
    score = rewards.collect([Prompt(0, "p", (1,), case.row)], [case.response], [[1]]).totals[0]
    wrong = case.option or not (math.isfinite(score) and 0 <= score <= 1)
    if score == 1.0 and case.row == VERIFIERS[case.shape] and case.shape != "think_answer_format":
        wrong = not case.response.replace(" ", "").endswith(("3", "3}", "+2</answer>", "3$.Ihope"))
    return frame.WRONGLY if wrong else frame.RIGHTLY


def called_otherwise(p: list[str], r: list[str], **columns: Any) -> list[float]:
    """Calls its texts by other names."""
    return [1.0 for _ in r]


def _tokenised(case: Case) -> str:
    try:
        rows = datasets.Dataset.from_list([SHAPES[case.shape], case.row, SHAPES[case.shape]])
    except Exception as error:  # Arrow has no such table: no file holds it
        raise DataError("no table holds it") from error
    tokenise: Callable[..., Any]
    if "prompts" in case.shape:
        options: dict[str, Any] = {
            "column": "prompt",
            "chat_template": True,
            "system_prompt": None,
            "max_prompt_tokens": 512,
        }
        tokenise = tokenise_prompts
    else:
        options, tokenise = (
            {"max_tokens": 512},
            tokenise_pairs if case.shape in ("pairs", "chat pairs", "transcripts") else tokenise_examples,
        )
    kept = tokenise(rows, _tokenizer(), **options)
    return frame.RIGHTLY if kept.summary().isprintable() else frame.WRONGLY
