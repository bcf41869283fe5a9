"""Patterns in an adapter's settings: those of everyday are taken, and what is taken is matched in no time."""

from __future__ import annotations

import random
import re
import time

import pytest

from rlhf_toolkit.errors import ModelError
from rlhf_toolkit.models.adapter_files import MOST_STEPS, steps
from tests.support.offenders import for_each

NAME = "model.layers.10.self_attn.q_proj.some_longer_name_of_a_layer"
EVERYDAY = (
    "q_proj",
    r".*\.(q_proj|v_proj)$",
    r"^model\.layers\.(?:\d+)\.mlp\.(gate|up|down)_proj",
    r"model\.layers\.[0-9]+\.self_attn\.(q|k|v|o)_proj",
    r"(?:.*?(?:vision|image|visual|patch|language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\."
    r"(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)))",
)
SLOW = (
    *("(a+)+X", "(a|a)*X", "(.*)*X", "(x+x+)+y", "((a))*", "(?=a)", "(?P<n>a)", r"(a)\1", ".*" * 5, "(", "a{1,2}{3}"),
    *("[z-a]", "a" * 20_001),
)


@for_each("pattern", EVERYDAY)
def test_patterns_of_everyday_are_taken(pattern: str) -> None:
    assert 1 <= steps("x", "target_modules", pattern) <= MOST_STEPS


@for_each("pattern", SLOW)
def test_what_might_take_long_is_refused(pattern: str) -> None:
    with pytest.raises(ModelError, match=r"^x has target_modules with the pattern"):
        steps("x", "target_modules", pattern)


def test_whatever_is_taken_is_matched_in_no_time() -> None:
    chance, taken, slowest = random.Random(5), 0, 0.0
    pieces = ["a", ".", r"\w", "[a-z_.0-9]", "*", "+", "?", "{1,9}", "{0,60}", "(", "(?:", ")", "|", "q", "_", r"\."]
    pieces += ["$", ".*", ".*?"]
    for _ in range(20_000):
        pattern = "".join(chance.choices(pieces, k=chance.randrange(1, 14))) + chance.choice(["", "X"])
        try:
            steps("x", "key", pattern)
        except ModelError:
            continue
        taken += 1
        begun = time.process_time()
        re.fullmatch(rf"(.*\.)?({pattern})", NAME)
        slowest = max(slowest, time.process_time() - begun)
    assert taken > 2_000 and slowest < 2.0
