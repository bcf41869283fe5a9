"""What is said about the knobs, in words and as a JSON schema, is what the loader does with them."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any, get_type_hints

import yaml

from rlhf_toolkit.errors import ConfigError
from rlhf_toolkit.settings import knobs as rules
from rlhf_toolkit.settings.kinds import KINDS, kind_of
from rlhf_toolkit.settings.knobs import Rule
from rlhf_toolkit.settings.listing import default_in_yaml, idle_by_default, listing, sections_of
from rlhf_toolkit.settings.loading import converted, load_experiment
from rlhf_toolkit.settings.schema import schema
from tests.fuzz.values import BORDERS, LEGAL, MISTAKEN_FOR
from tests.support.json_schema import faults
from tests.support.offenders import for_each
from tests.support.processes import ROOT

RECIPES = sorted((ROOT / "recipes").glob("*/*.yaml"))
VALUES = [*MISTAKEN_FOR, *(value for border in BORDERS.values() for value in border), 0.5, 2, 1.0, "off", "on", False]


def taken(section: type[Any], name: str, value: Any) -> bool:
    """Whether the loader takes ``value`` for one setting of ``section``, all others having their defaults."""
    knob, hints = {each.name: each for each in fields(section)}[name], get_type_hints(section)
    try:
        section(**{name: converted(f"x.{name}", value, hints[name], knob)})
    except ConfigError:
        return False
    return True


@for_each("path", RECIPES, lambda path: path.relative_to(ROOT))
def test_every_recipe_fits_the_schema_of_its_kind(path: Any) -> None:
    values = yaml.safe_load(path.read_text())
    assert list(faults(values, schema(kind_of(values, str(path))))) == []


@for_each("kind", KINDS)
def test_the_schema_takes_whatever_the_loader_takes_of_a_setting(kind: str) -> None:
    for name, section in sections_of(kind).items():
        known = schema(kind)["properties"][name]["properties"]
        assert set(known) == {each.name for each in fields(section)}
        for knob in fields(section):
            tried = [*VALUES, *LEGAL.get(f"{name}.{knob.name}", ()), *knob.metadata["choices"]]
            refused = [value for value in tried if any(faults(value, known[knob.name]))]
            assert [value for value in refused if taken(section, knob.name, value)] == [], (name, knob.name)
            assert refused, f"{name}.{knob.name} takes anything"


def test_the_schema_knows_sections_settings_and_the_kind() -> None:
    ppo = schema("ppo")
    mistakes: list[Any] = [{"rollouts": {}}, {"ppo": {"kl": 1}}, {"kind": "sft"}, {"ppo": []}]
    for wrong in [*mistakes, {"ppo": {"kl_coef": "much"}}]:
        assert list(faults(wrong, ppo)), wrong
    for right in ({}, {"ppo": None}, {"kind": "ppo"}, {"update": {"policy_lr": "1e-4", "packing": False}}):
        assert list(faults(right, ppo)) == [], right
    assert json.loads(json.dumps(ppo)) == ppo


def test_bounds_of_rules_say_what_their_tests_say() -> None:
    """Each limit is where the test changes its mind: 0.01 on one side of it and on the other, and at it."""
    found = [rule for rule in vars(rules).values() if isinstance(rule, Rule) and rule.bounds]
    assert len(found) >= 9
    for rule in found:
        for _, limit in rule.bounds:
            for value in (limit - 0.001, limit, limit + 0.001):
                assert rule.holds(value) == (not list(faults(value, dict(rule.bounds)))), (rule.words, value)


@for_each("kind", KINDS)
def test_the_listing_has_every_knob_with_help_default_and_choices(kind: str) -> None:
    text = " ".join(listing(kind).split())
    for name, section in sections_of(kind).items():
        for knob in fields(section):
            assert f"{name}.{knob.name}={default_in_yaml(knob)}".rstrip() in text
            assert knob.metadata["help"] in text
            assert not knob.metadata["choices"] or f"one of {', '.join(knob.metadata['choices'])}" in text
    assert max(map(len, listing(kind).splitlines())) <= 120


def test_a_default_of_the_listing_can_be_given_as_it_stands(tmp_path: Any) -> None:
    for kind in KINDS:
        for name, section in sections_of(kind).items():
            for knob in fields(section):
                written = default_in_yaml(knob)
                value = (
                    converted("x", yaml.safe_load(written), get_type_hints(section)[knob.name], knob) if written else ""
                )
                assert value == getattr(section(), knob.name), (name, knob.name)


def test_what_does_nothing_by_default_is_said() -> None:
    idle = idle_by_default("ppo")
    assert idle["ppo.kl_horizon"] == "the coefficient moves under ppo.kl_target only"
    assert "without effect by default: there is no reward.adapter" in " ".join(listing("ppo").split())
    assert "ppo.kl_coef" not in idle and "data.evaluation" not in idle_by_default("sft")


def test_a_file_names_its_kind_or_shows_it(tmp_path: Any) -> None:
    assert kind_of({"model": {}, "reward_model": {}}, "f") == "reward"
    assert kind_of({"kind": "dpo", "model": {}}, "f") == "dpo"
    for sections, message in (
        ({"model": {}}, "has no section of one kind of run alone"),
        ({"sft": {}, "dpo": {}}, "has sections of sft and dpo"),
        ({"kind": "pop"}, "kind='pop' is no kind of run; did you mean ppo?"),
        ({"kind": ["ppo"]}, r"kind=['ppo'] is no kind of run; known are"),
    ):
        try:
            raise AssertionError(kind_of(sections, "my.yaml"))
        except ConfigError as error:
            assert message in str(error) and str(error).startswith("my.yaml")
    path = tmp_path / "x.yaml"
    path.write_text("kind: sft\nmodel: {name: m}\ndata: {train: t.jsonl}\n")
    sft = KINDS["sft"].experiment
    assert isinstance(load_experiment(path, None, sft), sft)
    try:
        load_experiment(path)
        raise AssertionError
    except ConfigError as error:
        assert "says kind: sft, but this command runs ppo; start it with rlhf train or recipes/sft.py" in str(error)
