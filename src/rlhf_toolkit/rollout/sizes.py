"""A model and a rollout in numbers, for the planner: what ``planning`` counts with, read from real objects.

Works on meta tensors and on ZeRO-3's shards alike: nothing here looks at a number inside a tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from transformers import PreTrainedModel

from rlhf_toolkit.distributed.topology import LIVE_PARAMETERS, PREFETCHED_PARAMETERS, gradient_bucket
from rlhf_toolkit.distributed.zero3 import element_count, full_shape, is_here
from rlhf_toolkit.errors import ModelError
from rlhf_toolkit.models.decoding_weights import MERGED
from rlhf_toolkit.models.fused import GATED_MLPS
from rlhf_toolkit.models.heads import CPU_TILE, GPU_TILE, tile_of
from rlhf_toolkit.models.quantised import QuantisedLinear, matrix_bytes
from rlhf_toolkit.models.recurrent import layer_memory
from rlhf_toolkit.models.renamed import config_value
from rlhf_toolkit.models.reward_model import BATCH_TOKENS
from rlhf_toolkit.models.roles import POLICY
from rlhf_toolkit.models.segment_attention import SHARES_HEADS
from rlhf_toolkit.models.shared_base import SharedBase
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
    """What bounds the memory of a rollout and its update on one rank.

    Args:
        rows: sequences that are sampled.
        columns: the most tokens of a sequence, prompt and response together.
        role_pass_tokens: the most tokens of one forward pass of a role pass, its ``role_pass_roles`` roles together.
        longest_prompt: the most tokens of a prompt.
        later_turns: an environment answers, so that a later turn's prompt may fill all ``columns``.
        update_tokens: the most tokens of one forward pass of an update, its ``update_roles`` roles together; 0 where
            nothing is updated.
        checkpointing: layers are computed again in backward.
        packing: micro-batches are packed, and the ``responses`` to one prompt share its tokens.
        temperature, top_k, top_p, min_p: of sampling.
        changes_logits: a bias, a penalty or bad words do, before anything is sampled.
        shares_heads: the packed kernel reads the keys of grouped heads once.
        reward_bytes: what a reward model needs (``reward_bytes``).
        eight_bit: the optimizer keeps its moments in 8 bits.
    """

    rows: int
    columns: int
    role_pass_tokens: int
    longest_prompt: int
    later_turns: bool = False
    role_pass_roles: int = 2
    update_tokens: int = 0
    update_roles: int = 2
    checkpointing: bool = False
    packing: bool = False
    responses: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    changes_logits: bool = False
    shares_heads: bool = SHARES_HEADS
    reward_bytes: int = 0
    eight_bit: bool = False

    @property
    def slot_columns(self) -> int:
        """Columns that a slot needs, in a later turn too: what a prompt grows by, its budget has less
        (``most_columns``)."""
        return self.columns + SPARE_COLUMNS

    @property
    def widest_prompt(self) -> int:
        """Tokens of the longest prompt of any turn."""
        return self.columns if self.later_turns else self.longest_prompt

    @property
    def key_copies(self) -> float:
        """How often packed attention takes a token's keys: those of a prompt for itself and for each response."""
        if not self.packing or self.responses == 1:
            return 1.0
        prompt, response = self.longest_prompt, self.columns - self.longest_prompt
        return (prompt + self.responses * (prompt + response)) / (prompt + self.responses * response)

    def logit_rows(self, vocabulary: int) -> int:
        """Rows of V fp32 logits that choosing one token holds at once (``choose_tokens``): the pass's own and those of
        the slots that go on, shifted and exponentiated; changed ones; for top-p the sorted, their places in int64, sums
        and masks; for top-k and min-p what they leave and a mask; else tempered ones, or blocks padded to whole ones.
        """
        rows, filters = 4 + self.changes_logits, bool(self.top_k) + bool(self.min_p)
        if self.top_p < 1.0:
            return rows + bool(self.top_k) + 8
        if filters:
            return rows + filters + 1
        return rows + self.changes_logits + (self.temperature != 1.0 or vocabulary % BLOCK > 0)


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
            "role pass": free + placed.role_pass,
            "update": free + placed.update,
        }


