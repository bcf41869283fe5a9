"""A model and a rollout in numbers, for the planner: what ``planning`` counts with, read from real objects.

Works on meta tensors and on ZeRO-3's shards alike: nothing here looks at a number inside a tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import Linear as LoraLinear

from rlhf_toolkit.distributed.topology import LIVE_PARAMETERS, PREFETCHED_PARAMETERS, gradient_bucket
from rlhf_toolkit.distributed.zero3 import element_count, full_shape
from rlhf_toolkit.models.decoding_weights import MERGED
from rlhf_toolkit.models.fused import GATED_MLPS
from rlhf_toolkit.models.heads import CPU_TILE, GPU_TILE, tile_of
from rlhf_toolkit.models.segment_attention import SHARES_HEADS
from rlhf_toolkit.models.shared_base import POLICY, SharedBase
from rlhf_toolkit.planning.memory import Placement, RolloutNeeds
from rlhf_toolkit.planning.sizes import (
    FP32,
    ModelSize,
    PassSize,
    Sharding,
    activation_bytes,
    kept_bytes,
    live_bytes,
    pass_bytes,
    pass_token_bytes,
    prefetched_bytes,
    start_bytes,
    update_bytes,
    window_bytes,
)
from rlhf_toolkit.rollout.decoding import SPARE_COLUMNS
from rlhf_toolkit.rollout.sampling import BLOCK


@dataclass(frozen=True)
class RolloutSize:
    """What bounds memory on one rank: ``rows`` sequences of at most ``columns`` tokens, of which the prompt has at most
    ``longest_prompt`` and, with an environment's ``later_turns``, the next turn's prompt all. ``scoring_tokens`` of a
    scoring pass of ``scoring_roles``, and ``update_tokens`` of an update's of ``update_roles``, the roles together;
    no ``update_tokens``: nothing is updated. ``checkpointing``: layers are computed again in backward. ``packed``:
    micro-batches are, and a prompt's ``responses`` share it. ``temperature``, ``top_k`` and ``top_p`` are those of
    sampling."""

    rows: int
    columns: int
    scoring_tokens: int
    longest_prompt: int
    later_turns: bool = False
    scoring_roles: int = 2
    update_tokens: int = 0
    update_roles: int = 2
    checkpointing: bool = False
    packed: bool = False
    responses: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    @property
    def slot_columns(self) -> int:
        """Columns that a slot needs. In a later turn one row may have the longest prompt and another the largest
        budget."""
        response = self.columns - self.longest_prompt
        return self.columns + (response if self.later_turns else 0) + SPARE_COLUMNS

    @property
    def widest_prompt(self) -> int:
        """Tokens of the longest prompt of any turn."""
        return self.columns if self.later_turns else self.longest_prompt

    @property
    def key_copies(self) -> float:
        """How often packed attention takes a token's keys: those of a prompt for itself and for each response."""
        if not self.packed or self.responses == 1:
            return 1.0
        prompt, response = self.longest_prompt, self.columns - self.longest_prompt
        return (prompt + self.responses * (prompt + response)) / (prompt + self.responses * response)

    def logit_rows(self, vocabulary: int) -> int:
        """Rows of V fp32 logits that choosing one token holds at once (``choose_tokens``): the pass's own and those of
        the slots that go on, shifted and exponentiated; tempered ones; for top-k the chosen and their mask, for top-p
        the sorted, their places in int64, sums and masks; else blocks padded to whole ones."""
        rows = 4 + (self.temperature != 1.0)
        if self.top_p < 1.0:
            return rows + bool(self.top_k) + 8
        return rows + (2 if self.top_k else vocabulary % BLOCK > 0)


class Estimate(NamedTuple):
    """A model, how it is shared, and what a rollout with it needs."""

    model: ModelSize
    how: Sharding
    needs: RolloutNeeds

    def phases(self, placed: Placement) -> dict[str, int]:
        """Bytes on a rank at the peak of each phase of a run that is placed like this."""
        free = kept_bytes(self.model, self.how, moments=False)
        return {
            "start": start_bytes(self.model, self.how),
            "window": free + placed.sampling,
            "scoring": free + placed.scoring,
            "update": free + placed.update,
        }


