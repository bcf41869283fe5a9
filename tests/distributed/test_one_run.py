"""What one real two-rank run leaves behind: one W&B run, documented metrics, exact first ratios, adapters plain PEFT
can load."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import rlhf_toolkit
from rlhf_toolkit.checkpoints import open_run_folder
from rlhf_toolkit.errors import CheckpointError
from rlhf_toolkit.export.finished import read_run
from rlhf_toolkit.run_claims import RUN_FILE
from rlhf_toolkit.settings.alarms import AlarmsConfig
from tests.support import wandb_file
from tests.support.launch import ROOT, Finished, run_recipe
from tests.support.tiny import merged, write_experiment, write_task

WATCH_WANDB = """
import json, os
from pathlib import Path

import wandb

from tests.support.tiny import REWARD  # the tests' folder is importable on every rank

exec(REWARD)
real_init, real_log = wandb.init, wandb.sdk.wandb_run.Run.log
here = Path(__file__).parent


def note(kind, **values):
    with (here / "wandb_calls.jsonl").open("a") as file:
        file.write(json.dumps({"kind": kind, "rank": os.environ.get("RANK", "0"), **values}) + "\\n")


def init(*args, **kwargs):
    note("init", mode=kwargs["mode"])
    return real_init(*args, **kwargs)


def log(self, data, *args, **kwargs):
    note("log", keys=sorted(data), rollout=data["rollout"], options=sorted(kwargs) + ["positional"] * len(args))
    return real_log(self, data, *args, **kwargs)


wandb.init, wandb.sdk.wandb_run.Run.log = init, log
"""

FLAKY = """
def flaky(prompts, responses, **columns):
    if prompts[0].endswith("w3"):
        raise ValueError("not this one")
    return [float(len(response)) for response in responses]
"""

ANSWERS = """
def first_words(responses):
    return [response.split()[0] if response.split() else None for response in responses]
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one_run")
    changes = {
        "run.wandb": "offline",
        "run.trackers": ["wandb", "tensorboard"],
        "run.evaluate_every": 2,
        "run.evaluation_samples": 3,
        "reward.passes_at": 0.5,
        "reward.answer": f"{folder}/answers.py:first_words",
        "data.evaluation": str(folder / "heldout.jsonl"),
        "ppo.num_rollouts": 4,
        "ppo.mini_batches": 2,
        "ppo.value_warmup_rollouts": 1,
        "reward.missing_eos_penalty": 0.1,
        "rollout.temperature": 0.8,
        "rollout.top_p": 0.99,
        "ppo.importance_correction": "token",
        "ppo.kl_stop": 1e6,
        "rollout.responses_per_prompt": 2,
        "reward.function": "",
        "reward.functions": [
            {"function": f"{folder}/reward.py:low_words"},
            {"function": f"{folder}/flaky.py:flaky", "weight": 0.1, "workers": 1, "on_failure": "drop"},
        ],
    }
    task = merged(write_task(folder), changes)
    (folder / "reward.py").write_text(WATCH_WANDB)
    (folder / "flaky.py").write_text(FLAKY)
    (folder / "answers.py").write_text(ANSWERS)
    finished: Finished = run_recipe(write_experiment(folder / "run.yaml", task), processes=2, stage=3, launcher=True)
    finished.succeeded()
    (folder / "output.txt").write_text(finished.output)
    return folder


