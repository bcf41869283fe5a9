"""SharedBase: one frozen causal language model that plays policy, value, reference and reward in one forward pass."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Cache, PreTrainedModel

from rlhf_toolkit.data.layout import TokenLayout
from rlhf_toolkit.distributed.collectives import on_main
from rlhf_toolkit.distributed.zero3 import full_shape, whole
from rlhf_toolkit.errors import CheckpointError, ModelError
from rlhf_toolkit.models.adapter_files import check_adapter_weights
from rlhf_toolkit.models.attention import packing_obstacle, trunk_inputs
from rlhf_toolkit.models.fused import fuse
from rlhf_toolkit.models.heads import LanguageModelHead, ScalarHead
from rlhf_toolkit.models.quantised import products_of
from rlhf_toolkit.models.recurrent import refuse_state, share_read_weights
from rlhf_toolkit.models.renamed import cache_argument, recompute_layers
from rlhf_toolkit.models.role_outputs import RoleOutputs
from rlhf_toolkit.models.role_slices import RoleSlices, route_roles
from rlhf_toolkit.models.roles import LANGUAGE_ROLES, POLICY, REWARD, SCALAR_ROLES, TRAINED_ROLES, VALUE
from rlhf_toolkit.models.slot_cache import SlotCache, full_attention_only
from rlhf_toolkit.models.targets import is_plain, refuse_layers, refuse_settings, spelt_out


class ValueSite(StrEnum):
    """What the value head reads: the states of an adapter of its own, those of the policy, or nothing, where there is
    no value."""

    ADAPTER = "adapter"
    POLICY_TRUNK = "policy_trunk"
    NOWHERE = "nowhere"


ON_ADAPTER, ON_POLICY_TRUNK, NOWHERE = ValueSite.ADAPTER, ValueSite.POLICY_TRUNK, ValueSite.NOWHERE
CROSS_ATTENTION = re.compile("encoder_attn|cross_attn|crossattention")
UNFIT = {
    "blt": "reads bytes in patches that it cuts the whole text into",
    "cpmant": "puts prompt tokens of its own before every sequence",
    "git": "takes every sequence that it decodes to begin with an image",
    "inkling_text": "drops part of its logits",
}


class SharedBase(PeftModel):
    """A PeftModel whose adapters are roles, used side by side and never switched.

    It *is* a PeftModel because Trainer asks that before it leaves the frozen base out of checkpoints and loads them
    non-strictly, and so that what it saves loads with plain ``PeftModel.from_pretrained``.

    Args:
        base: a decoder-only model with a language-model head. Every parameter of it is frozen.
        adapters: LoRA settings for each role that has an adapter. ``reference`` without an entry is the bare base; with
            one it is a frozen adapter (a copy of the policy's start).
        trained: the roles that train, adapter and head; every other one is frozen.
        gradient_checkpointing: recompute layers in backward; each recomputation runs under the roles of its forward.
        value_head_std: standard deviation of the value head's start; 0 starts it at zero.
        value_on: ``adapter``: the value has an entry in ``adapters``; ``policy_trunk``: it has none, and its head reads
            the policy's states, detached, so that its loss moves nothing but the head; ``nowhere``: no value role.

    Raises:
        ModelError: the architecture or an adapter cannot work, by name.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        adapters: Mapping[str, LoraConfig],
        *,
        gradient_checkpointing: bool = False,
        value_head_std: float = 0.0,
        value_on: str = ON_ADAPTER,
        trained: Sequence[str] = TRAINED_ROLES,
    ) -> None:
        refuse_architecture(base)
        for role, config in adapters.items():
            refuse_settings(role, config)
        adapters = {role: spelt_out(config, base) for role, config in adapters.items()}
        first, *others = sorted(adapters, key=lambda role: (role != POLICY, role))
        with unrounded_starts(base):
            super().__init__(base, adapters[first], adapter_name=first)
            for role in others:
                self.add_adapter(role, adapters[role])
        refuse_layers(base)
        _, hidden_size = full_shape(base.get_output_embeddings().weight)  # OPT-350m's config names a wider one
        self.policy_head = LanguageModelHead(base)
        self.value_borrows = value_on == ON_POLICY_TRUNK
        with_head = [role for role in SCALAR_ROLES if role in adapters or (role == VALUE and self.value_borrows)]
        self.scalar_heads = nn.ModuleDict(
            {role: ScalarHead(hidden_size, initial_std=value_head_std) for role in with_head}
        )
        self.trained_roles = tuple(trained)
        self._cache_argument = str(cache_argument(base))
        self._masks_are_plain = packing_obstacle(base) is None and full_attention_only(base.config)
        self.slices = RoleSlices()
        route_roles(self.base_model, self.slices)
        share_read_weights(base)
        # What trains is decided once and for all: sharding, optimizer and checkpoints read it.
        for name, parameter in self.named_parameters():
            in_head = name.startswith("scalar_heads.") and name.split(".")[1] in self.trained_roles
            parameter.requires_grad_(in_head or ("lora_" in name and _role_of(name) in self.trained_roles))
        fuse(base)
        if gradient_checkpointing:
            recompute_layers(base, {"use_reentrant": False, "context_fn": self.slices.checkpoint_contexts})

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model underneath, with its adapted layers."""
        return cast(PreTrainedModel, self.base_model.model)

    def forward(  # type: ignore[override]
        self,
        layout: TokenLayout,
        *,
        roles: Sequence[str],
        temperature: float = 1.0,
        entropy_gradient: bool = False,
    ) -> RoleOutputs:
        """Run ``roles`` over the same sequences and return what each says about the response tokens.

        Args:
            layout: B sequences with K response tokens, padded or packed. A packed one needs a base without
                ``packing_obstacle``.
            roles: any of policy, reference, value, reward.
            temperature: divides the logits of policy and reference alike.
            entropy_gradient: whether the policy's entropies are part of a loss; without, they carry no gradient.

        Returns:
            What they say, in row-major order of the sequences: columns of tokens (K,), columns of sequences (B,).
        """
        trunks = self.trunks(roles)
        with self.slices.layout(trunks, layout.tokens.shape[0]):
            hidden = self.causal_lm.base_model(**trunk_inputs(layout, len(trunks))).last_hidden_state
        rows = cast(tuple[torch.Tensor, ...], hidden.view(len(trunks), -1, hidden.shape[-1]).unbind(0))
        states_of = dict(zip(trunks, rows, strict=True))  # the trunk's last states (n N, H) of each role
        outputs = RoleOutputs()
        for role in roles:
            states = states_of[POLICY].detach() if self._borrows(role) else states_of[role]
            if role in LANGUAGE_ROLES:
                logprobs, entropies = self.policy_head(
                    states.index_select(0, layout.before), layout.targets, temperature, entropy_gradient
                )
                outputs[f"{role}_logprobs"] = logprobs
                if role == POLICY:
                    outputs["policy_entropies"] = entropies
            elif role == VALUE:
                outputs["token_values"] = self.scalar_heads[VALUE](states.index_select(0, layout.before))
                outputs["final_values"] = self.scalar_heads[VALUE](states.index_select(0, layout.last))
            else:
                outputs["reward_scores"] = self.scalar_heads[REWARD](states.index_select(0, layout.last))
        return outputs

    def trunks(self, roles: Sequence[str]) -> tuple[str, ...]:
        """The roles whose rows the trunk must compute so that ``roles`` can say theirs: a value without an adapter
        reads the policy's."""
        return tuple(dict.fromkeys(POLICY if self._borrows(role) else role for role in roles))

    def _borrows(self, role: str) -> bool:
        return role == VALUE and self.value_borrows

    def next_token_logits(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        cache: Cache,
        last: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The policy's logits (B, V) in fp32 for the token after ``input_ids`` (B, S), which extend ``cache``.

        ``attention_mask`` (B, columns of the cache + S), or None where all belong to their rows. ``last`` (B,) is where
        in ``input_ids`` each row's last token stands, by default at the end. Without autograd; the whole base lies
        here, or ZeRO's hooks bring it layer by layer.
        """
        one = input_ids.shape[1] == 1 and self._masks_are_plain
        if one and attention_mask is not None and attention_mask.device.type != "cpu":
            # (B, 1, 1, columns) bool, which transformers hands on to every layer. Left to make it, it launches a dozen
            # small kernels a token and waits to hear whether there is any padding.
            attention_mask = attention_mask.bool()[:, None, None]
        with self.slices.layout((POLICY,), input_ids.shape[0]):
            hidden = self.causal_lm.base_model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=True,
                **{self._cache_argument: cache},
            ).last_hidden_state
        ends = hidden[:, -1] if last is None else hidden[torch.arange(len(hidden), device=hidden.device), last]
        return self.policy_head.next_token_logits(ends)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Trained parameters by name of their group: a role such as ``policy``, or a head such as ``value_head``. Names
        are plain text: they go into the optimizer's checkpoint, from which torch reads no other types."""
        groups: dict[str, list[nn.Parameter]] = {str(role): [] for role in self.trained_roles}
        groups |= {f"{role}_head": [] for role in self.trained_roles}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                in_head = name.startswith("scalar_heads.")
                groups[f"{name.split('.')[1]}_head" if in_head else _role_of(name)].append(parameter)
        return {name: parameters for name, parameters in groups.items() if parameters}

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike[str], state_dict: dict[str, torch.Tensor] | None = None, **kwargs: Any
    ) -> None:
        """Write each trained role to its own folder: a plain PEFT adapter, and its head, such as
        ``value_head.safetensors``, beside it, or alone where the value has no adapter.

        ``state_dict`` holds whole tensors (under ZeRO-3 the caller has gathered them); every shape is checked before it
        is written.
        """
        state_dict = self.state_dict() if state_dict is None else state_dict
        trained = [role for role in self.trained_roles if role in self.peft_config]
        refuse_empty(
            {name: tensor for name, tensor in state_dict.items() if "lora_" in name or "scalar_heads." in name}
        )
        kwargs["save_embedding_layers"] = False
        super().save_pretrained(str(save_directory), selected_adapters=trained, state_dict=state_dict, **kwargs)
        for role in self._trained_heads() if kwargs.get("is_main_process", True) else ():
            (Path(save_directory) / role).mkdir(exist_ok=True)
            prefix = f"scalar_heads.{role}."
            head = {k.removeprefix(prefix): v.contiguous().cpu() for k, v in state_dict.items() if k.startswith(prefix)}
            save_file(head, head_file(save_directory, role))

    def load_trained(self, folder: str | os.PathLike[str]) -> None:
        """Load every trained role that ``save_pretrained`` wrote to ``folder``, which only rank 0 reads. Trainability
        stays as it is. A collective, before there is an engine."""
        for role in (role for role in self.trained_roles if role in self.peft_config):
            self._set_role(role, on_main(partial(_adapter_weights, role, Path(folder) / role)), folder)
        for role in self._trained_heads():
            self._set_head(role, on_main(partial(_head_weights, role, head_file(folder, role))), folder)

    def load_role(self, role: str, folder: str | os.PathLike[str]) -> None:
        """Load a plain PEFT adapter folder as ``role``; all of its tensors must find their place."""
        self._set_role(role, _adapter_weights(role, folder), folder)

    def _set_role(self, role: str, weights: dict[str, torch.Tensor], folder: str | os.PathLike[str]) -> None:
        mine = [p for name, p in self.named_parameters() if f".{role}." in name]
        with whole(mine, write=True):
            _require_same_shapes(
                get_peft_model_state_dict(self, adapter_name=role, save_embedding_layers=False),
                weights,
                f"the adapter in {folder} does not fit role {role}",
            )
            set_peft_model_state_dict(self, weights, adapter_name=role)

    def load_head(self, role: str, path: str | os.PathLike[str]) -> None:
        """Load a scalar head's weight and bias from a safetensors file."""
        self._set_head(role, _head_weights(role, path), path)

    def _set_head(self, role: str, weights: dict[str, torch.Tensor], path: str | os.PathLike[str]) -> None:
        head = self.scalar_heads[role]
        with whole(head.parameters(), write=True):
            _require_same_shapes(head.state_dict(), weights, f"{path} does not fit the {role} head")
            head.load_state_dict(weights)

    def _trained_heads(self) -> list[str]:
        return [role for role in self.trained_roles if role in self.scalar_heads]


