"""A model's revision reaches every file of the hub that a run or a command reads, and is written down."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rlhf_toolkit.cli import main
from rlhf_toolkit.errors import CheckpointError, ModelError
from rlhf_toolkit.export.card import card
from rlhf_toolkit.export.chat import load_chat
from rlhf_toolkit.export.finished import read_json, read_run
from rlhf_toolkit.export.merge import merge
from rlhf_toolkit.models.loading import load_tokenizer
from rlhf_toolkit.runs.evaluation import compare_contestants
from rlhf_toolkit.runs.fine_tuning import prepare_fine_tuning
from rlhf_toolkit.runs.ppo import prepare
from rlhf_toolkit.settings.loading import experiment_from_dict
from tests.export.test_card import block
from tests.export.test_merge import tensors
from tests.rollout.test_model_rewards import write_reward_model
from tests.support.exports import write_base
from tests.support.hub import Hub
from tests.support.tiny import merged, tiny_llama, write_task
from tests.trainers.test_fine_tuning import KINDS, sections

MODEL, REWARD = "someone/model", "someone/reward"
AT = {"model.name": MODEL, "model.revision": "v1"}
V1, R2 = f"{MODEL}@v1", f"{REWARD}@r2"


@dataclass
class Ground:
    """A hub where each repository has another ``main``, and a run of PPO on the revisions asked for."""

    hub: Hub
    folder: Path
    commit: str
    task: dict[str, Any]
    of_training: set[str]

    @property
    def run(self) -> Path:
        return self.folder / "run"


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        folder = tmp_path_factory.mktemp("revisions")
        task = write_task(folder)
        hub = Hub(folder / "hub", monkeypatch)
        commit = hub.add(MODEL, "v1", folder / "model")
        hub.add(MODEL, "main", write_base(folder / "other", tiny_llama(initializer_range=0.5)))
        for revision in ("r2", "main"):
            hub.add(REWARD, revision, write_reward_model(folder / revision))
        changes = {
            **AT,
            "reward.model": REWARD,
            "reward.model_revision": "r2",
            "ppo.num_rollouts": 1,
            "run.save_every": 1,
            "data.evaluation": str(folder / "heldout.jsonl"),
        }
        task = merged(task, changes)
        hub.taken()
        prepare(experiment_from_dict(task)).train()
        yield Ground(hub, folder, commit, task, hub.taken())


def test_a_run_of_ppo_and_what_it_writes_down(ground: Ground) -> None:
    assert ground.of_training == {V1, R2}
    load_tokenizer(MODEL)
    assert ground.hub.taken() == {f"{MODEL}@main"}, "or this test could not fail"
    settings = read_json(ground.run / "run.json")
    assert settings["model"]["revision"] == "v1" and settings["reward"]["model_revision"] == "r2"
    assert read_json(ground.run / "policy/adapter_config.json")["revision"] == "v1"
    (checkpoint,) = ground.run.glob("checkpoint-*/state.json")
    assert json.loads(checkpoint.read_text())["commit"] == ground.commit


@pytest.mark.parametrize("kind", [*KINDS, "sft.full"])
def test_every_other_kind_of_run(kind: str, ground: Ground, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    section, _, full = kind.partition(".")
    changes: dict[str, Any] = dict(AT)
    experiment = sections(tmp_path, section, {})
    if full:
        changes |= {"sft.full": True, "update.lr": 1e-3}
        del experiment["model"]["lora_rank"], experiment["model"]["lora_alpha"]
        del experiment["model"]["value_head_std"]
    prepare_fine_tuning(experiment_from_dict(merged(experiment, changes), KINDS[section])).progress.close()
    assert ground.hub.taken() == {V1}
    assert f"model: {MODEL} (llama), revision v1, commit {ground.commit[:12]}\n" in capsys.readouterr().out
    assert read_json(tmp_path / "run/run.json")["model"]["revision"] == "v1"


def test_evaluate_chat_and_data_show(ground: Ground, capsys: pytest.CaptureFixture[str]) -> None:
    policy, out = str(ground.run / "policy"), io.StringIO()
    alone = merged(ground.task, {"reward.model": None, "reward.model_revision": None})
    compare_contestants(experiment_from_dict(alone), ["base", policy], kl=False)
    assert ground.hub.taken() == {V1}
    for base in (MODEL, V1):  # the adapter knows it
        load_chat(base, [policy], out, dtype=None, trust_remote_code=False, max_new_tokens=1).run(["w1"])
        assert ground.hub.taken() == {V1}
    main(["data", "show", str(ground.folder / "prompts.jsonl"), "--model", V1, "--no-chat-template"])
    assert ground.hub.taken() == {V1}
    assert f"model: {MODEL} (llama), revision v1, commit {ground.commit[:12]}" in capsys.readouterr().out


def test_merge_takes_the_revision_that_was_trained_on(ground: Ground, tmp_path: Path) -> None:
    policy = str(ground.run / "policy")
    found = merge(MODEL, policy, tmp_path / "named")
    assert ground.hub.taken() == {V1} and found.base == V1
    merge(str(ground.folder / "model"), policy, tmp_path / "local")
    named, local = tensors(tmp_path / "named"), tensors(tmp_path / "local")
    assert named.keys() == local.keys() and all(named[name].equal(local[name]) for name in local)
    other = merge(f"{MODEL}@main", policy, tmp_path / "other")
    assert other.base == f"{MODEL}@main" and ground.hub.taken() == {f"{MODEL}@main"}, "who names another gets it"


def test_the_card_loads_the_revision(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    text = card(read_run(ground.run))
    assert "| `model.revision` | `v1` |" in text
    monkeypatch.chdir(ground.folder)
    ground.hub.taken()
    exec(block(text, "python"), {})
    assert ground.hub.taken() == {V1}


def test_a_resume_on_another_revision_is_refused(ground: Ground) -> None:
    for name in ("model.revision", "reward.model_revision"):
        section, _, setting = name.partition(".")
        with pytest.raises(CheckpointError, match=rf"{section}\.{setting}"):
            prepare(experiment_from_dict(merged(ground.task, {name: "main"})), resume=True)
    refs = ground.hub.folder / "models--someone--model/refs"
    v1, moved = (refs / "v1").read_text(), (refs / "main").read_text()
    (refs / "v1").write_text(moved)  # a branch that has moved on
    with pytest.raises(CheckpointError, match="was trained on another base"):
        prepare(experiment_from_dict(ground.task), resume=True)
    (refs / "v1").write_text(v1)


def test_a_revision_that_is_not_there_is_named(ground: Ground, tmp_path: Path) -> None:
    changes = {"model.revision": "v3", "run.output_dir": str(tmp_path / "run")}
    with pytest.raises(ModelError, match=rf"'{MODEL}' \(revision 'v3'\)"):
        prepare(experiment_from_dict(merged(ground.task, changes)))
