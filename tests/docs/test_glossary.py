"""docs/glossary.md: what its last column says we do not say is the name of no function, class, parameter or field."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src/rlhf_toolkit"
PAGE = (ROOT / "docs/glossary.md").read_text()
ALONE = " (alone)"
"""Behind a word that says too little by itself and is fine in company: not held against names."""
WORD = re.compile(r"\w+(?:[ _-]\w+)*")

EXCEPTIONS: dict[str, dict[str, str]] = {
    "query": {
        "models/attention.py models/segment_attention.py models/slot_cache.py": "attention's query, key and value",
        "models/state_steps.py": "the same three of a gated delta net",
    },
    "v": {"models/segment_attention.py": "the same three, as in the equation"},
    "buffer": {
        "algorithms/rewards.py rollout/shaping.py": "DAPO's overlong buffer",
        "settings/configs.py settings/experiment.py": "the same, a setting",
    },
    "ragged": {"models/segment_attention.py": "segments end to end, as the kernel for varying lengths takes them"},
    "block": {
        "data/layout.py": "padded matrices that are put under one another",
        "rollout/sampling.py": "blocks of the vocabulary, summed one by one",
        "rollout/turns.py": "a padded block of a column",
    },
    "tree": {"rewards/gym_texts.py": "Python's syntax tree"},
    "done": {
        "data/items.py rollout/loader.py": "optimizer steps that were taken before this start",
        "export/card_kinds.py": "what a run has done, the first words of its card",
    },
    "batch row": {"settings/experiment.py": "rows of a mini-batch"},
    "beta": {
        "algorithms/policy_losses.py": "DRO's constant, under the paper's name",
        "algorithms/preference_losses.py settings/supervised.py trainers/objectives.py": "DPO's, a setting",
        "models/state_steps.py": "a gated delta net's, under the name by which transformers gives it",
    },
    "eps": {"models/fused.py": "a norm's epsilon, under the name that transformers gives it"},
}
"""Word -> files in which it is right -> why. A file that no longer has it has to leave."""


# ---- the page --------------------------------------------------------------------------------------------------------


def rows(page: str = PAGE) -> list[tuple[str, str]]:
    """(what we say, what not) of every row of the tables."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:2] == "| "]
    return [(row[0], row[-1]) for row in cells if row[0] not in ("we say", "---")]


def words_of(cell: str) -> list[str]:
    """The words of one cell, without what stands in brackets."""
    return [re.sub(r" \(.*\)", "", word).strip(" `") for word in cell.split(",")]


def said(page: str = PAGE) -> set[str]:
    return {word for row, _ in rows(page) for word in words_of(row)}


def unsaid(page: str = PAGE) -> dict[str, str]:
    """Word -> the row that forbids it, of those that could be part of a name and have no row of their own."""
    found = {}
    for row, cell in rows(page):
        for word in cell.split(","):
            plain = word.strip(" `")
            if not plain.endswith(ALONE) and WORD.fullmatch(plain) and plain not in said(page):
                found[plain] = row
    return found


CENTRAL = "types.py rollout/sampled.py rollout/experience.py rollout/scored_sampler.py rollout/prompt_source.py"
CENTRAL += (
    " rollout/deferred.py:DeferredExperience rollout/role_pass.py:Needs rollout/cutting.py models/role_outputs.py"
)
CENTRAL += " rollout/loader.py:Schedule runs/algorithm.py planning/memory.py:Placement"


def test_every_central_type_has_its_row() -> None:
    """Public classes of the files through which a rollout goes."""
    missing = []
    for place in CENTRAL.split():
        file, _, only = place.partition(":")
        classes = re.findall(r"^class ([A-Z]\w+)", (ROOT / "src/rlhf_toolkit" / file).read_text(), flags=re.MULTILINE)
        missing += [name for name in classes if (not only or name == only) and f"`{name}`" not in PAGE]
    assert set(missing) <= {"Scorer", "Column"}, missing


# ---- the code --------------------------------------------------------------------------------------------------------


def parts(name: str) -> list[str]:
    """``_RewardModel`` and ``reward_model`` to reward, model."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().strip("_").split("_")


def names_in(text: str) -> Iterator[tuple[str, int]]:
    """Every name that a source file gives to a function, class, parameter, field, attribute or constant, with its
    line; not what is local to a function, nor what others call their parameters."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno
        if isinstance(node, ast.Module | ast.ClassDef):
            for statement in node.body:
                yield from _assigned(statement)


