"""``rlhf check``: what it finds is what a run finds, and it has seen no weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PreTrainedModel

from rlhf_toolkit.cli import main
from rlhf_toolkit.distributed.topology import Launch, Topology
from rlhf_toolkit.models.slot_cache import column_bytes, state_bytes
from rlhf_toolkit.rollout.decoding import Alone
from rlhf_toolkit.rollout.sampler import one_token
from rlhf_toolkit.rollout.sizes import model_size
from rlhf_toolkit.runs.check import skeleton
from rlhf_toolkit.runs.ppo import load_ppo_roles
from rlhf_toolkit.settings.experiment import Experiment
from rlhf_toolkit.settings.loading import experiment_from_dict
from tests.support.offenders import for_each
from tests.support.tiny import merged, tiny_llama, tiny_recurrent, write_experiment, write_task

CASES: list[tuple[Callable[[], PreTrainedModel], dict[str, Any]]] = [
    (tiny_recurrent, {}),
    (tiny_llama, {"model.value_on": "policy_trunk", "model.dtype": "bfloat16"}),
    (tiny_llama, {"model.quantization": "int8", "model.target_modules": ["q_proj", "down_proj"]}),
]


@for_each(("make", "changes"), CASES)
def test_the_skeleton_has_the_sizes_of_the_real_model(
    make: Callable[[], PreTrainedModel], changes: dict[str, Any], tmp_path: Path
) -> None:
    """The numbers that the planner reads, of the model as a run loads it and of names and shapes alone."""
    experiment: Experiment = experiment_from_dict(merged(write_task(tmp_path, model=make()), changes))
    config = AutoConfig.from_pretrained(tmp_path / "model")
    topology = Topology(Launch.from_environment({}), 0, 1, torch.device("cpu"))
    real = load_ppo_roles(experiment, config, topology, value=True)
    bare = skeleton(experiment, config, value=True, quantised=False)
    with torch.no_grad():
        caches = [one_token(shared, Alone()) for shared in (real, bare)]
    columns, states = ([size(cache) for cache in caches] for size in (column_bytes, state_bytes))
    assert columns[0] == columns[1] and states[0] == states[1]
    stored = skeleton(experiment, config, value=True, quantised=True)
    assert all(p.is_meta for p in stored.parameters())
    sizes = [model_size(shared, columns[0], state=states[0], on_cpu=True) for shared in (real, stored)]
    assert sizes[0] == sizes[1]


def test_check_of_a_sound_experiment_and_of_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = write_task(tmp_path)
    (tmp_path / "model/model.safetensors").unlink()
    path = str(write_experiment(tmp_path / "my.yaml", task))
    main(["check", path, "--processes", "2"])
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"ppo: 2 processes on CPU, ZeRO-3, by cpu_zero3.yaml; results in {tmp_path}/run"
    assert "reward low_words: 0, 0 for 'A made-up response: 42.' to the first 2 prompt(s)" in told
    assert any(line.startswith("rollout: base gathered once a rollout, 4 slot(s), ") for line in told)
    assert "3 rollouts of 1 update(s)" in told
    assert told[-1] == f"{path} is sound; only the weights have not been looked at: rlhf train {path}"
    assert not (tmp_path / "run").exists()
    (tmp_path / "bad.py").write_text("def score(prompts, responses, wish):\n    return [0.0] * len(responses)\n")
    (tmp_path / "sum.py").write_text("def score(prompts, responses, **columns):\n    return sum(map(len, responses))\n")
    (tmp_path / "run").mkdir()
    mistakes = {
        f"reward.function={tmp_path}/bad.py:score": "wish",
        f"reward.function={tmp_path}/sum.py:score": "RewardError: reward score returned",
        "model.target_modules=[q_prog]": "model.target_modules",
        f"data.train={tmp_path}/none.jsonl": "DataError: ",
        "rollout.mode=stream": "ConfigError: rollout.mode=stream, but nothing is sharded here",
        "rollout.prompts_per_rollout=100": "24",
        "model.policy_adapter=nowhere": "model.policy_adapter=nowhere has no adapter_config.json",
    }
    for word, message in mistakes.items():
        with pytest.raises(SystemExit):
            main(["check", path, word])
        last = capsys.readouterr().err.splitlines()[-1]
        assert message in last, (word, last)


@for_each("kind", ["sft", "reward", "dpo"])
def test_check_of_the_other_kinds(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = write_task(tmp_path)
    monkeypatch.chdir(tmp_path)
    main(["init", "--kind", kind, "--model", task["model"]["name"], "new"])
    monkeypatch.chdir(tmp_path / "new")
    row = {"prompt": "w1", **({"completion": " w2"} if kind == "sft" else {"chosen": " w2", "rejected": " w3"})}
    Path("train.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    main(["check", "data.chat_template=false"])
    told = capsys.readouterr().out.splitlines()
    assert "5 steps of 1 update(s)" in told and told[-1].startswith("experiment.yaml is sound")
