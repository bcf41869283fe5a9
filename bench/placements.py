"""Where README's experiment runs on cards of 24 GB: mode, slots, prefill and bytes of each phase, from configs alone.

    python bench/placements.py        # prints the tables of docs/zero3.md; half a minute, no weights

Models are built on the meta device, so that names and shapes are transformers' own and no number exists. Estimate and
choice are the ones a run makes (``rollout/sizes.py``, ``planning/memory.py``); keys and values of a token come from
the config here, where a run measures them.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from common import GPU_SHAPES, Shape
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config

from rlhf_toolkit.errors import ConfigError
from rlhf_toolkit.models.attention import ROLE_ATTENTION
from rlhf_toolkit.models.loading import build_ppo_roles, lora_config
from rlhf_toolkit.models.quantised import Quantisation
from rlhf_toolkit.models.quantised_loading import quantise_layers
from rlhf_toolkit.planning.memory import place
from rlhf_toolkit.planning.sizes import ModelSize, kept_bytes, start_bytes
from rlhf_toolkit.rollout.sizes import Estimate, RolloutSize, model_size, needs_of, sharding

GIB = 2**30
CARD = int(23.6 * GIB)  # what a card of 24 GB shows
CONTEXT, COMMUNICATOR = int(0.45 * GIB), int(0.3 * GIB)  # CUDA's and NCCL's own
RESPONSES, PROMPT, NEW, MICRO_BATCH = 128, 512, 384, 4096  # README's experiment, with gradient checkpointing
LAUNCHES = ((1, 0), (2, 2), (4, 2), (8, 2), (2, 3), (4, 3), (8, 3))
QUANTISED = (
    ("Qwen2.5-7B", 1, 0),
    ("Qwen2.5-14B", 1, 0),
    ("Qwen2.5-14B", 2, 3),
    ("Qwen2.5-32B", 1, 0),
    ("Qwen2.5-32B", 2, 3),
    ("Qwen2.5-32B", 4, 3),
)
"""What runs with ``model.quantization: nf4``, in sequences of 1,024 tokens."""
PHASES = ("start", "window", "role pass", "update")
HEADER = ("model", "GPUs", "ZeRO", "rollout", "slots", "prefill", *PHASES)


def configs() -> dict[str, PretrainedConfig]:
    """The models of the table."""
    return {
        "Qwen2.5-7B": qwen(GPU_SHAPES["7b"]),
        "Llama-3.1-8B": LlamaConfig(vocab_size=128256, **Shape(32, 4096, 14336, 32, 8).settings()),
        "Qwen2.5-14B": qwen(Shape(48, 5120, 13824, 40, 8)),
        "Qwen2.5-32B": qwen(Shape(64, 5120, 27648, 40, 8)),
    }


def qwen(shape: Shape) -> Qwen2Config:
    """Qwen2.5's config."""
    return Qwen2Config(vocab_size=152064, **shape.settings())


@dataclass(frozen=True)
class Row:
    """One line of the table. ``refused``: why the run does not start; then there is no placement."""

    model: str
    ranks: int
    stage: int
    mode: str = ""
    slots: int = 0
    prefill: int = 0
    phases: tuple[float, ...] = ()
    refused: str = ""

    def cells(self) -> list[str]:
        """As they stand in the table."""
        head = [self.model, str(self.ranks), str(self.stage or "none")]
        if self.refused:
            return [*head, "does not fit", *[""] * (2 + len(PHASES))]
        return [*head, self.mode, str(self.slots), str(self.prefill), *(f"{gib:.1f}" for gib in self.phases)]


def size_of(config: Any, rank: int = 16, quantisation: Quantisation = Quantisation.NONE) -> ModelSize:
    """The model with policy and value of ``rank`` on the meta device, in numbers, as a GPU runs it."""
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=ROLE_ATTENTION)
        if quantisation != Quantisation.NONE:
            quantise_layers(base, quantisation)
        adapter = lora_config(rank=rank, alpha=2 * rank, rslora=False, target_modules="all-linear", exclude_modules=[])
        shared = build_ppo_roles(base, adapter, policy_adapter=None)
    width = config.hidden_size // config.num_attention_heads
    column = 2 * config.num_key_value_heads * width * config.num_hidden_layers * torch.bfloat16.itemsize
    return model_size(shared, column, on_cpu=False)


def row_of(name: str, model: ModelSize, ranks: int, stage: int, new: int = NEW) -> Row:
    """What a run of this model on ``ranks`` cards chooses, with ``new`` tokens a response at most, and the bytes of its
    phases beside CUDA's own."""
    how = sharding(model, ranks=ranks, stage=stage, on_cpu=False)
    size = RolloutSize(
        rows=RESPONSES // ranks,
        columns=PROMPT + new,
        role_pass_tokens=MICRO_BATCH,
        longest_prompt=PROMPT,
        update_tokens=MICRO_BATCH,
        checkpointing=True,
        packing=True,
        shares_heads=True,  # whatever torch prints the table
    )
    estimate = Estimate(model, how, needs_of(model, how, size, "exact"))
    card = CARD - CONTEXT - (COMMUNICATOR if ranks > 1 else 0)
    free = card - kept_bytes(model, how, moments=False)
    if start_bytes(model, how) > card:
        return Row(name, ranks, stage, refused="the model alone is too large for a card")
    try:
        placed = place(estimate.needs, free=free, rows=size.rows, mode="auto", slots=None, sharded=how.sharded)
    except ConfigError as error:
        return Row(name, ranks, stage, refused=str(error))
    phases = estimate.phases(placed)
    return Row(
        name,
        ranks,
        stage,
        f"{placed.mode}, dequantised once" if placed.keeps_matrices else placed.mode,
        placed.slots,
        placed.prefill_tokens,
        tuple(phases[phase] / GIB for phase in PHASES),
    )


def table() -> list[Row]:
    """Every model on every launch."""
    sizes = {name: size_of(config) for name, config in configs().items()}
    return [row_of(name, size, ranks, stage) for name, size in sizes.items() for ranks, stage in LAUNCHES]


def quantised_table() -> list[Row]:
    """What is quantised, with 512 new tokens."""
    names = {name for name, _, _ in QUANTISED}
    sizes = {
        name: size_of(config, quantisation=Quantisation.NF4) for name, config in configs().items() if name in names
    }
    return [row_of(name, sizes[name], ranks, stage, new=1024 - PROMPT) for name, ranks, stage in QUANTISED]


def as_markdown(rows: list[Row]) -> str:
    """The table as it stands in docs/zero3.md."""
    lines = [HEADER, ["---"] * len(HEADER), *(row.cells() for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |".replace("|  ", "| ") for line in lines)


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    for rows in (table(), quantised_table()):
        print(as_markdown(rows))
        for row in rows:
            if row.refused:
                print(f"\n{row.model}, {row.ranks} x 24 GB, ZeRO {row.stage or 'none'}: {row.refused}")


if __name__ == "__main__":
    main()
