"""SFT, reward model and DPO against plain PyTorch on a plain PEFT model: losses, gradients, whole runs."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from rlhf_toolkit.data.items import Item
from rlhf_toolkit.runs.fine_tuning import FineTuningRun, prepare_fine_tuning
from rlhf_toolkit.settings.experiment import DPOExperiment, FineTuning, RewardExperiment, SFTExperiment
from rlhf_toolkit.settings.loading import experiment_from_dict
from tests.support.launch import run_recipe
from tests.support.tiny import merged, tiny_llama, write_experiment, write_task
from tests.support.values import named

KINDS: dict[str, type[FineTuning]] = {"sft": SFTExperiment, "reward_model": RewardExperiment, "dpo": DPOExperiment}
CHANGES: dict[str, dict[str, Any]] = {
    "sft": {},
    "reward_model": {"reward_model.centring": 0.3, "reward_model.normalise": False},
    "dpo": {"dpo.beta": 0.5, "dpo.label_smoothing": 0.1},
}


def words(*numbers: int) -> str:
    return " ".join(f"w{n % 28}" for n in numbers)


def write_rows(folder: Path, count: int = 10) -> Path:
    """Pairs of uneven lengths; SFT reads the chosen ones as completions."""
    rows = []
    for i in range(count):
        chosen = " " + words(*range(i, i + 2 + i % 5))
        rows.append(
            {
                "prompt": words(*range(3 * i, 3 * i + 1 + i % 4)),
                "completion": chosen,
                "chosen": chosen,
                "rejected": " " + words(*range(5 * i + 1, 5 * i + 2 + i % 3)),
                "margin": 0.1 * (i % 3),
            }
        )
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


def sections(folder: Path, kind: str, changes: dict[str, Any]) -> dict[str, Any]:
    task = write_task(folder, model=tiny_llama(initializer_range=0.2))
    rows = str(write_rows(folder))
    model = {**task["model"], "value_head_std": 0.0}
    if "model.policy_adapter" in changes:  # which has rank and scale of its own
        del model["lora_rank"], model["lora_alpha"]
    experiment = {
        "model": model,
        "data": {"train": rows, "evaluation": rows, "chat_template": False, "max_tokens": 32},
        "update": {"micro_batch_tokens": 40, "lr": 1e-2, **({"head_lr": 1e-2} if kind == "reward_model" else {})},
        "run": {"output_dir": str(folder / "run"), "wandb": "off"},
        kind: {"batch_size": 6, "epochs": 2.0},
    }
    return merged(experiment, {**CHANGES[kind], **changes})


def prepared(folder: Path, kind: str, **changes: Any) -> FineTuningRun:
    run = prepare_fine_tuning(experiment_from_dict(sections(folder, kind, changes), KINDS[kind]))
    run.progress.close()
    return run


def moved(model: nn.Module) -> None:
    """Trained parameters away from their start, where adapters say nothing."""
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=g))


def plain_states(run: FineTuningRun, role: str | None) -> Any:
    """A plain PEFT model with the role's adapter, or the bare base, in no hands of ours."""
    base = tiny_llama(initializer_range=0.2)
    if role is None:
        return base
    shared = run.trainer.model
    config: Any = deepcopy(shared.peft_config[role])
    config.inference_mode = False
    model = PeftModel(base, config, adapter_name=role)
    weights = {n: p for n, p in shared.state_dict().items() if f".{role}." in n and "lora_" in n}
    model.load_state_dict(weights, strict=False)
    return model


def reward_head(run: FineTuningRun) -> Any:
    shared: Any = run.trainer.model
    return shared.scalar_heads["reward"]


def logprob(model: nn.Module, row: Any) -> Tensor:
    """The sum of log-probs of a row's trained tokens, one sequence at a time."""
    ids = torch.tensor([row.token_ids])
    logits = model(ids).logits[0].float().log_softmax(-1)
    places = [row.prompt_length + t for t, trained in enumerate(row.trained) if trained]
    return torch.stack([logits[place - 1, row.token_ids[place]] for place in places]).sum()


