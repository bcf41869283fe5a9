"""Runs in Python: arguments become the experiment of a YAML file, objects leave a trace, and a run is the same run."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict, load_dataset
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import rlhf_toolkit
from rlhf_toolkit import DPOTrainer, PPOConfig, PPOTrainer, RewardTrainer, SFTConfig, SFTTrainer
from rlhf_toolkit.data.given_rows import rows_of
from rlhf_toolkit.errors import CheckpointError, ConfigError, DataError, ModelError, RLHFError
from rlhf_toolkit.models.folders import commit_of
from rlhf_toolkit.models.given_model import require_usable
from rlhf_toolkit.reporting.records import read_records
from rlhf_toolkit.runs.ppo import prepare
from rlhf_toolkit.settings.experiment import Experiment
from rlhf_toolkit.settings.loading import experiment_from_dict
from tests.support.processes import environment_of_tests
from tests.support.tiny import merged, tiny_llama, write_task
from tests.trainers.test_fine_tuning import write_rows


def few_words(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
    return [1 - len(response.split()) / 10 for response in responses]


def polite(prompts: list[str], responses: list[str], *, word: str = "w3", **columns: Any) -> list[float]:
    return [float(word in response) for response in responses]


def rows_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def model_in(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)


def made(task: dict[str, Any], **changes: Any) -> PPOTrainer:
    """A trainer of the sections of ``task``, whose model, reward and rows may be given otherwise."""
    sections = {name: dict(section) for name, section in task.items()}
    arguments: dict[str, Any] = {
        "model": sections["model"].pop("name"),
        "train_dataset": sections["data"].pop("train"),
        "reward_funcs": few_words,
        "args": PPOConfig(**sections | {"reward": {}}),
    }
    return PPOTrainer(**{**arguments, **changes})


def test_the_package_itself_is_imported_in_no_time() -> None:
    code = (
        "import sys, time; before = time.perf_counter(); import rlhf_toolkit; took = time.perf_counter() - before; "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules; print(took)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment_of_tests(), capture_output=True, text=True, check=True
    )
    assert float(found.stdout) < 0.3
    assert {name for name in rlhf_toolkit.__all__ if not hasattr(rlhf_toolkit, name)} == set()
    assert "PPOTrainer" in dir(rlhf_toolkit) and not hasattr(rlhf_toolkit, "PPOTrainr")


def test_settings_by_their_own_names_are_those_of_the_file(tmp_path: Path) -> None:
    config = PPOConfig(num_rollouts=2, top_p=0.9, run={"name": "first"}, kl_coef=1, output_dir="x", lora_rank=4)
    assert config.sections == {
        "ppo": {"num_rollouts": 2, "kl_coef": 1},
        "rollout": {"top_p": 0.9},
        "run": {"name": "first", "output_dir": "x"},
        "model": {"lora_rank": 4},
    }
    more = config.with_settings({"kl_coef": 0.5, "run": {"seed": 1}}).sections
    assert more["ppo"] == {"num_rollouts": 2, "kl_coef": 0.5}
    assert more["run"] == {"name": "first", "output_dir": "x", "seed": 1}
    task = write_task(tmp_path)
    reward = str(task["reward"]["function"])
    expected = merged(task, {"reward.functions": [{"function": reward}]})
    del expected["reward"]["function"]
    assert made(task, reward_funcs=reward).experiment == experiment_from_dict(expected)


def test_help_shows_every_setting_of_the_file() -> None:
    import inspect

    known = inspect.signature(PPOConfig).parameters
    assert known["kl_coef"].default == 0.05 and "num_rollouts" in known and "name" not in known
    assert {"full", "epochs", "lr"} <= set(inspect.signature(SFTConfig).parameters)


BAD_SETTINGS: dict[str, dict[str, Any]] = {
    r"unknown setting kl_coeff; did you mean kl_coef\?": {"kl_coeff": 1},
    r"name is a setting of model and run; write model=\{": {"name": "x"},
    r"learning_rate; here it is policy_lr, value_lr": {"learning_rate": 1e-5},
    r"ppo\.kl_coef=-1\.0 must not be negative": {"kl_coef": -1},
    r"run is a section; write run=\{": {"run": "x"},
    r"unknown setting run\.nme": {"run": {"nme": 1}},
    r"the reward 'judge' is no function": {"reward": {"functions": ["judge"]}},
    r"\(completions, \*\*more\) takes the responses first, as TRL has it; .*\(prompts, responses, \*\*columns\)": {
        "functions": [lambda completions, **more: [0.0]]
    },
    r"\(text\) cannot take prompts and responses; write .*\(prompts, resp": {"functions": [lambda text: 0.0]},
    r"beta; here it is kl_coef": {"beta": 0.1},
    r'run_name; here it is run=\{"name"': {"run_name": "x"},
    r"report_to; here it is trackers": {"report_to": "none"},
}


def test_settings_that_are_none() -> None:
    for message, settings in BAD_SETTINGS.items():
        with pytest.raises(ConfigError, match=message) as caught:
            PPOConfig(**settings)
        assert "\n" not in str(caught.value)


def test_functions_stand_under_names_that_tell_them_apart() -> None:
    config = PPOConfig(
        functions=[polite, {"function": partial(polite, word="w4"), "weight": 0.5}, lambda p, r, **c: [0.0] * len(r)],
        environment=lambda prompts, responses, turn, **columns: [None] * len(prompts),
        max_turns=2,
    )
    module = __name__
    assert config.sections["reward"]["functions"] == [
        {"name": "polite", "function": f"{module}:polite"},
        {"name": "polite", "function": f"{module}:partial(polite)", "weight": 0.5},
        {
            "name": "lambda",
            "function": f"{module}:test_functions_stand_under_names_that_tell_them_apart.<locals>.<lambda>",
        },
    ]
    assert config.sections["rollout"]["environment"].endswith("<lambda>#2")
    assert len(config.functions) == 3, "the first is found where it is"
    more = config.with_settings({"answer": lambda responses: responses, "passes_at": 1.0, "data": {"evaluation": "x"}})
    assert len(more.functions) == 4 and len(config.functions) == 3, "one lambda never takes another's place"
    assert len({id(function) for function in more.functions.values()}) == 4


BAD_ROWS: dict[str, Any] = {
    r"is a DatasetDict of splits \(train\); give one": DatasetDict({"train": Dataset.from_list([{"prompt": "a"}])}),
    r"is an IterableDataset": Dataset.from_list([{"prompt": "a"}]).to_iterable_dataset(),
    r"holds no rows": [],
    r"row 1 is 'b', no dict": [{"prompt": "a"}, "b"],
    r"is a int, not a datasets\.Dataset": 3,
    r"row 0 holds <object object .*\(object\); give": [{"prompt": object()}],
    r"row 0 holds \{1\} \(set\)": [{"prompt": ["a", {"b": {1}}]}],
}


def test_rows_are_those_of_a_file(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "w1", "answer": 1}, {"prompt": "w2", "tags": ["x"], "answer": None}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    of_file = list(load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache")))
    assert list(rows_of(rows, "data.train")) == of_file == list(rows_of(Dataset.from_list(of_file), "data.train"))
    for message, bad in BAD_ROWS.items():
        with pytest.raises(DataError, match=message):
            rows_of(bad, "data.train")


def bad_models() -> dict[str, Any]:
    adapted: Any = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    injected, meta, empty = tiny_llama(), tiny_llama(), tiny_llama()
    torch.nn.Module.to(meta, "meta")
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), injected)
    empty.get_input_embeddings().weight.data = torch.empty(0)  # type: ignore[union-attr]
    return {
        "a base with an adapter": adapted,
        "has an adapter on it": injected,
        "no PreTrainedModel": nn.Linear(2, 2),
        "not in memory": meta,
        "gone to an earlier run": empty,
    }


def test_models_of_which_no_base_is_made() -> None:
    assert commit_of("given:LlamaForCausalLM", "main") is None and commit_of("/gone/a/b/c", "main") is None
    for message, model in bad_models().items():
        with pytest.raises(ModelError, match=message):
            require_usable(model)


class Heard(TrainerCallback):
    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


@pytest.fixture(scope="module")
def of_names(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A finished run of names alone, and its sections."""
    folder = tmp_path_factory.mktemp("names")
    task = merged(write_task(folder), {"data.evaluation": str(folder / "heldout.jsonl"), "run.save_every": 1})
    prepare(experiment_from_dict(task)).train()
    return folder, task


