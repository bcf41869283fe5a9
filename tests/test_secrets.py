"""Secrets among settings."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from rlhf_toolkit import texts
from rlhf_toolkit.errors import ConfigError
from rlhf_toolkit.secrets import is_secret_key, keep_secrets_of, masked, resolved
from rlhf_toolkit.settings.experiment import DPOExperiment, Experiment, RewardExperiment, SFTExperiment
from rlhf_toolkit.texts import HIDDEN
from tests.support.offenders import for_each


@pytest.fixture(autouse=True)
def no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "_secrets", set())


def test_no_setting_of_the_toolkit_is_called_like_a_secret() -> None:
    kinds = (Experiment, SFTExperiment, RewardExperiment, DPOExperiment)
    sections = {part.default_factory for kind in kinds for part in fields(kind) if callable(part.default_factory)}
    names = [setting.name for section in sections for setting in fields(section)]  # type: ignore[arg-type]
    assert len(names) > 80 and [name for name in names if is_secret_key(name)] == []


ALIKE = (
    "eos_token max_tokens answer_key monkey keyboard tokenizer passes_at author pinned end_token key_id sort_key keys"
)


@for_each("key", ALIKE.split())
def test_a_name_that_only_looks_like_one(key: str) -> None:
    assert not is_secret_key(key) and masked({key: "x"}) == {key: "x"}


def test_what_is_no_secret_stays() -> None:
    plain = {
        "a": 1,
        "b": [1.5, None, True, "text"],
        "url": "http://h:80/p?model=x&n=3#part",
        "at": "a@b.example",
        "c": {},
    }
    assert masked(plain) == plain
    named = {
        "api_key": "${KEY}",
        "h": {"Authorization": "Bearer ${KEY}"},
        "url": "https://h/x?token=${T}",
        "n": "a ${B} c",
    }
    assert masked(named) == named


def test_a_secret_is_masked_by_its_name_its_form_and_its_place() -> None:
    given = {
        "api_key": "abc",
        "password": 1234,
        "token": ["a", {"b": "c"}],
        "note": "use sk-0123456789abcdefgh please",
        "db": "postgres://me:pw@h/x",
        "url": "https://h/x?a=1&access_token=abc&b=2",
        "off": {"secret": "", "key": None, "pwd": False},
    }
    assert masked(given) == {
        "api_key": HIDDEN,
        "password": HIDDEN,
        "token": [HIDDEN, {"b": HIDDEN}],
        "note": f"use {HIDDEN} please",
        "db": f"postgres://{HIDDEN}@h/x",
        "url": f"https://h/x?a=1&access_token={HIDDEN}&b=2",
        "off": {"secret": "", "key": None, "pwd": False},
    }
    assert masked(masked(given)) == masked(given)
    keep_secrets_of(given)
    assert "1234" not in str(ConfigError("password=1234 is no text"))


def test_a_variable_is_read_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "value-of-it")
    given: Any = {"a": ["${A_KEY}", 1], "b": "x ${A_KEY}", "c": "$${A_KEY}"}
    assert resolved(given, "reward.kwargs") == {"a": ["value-of-it", 1], "b": "x value-of-it", "c": "${A_KEY}"}
    assert str(ConfigError("got value-of-it")) == f"got {HIDDEN}"


@for_each("text", ["${NOT_SET_HERE}", "${EMPTY}", "${}", "${a b}", "${a-b}", "x${NOT_SET_HERE}y"])
def test_a_variable_that_is_not_there(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMPTY", "")
    with pytest.raises(ConfigError, match=r"^reward\.kwargs\.a\[1\] (names|holds)"):
        resolved({"a": ["x", text]}, "reward.kwargs")