def written_out(run: FineTuningRun, kind: str, items: list[Item]) -> tuple[Tensor, Any]:
    """The loss of a mini-batch by its definition, with the model whose gradient it has."""
    if kind == "sft":
        model = plain_states(run, "policy")
        tokens = sum(sum(row.trained) for item in items for row in item.rows)
        return -torch.stack([logprob(model, item.rows[0]) for item in items]).sum() / tokens, model
    total = torch.zeros(())
    if kind == "dpo":
        model, reference = plain_states(run, "policy"), plain_states(run, None)
        for item in items:
            (c, r), (rc, rr) = ([logprob(m, row) for row in item.rows] for m in (model, reference))
            h = 0.5 * ((c - rc.detach()) - (r - rr.detach()))
            total = total - 0.9 * torch.sigmoid(h).log() - 0.1 * torch.sigmoid(-h).log()
        return total / len(items), model
    model, head = plain_states(run, "reward"), reward_head(run)
    weight, bias = head.weight.detach().clone().requires_grad_(), head.bias.detach().clone().requires_grad_()
    model.extra = nn.ParameterList([nn.Parameter(weight), nn.Parameter(bias)])
    for item in items:
        states = [
            model.base_model.model.model(torch.tensor([row.token_ids])).last_hidden_state[0, -1] for row in item.rows
        ]
        c, r = (state @ model.extra[0] + model.extra[1].squeeze() for state in states)
        total = total - torch.sigmoid(c - r - item.margin).log() + 0.3 * (c + r) ** 2
    return total / len(items), model