def model_size(shared: SharedBase, column: int, *, on_cpu: bool, state: int = 0) -> ModelSize:
    """The numbers of ``shared``, whose keys and values take ``column`` bytes a token, and its states ``state`` bytes a
    sequence."""
    output, widths = shared.causal_lm.get_output_embeddings().weight, dimensions(shared.causal_lm.config)
    trained = [p for p in shared.parameters() if p.requires_grad]
    largest_trained = max((element_count(p) for p in trained), default=0)
    frozen = [p for p in shared.parameters() if not p.requires_grad]
    sizes = [(element_count(p), element_count(p) * p.element_size()) for p in frozen]
    adapted = [module for module in shared.modules() if isinstance(module, LoraLinear)]
    bases: list[Any] = [module.get_base_layer() for module in adapted]
    quantised = [module for module in shared.modules() if isinstance(module, QuantisedLinear)]
    recurrence = layer_memory(shared.causal_lm)
    return ModelSize(
        base=sum(size for _, size in sizes),
        kept=sum(size for count, size in sizes if count <= largest_trained),
        largest=max(size for _, size in sizes),
        adapted=sum(map(matrix_bytes, bases)),
        trained=sum(map(element_count, trained)),
        policy=sum(element_count(p) for name, p in shared.named_parameters() if f".{POLICY}." in name),
        low_rank=sum(module.r.get(POLICY, 0) for module in adapted),
        **widths,
        vocabulary=full_shape(output)[0],
        element=output.element_size(),
        column=column,
        tile=tile_of(widths["hidden"], CPU_TILE if on_cpu else GPU_TILE),
        plain=_plain(shared),
        recurrent=recurrence.layers,
        state=state,
        scratch=recurrence.scratch,
        scan=recurrence.kept,
        matrix=max(map(matrix_bytes, quantised), default=0),
        latent=latent_width(shared.causal_lm.config),
    )


def _plain(model: nn.Module) -> bool:
    """Whether ``model`` has no gated MLP of those that ``fused`` replaces, which make fewer tensors on the way."""
    return not any(type(module).__name__ in GATED_MLPS for module in model.modules())


