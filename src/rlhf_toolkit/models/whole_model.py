"""WholeModel: a causal language model all of whose weights are trained, where SharedBase trains adapters on it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from rlhf_toolkit.data.layout import TokenLayout
from rlhf_toolkit.distributed.collectives import agreement, rank
from rlhf_toolkit.distributed.moments import restore_weights
from rlhf_toolkit.errors import CheckpointError, ModelError
from rlhf_toolkit.models.attention import trunk_inputs
from rlhf_toolkit.models.renamed import recompute_layers
from rlhf_toolkit.models.role_outputs import RoleOutputs
from rlhf_toolkit.models.roles import POLICY
from rlhf_toolkit.models.shared_base import refuse_architecture, refuse_empty
from rlhf_toolkit.models.targets import runs_without_gradient
from rlhf_toolkit.models.trained_head import TrainedHead


class WholeModel(PreTrainedModel):
    """A causal language model as the one role ``policy``, trained as a whole.

    It *is* a PreTrainedModel because Trainer asks that before it saves by ``save_pretrained``. Weights, gradients and
    the optimizer are float32, so that no update is lost to rounding; with ``products`` bfloat16 the trunk runs under
    autocast, which rounds the factors of its matrix products. Nothing of ``fused`` or ``role_slices`` is in it: their
    backward passes leave out the gradients of the base.

    Args:
        base: a decoder-only model in float32 with a language-model head. What it would train it trains here: parameters
            that its own class freezes, such as fixed position tables, stay frozen.
        gradient_checkpointing: recompute layers in backward.
        products: the dtype of matrix products.

    Raises:
        ModelError: the architecture cannot work, or a part of the model would never see a gradient, by name.
    """

    causal_lm: PreTrainedModel

    def __init__(
        self, base: PreTrainedModel, *, gradient_checkpointing: bool = False, products: torch.dtype = torch.float32
    ) -> None:
        refuse_architecture(base)
        refuse_unreached(base)
        super().__init__(PretrainedConfig())  # what its constructor checks and sets, the base has done for itself
        self.config = deepcopy(base.config)  # Trainer writes into it, use_cache for one, and the base's own is saved
        self.causal_lm = base
        self.policy_head = TrainedHead(base)
        self.products = products
        if gradient_checkpointing:
            recompute_layers(base, {"use_reentrant": False})

    def forward(self, layout: TokenLayout, *, roles: Sequence[str] = (POLICY,)) -> RoleOutputs:
        """What the model says about the K response tokens of ``layout``: ``policy_logprobs`` and ``policy_entropies``
        (K,), fp32; entropies carry no gradient. There is no role but ``policy``."""
        assert tuple(roles) == (POLICY,), roles
        # Without autocast's cache, which would hold a rounded copy of every weight until the end of the forward pass,
        # of those too that ZeRO-3 has taken away again.
        rounds = self.products != torch.float32
        with torch.autocast(
            self.causal_lm.device.type, dtype=self.products if rounds else None, enabled=rounds, cache_enabled=False
        ):
            hidden = self.causal_lm.base_model(**trunk_inputs(layout)).last_hidden_state
        states = hidden.flatten(0, 1).index_select(0, layout.before)
        if states.is_cuda:
            states = states.to(self.products)
        logprobs, entropies = self.policy_head(states, layout.targets, 1.0, False)
        return RoleOutputs(policy_logprobs=logprobs, policy_entropies=entropies)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """All parameters that are trained, in one group; tied ones are there once."""
        return {str(POLICY): [parameter for parameter in self.parameters() if parameter.requires_grad]}

    def kept_constants(self) -> dict[str, torch.Tensor]:
        """The buffers of a saved model, by name: not those that it makes anew, such as rotary frequencies."""
        kept = self.state_dict().keys()
        return {name: buffer for name, buffer in self.named_buffers() if name in kept}

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike[str], state_dict: dict[str, torch.Tensor] | None = None, **kwargs: Any
    ) -> None:
        """Write ``policy/``: a plain folder of transformers. ``state_dict`` holds whole tensors (under ZeRO the caller
        has gathered them)."""
        state_dict = self.state_dict() if state_dict is None else state_dict
        prefix = "causal_lm."
        weights = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
        for tied in self.causal_lm.all_tied_weights_keys:
            weights.pop(tied, None)
        refuse_empty(weights)
        self.causal_lm.save_pretrained(Path(save_directory) / POLICY, state_dict=weights, **kwargs)

    def load_trained(self, folder: str | os.PathLike[str]) -> None:
        """Load what ``save_pretrained`` wrote to ``folder``, which only rank 0 reads. A collective, before there is an
        engine."""
        weights = {}
        with agreement("reading the model"):
            if rank() == 0:
                place = Path(folder) / POLICY
                if not place.is_dir():
                    raise CheckpointError(
                        f"{place} is not a folder; it should hold the model that save_pretrained writes"
                    )
                kind = type(self.causal_lm)
                weights = kind.from_pretrained(place, config=self.causal_lm.config, dtype=torch.float32).state_dict()
        prefix = "causal_lm."
        mine = [(name, p) for name, p in self.named_parameters() if name.startswith(prefix)]
        restore_weights(mine, lambda name: weights[name.removeprefix(prefix)])


def refuse_unreached(base: PreTrainedModel) -> None:
    """Raise ModelError for weights that no text reaches, such as a vision tower's: ZeRO-3 would apply gradients that
    are none, and weight decay would shrink them. The same for weights that the model runs without gradient."""
    reached = {*base.get_decoder().parameters(), *base.get_output_embeddings().parameters()}
    strangers = [name for name, parameter in base.named_parameters() if parameter not in reached]
    still = [name for name, _ in base.named_parameters() if runs_without_gradient(base, name)]
    if still:
        raise ModelError(
            f"{type(base).__name__} runs weights without gradient ({still[0]}), which would never learn; drop sft.full "
            "to train adapters on the others"
        )
    if strangers:
        raise ModelError(
            f"{type(base).__name__} has weights that no text reaches ({strangers[0]}), which cannot be trained here; "
            "drop sft.full to train an adapter, or give the language model alone"
        )
