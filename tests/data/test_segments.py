"""The trie over prompts: every row is found again along its path, and what is shared is worth it."""

from __future__ import annotations

import random

from rlhf_toolkit.data.segments import Trie, common_prefix, share_prefixes
from tests.support.offenders import for_each

TEMPLATE = tuple(range(100, 120))
CASES = {
    "nothing alike": [(1, 2), (3,), (4, 5, 6)],
    "a template": [(*TEMPLATE, 1), (*TEMPLATE, 2, 3), (*TEMPLATE, 1, 4)],
    "groups": [(*TEMPLATE, *range(9))] * 4 + [(*TEMPLATE, *range(5, 20))] * 3 + [(7,)] * 2,
    "a prefix of another": [TEMPLATE, (*TEMPLATE, 1), (*TEMPLATE, 1, *range(30, 40)), (*TEMPLATE, 1, *range(30, 40))],
    "the same everywhere": [TEMPLATE] * 5,
    "one token each": [(1,)] * 20,
    "one row": [TEMPLATE],
}
BY_CASE = for_each("prompts", CASES.values(), ids=CASES.keys())


def lengths_of(prompts: list[tuple[int, ...]]) -> list[int]:
    return [len(prompt) + 1 + row % 3 for row, prompt in enumerate(prompts)]


def walk(trie: Trie, row: int) -> list[tuple[int, int]]:
    """(row it is taken from, position) of every token of ``row``, by its path."""
    segments = [trie.segments[number] for number in trie.path(trie.leaves[row])]
    return [(segment.row, position) for segment in segments for position in range(segment.start, segment.stop)]


@BY_CASE
@for_each("least", [1, 8, 30])
def test_a_path_spells_its_row(prompts: list[tuple[int, ...]], least: int) -> None:
    lengths = lengths_of(prompts)
    trie = share_prefixes(prompts, lengths, least=least)
    assert len(set(trie.leaves)) == len(prompts), "a response belongs to one row"
    for row, prompt in enumerate(prompts):
        found = walk(trie, row)
        assert [position for _, position in found] == list(range(lengths[row]))
        for source, position in found:
            assert source == row if position >= len(prompt) else prompts[source][position] == prompt[position]
    parents = [(number, segment.parent) for number, segment in enumerate(trie.segments) if segment.parent is not None]
    assert all(parent < number for number, parent in parents), "what is above comes first"


@BY_CASE
@for_each("least", [1, 8, 30])
def test_every_shared_segment_saves_enough(prompts: list[tuple[int, ...]], least: int) -> None:
    trie = share_prefixes(prompts, lengths_of(prompts), least=least)
    for number, segment in enumerate(trie.segments):
        through = sum(number in trie.path(leaf) for leaf in trie.leaves)
        assert segment.size > 0 and (through == 1 or (through - 1) * segment.size >= least)


@BY_CASE
def test_sharing_from_the_first_token_on_keeps_each_prefix_once(prompts: list[tuple[int, ...]]) -> None:
    prefixes = {prompt[:end] for prompt in prompts for end in range(1, len(prompt) + 1)}
    responses = sum(lengths_of(prompts)) - sum(map(len, prompts))
    trie = share_prefixes(prompts, lengths_of(prompts), least=1)
    assert trie.tokens == len(prefixes) + responses
    assert share_prefixes(prompts, lengths_of(prompts)).tokens >= trie.tokens


def test_the_figures_of_a_template() -> None:
    """20 tokens three times: 40 saved. Then two rows share one more, which is not worth a segment."""
    prompts = CASES["a template"]
    assert share_prefixes(prompts, lengths_of(prompts)).tokens == sum(lengths_of(prompts)) - 40
    assert share_prefixes(prompts, lengths_of(prompts), least=1).tokens == sum(lengths_of(prompts)) - 41


def test_common_prefix_against_a_loop() -> None:
    choose = random.Random(1)
    for _ in range(200):
        prompts = [tuple(choose.choices(range(2), k=choose.randint(1, 9))) for _ in range(choose.randint(1, 4))]
        agreed = 0
        while all(len(p) > agreed and p[agreed] == prompts[0][agreed] for p in prompts):
            agreed += 1
        assert common_prefix(prompts) == agreed
