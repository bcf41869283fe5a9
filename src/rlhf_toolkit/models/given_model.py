"""A model that a program has loaded already, as the source of a run's base.

The base is made of it as of a file: by its class, in the run's dtype, with the run's attention, quantised and sharded
where that is asked for. Where nothing is changed, tensors are shared and there is no second copy; what ZeRO-3 has
sharded is taken away from the object, which would hold the whole on every rank otherwise.
"""

from __future__ import annotations

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_toolkit.errors import ModelError, shortened
from rlhf_toolkit.models.quantised import QuantisedLinear


def require_usable(model: object) -> None:
    """Raise ModelError unless a base can be made of ``model``: one of transformers, whole, in no other hands."""
    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        if hasattr(model, "merge_and_unload"):
            raise ModelError(
                f"the model is a {kind}, a base with an adapter; give the base, and the adapter as policy_adapter"
            )
        raise ModelError(f"the model is a {kind}, no PreTrainedModel of transformers; give one, a hub name or a folder")
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ModelError(
            f"the {kind} has an adapter on it; give it without, and the adapter's folder as policy_adapter"
        )
    if getattr(model, "hf_quantizer", None) is not None or any(isinstance(m, QuantisedLinear) for m in model.modules()):
        raise ModelError(f"the {kind} is quantised already; give its name, and quantization=nf4 or another")
    tensors = [*model.parameters(), *model.buffers()]
    if any(hasattr(each, "ds_id") for each in tensors):
        raise ModelError(f"the {kind} is sharded by ZeRO-3 already; give its name or folder: it is sharded as it loads")
    if any(each.is_meta for each in tensors):
        raise ModelError(f"the {kind} has weights that are not in memory (device meta); give its name or folder")
    if any(each.numel() == 0 for each in model.parameters()):
        raise ModelError(f"the weights of the {kind} have gone to an earlier run's base; load the model again")


def weights_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """Its weights and buffers by name, each the very tensor, without autograd."""
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def take_over(model: PreTrainedModel, base: PreTrainedModel, *, shards: bool) -> None:
    """End what ``base``, just made of ``model``, has begun: it has the name that adapters know their base by, and where
    it ``shards`` while it is loaded the object lets its weights go.

    Raises ModelError where ``model`` has weights for which its config leaves no place: it was changed since.
    """
    extra = sorted(set(model.state_dict()) - set(base.state_dict()))
    if extra:
        raise ModelError(
            f"the {type(model).__name__} has {len(extra)} weights that its config does not ask for, first "
            f"{shortened(extra[0])}; save it with save_pretrained and give the folder"
        )
    base.name_or_path = base.config.name_or_path = model.name_or_path
    if shards:
        for parameter in model.parameters():
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