def head_file(folder: str | os.PathLike[str], role: str) -> Path:
    """Where the head of ``role`` lies in the folder that holds a folder for each role."""
    return Path(folder) / role / f"{role}_head.safetensors"


def _adapter_weights(role: str, folder: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    if not Path(folder).is_dir():
        raise CheckpointError(
            f"{folder} is not a folder; it should hold the {role} adapter that save_pretrained writes"
        )
    return load_peft_weights(str(folder), device="cpu")  # type: ignore[no-any-return]


def _head_weights(role: str, path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    if not Path(path).is_file():
        raise CheckpointError(f"there is no file {path}; it should hold the {role} head that save_pretrained writes")
    check_adapter_weights(Path(path))
    return load_file(path)


@contextmanager
def unrounded_starts(base: nn.Module) -> Iterator[None]:
    """Inside, PEFT makes adapters in float32 and leaves them so: it would round what it has drawn to the dtype of the
    base's layer, which leaves A half of its values in bfloat16, and only then widen it."""
    halves: list[Any] = [
        module
        for module in base.modules()
        if is_plain(module) and products_of(module) in (torch.bfloat16, torch.float16)
    ]
    for module in halves:
        module.compute_dtype = torch.float32  # what PEFT asks a layer for whose weight says nothing
    try:
        yield
    finally:
        for module in halves:
            del module.compute_dtype


def refuse_architecture(base: PreTrainedModel) -> None:
    """Raise ModelError for models that cannot play roles side by side, naming what is in the way."""
    kind = type(base).__name__
    if base.config.is_encoder_decoder:
        raise ModelError(f"{kind} is an encoder-decoder; roles need a decoder-only causal language model")
    if base.get_output_embeddings() is None:
        raise ModelError(f"{kind} has no language-model head; load it with AutoModelForCausalLM")
    refuse_state(base)
    if cache_argument(base) is None:
        raise ModelError(f"{kind} has no key-value cache to decode with; use a newer model")
    if base.config.model_type in UNFIT:
        raise ModelError(f"{kind} {UNFIT[base.config.model_type]}; use another model")
    torn = [name for name, _ in base.named_modules() if CROSS_ATTENTION.search(name)]
    if torn:
        raise ModelError(f"{kind} has cross-attention ({torn[0]}), so it needs an encoder; use a decoder-only model")
    known = {base.base_model, base.get_output_embeddings()}
    extra = [
        name for name, child in base.named_children() if child not in known and any(True for _ in child.parameters())
    ]
    if extra:
        raise ModelError(
            f"{kind} has layers ({extra[0]}) besides its trunk and output layer, which the roles' log-probs would "
            "leave out; use a model whose trunk feeds its output layer directly"
        )
    output = base.get_output_embeddings()
    if not is_plain(output):
        raise ModelError(
            f"{kind} has an output layer ({type(output).__name__}) that does more than a product, which the roles' "
            "log-probs would leave out; use a model with a plain one"
        )
    SlotCache(base.config, slots=1, capacity=1, device=torch.device("meta"))


def _role_of(name: str) -> str:
    """``...lora_A.policy.weight`` -> ``policy``."""
    return name.rsplit(".", 2)[1]


def _require_same_shapes(mine: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor], misfit: str) -> None:
    for name in sorted({*mine, *found}):
        here, there = (tuple(side[name].shape) if name in side else None for side in (mine, found))
        if here != there:
            raise CheckpointError(f"{misfit}: {name} has shape {there}, expected {here}; None means that it is missing")


def refuse_empty(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise CheckpointError where a tensor is a placeholder of ZeRO-3's."""
    empty = [name for name, tensor in tensors.items() if tensor.numel() == 0]
    if empty:
        raise CheckpointError(f"{len(empty)} tensors are empty, first {empty[0]}: they were not gathered before saving")
