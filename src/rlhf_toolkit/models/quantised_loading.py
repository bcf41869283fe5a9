"""Quantises a base while it is loaded: one tensor after another is read, quantised, and sharded where ZeRO-3 runs.

transformers reads, renames and converts what is stored as it does for any model, and hands each tensor to a quantiser
of ours before it goes to its module. So of what is quantised a process never holds more than one matrix in
``model.dtype``. transformers' own quantisers would leave the whole model on every rank of ZeRO-3.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from rlhf_toolkit.errors import ModelError
from rlhf_toolkit.models.quantised import Quantisation, QuantisedLinear
from rlhf_toolkit.models.targets import is_plain

METHOD = "rlhf_toolkit"  # our name among transformers' quantisation methods; it is in no file
ROUTER = re.compile(r"(^|\.)(\w*router\w*|gate|shared_expert_gate|shared_gate)$")
"""Layers that choose experts or weigh them: few numbers that decide much."""
Shard = Callable[[nn.Module], None]
"""Leaves this rank's part of every parameter of a module, where ZeRO-3 runs."""


@register_quantization_config(METHOD)
class QuantisedLoading(QuantizationConfigMixin):  # type: ignore[misc]
    """What ``from_pretrained`` is given: ``kind``, the ``device`` that quantises, and ``shard`` where it is sharded."""

    def __init__(self, kind: Quantisation, device: torch.device, shard: Shard | None) -> None:
        self.quant_method: Any = METHOD
        self.kind, self.device, self.shard = kind, device, shard


@register_quantizer(METHOD)
class Quantiser(HfQuantizer):  # type: ignore[misc]
    """Puts quantised layers into the empty model, and each stored tensor into its place in it."""

    def __init__(self, quantization_config: QuantisedLoading, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self.how = quantization_config

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Only hears of it."""
        self.dtype = dtype
        return dtype

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **options: Any) -> None:
        quantise_layers(model, self.how.kind)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **options: Any) -> bool:
        """Whether ``placed`` sees this tensor: those to quantise, and, to be sharded at once, all parameters of the
        model's own dtype."""
        module, _, name = param_name.rpartition(".")
        owner: Any = model.get_submodule(module)
        if isinstance(owner, QuantisedLinear) and name == "weight":
            return True
        parameter = owner._parameters.get(name)
        return self.how.shard is not None and parameter is not None and parameter.dtype == self.dtype

    def get_quantize_ops(self) -> ConversionOps:
        """What transformers calls with each of these tensors."""
        return _Placing(self)

    def placed(self, model: PreTrainedModel, name: str, tensor: Tensor) -> nn.Parameter | None:
        """The parameter ``name`` of ``model`` with what the file has for it; None where its shape is not that of the
        config: it then counts as missing, which ``require_all_weights`` tells."""
        layer: Any = model.get_submodule(name.rpartition(".")[0])
        tensor = tensor.to(self.how.device)
        if isinstance(layer, QuantisedLinear) and name.endswith(".weight"):
            wanted = layer.shape[::-1] if layer.turned else layer.shape
        else:
            layer, wanted = None, model.get_parameter(name).shape
        if tensor.shape != wanted:
            return None
        parameter = nn.Parameter(tensor if layer is None else layer.stored(tensor), requires_grad=False)
        if self.how.shard is not None:
            self.how.shard(nn.ParameterList([parameter]))
        return parameter

    def postprocess_model(self, model: PreTrainedModel, **options: Any) -> None:
        """Shard what is left, such as parameters of another dtype; from here on nobody need know that a quantiser was
        here: layers say it for themselves."""
        if self.how.shard is not None:
            self.how.shard(model)
        self.remove_quantization_config(model)

    def is_serializable(self) -> bool:
        """A base is never saved."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Adapters on it are."""
        return True


class _Placing(ConversionOps):  # type: ignore[misc]
    def __init__(self, quantiser: Quantiser) -> None:
        self.quantiser = quantiser

    def convert(self, input_dict: dict[str, Any], *names: Any, model: Any = None, **options: Any) -> dict[str, Any]:
        """Every tensor of ``input_dict`` that fits, by its name in the model."""
        tensors = {name: each[0] if isinstance(each, list) else each for name, each in input_dict.items()}
        placed = {name: self.quantiser.placed(model, name, tensor) for name, tensor in tensors.items()}
        return {name: parameter for name, parameter in placed.items() if parameter is not None}


def quantise_layers(model: PreTrainedModel, kind: Quantisation) -> list[str]:
    """Put an empty quantised layer in the place of every plain linear layer of the decoder, and return their names.

    The output layer, whatever is tied, and routers stay as they are; routed experts that are matrices of one tensor are
    no linear layers, and stay too. Raises ModelError where there is none.
    """
    inside, output = set(model.get_decoder().modules()), model.get_output_embeddings()
    tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
    chosen = [
        (name, module)
        for name, module in model.named_modules()
        if module in inside
        and module is not output
        and is_plain(module)
        and not ROUTER.search(name)
        and f"{name}.weight" not in tied
    ]
    if not chosen:
        raise ModelError(
            f"{type(model).__name__} has no plain linear layer to quantise; set model.quantization to none"
        )
    for name, module in chosen:
        layer: Any = QuantisedLinear(module, kind)  # type: ignore[arg-type]
        layer._is_hf_initialized = True  # a weight that is missing is told by its name, and never made up
        model.set_submodule(name, layer)
    return [name for name, _ in chosen]
