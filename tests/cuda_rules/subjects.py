"""What is run on the pretended GPU: the same tiny models and runs as on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor, nn

from rlhf_toolkit.models.shared_base import SharedBase
from rlhf_toolkit.runs.ppo import prepare
from rlhf_toolkit.settings.loading import experiment_from_dict
from rlhf_toolkit.trainers.ppo import PPOTrainer
from rlhf_toolkit.types import Prompt, PromptBatch
from tests.cuda_rules.device import NAME, Rules, numbers
from tests.support.roles import tiny_shared
from tests.support.tiny import merged, tiny_llama, write_task
from tests.support.values import there

TEMPLATE = (7, 8, 9, 10, 11, 12, 13, 14, 15)
"""What all prompts begin with, so that prefixes are shared."""
TERMS: dict[str, Any] = {
    "kl_in_loss": True,
    "entropy_coef": 0.1,
    "dual_clip": 1.5,
    "clip_range_low": 0.05,
    "clip_range_high": 0.05,
}
"""Every term of the loss."""


def shared_base(
    *, dtype: torch.dtype = torch.float32, layers: int = 2, roles: Sequence[str] = ("policy", "value"), **options: Any
) -> SharedBase:
    """A SharedBase on the attention that the toolkit loads models with; the same weights every time."""
    base: Any = tiny_llama(
        num_hidden_layers=layers, initializer_range=0.2, attn_implementation="sdpa_roles", max_position_embeddings=64
    )
    return tiny_shared(base.to(dtype), roles=roles, **options).eval()


def prompts(count: int = 5) -> PromptBatch:
    """Prompts of uneven lengths, the first of them twice."""
    made = [Prompt(i, "", (*TEMPLATE, *range(3, 4 + i)), {}) for i in range(count - 1)]
    return PromptBatch((made[0], *made), (1, *[0] * (count - 1)))


def sequences() -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded sequences (5, T) with the lengths of prompts and responses (5,)."""
    prompt_lengths, response_lengths = torch.tensor([10, 10, 11, 13, 9]), torch.tensor([4, 1, 6, 3, 5])
    generator = torch.Generator().manual_seed(4)
    rows = torch.ones(5, 17, dtype=torch.long)
    for row, (p, r) in enumerate(zip(prompt_lengths.tolist(), response_lengths.tolist(), strict=True)):
        rows[row, : p + r] = torch.randint(3, 32, (p + r,), generator=generator)
        rows[row, :9] = torch.tensor(TEMPLATE)
    return rows, prompt_lengths, response_lengths


def ppo_trainer(folder: Path, changes: dict[str, Any]) -> PPOTrainer:
    """One that has not begun, its model on the device."""
    task = write_task(folder, model=tiny_llama(initializer_range=0.2))
    run = prepare(experiment_from_dict(merged(task, {"rollout.prompts_per_rollout": 4, **changes})))
    run.progress.close()
    run.trainer.model.to(run.trainer.args.device)
    return run.trainer


def move(trainer: PPOTrainer) -> None:
    """Change all that is trained, as updates since the rollout would."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.device))


@contextmanager
def a_gpu() -> Iterator[Rules]:
    """Inside, runs that are prepared find a GPU, and operators on it obey its rules. Those of this thread: transformers
    is told to copy weights to the GPU here and not in threads of its own, which PyTorch's modes do not reach."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_TORCH_DEVICE", f"{NAME}:0")
        patch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            with Rules() as rules:
                yield rules
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)


def on_both(work: Callable[[Path], Any], folder: Path) -> tuple[Any, Any]:
    """What ``work`` gives on the CPU and on the pretended GPU, each in a folder of its own."""
    for name in ("cpu", "gpu"):
        (folder / name).mkdir()
    on_cpu = work(folder / "cpu")
    with a_gpu():
        return on_cpu, work(folder / "gpu")


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Those of all trained parameters, as plain numbers; a parameter without one is an error."""
    return {name: numbers(there(p.grad)).clone() for name, p in model.named_parameters() if p.requires_grad}


def saved(folder: Path) -> dict[str, Tensor]:
    """All tensors that a run has left in its folder."""
    files = sorted((folder / "run").glob("*/*.safetensors"))
    return {f"{file.parent.name}/{key}": tensor for file in files for key, tensor in load_file(file).items()}


def unlike(found: dict[str, Tensor], expected: dict[str, Tensor], *, tolerance: float) -> list[str]:
    """The names whose tensors differ by more than ``tolerance`` times the largest number of the expected one, or are
    not there on both sides."""
    return [
        name
        for name in sorted(found.keys() | expected.keys())
        if name not in found
        or name not in expected
        or not bool(
            (found[name] - expected[name]).abs().max() <= tolerance * max(1e-3, float(expected[name].abs().max()))
        )
    ]