def test_objects_make_the_run_that_names_make_and_leave_a_trace(of_names: tuple[Path, dict[str, Any]]) -> None:
    folder, task = of_names
    model = model_in(folder)
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    namespace: dict[str, Any] = {}
    exec((folder / "reward.py").read_text(), namespace)
    heard, rows = Heard(), rows_in(folder / "prompts.jsonl")
    trainer = made(
        merged(task, {"run.output_dir": str(folder / "objects")}),
        model=model,
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        reward_funcs=namespace["low_words"],
        train_dataset=rows,
        eval_dataset=Dataset.from_list(rows_in(folder / "heldout.jsonl")),
        callbacks=[heard],
    )
    first = trainer.evaluate()
    embeddings: Any = trainer.run.trainer.model.causal_lm.get_input_embeddings()
    assert before["model.embed_tokens.weight"] == embeddings.weight.data_ptr()
    summary = trainer.train()
    assert trainer.evaluate()["eval/score/mean"] == summary["evaluations"][-1]["eval/score/mean"]
    assert [record["rollout"] for record in read_records(folder / "objects", "eval")] == [0, 3]
    assert first["eval/score/mean"] == summary["evaluations"][0]["eval/score/mean"]
    assert sum("critic/score/mean" in logs for logs in heard.logs) == 3
    for role in ("policy", "value"):
        mine, theirs = (load_file(folder / run / role / "adapter_model.safetensors") for run in ("objects", "run"))
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs), role
    kept = json.loads((folder / "objects/run.json").read_text())
    assert kept["model"]["name"] == str(folder / "model") and kept["data"]["train"] == "given:data.train"
    assert kept["given"]["data.train"].startswith("list of 24 rows, fingerprint ")
    assert kept["given"]["model.name"] == "LlamaForCausalLM in float32, 17568 weights"
    adapter = json.loads((folder / "objects/policy/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(folder / "model")
    assert (folder / "objects/policy/tokenizer.json").is_file(), "it may be another than the base's"
    for call in (trainer.train, trainer.prepare):
        with pytest.raises(ConfigError, match=r"make another trainer|prepared already"):
            call()


def test_a_run_goes_on_with_the_same_objects_only(of_names: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, task = of_names
    task = merged(task, {"run.output_dir": str(tmp_path / "run"), "ppo.num_rollouts": 1})
    rows, longer = rows_in(folder / "prompts.jsonl"), merged(task, {"ppo.num_rollouts": 2})
    made(task, model=model_in(folder), train_dataset=rows).train()

    def go_on(**changes: Any) -> dict[str, Any]:
        return made(longer, **{"model": model_in(folder), "train_dataset": rows, **changes}).train(resume=True)

    with pytest.raises(CheckpointError, match=r"given\.data\.train='list of 24 rows.* now .*'list of 23 rows"):
        go_on(train_dataset=rows[:23])
    with pytest.raises(CheckpointError, match=r"reward\.functions=.*few_words.* now .*polite"):
        go_on(reward_funcs=polite)
    other = model_in(folder)
    other.get_input_embeddings().weight.data[3] += 1.0
    with pytest.raises(CheckpointError, match="was trained on another base"):
        go_on(model=other)
    summary = go_on()
    assert len(summary["mean_scores"]) == 2
    found: Experiment = experiment_from_dict(
        {k: v for k, v in json.loads((tmp_path / "run/run.json").read_text()).items() if k != "given"}
    )
    with pytest.raises(DataError, match="stands for an object that a Python program has given"):
        prepare(found, overwrite=True)


def test_what_cannot_be_an_argument(of_names: tuple[Path, dict[str, Any]]) -> None:
    folder, task = of_names
    task = merged(task, {"run.output_dir": str(folder / "never")})
    rows = rows_in(folder / "prompts.jsonl")
    alone = {name: value for name, value in task["data"].items() if name not in ("train", "evaluation")}
    bad: dict[str, dict[str, Any]] = {
        r"eval_dataset is missing": {"args": PPOConfig(**{**task, "model": {}, "reward": {}, "data": alone})},
        r"args is a SFTConfig; give a PPOConfig": {"args": SFTConfig()},
        r"is no TrainerCallback": {"callbacks": [print]},
        r"processing_class is a int": {"processing_class": 3},
        r"data\.train_split names a part": {"train_dataset": rows, "train_split": "train[:3]"},
        r"data\.streaming reads a file": {"train_dataset": rows, "streaming": True},
        r"came from no folder that would have a tokenizer": {"model": tiny_llama()},
        r"reward\.function is missing": {"reward_funcs": ()},
        r"reward\.model=.* is also what the given model": {
            "model": model_in(folder),
            "reward": {"model": str(folder / "model")},
        },
    }
    for message, arguments in bad.items():
        with pytest.raises(RLHFError, match=message):
            made(task, **arguments).evaluate()
    with pytest.raises(ConfigError, match="was given as an object by a Python program; start that program"):
        made(task, reward_funcs={"function": lambda prompts, responses, **c: [0.0], "workers": 1}).prepare()
    assert not (folder / "never/run.json").exists()


@pytest.mark.thorough
def test_supervised_runs_take_the_same_arguments(of_names: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, _ = of_names
    pairs = rows_in(write_rows(tmp_path))
    shared: dict[str, Any] = {
        "train_dataset": pairs,
        "eval_dataset": pairs[:4],
        "chat_template": False,
        "max_tokens": 32,
        "micro_batch_tokens": 128,
        "batch_size": 5,
        "wandb": "off",
    }
    model = model_in(folder)
    tuned = SFTTrainer(model, **shared, full=True, lr=1e-3, output_dir=str(tmp_path / "sft"))
    before = tuned.evaluate()["eval/loss"]
    assert tuned.train()["world_size"] == 1 and tuned.evaluate()["eval/loss"] < before
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "sft/policy") is not None
    for kind in (RewardTrainer, DPOTrainer):
        trainer = kind(str(folder / "model"), **shared, output_dir=str(tmp_path / kind.__name__))
        trainer.train()
        assert "eval/loss" in trainer.evaluate()
        assert json.loads((trainer.folder / "run.json").read_text())["given"]["data.train"].startswith("list of")
