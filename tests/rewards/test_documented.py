"""What docs/rewards.md says: its settings and their defaults, and its examples as they stand."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from rlhf_toolkit.rewards.lanes import Lanes
from rlhf_toolkit.rewards.specification import REQUEST_SECONDS, REQUESTS, RewardSpec
from rlhf_toolkit.rewards.values import POLICIES
from tests.support.rewards import batch_of, prompts_for, rewards_of, tokens_for

PAGE = (Path(__file__).parents[2] / "docs/rewards.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def python_block(name: str) -> str:
    (text,) = [text for text in blocks("python") if f"def {name}(" in text]
    return text


def test_every_key_is_in_the_table_with_its_default() -> None:
    table = dict(re.findall(r"^\| `(\w+)` \|(?: (.*?))? \| ", PAGE, flags=re.MULTILINE))
    spec = RewardSpec.parse({"function": "f.py:f"})
    for each in fields(RewardSpec):
        default = getattr(spec, each.name)
        if each.name not in ("setting", "name", "function", "url", "workers", "timeout"):
            text = {"()": "[]", "True": "true"}.get(str(default), str(default))
            assert table[each.name] == text, each.name
    assert table["timeout"] == f"none; {REQUEST_SECONDS:g} with `url`"
    assert table["workers"] == f"{spec.workers}; {REQUESTS} with `url`"
    assert set(table) == {each.name for each in fields(RewardSpec)} - {"setting"}
    assert tuple(re.findall(r"^\| `(\w+)` \| (?!what)[^|]* \|$", PAGE, flags=re.MULTILINE)) == POLICIES


def test_the_entries_are_valid() -> None:
    lists = [yaml.safe_load(text)["reward"]["functions"] for text in blocks("yaml")]
    specs = [
        [RewardSpec.parse(entry, f"reward.functions[{i}]") for i, entry in enumerate(entries)] for entries in lists
    ]
    assert [[spec.name for spec in each] for each in specs] == [["correct", "short"], ["correct"], ["judge", "short"]]


def test_the_functions_for_length_and_for_repeats() -> None:
    names: dict[str, Any] = {}
    exec(python_block("short") + python_block("no_repeats"), names)
    assert names["short"](["p"], ["x" * 50], label=[1]) == [-0.5]
    assert names["no_repeats"](["p"] * 2, ["", ""], tokens=[[1, 1, 2, 2, 2], [3]]) == [[0, -0.1, 0, -0.1, -0.1], [0]]


def test_the_verifier_in_its_workers(tmp_path: Path) -> None:
    """The third would be a number with a billion digits."""
    (tmp_path / "math_reward.py").write_text(python_block("correct"))
    text = next(text for text in blocks("yaml") if "math_reward" in text)
    (entry,) = yaml.safe_load(text)["reward"]["functions"]
    entry |= {"function": f"{tmp_path}/{entry['function']}", "workers": 1, "timeout": 4}
    responses = [
        r"so \boxed{(x + 1)**2}",
        r"\boxed{x}",
        r"\boxed{9**9**9}",
        "none",
        r"\boxed{)}",
        r"\boxed{1 + x*(x + 2)}",
        rf"\boxed{{__import__('pathlib').Path({str(tmp_path / 'run')!r}).touch()}}",
        r"\boxed{x.__class__}",
        r"\boxed{1e999*x}",
    ]
    with rewards_of(entry) as rewards:
        scores = rewards.collect(*batch_of(responses, answer="x**2 + 2*x + 1"))
    assert scores.totals == [1, 0, 0, 0, 0, 1, 0, 0, 0] and scores.failures == {"correct": 1}
    assert not (tmp_path / "run").exists()


RUNS = re.compile(r"\b(eval|exec|sympify|parse_expr|pickle\.loads?|torch\.load|yaml\.(unsafe_|full_)?load)\(")


def test_no_example_runs_what_it_is_given() -> None:
    """Examples are copied: none in the documentation or the recipes evaluates a text or loads a pickle."""
    root = Path(__file__).parents[2]
    pages = [*root.glob("docs/*.md"), *root.glob("*.md"), *root.glob("recipes/**/*.md")]
    code = {str(page): "".join(re.findall(r"```\w*\n(.*?)```", page.read_text(), flags=re.DOTALL)) for page in pages}
    code |= {str(path): path.read_text() for path in root.glob("recipes/**/*.py")}
    assert len(code) > 20
    assert not {name for name, text in code.items() if RUNS.search(re.sub(r"\.eval\(", "", text))}


def test_the_judge_is_asked_from_as_many_threads_as_it_says() -> None:
    text = next(text for text in blocks("yaml") if "judge" in text)
    entry, _ = yaml.safe_load(text)["reward"]["functions"]
    with rewards_of({**entry, "url": "http://127.0.0.1:1/", "retries": 0}) as rewards:
        source = rewards._rewards[0].source
        assert isinstance(source, Lanes) and len(source._threads) == 16
        responses = ["a", "b"]
        assert rewards.collect(prompts_for(2), responses, tokens_for(responses)).kept == [False, False]
