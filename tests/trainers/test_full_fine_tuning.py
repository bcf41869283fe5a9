"""SFT of all weights against plain transformers: loss, gradients, whole runs, what they save, and resuming."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from rlhf_toolkit.data.items import Item
from rlhf_toolkit.errors import CheckpointError, ModelError
from rlhf_toolkit.export.folders import adapter_folder
from rlhf_toolkit.runs.fine_tuning import FineTuningRun, prepare_fine_tuning
from rlhf_toolkit.settings.experiment import SFTExperiment
from rlhf_toolkit.settings.loading import experiment_from_dict
from tests.support.launch import run_recipe
from tests.support.tiny import merged, tiny_llama, write_experiment
from tests.support.values import named
from tests.trainers.test_fine_tuning import logprob
from tests.trainers.test_fine_tuning import sections as adapter_sections

WIDE: dict[str, Any] = {"vocab_size": 3200, "intermediate_size": 3200, "head_dim": 800}
"""Matrices of more than 1e5 elements, up to which ZeRO-3 would keep them whole on every rank."""
TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def sections(folder: Path, changes: dict[str, Any], *, tied: bool = True, **sizes: Any) -> dict[str, Any]:
    experiment = adapter_sections(folder, "sft", {"sft.full": True, **changes})
    for name in ("lora_rank", "lora_alpha", "value_head_std"):
        del experiment["model"][name]
    llama(tied, **sizes).save_pretrained(folder / "model")
    return experiment


def llama(tied: bool, **sizes: Any) -> PreTrainedModel:
    return tiny_llama(initializer_range=0.2, tie_word_embeddings=tied, **sizes)


def prepared(folder: Path, *, tied: bool = True, resume: bool = False, **changes: Any) -> FineTuningRun:
    experiment = experiment_from_dict(sections(folder, changes, tied=tied), SFTExperiment)
    run = prepare_fine_tuning(experiment, resume=resume)
    run.progress.close()
    return run


def plain_loss(model: PreTrainedModel, items: list[Item]) -> Tensor:
    """Transformers' own forward pass of one sequence at a time; the mean over the trained tokens of all."""
    tokens = sum(sum(row.trained) for item in items for row in item.rows)
    return -torch.stack([logprob(model, item.rows[0]) for item in items]).sum() / tokens


@TIED
@pytest.mark.parametrize("packing", ["on", "off"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_loss_and_gradient_are_those_of_plain_transformers(
    tmp_path: Path, tied: bool, packing: str, checkpointing: bool
) -> None:
    changes: dict[str, Any] = {"update.packing": packing, "model.gradient_checkpointing": checkpointing}
    trainer = prepared(tmp_path, tied=tied, **changes).trainer
    trainer.model.train()
    parts = next(iter(trainer.get_train_dataloader()))
    assert len(parts) > 1, "one micro-batch would not test the cut"
    losses = [trainer.compute_loss(trainer.model, part) for part in parts]
    torch.stack(losses).sum().backward()

    plain = llama(tied)
    expected = plain_loss(plain, [trainer.items[i] for i in trainer.get_train_dataloader().schedule.indices(0)])
    expected.backward()
    assert torch.stack(losses).sum().item() == pytest.approx(expected.item(), rel=1e-5)
    mine = {name.removeprefix("causal_lm."): p.grad for name, p in trainer.model.named_parameters()}
    theirs = {name: p.grad for name, p in plain.named_parameters()}
    assert mine.keys() == theirs.keys()
    assert ("lm_head.weight" in theirs) is not tied
    for name, gradient in theirs.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-5, atol=1e-5, msg=named(name))


def test_steps_are_those_of_a_plain_loop_of_adamw(tmp_path: Path) -> None:
    """Clipping, schedule and all, over four steps."""
    changes: dict[str, Any] = {"update.schedule": "linear", "update.max_grad_norm": 0.5, "update.weight_decay": 0.1}
    run = prepared(tmp_path, **changes)
    run.train()
    plain, trainer = llama(True), run.trainer
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1)
    for step in range(trainer.steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / trainer.steps)
        optimizer.zero_grad()
        plain_loss(plain, [trainer.items[i] for i in trainer.get_train_dataloader().schedule.indices(step)]).backward()
        assert torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5) > 0.5
        optimizer.step()
    assert trainer.steps == 3
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "run/policy").state_dict()
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=named(name))