def calls(folder: Path, kind: str) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (folder / "wandb_calls.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def log(folder: Path, kind: str) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "run/log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def test_one_wandb_run_from_rank_zero(run: Path) -> None:
    assert [(call["rank"], call["mode"]) for call in calls(run, "init")] == [("0", "offline")]
    assert {call["rank"] for call in calls(run, "log")} == {"0"}
    assert len(list((run / "run/wandb").glob("offline-run-*"))) == 1


def test_a_run_with_what_wandb_leaves_in_it_can_go_on_and_be_read(run: Path) -> None:
    folder = run / "run"
    settings = json.loads((folder / RUN_FILE).read_text())
    with pytest.raises(CheckpointError, match="has no checkpoint"):  # and nothing about a link
        open_run_folder(folder, settings, resume=True, overwrite=False)
    assert read_run(folder).summary["mean_scores"]


def test_wandbs_own_file_has_every_record_and_what_the_run_was(run: Path) -> None:
    found = wandb_file.read(run / "run/wandb")
    for kind in ("train", "eval"):
        for record in log(run, kind):
            numbers = {name: value for name, value in record.items() if name != "kind"}
            assert any(numbers.items() <= row.items() for row in found.rows), record
    assert found.metrics == {"rollout": "", "*": "rollout"}
    assert found.config["ppo"]["num_rollouts"] == 4
    assert found.config["versions"]["rlhf_toolkit"] == rlhf_toolkit.__version__
    assert bool(found.commit) == (ROOT / ".git").exists(), "W&B itself notes the code's commit"
    summary = json.loads((run / "run/summary.json").read_text())
    assert summary["versions"]["rlhf_toolkit"] == rlhf_toolkit.__version__
    assert found.summary["run/seconds"] == summary["seconds"]
    assert found.summary["run/best_score"] == max(summary["mean_scores"])
    adapters = {name.partition("-")[0]: files for name, files in found.artifacts.items() if "samples" not in name}
    assert {*adapters} == {"policy", "value"}
    assert "adapter_model.safetensors" in adapters["policy"]
    assert sum("samples" in name for name in found.artifacts) >= 2, "tables of train and eval"


def test_tensorboards_own_reader_finds_the_log(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "run/tensorboard"))
    events.Reload()
    curve = {each.step: each.value for each in events.Scalars("critic/score/mean")}
    assert curve == pytest.approx({record["rollout"]: record["critic/score/mean"] for record in log(run, "train")})


def test_wandb_gets_its_own_axis_and_never_a_step(run: Path) -> None:
    logged = calls(run, "log")
    assert all(call["options"] == [] for call in logged)
    rollouts = [int(str(call["rollout"])) for call in logged]
    assert rollouts == sorted(rollouts) and rollouts[0] == 0 and rollouts[-1] == 4


WHERE_WRONG = {"train/not_finite_updates", "perf/update_retries", "perf/rollout_retries"} | {
    f"alarm/{field.name}" for field in fields(AlarmsConfig) if field.name != "stop"
}
"""Logged only where something has gone wrong."""


def test_every_logged_key_is_documented_and_every_documented_key_is_logged(run: Path) -> None:
    logged = {key for call in calls(run, "log") for key in call["keys"]}  # type: ignore[attr-defined]
    logged |= {key for record in log(run, "train") + log(run, "eval") for key in record if key != "kind"}
    documented = set(re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs/metrics.md").read_text(), flags=re.MULTILINE))
    assert {
        re.sub("low_words|flaky", "NAME", re.sub(r"@\d+$", "@K", name)) for name in logged
    } == documented - WHERE_WRONG


def test_the_first_ratio_of_every_rollout_is_exactly_one(run: Path) -> None:
    assert [record["actor/first_ratio_deviation"] for record in log(run, "train")] == [0.0] * 4


def test_the_reference_kl_at_the_start_is_exactly_zero(run: Path) -> None:
    first, *_, last = log(run, "train")
    assert first["actor/ref_kl"] == 0.0 and first["actor/ref_kl_k3"] == 0.0
    assert last["actor/ref_kl"] != 0.0, "the policy never moved, so the first line says nothing"


def test_sampling_and_training_see_the_same_policy(run: Path) -> None:
    assert max(record["rollout/logprob_gap_max"] for record in log(run, "train")) < 1e-4


def test_evaluations_at_both_ends_and_between(run: Path) -> None:
    assert [record["rollout"] for record in log(run, "eval")] == [0, 2, 4]


def test_summary_and_samples(run: Path) -> None:
    summary = json.loads((run / "run/summary.json").read_text())
    assert len(summary["mean_scores"]) == 4 and summary["world_size"] == 2
    assert summary["mean_scores"] == [record["critic/score/mean"] for record in log(run, "train")]
    assert {"torch", "transformers", "deepspeed"} <= set(summary["versions"])
    kinds = [json.loads(line)["kind"] for line in (run / "run/samples.jsonl").read_text().splitlines()]
    assert kinds.count("train") == 16 and kinds.count("eval") == 9


def test_plain_peft_loads_the_policy(run: Path) -> None:
    """The adapter's B must have moved, and the loaded model must differ from its base."""
    ids = torch.tensor([[5, 6, 7, 8]])
    base = AutoModelForCausalLM.from_pretrained(run / "model")
    before = base(ids).logits.clone()
    policy = PeftModel.from_pretrained(base, run / "run/policy")
    assert (policy(ids).logits - before).abs().max() > 1e-3


def test_the_output_has_no_stack_and_says_where_things_are(run: Path) -> None:
    output = (run / "output.txt").read_text()
    assert "Traceback" not in output
    assert "run folder" in output and "summary" not in output.lower().split("run folder")[0][-20:]
