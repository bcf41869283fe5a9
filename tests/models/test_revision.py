"""A revision of a model of the hub: config, tokenizer and weights are those of it, and a run says which commit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from rlhf_toolkit.errors import ModelError
from rlhf_toolkit.runs.ppo import prepare
from rlhf_toolkit.settings.loading import experiment_from_dict
from tests.support.tiny import merged, tiny_llama, write_task

NAME = "somebody/tiny"
COMMITS = {"main": "a" * 40, "v2": "b" * 40}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A task whose model lies in the hub's cache, as a download leaves it: two revisions with other weights."""
    task = write_task(tmp_path)
    place = tmp_path / "cache" / "models--somebody--tiny"
    (place / "refs").mkdir(parents=True)
    for seed, (revision, commit) in enumerate(COMMITS.items()):
        (place / "refs" / revision).write_text(commit)
        shutil.copytree(tmp_path / "model", place / "snapshots" / commit)
        tiny_llama(initializer_range=(0.1, 0.9)[seed]).save_pretrained(place / "snapshots" / commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return merged(task, {"model.name": NAME})


def test_a_run_takes_the_revision_it_is_given_and_says_its_commit(
    hub: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spread = {}
    for revision, shown in ((None, ""), ("v2", "revision v2, ")):
        changes = {"model.revision": revision, "ppo.num_rollouts": 1, "run.save_every": 1}
        changes |= {"run.output_dir": str(tmp_path / str(revision))}
        run: Any = prepare(experiment_from_dict(merged(hub, changes)))
        spread[revision] = float(run.trainer.model.causal_lm.model.embed_tokens.weight.std())
        commit = COMMITS[revision or "main"]
        assert f"model: {NAME} (llama), {shown}commit {commit[:12]}" in capsys.readouterr().out
    run.train()
    (state,) = (tmp_path / "v2").glob("checkpoint-*/state.json")
    assert json.loads(state.read_text())["commit"] == COMMITS["v2"]
    assert spread["v2"] > 5 * spread[None]
    with pytest.raises(ModelError, match=r"'somebody/tiny' \(revision 'v3'\)"):
        prepare(experiment_from_dict(merged(hub, {"model.revision": "v3", "run.output_dir": str(tmp_path / "v3")})))
