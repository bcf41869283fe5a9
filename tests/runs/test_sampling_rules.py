"""From settings to what changes logits, and what a start says about how tokens are drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_toolkit.errors import ConfigError
from rlhf_toolkit.models.loading import sampling_wishes_of
from rlhf_toolkit.rollout.logit_changes import LogitRules
from rlhf_toolkit.runs.ppo import prepare
from rlhf_toolkit.runs.sampling_rules import logit_rules, uncorrected, unheeded
from rlhf_toolkit.settings.configs import RolloutConfig
from rlhf_toolkit.settings.loading import experiment_from_dict
from tests.support.builders import tiny_tokenizer
from tests.support.chat_tokenizers import byte_tokenizer
from tests.support.offenders import for_each
from tests.support.tiny import WORDS, merged, write_task

STOP = 1


def rules(**settings: Any) -> LogitRules:
    tokenizer = tiny_tokenizer(words=WORDS, pad="</s>")
    return logit_rules(RolloutConfig(**settings), tokenizer, stop_ids=(STOP,), vocab_size=32)


def test_words_are_their_tokens_at_the_beginning_of_a_text_and_behind_a_space() -> None:
    of = tiny_tokenizer(words=WORDS, pad="</s>").get_vocab()
    found = rules(bad_words=["w3", " w4 w5 "], logit_bias={"9": 1, "2": -0.5}, repetition_penalty=1.1)
    assert found == LogitRules(((2, -0.5), (9, 1.0)), 1.1, ((of["w3"],), (of["w4"], of["w5"])))
    assert not rules() and rules(repetition_penalty=0.9) and rules(logit_bias={"3": 0.0})
    merges = [("b", "a"), ("ba", "d"), ("Ġ", "bad")]
    tokenizer = byte_tokenizer(merges=merges)
    behind, begin = tokenizer.get_vocab()["Ġbad"], tokenizer.get_vocab()["bad"]
    spelt = logit_rules(RolloutConfig(bad_words=["bad"]), tokenizer, stop_ids=(), vocab_size=999).bad_words
    assert spelt == ((begin,), (behind,))


@for_each(
    "settings, message",
    [
        ({"logit_bias": {"32": 1.0}}, r"rollout.logit_bias has the token id 32, but the model has 32 tokens; give"),
        ({"bad_words": ["w3 </s>", "</s>"]}, r"rollout.bad_words has '</s>', a token that ends responses, so that"),
        ({"bad_words": ["zzz"]}, r"rollout.bad_words has 'zzz', which the model's tokens cannot spell; leave it out"),
    ],
)
def test_what_no_rule_can_be_made_of_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rules(**settings)


PPO: dict[str, Any] = {"model": {"name": "m"}, "data": {"train": "t"}, "reward": {"functions": [{"function": "f:f"}]}}


@for_each(
    "changes, said",
    [
        ({}, None),
        ({"rollout.temperature": 0.7}, None),
        (
            {"rollout.top_k": 20, "rollout.min_p": 0.1},
            "rollout.top_k=20, rollout.min_p=0.1: tokens are drawn from anot",
        ),
        ({"rollout.bad_words": ["x" * 999]}, "rollout.bad_words=['xxx"),
        ({"rollout.repetition_penalty": 1.1, "ppo.importance_correction": "token"}, None),
    ],
)
def test_a_gradient_that_nothing_corrects_is_said(changes: dict[str, Any], said: str | None) -> None:
    experiment: Any = experiment_from_dict(merged(PPO, changes))
    lines = uncorrected(experiment)
    assert lines == [] if said is None else (len(lines) == 1 and lines[0].startswith(said) and len(lines[0]) < 400)


QWEN = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05, "eos_token_id": 1}


def test_what_a_generation_config_asks_for_and_does_not_get_is_said(tmp_path: Path) -> None:
    file = tmp_path / "generation_config.json"
    assert sampling_wishes_of(str(tmp_path)) == {}
    file.write_text(json.dumps({"eos_token_id": 1, "temperature": 1.0, "top_p": 1, "top_k": 0, "bad_words_ids": None}))
    assert sampling_wishes_of(str(tmp_path)) == {}
    file.write_text(json.dumps({**QWEN, "no_repeat_ngram_size": 3}))
    wishes = sampling_wishes_of(str(tmp_path))
    ours = RolloutConfig(temperature=0.7, top_k=20, repetition_penalty=1.1)
    (line,) = unheeded("m", wishes, ours)
    assert line == (
        "m asks in its generation_config.json for top_p=0.8, repetition_penalty=1.05, no_repeat_ngram_size=3; only the "
        "settings count, and here it is rollout.top_p=1.0, rollout.repetition_penalty=1.1 and nothing gives "
        "no_repeat_ngram_size"
    )
    del wishes["no_repeat_ngram_size"]
    same = RolloutConfig(temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.05)
    assert unheeded("m", wishes, same) == []


def test_a_run_says_both_at_its_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = write_task(tmp_path)
    file = tmp_path / "model/generation_config.json"
    file.write_text(json.dumps({"eos_token_id": 1, "repetition_penalty": 1.05}))
    prepare(experiment_from_dict(merged(task, {"rollout.min_p": 0.1}))).progress.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "generation_config.json" in line and "repetition_penalty=1.05" in line]
    assert [line for line in lines if line.startswith("rollout.min_p=0.1: tokens are drawn from another distribution")]
