"""LoRA+ against plain AdamW with two rates, moments in 8 bits, adapters' starts, and what is refused of them."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf_toolkit.distributed.eight_bit import MOMENTS, elements, magnitudes, new_state, write_elements
from rlhf_toolkit.errors import ConfigError
from rlhf_toolkit.models.loading import lora_config
from rlhf_toolkit.models.shared_base import SharedBase
from rlhf_toolkit.settings.experiment import SFTExperiment
from rlhf_toolkit.settings.loading import experiment_from_dict
from rlhf_toolkit.trainers.optimizers import make_adamw, require_optimizer
from tests.distributed.test_resume import assert_same_tensors, records
from tests.support.launch import run_recipe
from tests.support.tiny import merged, tiny_llama, write_experiment
from tests.support.values import named
from tests.trainers.test_fine_tuning import logprob, plain_states, prepared, sections

CONSTANTS: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-5, "weight_decay": 0.1}
CPU = torch.device("cpu")


def test_lora_plus_is_plain_adamw_with_two_rates(tmp_path: Path) -> None:
    """Schedule, clipping and weight decay included; the log has A's rate."""
    changes: dict[str, Any] = {"update.schedule": "linear", "update.max_grad_norm": 0.5, "update.weight_decay": 0.1}
    run = prepared(tmp_path, "sft", **changes, **{"update.loraplus_lr_ratio": 4.0})
    plain = plain_states(run, "policy")
    rates = {"lora_A": 1e-2, "lora_B": 4e-2}
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in plain.named_parameters() if part in n], "lr": rate} for part, rate in rates.items()
    ]
    trained = [p for group in groups for p in group["params"]]
    optimizer, trainer = torch.optim.AdamW(groups, **CONSTANTS), run.trainer
    run.train()
    for step in range(trainer.steps):
        for group, rate in zip(optimizer.param_groups, rates.values(), strict=True):
            group["lr"] = rate * (1 - step / trainer.steps)
        optimizer.zero_grad()
        items = [trainer.items[i] for i in trainer.get_train_dataloader().schedule.indices(step)]
        tokens = sum(sum(row.trained) for item in items for row in item.rows)
        (-torch.stack([logprob(plain, item.rows[0]) for item in items]).sum() / tokens).backward()
        assert torch.nn.utils.clip_grad_norm_(trained, 0.5) > 0.5
        optimizer.step()
    found = trainer.model.state_dict()
    weights = {name: tensor for name, tensor in plain.state_dict().items() if "lora_" in name}
    assert trainer.steps == 3 and len(weights) > 4
    for name, tensor in weights.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=named(name))
    rates_logged = [line["sft/lr/policy"] for line in records(tmp_path / "run", "step") if line["kind"] == "train"]
    assert rates_logged == pytest.approx([1e-2, 1e-2 * 2 / 3, 1e-2 / 3])
    assert "sft/lr/policy.B" not in records(tmp_path / "run", "step")[1]


# ---- moments in 8 bits -----------------------------------------------------------------------------------------------


def stepped(steps: int) -> tuple[nn.Parameter, Any, Any]:
    """A parameter of 4,999 elements after so many steps, its optimizer, and a float32 AdamW that has made them too."""
    weight = nn.Parameter(torch.zeros(4999))
    twin = nn.Parameter(weight.detach().clone())
    ours: Any = make_adamw("adamw_8bit", [{"params": [weight], "lr": 1e-2, "name": "policy"}], **CONSTANTS)
    plain = torch.optim.AdamW([twin], lr=1e-2, **CONSTANTS)
    for step in range(steps):
        weight.grad, twin.grad = gradient(step), gradient(step)
        ours.step()
        plain.step()
    return weight, ours, plain.state[twin]


def gradient(step: int) -> Tensor:
    return torch.randn(4999, generator=torch.Generator().manual_seed(step)) * torch.linspace(1e-4, 1.0, 4999)


def test_moments_in_8_bits_go_to_float32_and_back_to_the_same_bits() -> None:
    """The next step, too, is the same; without the blocks' magnitudes it is not: the largest code below zero is no
    -1."""
    weight, ours, plain = stepped(4)
    again = nn.Parameter(weight.detach().clone())
    theirs: Any = make_adamw("adamw_8bit", [{"params": [again], "lr": 1e-2, "name": "policy"}], **CONSTANTS)
    new_state(theirs, again)
    theirs.state[again]["step"] = 4
    for moment in MOMENTS:
        values = torch.cat([elements(ours.state[weight], moment, *part) for part in ((0, 700), (700, 4299))])
        torch.testing.assert_close(values, plain[moment], rtol=0.07, atol=0.01 * float(plain[moment].abs().max()))
        write_elements(theirs.state[again], moment, values, None)
        anew = elements(theirs.state[again], moment, 0, 4999)
        assert not torch.equal(anew, values) or moment == "exp_avg_sq"
        torch.testing.assert_close(anew, values, rtol=0.02, atol=0.01 * float(values.abs().max()))
        write_elements(theirs.state[again], moment, values, magnitudes(ours.state[weight], moment))
        assert torch.equal(elements(theirs.state[again], moment, 0, 4999), values)
    weight.grad, again.grad = gradient(9), gradient(9)
    ours.step()
    theirs.step()
    assert torch.equal(weight, again)