def model_size(shared: SharedBase, column: int, *, on_cpu: bool) -> ModelSize:
    """The numbers of ``shared``, whose keys and values take ``column`` bytes a token."""
    config = shared.causal_lm.config.get_text_config()
    output = shared.causal_lm.get_output_embeddings().weight
    vocabulary, hidden = full_shape(output)
    values = vars(config)
    heads = values.get("num_attention_heads") or 1
    width = values.get("head_dim") or hidden // heads
    trained = [p for p in shared.parameters() if p.requires_grad]
    largest_trained = max((element_count(p) for p in trained), default=0)
    frozen = [p for p in shared.parameters() if not p.requires_grad]
    sizes = [(element_count(p), element_count(p) * p.element_size()) for p in frozen]
    adapted = [module for module in shared.modules() if isinstance(module, LoraLinear)]
    weights: list[Any] = [module.get_base_layer().weight for module in adapted]
    return ModelSize(
        base=sum(size for _, size in sizes),
        kept=sum(size for count, size in sizes if count <= largest_trained),
        largest=max(size for _, size in sizes),
        adapted=sum(element_count(w) * w.element_size() for w in weights),
        trained=sum(map(element_count, trained)),
        policy=sum(element_count(p) for name, p in shared.named_parameters() if f".{POLICY}." in name),
        low_rank=sum(module.r.get(POLICY, 0) for module in adapted),
        layers=values.get("num_hidden_layers") or 1,
        hidden=hidden,
        intermediate=_intermediate(values, hidden),
        queries=heads * width,
        keys=(values.get("num_key_value_heads") or heads) * width,
        heads=heads,
        vocabulary=vocabulary,
        element=output.element_size(),
        column=column,
        tile=tile_of(hidden, CPU_TILE if on_cpu else GPU_TILE),
        plain=not any(type(module).__name__ in GATED_MLPS for module in shared.modules()),
    )


def _intermediate(values: dict[str, Any], hidden: int) -> int:
    """The MLP's width for a token, over the experts that it goes through."""
    experts = values.get("num_experts_per_tok") or 0
    own = values.get("intermediate_size") or 4 * hidden
    return max(own, experts * (values.get("moe_intermediate_size") or own))


def sharding(size: ModelSize, *, ranks: int, stage: int, on_cpu: bool) -> Sharding:
    """How the run shares a model of this size, with the settings that DeepSpeed gets (``deepspeed_settings``)."""
    bucket = gradient_bucket(size.trained, adapters=True) if stage else 0
    return Sharding(ranks, stage, bucket, LIVE_PARAMETERS, PREFETCHED_PARAMETERS, overlap=not on_cpu, on_cpu=on_cpu)


def needs_of(model: ModelSize, how: Sharding, size: RolloutSize, weights: str) -> RolloutNeeds:
    """The estimate for this model, shared like this, and this size of rollout, decoded with ``weights``."""
    repeats = model.queries / model.keys if size.packed and not how.on_cpu and not SHARES_HEADS else 1
    copies = repeats * size.key_copies
    score = PassSize(size.scoring_tokens, size.scoring_roles, size.columns, key_copies=copies)
    update = PassSize(size.update_tokens, size.update_roles, size.columns, size.checkpointing, copies)
    prefill = PassSize(size.widest_prompt, 1, size.columns)
    on_device = Sharding(how.ranks, how.stage, how.bucket, how.live, how.prefetched)  # a prefill keeps no scores
    window = window_bytes(model, how)
    trains = size.update_tokens > 0
    return RolloutNeeds(
        window_bytes=window,
        live_bytes=min(window, live_bytes(model, how)) + prefetched_bytes(model, how),
        slot_bytes=model.column * size.slot_columns,
        choice_bytes=size.logit_rows(model.vocabulary) * model.vocabulary * FP32,
        column_bytes=model.column,
        prefill_bytes=pass_token_bytes(model, on_device, prefill),
        longest_prompt=size.widest_prompt,
        weights_bytes=0 if weights == MERGED else model.policy * model.element,
        copied_bytes=copied_bytes(model, how, weights),
        scoring_bytes=pass_bytes(model, how, score),
        update_bytes=update_bytes(model, how, update) if trains else 0,
        activation_bytes=activation_bytes(model, how, update) if trains else 0,
        checkpointing=size.checkpointing,
        later_bytes=kept_bytes(model, how) - kept_bytes(model, how, moments=False) if trains else 0,
        micro_batch=size.update_tokens or size.scoring_tokens,
    )


def copied_bytes(model: ModelSize, how: Sharding, weights: str) -> int:
    """Copies that decoding makes of the adapted weights where they lie here (``models/decoding_weights.py``): merged
    or, in bfloat16 on a CPU, in its kernel's order."""
    copied = weights == MERGED or (how.on_cpu and model.element == torch.bfloat16.itemsize)
    return model.adapted if copied else 0