@TIED
def test_the_saved_folder_is_the_trained_model_for_plain_transformers(tmp_path: Path, tied: bool) -> None:
    changes: dict[str, Any] = {"sft.epochs": 15.0}
    run = prepared(tmp_path, tied=tied, **changes)
    summary = run.train()
    assert summary["evaluations"][-1]["eval/loss"] < 0.5 * summary["evaluations"][0]["eval/loss"]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "run/policy", dtype="auto").eval()
    trained: Any = run.trainer.model.causal_lm
    ids = torch.arange(2, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, trained.eval()(ids).logits, rtol=1e-5, atol=1e-5)
        loss = plain_loss(plain, list(run.trainer.items))
    assert plain.config.tie_word_embeddings is tied
    assert float(loss) == pytest.approx(summary["evaluations"][-1]["eval/loss"], rel=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/policy")
    of_the_run: Any = run.trainer.processing_class
    assert tokenizer("w1 w5")["input_ids"] == of_the_run("w1 w5")["input_ids"]
    assert not list((tmp_path / "run").rglob("adapter_*"))
    with pytest.raises(ModelError, match=r"policy holds a whole model, as sft\.full trains it"):
        adapter_folder(str(tmp_path / "run/policy"))

    (tmp_path / "next").mkdir()
    changes = {"model.name": str(tmp_path / "run/policy"), "sft.epochs": 0.1}
    following = prepare_fine_tuning(
        experiment_from_dict(adapter_sections(tmp_path / "next", "sft", changes), SFTExperiment)
    ).train()
    assert following["evaluations"][0]["eval/loss"] == pytest.approx(float(loss), rel=1e-4), "an adapter goes on here"


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "policy/model.safetensors")


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The log without what a clock says; of a step that was logged twice, after a resume, the later line."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    timeless = [{k: v for k, v in line.items() if not k.startswith(("timing_s", "perf"))} for line in lines]
    return [*{(line["kind"], line["step"]): line for line in timeless}.values()]


@TIED
def test_two_ranks_under_zero_train_as_one_process(tmp_path: Path, tied: bool) -> None:
    """Evaluations in between; ten items in mini-batches of five over two ranks; whole mini-batches of padded rows."""
    runs: dict[str, tuple[int, int | None, dict[str, Any]]] = {
        "one": (1, None, {}),
        "zero3": (2, 3, {"model.gradient_checkpointing": tied}),
        "other": (2, 2, {}) if tied else (1, None, {"update.micro_batch_tokens": 400, "update.packing": "off"}),
    }
    for name, (processes, stage, changes) in runs.items():
        (tmp_path / name).mkdir()
        changes = {"sft.batch_size": 5, "sft.epochs": 3.0, "run.evaluate_every": 2, **changes}
        path = write_experiment(tmp_path / name / "run.yaml", sections(tmp_path / name, changes, tied=tied, **WIDE))
        run_recipe(path, processes=processes, stage=stage, recipe="recipes/sft.py").succeeded()
    one, log = weights(tmp_path / "one/run"), log_of(tmp_path / "one/run")
    start = llama(tied, **WIDE).state_dict()
    assert min(float((tensor - start[name]).norm()) for name, tensor in one.items()) > 0.01, "something stood still"
    for name in ("zero3", "other"):
        found = weights(tmp_path / name / "run")
        assert found.keys() == one.keys()
        for parameter, tensor in one.items():
            torch.testing.assert_close(found[parameter], tensor, rtol=1e-5, atol=1e-5, msg=named(parameter))
        lines = log_of(tmp_path / name / "run")
        assert len(lines) == len(log) == 6 + 4
        for line, expected in zip(lines, log, strict=True):
            assert line.pop("kind") == expected["kind"]
            assert line == pytest.approx({k: v for k, v in expected.items() if k != "kind"}, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(("processes", "stage"), [(1, None), (2, 3)], ids=["one process", "two ranks, ZeRO-3"])
def test_resumed_equals_straight(tmp_path: Path, processes: int, stage: int | None) -> None:
    """From the folder that a run killed after its second checkpoint leaves, to the same bits and the same log."""
    changes: dict[str, Any] = {
        "sft.epochs": 4.0,
        "run.save_every": 2,
        "run.keep_checkpoints": 9,
        "update.schedule": "linear",
    }
    experiment = sections(tmp_path, {**changes, "run.evaluate_every": 2}, **WIDE)
    straight, broken = tmp_path / "run", tmp_path / "broken"
    path = write_experiment(tmp_path / "run.yaml", experiment)
    run_recipe(path, processes=processes, stage=stage, recipe="recipes/sft.py").succeeded()
    shutil.copytree(straight, broken)
    for gone in ("policy", "checkpoint-6", "checkpoint-7"):
        shutil.rmtree(broken / gone)
    path = write_experiment(tmp_path / "run.yaml", merged(experiment, {"run.output_dir": str(broken)}))
    run_recipe(path, "--resume", processes=processes, stage=stage, recipe="recipes/sft.py").succeeded()
    found, expected = weights(broken), weights(straight)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not torch.equal(*(weights(straight / at)["model.norm.weight"] for at in ("checkpoint-4", "checkpoint-6")))
    assert sorted(map(str, log_of(broken))) == sorted(map(str, log_of(straight)))


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path: Path) -> None:
    """Its weights come from the checkpoint, so the base's do not count; its config does."""
    changes: dict[str, Any] = {"run.save_every": 2}
    prepared(tmp_path, **changes).train()
    experiment = experiment_from_dict(sections(tmp_path, changes), SFTExperiment)
    tiny_llama(initializer_range=0.2, tie_word_embeddings=True, intermediate_size=64).save_pretrained(
        tmp_path / "model"
    )
    with pytest.raises(CheckpointError, match="was trained on another base"):
        prepare_fine_tuning(experiment, resume=True)