def _assigned(statement: ast.stmt) -> Iterator[tuple[str, int]]:
    if isinstance(statement, ast.Assign | ast.AnnAssign):
        for target in statement.targets if isinstance(statement, ast.Assign) else [statement.target]:
            yield from ((each.id, each.lineno) for each in ast.walk(target) if isinstance(each, ast.Name))


def says(name: str, word: str) -> bool:
    """Whether the parts of ``name`` hold those of ``word``, one after another; its plural counts too."""
    own, sought = parts(name), re.split(r"[ _-]", word.lower())
    ends = {sought[-1], f"{sought[-1]}s"} if len(sought[-1]) > 1 else {sought[-1]}
    return any(
        own[i : i + len(sought) - 1] == sought[:-1] and own[i + len(sought) - 1] in ends
        for i in range(len(own) - len(sought) + 1)
    )


@cache
def found() -> dict[str, dict[str, list[str]]]:
    """Word -> file -> the names that say it, with their lines."""
    everything: dict[str, dict[str, list[str]]] = {word: {} for word in unsaid()}
    for path in sorted(SOURCE.rglob("*.py")):
        names = sorted(set(names_in(path.read_text())), key=lambda each: each[1])
        for word, files in everything.items():
            if places := [f"{name} ({line})" for name, line in names if says(name, word)]:
                files[str(path.relative_to(SOURCE))] = places
    return everything


def allowed(word: str) -> dict[str, str]:
    """File -> why the word is right there."""
    return {file: reason for files, reason in EXCEPTIONS.get(word, {}).items() for file in files.split()}


def test_nothing_is_called_what_the_glossary_says_we_do_not_say() -> None:
    wrong = [
        f"{file}: {', '.join(names)}: {word!r}, we say {unsaid()[word]}"
        for word, files in found().items()
        for file, names in files.items()
        if file not in allowed(word)
    ]
    assert not wrong, "\n".join(["", *wrong])


def test_every_exception_is_needed() -> None:
    for word in EXCEPTIONS:
        assert word in unsaid(), f"{word} is no word of the last column any more"
        assert allowed(word).keys() <= found()[word].keys(), f"{word}: {allowed(word).keys() - found()[word].keys()}"


# ---- would it be seen? -----------------------------------------------------------------------------------------------

TABLE = """
| we say | meaning | not |
| --- | --- | --- |
| prompt | text | query |
| `old_logprobs` | (B, R) | logp_old, behaviour policy |
| score | a number | r |
| reward | a number | score |
| update | a step | step (alone) |
| trie | segments | - |
"""


def test_words_with_a_row_of_their_own_and_those_alone_are_fine() -> None:
    assert unsaid(TABLE) == {
        "query": "prompt",
        "logp_old": "`old_logprobs`",
        "behaviour policy": "`old_logprobs`",
        "r": "score",
    }


def test_the_page_is_read() -> None:
    words = unsaid().keys()
    assert {"query", "completion", "trajectory", "adv", "logps", "ref_logp", "backbone", "lam"} <= words
    assert "score" not in words and "worker" not in words and "batch" not in words and "prompt" in said()


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("def decode(query, *, sample_logps=1): pass", ["decode", "query", "sample_logps"]),
        ("class A:\n    adv: int = 1\n    done = 2", ["A", "adv", "done"]),
        ("def f(self):\n    self.critic = local = g(lam=1)", ["f", "self", "critic"]),
        ("LAM, (V, W) = 1, (2, 3)", ["LAM", "V", "W"]),
    ],
)
def test_every_kind_of_name_is_seen(text: str, names: list[str]) -> None:
    assert sorted(name for name, _ in names_in(text)) == sorted(names)


@pytest.mark.parametrize(
    ("name", "word", "expected"),
    [
        ("query_length", "query", True),
        ("Completions", "completion", True),
        ("_BestTrajectory", "trajectory", True),
        ("advantage", "adv", False),
        ("seen_logp_old", "logp_old", True),
        ("old_logps", "logp_old", False),
        ("the_behaviour_policies", "behaviour policy", False),
        ("the_behaviour_policy", "behaviour policy", True),
        ("rs", "r", False),
        ("r", "r", True),
    ],
)
def test_a_word_is_seen_in_a_name(name: str, word: str, expected: bool) -> None:
    assert says(name, word) == expected
