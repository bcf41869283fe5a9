"""YAML within limits."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml

from rlhf_toolkit.errors import ConfigError
from rlhf_toolkit.settings.loading import load_experiment
from rlhf_toolkit.settings.yaml_text import MOST_CHARACTERS, file_text, read_with_lines, read_yaml
from tests.support.offenders import for_each

RECIPES = sorted((Path(__file__).parents[2] / "recipes").rglob("*.yaml"))


def test_every_recipe_reads_as_yaml_says() -> None:
    assert len(RECIPES) > 5
    for path in RECIPES:
        assert read_yaml(file_text(path), "x") == yaml.safe_load(path.read_text())


def test_an_alias_that_does_not_multiply_is_taken() -> None:
    shared = {"x": [1, 2]}
    found = read_yaml("a: &a {x: [1, 2]}\nb: *a\nc: {<<: *a, y: 1}", "x")
    assert found == {"a": shared, "b": shared, "c": {**shared, "y": 1}}
    assert read_yaml("", "x") is None and read_yaml("# nothing", "x") is None


BAD = {
    "a: &a0 [1,1]\n"
    + "\n".join(f"b{i}: &a{i + 1} [*a{i},*a{i},*a{i}]" for i in range(12)): "aliases stand for more than",
    "a: &a [*a]": "within the value",
    "a: 1\na: 2": "'a' stands twice, at lines 1 and 2",
    "[" * 200 + "]" * 200: "nested deeper",
    "a: [1": "line 1",
    "x" * (MOST_CHARACTERS + 1): "more than 262144 characters",
    "a: !!python/object/apply:os.system ['x']": "python/object",
    "password: 'hunter2\n": "at line",
}


@for_each("text", list(BAD), lambda text: BAD[text][:20])
def test_what_is_refused_and_never_quoted(text: str) -> None:
    begun = time.process_time()
    with pytest.raises(ConfigError, match=r"^the file: ") as caught:
        read_yaml(text, "the file")
    assert BAD[text] in str(caught.value) and "hunter2" not in str(caught.value)
    assert time.process_time() - begun < 5


def test_a_number_to_the_base_of_60_is_text() -> None:
    assert read_yaml("[12:30, 1:30.5, 1_000, 1.5, 0x10]", "x") == ["12:30", "1:30.5", 1000, 1.5, 16]


def test_a_path_that_is_no_file(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "none", "a\0b"):
        with pytest.raises(ConfigError, match="cannot read the experiment"):
            file_text(place)


PLACED = """\
model: {name: m}
data:
  train: t.jsonl
reward:
  functions:
    - function: r.py:f
    - function: r.py:g
      weigth: 2
ppo:
  kl_coef: -1
"""


def test_an_error_names_the_line_of_the_setting_that_it_is_about(tmp_path: Path) -> None:
    assert read_with_lines(PLACED, "x")[1]["reward.functions[1].weigth"] == 8
    path = tmp_path / "x.yaml"
    changes = {
        "": r"ppo\.kl_coef=-1\.0 .*\(.*x\.yaml, line 10\)$",
        "kl_coef: -1|kl_koef: 1": r"unknown setting ppo\.kl_koef.* line 10\)$",
        "ppo:|pop:": r"unknown section 'pop'.* line 9\)$",
        "kl_coef: -1|kl_stop: 1": r"ppo\.kl_stop=1\.0 does nothing.* line 10\)$",
        "ppo:\n  kl_coef: -1|ppo: 3": r"section ppo holds 3.* line 9\)$",
    }
    for change, expected in changes.items():
        old, _, new = change.partition("|")
        path.write_text(PLACED.replace(old, new) if old else PLACED)
        with pytest.raises(ConfigError, match=expected):
            load_experiment(path)
    path.write_text(PLACED)
    with pytest.raises(ConfigError, match=r"ppo\.kl_coef=-2\.0 [^(]*$"):
        load_experiment(path, {"ppo.kl_coef": -2})


def test_names_that_a_stranger_makes_long_cost_nothing() -> None:
    key = "k" * 1000
    text = f"a: &a {{{key}: &b {{{key}1: {{{key}2: 1}}}}}}\nb: [{'*a, ' * 2000}]"
    begun = time.process_time()
    assert set(read_with_lines(text, "x")[1]) == {"a", "b"}
    assert time.process_time() - begun < 5