def dimensions(config: Any) -> dict[str, int]:
    """``layers``, ``hidden``, ``intermediate``, ``queries``, ``keys`` and ``heads`` of ``ModelSize``, by any name that
    an architecture's config has for them."""
    config = config.get_text_config()
    hidden, heads, width = _named(config, "hidden_size"), 1, 0
    if set(getattr(config, "layer_types", None) or ()) != {"linear_attention"}:  # else there is no attention at all
        heads = _named(config, "num_attention_heads")
        width = _named(config, "qk_head_dim", "head_dim", default=hidden // heads)
    return {
        "layers": _named(config, "num_hidden_layers"),
        "hidden": hidden,
        "intermediate": mlp_width(config, hidden),
        "queries": heads * width,
        "keys": _named(config, "num_kv_heads", "num_key_value_heads", default=heads) * width,
        "heads": heads,
    }


def latent_width(config: Any) -> int:
    """Elements that a step of latent attention makes of a cached token in one layer: its cache holds what keys and
    values are made from, and a step makes those of all columns, and the keys once more with the part that is rotated.
    0 for other attention."""
    config = config.get_text_config()
    if not _named(config, "kv_lora_rank", default=0):
        return 0
    unrotated, rotated, value = (
        _named(config, name) for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    )
    return _named(config, "num_attention_heads") * (2 * unrotated + rotated + value)


def _named(config: Any, *names: str, default: int | None = None) -> int:
    """The first of the config's attributes ``names`` that has a value. It is asked for each, since what is called
    ``n_layer`` in a file is ``num_hidden_layers`` as an attribute only (``attribute_map``). Raises ModelError where
    there is none and no ``default``."""
    found = next((value for value in (config_value(config, name) for name in names) if value), default)
    if found is None:
        raise ModelError(f"{type(config).__name__} has no {names[0]}; give it that attribute: memory follows from it")
    return max(found) if isinstance(found, list | tuple) else int(found)  # one for each layer, or one


def mlp_width(config: Any, hidden: int) -> int:
    """The MLP's width for a token, over the experts that it goes through, shared ones included. Gemma 4's is twice as
    wide in layers without keys of their own."""
    dense = _named(config, "ffn_hidden_size", "ffn_dim", "n_inner", "intermediate_size", default=4 * hidden)
    if getattr(config, "use_double_wide_mlp", False) and config.num_kv_shared_layers:
        dense *= 2
    expert = _named(config, "moe_intermediate_size", default=dense)
    shared = _named(config, "n_shared_experts", default=0) * expert
    experts = _named(config, "num_experts_per_tok", default=0)  # which Doge names where it has none
    routed = experts * expert if getattr(config, "is_moe", True) else 0
    return max(dense, routed + _named(config, "shared_expert_intermediate_size", default=shared))


def reward_bytes(model: PreTrainedModel, columns: int, *, on_cpu: bool) -> int:
    """What the scores of a reward model take beside what lies there already: all of it where ZeRO-3 shards it, since
    its shards stay while it is gathered, and its pass over a batch, or over one row of ``columns`` tokens if that is
    longer."""
    parameters = list(model.parameters())
    gathered = sum(element_count(p) * p.element_size() for p in parameters if not is_here(p))
    nothing = dict.fromkeys(("base", "kept", "largest", "adapted", "trained", "policy", "low_rank"), 0)
    size = ModelSize(
        **nothing,
        **dimensions(model.config),
        vocabulary=0,
        element=parameters[0].element_size(),
        column=0,
        tile=(1, 1),
        plain=_plain(model),
        scratch=layer_memory(model).scratch,
    )
    how = Sharding(1, 0, 0, 0, 0, on_cpu=on_cpu)
    tokens = max(BATCH_TOKENS, columns)
    return gathered + tokens * pass_token_bytes(size, how, PassSize(tokens, 1, columns))


def sharding(
    size: ModelSize, *, ranks: int, stage: int, on_cpu: bool, offloaded: bool = False, eight_bit: bool = False
) -> Sharding:
    """How the run shares a model of this size, with the settings that DeepSpeed gets (``deepspeed_settings``).
    ``offloaded``: the optimizer lies in the machine's memory, which on a CPU is the same memory. ``eight_bit``: it
    keeps its moments in 8 bits."""
    return Sharding(
        ranks,
        stage,
        bucket=gradient_bucket(size.trained, adapters=True) if stage else 0,
        live=LIVE_PARAMETERS,
        prefetched=PREFETCHED_PARAMETERS,
        overlap=not on_cpu,
        on_cpu=on_cpu,
        offloaded=offloaded and not on_cpu,
        eight_bit=eight_bit,
    )


def needs_of(model: ModelSize, how: Sharding, size: RolloutSize, weights: str) -> RolloutNeeds:
    """The estimate for this model, shared like this, and this size of rollout, decoded with ``weights``."""
    repeats = model.queries / model.keys if size.packing and not how.on_cpu and not size.shares_heads else 1
    copies = repeats * size.key_copies
    role_pass = PassSize(size.role_pass_tokens, size.role_pass_roles, size.columns, key_copies=copies)
    update = PassSize(size.update_tokens, size.update_roles, size.columns, size.checkpointing, copies)
    prefill = PassSize(size.widest_prompt, 1, size.columns)
    on_device = Sharding(how.ranks, how.stage, how.bucket, how.live, how.prefetched)  # a prefill keeps no scores
    window = window_bytes(model, how)
    trains = size.update_tokens > 0
    return RolloutNeeds(
        window_bytes=window,
        live_bytes=min(window, live_bytes(model, how)) + prefetched_bytes(model, how),
        slot_bytes=(model.column + model.latent * model.element) * size.slot_columns + model.state,
        choice_bytes=size.logit_rows(model.vocabulary) * model.vocabulary * FP32,
        column_bytes=model.column,
        prefill_bytes=pass_token_bytes(model, on_device, prefill),
        longest_prompt=size.widest_prompt,
        state_bytes=model.state,
        weights_bytes=(0 if weights == MERGED else model.policy * model.element) + model.matrix,
        copied_bytes=copied_bytes(model, how, weights),
        matrices_bytes=model.adapted if model.matrix and weights != MERGED else 0,
        role_pass_bytes=pass_bytes(model, how, role_pass),
        update_bytes=update_bytes(model, how, update) if trains else 0,
        streamed_update_bytes=update_bytes(model, how, update, streamed=True) if trains else 0,
        activation_bytes=activation_bytes(model, how, update) if trains else 0,
        checkpointing=size.checkpointing,
        later_bytes=kept_bytes(model, how) - kept_bytes(model, how, moments=False) if trains else 0,
        reward_bytes=size.reward_bytes,
        micro_batch=size.update_tokens,
        role_pass_batch=size.role_pass_tokens // size.role_pass_roles * size.update_roles,
        least_batch=size.columns * size.update_roles,
    )


def copied_bytes(model: ModelSize, how: Sharding, weights: str) -> int:
    """Copies that decoding makes of the adapted weights where they lie here (``models/decoding_weights.py``): merged
    or, in bfloat16 on a CPU, in its kernel's order. Quantised ones are copied where there is room (``place``)."""
    ordered = how.on_cpu and model.element == torch.bfloat16.itemsize and not model.matrix
    copied = weights == MERGED or ordered
    return model.adapted if copied else 0
