"""An update in which a number is not finite changes no bit, on all ranks together, and the run goes on as if it had not
been there. What is planted is planted on one rank alone; the oracle is a run that never makes those updates."""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from rlhf_toolkit.cli import main
from rlhf_toolkit.errors import ConfigError, RLHFError
from rlhf_toolkit.runs.inspection import inspect_batch
from rlhf_toolkit.trainers.kept_batches import read_kept_batch
from tests.support.launch import run_recipe
from tests.support.tiny import merged, write_experiment, write_task

PLANTED = {2: "a loss is NaN", 4: "a gradient is NaN", 5: "a loss is infinite", 6: "logits are NaN"}
"""By number of the update, from 0, of two rollouts of four. An infinite loss has finite gradients here."""
WATCH = '''
import hashlib, json, os
from pathlib import Path

import torch
from rlhf_toolkit.distributed.zero3 import own_part
from rlhf_toolkit.trainers.ppo import PPOTrainer
from tests.support.tiny import REWARD

exec(REWARD)
PLANTED, RANK = {planted}, int(os.environ.get("RANK", "0"))
LAST = int(os.environ.get("WORLD_SIZE", "1")) - 1
real_step, real_loss, real_save = PPOTrainer.training_step, PPOTrainer.micro_batch_loss, PPOTrainer.save_model


def digest(trainer):
    """Of what this rank holds: parameters, or its shards of them, the optimizer's moments and its counts."""
    optimizer = trainer.optimizer
    while hasattr(optimizer, "optimizer"):  # accelerate's wrapper, DeepSpeed's
        optimizer = optimizer.optimizer
    held = [getattr(p, "ds_tensor", p) for p in trainer.model.parameters() if p.requires_grad]
    moments = [value for state in optimizer.state.values() for _, value in sorted(state.items())]
    tensors = [t.detach().cpu().float().contiguous().numpy().tobytes() for t in [*held, *optimizer.state, *moments]]
    return hashlib.sha256(b"".join(tensors)).hexdigest()


def weights(trainer):
    """The same of parameters alone, without the padding of shards, which is whatever lay in memory."""
    parts = [own_part(p)[0].contiguous().numpy().tobytes() for p in trainer.model.parameters() if p.requires_grad]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def note(trainer, kind):
    rates = trainer.lr_scheduler.get_last_lr()
    line = {{"kind": kind, "digest": digest(trainer), "weights": weights(trainer), "rates": rates}}
    with (Path(__file__).parent / f"rank{{RANK}}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\\n")


def step(self, model, inputs, num_items_in_batch=None):
    note(self, "before")
    never = {never} and self.state.global_step in PLANTED
    loss = torch.zeros(()) if never else real_step(self, model, inputs, num_items_in_batch)
    note(self, "after")
    return loss


def micro_batch_loss(self, model, part, *, first=False):
    fault = PLANTED.get(self.state.global_step) if RANK == LAST else None
    handles = []
    if fault == "logits are NaN":
        spoil = lambda module, args, output: output * float("nan")
        handles = [self.model.causal_lm.base_model.norm.register_forward_hook(spoil)]
    loss = real_loss(self, model, part, first=first)
    for handle in handles:
        handle.remove()
    if fault == "a loss is NaN":
        loss = loss * float("nan")
    if fault == "a loss is infinite":
        loss = loss + float("inf")
    if fault == "a gradient is NaN":
        trained = next(p for p in self.model.parameters() if p.requires_grad)
        handle = trained.register_hook(lambda gradient: handle.remove() or gradient * float("nan"))
    return loss


def save(self, *args, **kwargs):
    note(self, "end")
    return real_save(self, *args, **kwargs)


PPOTrainer.training_step, PPOTrainer.micro_batch_loss, PPOTrainer.save_model = step, micro_batch_loss, save
'''
CHANGES = {
    "ppo.num_rollouts": 2,
    "ppo.num_ppo_epochs": 2,
    "ppo.mini_batches": 2,
    "rollout.responses_per_prompt": 2,
    "update.weight_decay": 0.1,  # would move parameters that have no gradient
    "update.schedule": "linear",
    "update.micro_batch_tokens": 64,
}


def a_run(
    folder: Path, processes: int, stage: int | None, *, never: bool, **changes: Any
) -> list[list[dict[str, Any]]]:
    """What each rank noted of a run in which the updates of ``PLANTED`` are spoiled, or ``never`` made."""
    folder.mkdir()
    task = merged(write_task(folder), CHANGES | changes)
    (folder / "reward.py").write_text(WATCH.format(planted=PLANTED, never=never))
    run_recipe(write_experiment(folder / "run.yaml", task), processes=processes, stage=stage).succeeded()
    files = [folder / f"rank{rank}.jsonl" for rank in range(processes)]
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


