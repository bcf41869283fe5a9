"""YAML within limits."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml

from rlhf_toolkit.errors import ConfigError
from rlhf_toolkit.settings.yaml_text import MOST_CHARACTERS, file_text, read_yaml
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
    "a: 1\na: 2": "'a' stands twice at line 1",
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