def test_a_run_with_8_bits_goes_on_under_zero2_exactly_and_elsewhere_nearly(tmp_path: Path) -> None:
    more = {"update.optimizer": "adamw_8bit", "model.lora_rank": 128, "run.save_every": 2, "sft.epochs": 2.0}
    task = sections(tmp_path, "sft", more)
    path = write_experiment(tmp_path / "run.yaml", task)
    run_recipe(path, recipe="recipes/sft.py", processes=2, stage=2).succeeded()
    lines = {}
    for name, ranks in {"same": {"processes": 2, "stage": 2}, "alone": {"processes": 1, "stage": None}}.items():
        shutil.copytree(tmp_path / "run", tmp_path / name)
        for later in ("policy", "checkpoint-3"):
            shutil.rmtree(tmp_path / name / later, ignore_errors=True)
        broken = write_experiment(tmp_path / f"{name}.yaml", merged(task, {"run.output_dir": str(tmp_path / name)}))
        done: Any = run_recipe(broken, "--resume", recipe="recipes/sft.py", **ranks)  # type: ignore[arg-type]
        done.succeeded()
        lines[name] = "their blocks are cut anew" in done.output
    assert lines == {"same": False, "alone": True}
    assert_same_tensors(tmp_path / "run", tmp_path / "same", files=1)
    straight, alone = (records(tmp_path / name, "step")[-1] for name in ("run", "alone"))
    assert alone["eval/loss"] == pytest.approx(straight["eval/loss"], rel=1e-2)


def test_what_an_optimizer_needs_is_refused_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    require_optimizer("adamw_8bit", CPU, offloaded=True)
    with pytest.raises(ConfigError, match=r"update\.optimizer=paged_adamw_8bit pages .*, but this is a cpu; set it to"):
        require_optimizer("paged_adamw_8bit", CPU, offloaded=False)
    with pytest.raises(ConfigError, match=r"keeps moments in the machine's memory; set it to adamw_8bit"):
        require_optimizer("paged_adamw_8bit", torch.device("cuda"), offloaded=True)
    with pytest.raises(ConfigError, match=r"bitsandbytes has no 8-bit AdamW for a fpga; update it, or set update\.opt"):
        require_optimizer("adamw_8bit", torch.device("fpga"), offloaded=False)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ConfigError, match=r"needs bitsandbytes \(.*\); install rlhf_toolkit\[quantized\], or set"):
        require_optimizer("adamw_8bit", CPU, offloaded=False)
    require_optimizer("adamw", CPU, offloaded=False)


# ---- starts of adapters ----------------------------------------------------------------------------------------------


def test_a_gaussian_start_is_pefts_and_leaves_the_policy_at_its_reference() -> None:
    deviations = {}
    for start in ("kaiming", "gaussian"):
        torch.manual_seed(0)
        settings = lora_config(
            rank=16, alpha=32, rslora=False, target_modules="all-linear", exclude_modules=[], start=start
        )
        shared = SharedBase(tiny_llama(), {"policy": settings}, value_on="nowhere")
        parts = {name: p for name, p in shared.named_parameters() if "lora_" in name}
        assert all(not p.any() for name, p in parts.items() if "lora_B" in name)
        deviations[start] = float(torch.cat([p.detach().flatten() for n, p in parts.items() if "lora_A" in n]).std())
        assert settings.init_lora_weights is (True if start == "kaiming" else settings.init_lora_weights)
    assert deviations["gaussian"] == pytest.approx(1 / 16, rel=0.05)
    assert abs(deviations["kaiming"] - 1 / 16) > 0.02


def test_other_starts_are_refused_each_with_its_reason() -> None:
    reasons = {
        **dict.fromkeys(
            ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"), "changes the base's weights, w"
        ),
        "eva": "reads activations of the whole base before anything is sharded; make that adapter with PEFT",
        "orthogonal": "gives B A = 0 up to rounding only",
        "random": "kaiming, gaussian",
    }
    wrong = []
    for start, reason in reasons.items():
        settings = {"model": {"name": "m", "init_lora_weights": start}, "data": {"train": "t"}}
        with pytest.raises(ConfigError) as caught:
            experiment_from_dict(settings, SFTExperiment)
        if reason not in str(caught.value):
            wrong.append(f"{start}: {caught.value}")
    assert not wrong