@pytest.mark.parametrize("packing", ["on", "off"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_equal_the_definition(tmp_path: Path, kind: str, packing: str) -> None:
    run = prepared(tmp_path, kind, **{"update.packing": packing})
    trainer, shared = run.trainer, run.trainer.model
    moved(shared)
    parts = next(iter(trainer.get_train_dataloader()))
    assert len(parts) > 1, "one micro-batch would not test the cut"
    losses = [trainer.compute_loss(shared, part) for part in parts]
    torch.stack(losses).sum().backward()

    chosen = trainer.get_train_dataloader().schedule.indices(0)
    expected, plain = written_out(run, kind, [trainer.items[i] for i in chosen])
    expected.backward()
    assert torch.stack(losses).sum().item() == pytest.approx(expected.item(), rel=1e-5)
    role = "reward" if kind == "reward_model" else "policy"
    mine = {n: p.grad for n, p in shared.named_parameters() if p.grad is not None}
    theirs = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None and f".{role}." in n}
    assert {n for n in mine if "lora_" in n} == theirs.keys() and theirs
    for name, gradient in theirs.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-4, atol=1e-5, msg=named(name))
    if role == "reward":
        torch.testing.assert_close(mine["scalar_heads.reward.weight"], plain.extra[0].grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(mine["scalar_heads.reward.bias"], plain.extra[1].grad, rtol=1e-4, atol=1e-6)


def results(folder: Path) -> dict[str, Tensor]:
    files = sorted((folder / "run").glob("*/*.safetensors"))
    return {f"{f.parent.name}/{name}": tensor for f in files for name, tensor in load_file(f).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_every_topology_and_cut_trains_the_same(tmp_path: Path, kind: str) -> None:
    """Ten items in mini-batches of six over two ranks: ranks have unequal numbers of items in some of them."""
    runs: dict[str, tuple[int, int | None, dict[str, Any]]] = {
        "one process": (1, None, {}),
        "large micro-batches, padded": (1, None, {"update.micro_batch_tokens": 400, "update.packing": "off"}),
        "two ranks, ZeRO-3": (2, 3, {f"{kind}.batch_size": 5}),
        "one process, batches of five": (1, None, {f"{kind}.batch_size": 5}),
    }
    found = {}
    for name, (processes, stage, changes) in runs.items():
        folder = tmp_path / name.replace(" ", "_").replace(",", "")
        folder.mkdir()
        path = write_experiment(folder / "run.yaml", sections(folder, kind, changes))
        run_recipe(path, processes=processes, stage=stage, recipe=f"recipes/{kind}.py").succeeded()
        found[name] = results(folder)
    for one, other in [
        ("one process", "large micro-batches, padded"),
        ("one process, batches of five", "two ranks, ZeRO-3"),
    ]:
        assert found[one].keys() == found[other].keys() and found[one]
        for name, tensor in found[one].items():
            torch.testing.assert_close(found[other][name], tensor, rtol=1e-5, atol=1e-5, msg=named(name))
    assert any(tensor.any() for name, tensor in found["one process"].items() if "lora_B" in name)


def test_dpo_starts_at_log_2_and_its_reference_is_where_the_policy_starts(tmp_path: Path) -> None:
    summary = prepared(tmp_path, "dpo", **{"dpo.label_smoothing": 0.0}).train()
    assert summary["evaluations"][0]["eval/loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert summary["evaluations"][-1]["eval/loss"] < 0.6
    again = tmp_path / "again"
    again.mkdir()
    run = prepared(again, "dpo", **{"model.policy_adapter": str(tmp_path / "run/policy")})
    run.trainer.model_wrapped = run.trainer.model
    assert run.trainer.measured(run.trainer.held_out, "eval")["eval/margin"] == 0.0


def test_a_reward_model_learns_and_its_scores_are_normalised(tmp_path: Path) -> None:
    run = prepared(tmp_path, "reward_model", **{"reward_model.normalise": True, "reward_model.epochs": 20.0})
    summary = run.train()
    assert summary["evaluations"][0]["eval/accuracy"] == 0.5, "a head of zeros has no opinion"
    assert summary["evaluations"][-1]["eval/accuracy"] == 1.0
    assert run.trainer.normalise_rewards() == pytest.approx((0.0, 1.0), abs=1e-5)
    head = load_file(tmp_path / "run/reward/reward_head.safetensors")
    torch.testing.assert_close(head["weight"], reward_head(run).weight.detach())


def test_sft_learns_and_writes_a_plain_adapter(tmp_path: Path) -> None:
    run = prepared(tmp_path, "sft", **{"sft.epochs": 15.0})
    summary = run.train()
    assert summary["evaluations"][-1]["eval/loss"] < 0.5 * summary["evaluations"][0]["eval/loss"]
    plain = PeftModel.from_pretrained(tiny_llama(initializer_range=0.2), tmp_path / "run/policy").eval()
    tokens = sum(sum(item.rows[0].trained) for item in run.trainer.items)
    with torch.no_grad():
        loss = -sum(logprob(plain, item.rows[0]) for item in run.trainer.items) / tokens  # type: ignore[operator]
    assert float(loss) == pytest.approx(summary["evaluations"][-1]["eval/loss"], rel=1e-4)


def test_an_evaluation_that_runs_out_of_memory_says_the_same_in_smaller_parts(tmp_path: Path) -> None:
    """What the parts before had metered counts once."""
    trainer = prepared(tmp_path, "reward_model").trainer
    trainer.model_wrapped = trainer.model
    assert trainer.normalise_rewards() == (0.0, 0.0), "a head of zeros, which stays finite"
    moved(trainer.model)
    expected, forward, passes = trainer.measured(trainer.held_out, "eval"), trainer._forward, list[int]()
    budget = trainer.cut.tokens

    def small(model: nn.Module, batch: Any, roles: Any) -> Any:
        passes.append(len(batch["sequences"]))
        if len(passes) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(model, batch, roles)

    trainer._forward = small  # type: ignore[method-assign]
    assert trainer.measured(trainer.held_out, "eval") == pytest.approx(expected, abs=1e-5)
    assert trainer.cut.tokens < budget and trainer.update_retries == 1 and len(passes) > 4
    passes[:] = [0]
    mean_and_deviation = trainer.normalise_rewards()
    assert trainer.update_retries == 2 and len(passes) > 4
    trainer._forward = forward  # type: ignore[method-assign]
    assert trainer.normalise_rewards() == pytest.approx((0.0, 1.0), abs=1e-5) != mean_and_deviation