CASES = {
    "one process": (1, None, "float32"),
    "two ranks, ZeRO-3": (2, 3, "bfloat16"),
    "two ranks, ZeRO-2": (2, 2, "float32"),
}
SHARDED = "two ranks, ZeRO-3"
Noted = list[list[dict[str, Any]]]


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Noted]]:
    """The folder of a case's run, and what its ranks noted; each case runs once."""

    @functools.cache
    def made(case: str) -> tuple[Path, Noted]:
        folder = tmp_path_factory.mktemp("spoiled") / "task"
        processes, stage, dtype = CASES[case]
        return folder, a_run(folder, processes, stage, never=False, **{"model.dtype": dtype})

    return made


@pytest.mark.parametrize("case", CASES)
def test_an_update_that_is_not_finite_is_as_if_it_had_not_been(
    tmp_path: Path, spoiled: Callable[[str], tuple[Path, Noted]], case: str
) -> None:
    processes, stage, dtype = CASES[case]
    folder, found = spoiled(case)
    expected = a_run(tmp_path / "never", processes, stage, never=True, **{"model.dtype": dtype})
    for rank, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert len(ours) == 2 * 8 + 1
        for number, (before, after) in enumerate(zip(ours[0:-1:2], ours[1::2], strict=True)):
            same = before["digest"] == after["digest"]
            # Without DeepSpeed it is Trainer that steps, after this.
            assert same or (stage is not None and number not in PLANTED), f"rank {rank}, update {number}"
        for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            for name in ("weights", "rates"):
                assert one[name] == other[name], f"rank {rank}, {name} {one['kind']} update {number // 2}"
        assert len({line["digest"] for line in ours}) == 8 - len(PLANTED) + 1, "the other updates were made"
    lines = [json.loads(line) for line in (folder / "run/log.jsonl").read_text().splitlines()]
    assert [line.get("train/not_finite_updates") for line in lines if line["kind"] == "train"] == [1.0, 3.0]
    numbers = [value for line in lines for value in line.values() if isinstance(value, float)]
    assert all(map(math.isfinite, numbers)), "JSON has no NaN"
    for number, fault in PLANTED.items():
        kept = read_kept_batch(folder / f"run/skipped/step-{number + 1}")
        assert {rank for rank, _ in kept.places} == set(range(processes))
        assert sum(len(part["row"]) for part in kept.parts) == 8
        in_loss = "loss" in fault or "logits" in fault
        wrong = {rank for (rank, _), loss in zip(kept.places, kept.losses, strict=True) if not math.isfinite(loss)}
        assert wrong == ({processes - 1} if in_loss else set()), fault


# ---- rlhf inspect ----------------------------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path: Path, spoiled: Callable[[str], tuple[Path, Noted]]) -> Path:
    """A copy of the run on two ranks, to be changed: the folder of its kept batch of update 3."""
    shutil.copytree(spoiled(SHARDED)[0], tmp_path / "task")
    settings = tmp_path / "task/run/run.json"
    settings.write_text(settings.read_text().replace(str(spoiled(SHARDED)[0]), str(tmp_path / "task")))
    return tmp_path / "task/run/skipped/step-3"


def test_a_replay_gives_the_losses_of_the_run_to_the_bit(kept: Path) -> None:
    for step in (3, 5, 6, 7):
        found = inspect_batch(kept.parent / f"step-{step}")
        assert found.weights.name == f"step-{step}"
        pairs = list(zip(found.batch.losses, found.losses, strict=True))
        assert all(math.isfinite(now) for _, now in pairs)
        assert all(then == now for then, now in pairs if math.isfinite(then)) and any(
            math.isfinite(x) for x, _ in pairs
        )
        assert not found.findings and "every number is finite in this replay" in "\n".join(found.lines())


def test_a_kept_column_that_is_not_finite_is_named_with_row_and_token(kept: Path) -> None:
    tensors = load_file(kept / "batch.safetensors")
    assert tensors["1.response_mask"][2, 1]
    tensors["1.advantages"][2, 1] = math.nan
    save_file(tensors, kept / "batch.safetensors")
    (finding,) = inspect_batch(kept / "batch.json").findings
    place = int(tensors["1.prompt_lengths"][2]) + 1
    assert (finding.micro_batch, finding.row, finding.role, finding.token) == (1, 2, None, place)
    assert "advantages is not finite" in finding.words


