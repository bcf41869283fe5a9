"""Tags that are special tokens: with ``rollout.keep_special_tokens`` rewards, environment and samples read them, and a
reward model of its own never does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_toolkit.runs.ppo import prepare
from rlhf_toolkit.settings.loading import experiment_from_dict
from tests.rollout.test_model_rewards import plain_scores, write_reward_model
from tests.support.offenders import for_each
from tests.support.tiny import merged, tiny_llama, write_task

TAGS = ("w3", "w9", "w20")
NOTING = """

SCORED, ASKED = [], []


def noting(prompts, responses, **columns):
    SCORED.extend(zip(prompts, responses))
    return [float(len(response)) for response in responses]


def answering(prompts, responses, *, turn, **columns):
    ASKED.extend(zip(prompts, responses))
    return ["w9 w1"] * len(responses)
"""
CHANGES = {
    "rollout.max_new_tokens": 24,
    "rollout.max_turns": 2,
    "rollout.responses_per_prompt": 2,
    "rollout.stop_strings": ["w20"],
    "reward.model_weight": 0.5,
}


def collected(folder: Path, **changes: Any) -> Any:
    """The trainer, what one rollout of a run gave, and what its function and its environment were shown."""
    tags = list(TAGS)
    task = write_task(folder, model=tiny_llama(initializer_range=0.3), additional_special_tokens=tags)
    (folder / "noting.py").write_text(NOTING)
    write_reward_model(folder / "rm")
    names = {"reward.function": f"{folder}/noting.py:noting", "rollout.environment": f"{folder}/noting.py:answering"}
    settings: Any = experiment_from_dict(
        merged(task, {**CHANGES, **names, "reward.model": str(folder / "rm"), **changes})
    )
    run = prepare(settings)
    run.progress.close()
    found = run.trainer.maker.collect(run.trainer.model, 0)
    environment: Any = run.trainer.maker.scored_sampler.sampler.environment
    return run.trainer, found, environment.function.__globals__


@for_each("keep", [False, True])
def test_who_reads_special_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str], keep: bool) -> None:
    trainer, found, seen = collected(tmp_path, **{"rollout.keep_special_tokens": keep})
    tokenizer, tokens = trainer.processing_class, found.tokens
    words = [
        tokenizer.convert_ids_to_tokens(row[start : start + length].tolist())
        for row, start, length in zip(tokens.sequences, tokens.prompt_lengths, tokens.response_lengths, strict=True)
    ]
    without = [" ".join(w for w in row if w not in (*TAGS, "</s>", "<unk>")) for row in words]
    expected = [" ".join(w for w in row if w != "</s>") for row in words] if keep else without
    assert [sample["response"] for sample in found.samples] == expected
    assert sorted(response for _, response in seen["SCORED"]) == sorted(expected)
    assert {tag for tag in TAGS for text in expected if tag in text.split()} == (set(TAGS) if keep else set())
    ends = [text.split()[-1:] for _, text in seen["ASKED"]]
    assert (["w20"] in ends) == keep and len(ends) > 4, "a turn ends with a special token that is a stop string"
    told = [line for line in capsys.readouterr().out.splitlines() if "special tokens that neither" in line]
    assert len(told) == (not keep) and all("'w3' in " in line for line in told)
    scores = [float(sample["score"]) for sample in found.samples]
    prompts = [tokenizer.decode(row[:n]) for row, n in zip(tokens.sequences, tokens.prompt_lengths, strict=True)]
    by_model = plain_scores(tmp_path / "rm", [p + r for p, r in zip(prompts, without, strict=True)])
    combined = [len(text) + 0.5 * score for text, score in zip(expected, by_model, strict=True)]
    torch.testing.assert_close(torch.tensor(scores), torch.tensor(combined), rtol=1e-5, atol=1e-5)
