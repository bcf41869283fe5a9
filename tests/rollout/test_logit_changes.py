"""Biases, penalties and bad words against transformers' own processors, row by row with histories of many lengths."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from random import Random
from typing import Any

import torch
from torch import Tensor

from rlhf_toolkit.rollout.decoding import Sampling
from rlhf_toolkit.rollout.logit_changes import LogitChanges, LogitRules
from rlhf_toolkit.rollout.sampling import choose_tokens
from rlhf_toolkit.types import Prompt
from tests.support.logits import by_transformers
from tests.support.offenders import for_each

SIZE, BUDGET = 40, 6
RULES = {
    "bias": LogitRules(bias=((3, 2.5), (7, -100.0), (11, 100.0))),
    "penalty": LogitRules(penalty=1.3),
    "reward of repetition": LogitRules(penalty=0.7),
    "single bad words": LogitRules(bad_words=((3,), (5,))),
    "long bad words": LogitRules(bad_words=((3, 4), (4, 4), (1, 2, 3, 4), (2,), (9, 4))),
    "all": LogitRules(((3, 2.0), (12, -1.0)), 1.2, ((5,), (3, 4), (2, 3, 4), (6, 3))),
}
PLAIN = Sampling(BUDGET, stop_ids=(0,), pad_id=0)


def histories(seed: int, rows: int = 40) -> tuple[list[Prompt], list[list[int]]]:
    """Prompts, some of one token, and what has been written after them: few different tokens, so that words begin."""
    dice = Random(seed)
    draw = lambda most: [dice.randint(1, 6) for _ in range(dice.randint(0, most))]  # noqa: E731
    prompts = [Prompt(i, "", (dice.randint(1, 4), *draw(9)), {}) for i in range(rows)]
    return prompts, [draw(BUDGET - 1) for _ in range(rows)]


def changes_of(rules: LogitRules, prompts: list[Prompt], written: list[list[int]]) -> LogitChanges:
    """As decoding makes them: a token a step, for the rows that are still in flight."""
    changes = LogitChanges(rules, prompts, BUDGET, torch.device("cpu"))
    for step in range(BUDGET):
        rows = [row for row, tokens in enumerate(written) if len(tokens) > step]
        if rows:
            tokens = torch.tensor([written[row][step] for row in rows])
            changes.note(torch.tensor(rows), torch.full((len(rows),), step), tokens)
    return changes


@for_each("name", list(RULES))
@for_each("seed", range(3))
def test_logits_are_changed_as_transformers_changes_them(name: str, seed: int) -> None:
    prompts, written = histories(seed)
    changes = changes_of(RULES[name], prompts, written)
    logits = torch.randn(len(prompts), SIZE, generator=torch.Generator().manual_seed(seed)) * 3
    rows = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed))  # slots have no order
    before = logits.clone()
    found = changes.changed(logits[rows], rows, torch.tensor([len(written[row]) for row in rows]))
    sampling, moved = replace(PLAIN, rules=RULES[name]), 0
    for place, row in enumerate(rows.tolist()):
        expected = by_transformers(logits[row], [*prompts[row].token_ids, *written[row]], sampling)
        assert torch.equal(found[place], expected), (row, prompts[row].token_ids, written[row])
        moved += int(not torch.equal(expected, logits[row]))
    assert torch.equal(logits, before) and moved > len(prompts) // 2


def test_a_row_without_room_for_a_words_beginning_does_not_complete_it() -> None:
    """Nor does what fills the history up: the first token, again and again."""
    prompts = [Prompt(0, "", (2,), {}), Prompt(1, "", (2, 2, 2, 2), {})]
    changes = LogitChanges(LogitRules(bad_words=((2, 2, 5),)), prompts, BUDGET, torch.device("cpu"))
    found = changes.changed(torch.zeros(2, SIZE), torch.arange(2), torch.zeros(2, dtype=torch.long))
    assert found[0].tolist() == [0.0] * SIZE and found[1].isinf().nonzero().tolist() == [[5]]


def test_a_process_without_rows_changes_nothing() -> None:
    changes = LogitChanges(RULES["all"], [], BUDGET, torch.device("cpu"))
    none = torch.zeros(0, dtype=torch.long)
    assert changes.changed(torch.zeros(0, SIZE), none, none).shape == (0, SIZE)


FILTERS: list[dict[str, Any]] = [
    {},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"temperature": 0.6, "min_p": 0.05},
    {"temperature": 1.7, "top_k": 12, "top_p": 0.9, "min_p": 0.1},
    {"top_p": 0.7},
]


@for_each("name", ["none", *RULES])
@for_each("filters", FILTERS)
def test_what_is_drawn_has_the_log_prob_that_transformers_gives_it(name: str, filters: dict[str, Any]) -> None:
    """Tokens over an even grid are those of transformers' distribution, ``drawn`` its log-probs, and ``logprobs`` those
    of the policy, whatever else."""
    rules = RULES.get(name, LogitRules())
    sampling = replace(PLAIN, rules=rules, **filters)
    (prompt, *_), (written, *_) = histories(1)
    changes = changes_of(rules, [prompt], [written])
    logits = torch.randn(SIZE, generator=torch.Generator().manual_seed(4)) * 2
    expected = by_transformers(logits, [*prompt.token_ids, *written], sampling).double().log_softmax(-1)
    points = 2000
    rows, now = torch.zeros(points, dtype=torch.long), torch.full((points,), len(written))
    grid = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    changed = partial(changes.changed, rows=rows, now=now) if rules else None
    tokens, logprobs, drawn = choose_tokens(
        logits.expand(points, -1), grid, **{"temperature": 1.0, **filters}, changed=changed
    )
    counts = torch.bincount(tokens, minlength=SIZE)
    assert (counts - expected.exp() * points).abs().max() <= 1.01
    policy: Tensor = (logits.double() / sampling.temperature).log_softmax(-1)
    torch.testing.assert_close(logprobs.double(), policy[tokens], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(drawn.double(), expected[tokens], rtol=1e-5, atol=1e-5)
    assert (drawn is logprobs) == sampling.is_whole
    greedy = by_transformers(logits, [*prompt.token_ids, *written], replace(sampling, greedy=True)).argmax()
    chosen, *_ = choose_tokens(
        logits[None], None, temperature=1.0, changed=changed and partial(changes.changed, rows=rows[:1], now=now[:1])
    )
    assert chosen.item() == greedy