def test_the_first_layer_role_row_and_token_are_found(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The embedding of one word is spoiled: the oracle is where that word stands."""
    tensors = load_file(kept / "batch.safetensors")
    ids, lengths = tensors["0.sequences"], tensors["0.prompt_lengths"] + tensors["0.response_lengths"]
    word = int(ids[1, 1])
    base = kept.parents[2] / "model/model.safetensors"
    weights = load_file(base)
    weights["model.embed_tokens.weight"][word] = math.inf
    save_file(weights, base, {"format": "pt"})
    found = inspect_batch(kept)
    expected = {}
    for i, part in enumerate(found.batch.parts):
        ends = part["prompt_lengths"] + part["response_lengths"]
        for row, (line, end) in enumerate(zip(part["sequences"].tolist(), ends.tolist(), strict=True)):
            if word in line[:end]:
                expected[i, row] = line.index(word)
    assert len(ids) == len(lengths) and (0, 1) in expected
    assert {(f.micro_batch, f.row): f.token for f in found.findings} == expected
    assert all(f.role == "policy" and "embed_tokens is the first layer" in f.words for f in found.findings)
    main(["inspect", str(kept)])
    shown = capsys.readouterr().out
    first = found.findings[0]
    assert f"first: micro-batch {first.micro_batch}, row {first.row}, policy, token " in shown
    assert str(found.tokenizer.decode([word])) in shown and "  response " in shown


def test_a_gradient_beyond_float32_is_found_in_its_row(kept: Path) -> None:
    tensors = load_file(kept / "batch.safetensors")
    tensors["0.advantages"][3] = 1e30
    save_file(tensors, kept / "batch.safetensors")
    (finding,) = inspect_batch(kept).findings
    assert (finding.micro_batch, finding.row) == (0, 3) and "norm is beyond float32" in finding.words


BROKEN = {
    "no record": (lambda folder: (folder / "batch.json").unlink(), "no kept batch"),
    "a cut record": (lambda folder: cut_short(folder / "batch.json"), "cannot be read"),
    "cut tensors": (lambda folder: cut_short(folder / "batch.safetensors"), "cannot be read"),
    "a newer format": (lambda folder: edited(folder, format=2), "has the format 2"),
    "another kind": (lambda folder: edited(folder, kind="../x"), "which no run writes"),
    "details that are text": (lambda folder: edited(folder, details={"kl_coef": "x"}), "which no run writes"),
    "too few places": (lambda folder: edited(folder, places=[[0, 0]]), "it was changed"),
    "tokens of no vocabulary": (lambda folder: retyped(folder, lambda ids: ids + 10**6), "none of this model"),
    "tokens that are numbers": (lambda folder: retyped(folder, lambda ids: ids.float()), "none of this model"),
    "no weights": (lambda folder: edited(folder, weights=False), None),
}


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:50])


def edited(folder: Path, **changes: Any) -> None:
    record = json.loads((folder / "batch.json").read_text())
    (folder / "batch.json").write_text(json.dumps(record | changes))


def retyped(folder: Path, change: Callable[[Any], Any]) -> None:
    tensors = load_file(folder / "batch.safetensors")
    save_file({**tensors, "0.sequences": change(tensors["0.sequences"])}, folder / "batch.safetensors")


def test_what_no_run_has_written_is_refused_in_one_line(kept: Path, tmp_path: Path) -> None:
    wrong = {}
    for name, (spoil, words) in BROKEN.items():
        folder = kept.with_name("step-99")
        shutil.copytree(kept, folder)
        spoil(folder)
        try:
            found = inspect_batch(folder)
            if words is not None or found.weights != kept.parents[1].resolve():
                wrong[name] = "accepted"
        except RLHFError as error:
            if words is None or words not in str(error) or "\n" in str(error):
                wrong[name] = str(error)
        shutil.rmtree(folder)
    assert not wrong, wrong


def test_code_that_a_run_folder_names_runs_only_when_trusted(kept: Path) -> None:
    settings = kept.parents[1] / "run.json"
    before = json.loads(settings.read_text())
    for section, setting, value in (("ppo", "policy_loss", "x.py:f"), ("model", "trust_remote_code", True)):
        settings.write_text(json.dumps({**before, section: {**before[section], setting: value}}))
        with pytest.raises(ConfigError, match=rf"names code to run \({section}.{setting}\)"):
            inspect_batch(kept)
