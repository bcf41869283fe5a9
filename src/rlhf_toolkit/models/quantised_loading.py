"""Quantises a base while it is loaded: one tensor after another is read, quantised, and sharded where ZeRO-3 runs.

transformers reads, renames and converts what is stored as it does for any model, and hands each tensor to a quantiser
of ours before it goes to its module. So of what is quantised a process never holds more than one matrix in
``model.dtype``. transformers' own quantisers would leave the whole model on every rank of ZeRO-3.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from rlhf_toolkit.errors import ModelError
from rlhf_toolkit.models.quantised import Quantisation, QuantisedLinear, dequantised
from rlhf_toolkit.models.stored_nf4 import STATE, bytes_of, gathering
from rlhf_toolkit.models.targets import WRITTEN, is_plain, read_past

METHOD = "rlhf_toolkit"  # our name among transformers' quantisation methods; it is in no file
ROUTER = re.compile(r"(^|\.)(\w*router\w*|gate|shared_expert_gate|shared_gate)$")
"""Layers that choose experts or weigh them: few numbers that decide much."""
Shard = Callable[[nn.Module], None]
"""Leaves this rank's part of every parameter of a module, where ZeRO-3 runs."""


@register_quantization_config(METHOD)
class QuantisedLoading(QuantizationConfigMixin):  # type: ignore[misc]
    """What ``from_pretrained`` is given: ``kind``, the ``device`` that quantises, ``shard`` where it is sharded, and
    where the files have the bytes already (``stored_nf4``), ``stored_but``: the layers of which they do not."""

    def __init__(
        self, kind: Quantisation, device: torch.device, shard: Shard | None, stored_but: Sequence[str] | None = None
    ) -> None:
        self.quant_method: Any = METHOD
        self.kind, self.device, self.shard, self.stored_but = kind, device, shard, stored_but


@register_quantizer(METHOD)
class Quantiser(HfQuantizer):  # type: ignore[misc]
    """Puts quantised layers into the empty model, and each stored tensor into its place in it."""

    def __init__(self, quantization_config: QuantisedLoading, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self.how = quantization_config
        self.pre_quantized = self.how.stored_but is not None
        self.misfits: list[str] = []

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Only hears of it."""
        self.dtype = dtype
        return dtype

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **options: Any) -> None:
        for name in quantise_layers(model, self.how.kind, self.how.stored_but or ()):
            layer: Any = model.get_submodule(name)
            # On the meta device, and for transformers before 5.23 alone: it casts what it reads to the dtype that it
            # sees here, which as bytes would cut every weight to a whole number before it is quantised.
            layer.weight = nn.Parameter(layer.weight.to(self.dtype), requires_grad=False)

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

    def get_weight_conversions(self) -> list[WeightConverter]:
        """What gathers the parts of a stored weight."""
        return [gathering(_Placing(self))] if self.pre_quantized else []

    def placed_parts(self, model: PreTrainedModel, name: str, parts: dict[str, Tensor]) -> nn.Parameter | None:
        """The same of a weight whose bytes are in the files, or of one that is in full precision there too."""
        layer: Any = model.get_submodule(name.rpartition(".")[0])
        parts = {part: tensor.to(self.how.device) for part, tensor in parts.items()}
        if STATE not in parts:
            return self.placed(model, name, parts["weight"])
        if isinstance(layer, QuantisedLinear):
            return self.kept(bytes_of(parts, layer.shape))
        shape = model.get_parameter(name).shape  # of a router, or in a tower: a matrix here
        return self.placed(model, name, dequantised(bytes_of(parts, shape), shape, Quantisation.NF4, torch.float32))

    def placed(self, model: PreTrainedModel, name: str, tensor: Tensor) -> nn.Parameter | None:
        """The parameter ``name`` of ``model`` with what the file has for it; None where its shape is not that of the
        config, which is told at the end."""
        layer: Any = model.get_submodule(name.rpartition(".")[0])
        tensor = tensor.to(self.how.device)
        quantises = isinstance(layer, QuantisedLinear) and name.endswith(".weight")
        wanted = layer.shape[:: -1 if layer.turned else 1] if quantises else model.get_parameter(name).shape
        if tensor.shape != wanted:
            self.misfits.append(f"{name} has shape {tuple(tensor.shape)}, its config asks for {tuple(wanted)}")
            return None
        return self.kept(layer.stored(tensor) if quantises else tensor.to(model.get_parameter(name).dtype))

    def kept(self, tensor: Tensor) -> nn.Parameter:
        """A frozen parameter of it, sharded where that is asked for."""
        parameter = nn.Parameter(tensor, requires_grad=False)
        if self.how.shard is not None:
            self.how.shard(nn.ParameterList([parameter]))
        return parameter

    def postprocess_model(self, model: PreTrainedModel, **options: Any) -> None:
        """Shard what is left, such as parameters of another dtype; from here on nobody need know that a quantiser was
        here: layers say it for themselves. Raises ModelError where a tensor did not fit."""
        if self.misfits:
            raise ModelError(
                f"{model.name_or_path} holds {len(self.misfits)} weight(s) that do not fit, first "
                f"{self.misfits[0]}; fetch the model again"
            )
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
        # By the second name transformers knows not to cast what it reads.
        self.quantiser = self.hf_quantizer = quantiser

    def __deepcopy__(self, memo: dict[int, Any]) -> _Placing:
        """Itself: transformers copies the operations of a converter for every weight, and the quantiser is one."""
        return self

    def convert(self, input_dict: dict[str, Any], *names: Any, model: Any = None, **options: Any) -> dict[str, Any]:
        """Every tensor of ``input_dict`` that fits, by its name in the model."""
        tensors = {name: each[0] if isinstance(each, list) else each for name, each in input_dict.items()}
        if self.quantiser.pre_quantized:
            name = options["full_layer_name"]
            try:
                whole = self.quantiser.placed_parts(model, name, tensors)
            except ValueError as error:
                self.quantiser.misfits.append(f"{name}: {error}")
                whole = None
            return {} if whole is None else {"weight": whole}
        placed = {name: self.quantiser.placed(model, name, tensor) for name, tensor in tensors.items()}
        return {name: parameter for name, parameter in placed.items() if parameter is not None}


def quantise_layers(model: PreTrainedModel, kind: Quantisation, but: Sequence[str] = ()) -> list[str]:
    """Put an empty quantised layer in the place of every plain linear layer of the decoder, and return their names;
    not of those that are named in ``but``, by their endings or what they lie in.

    The output layer, whatever is tied, routers, and layers whose weight the model reads or writes itself stay as they
    are; routed experts that are matrices of one tensor are no linear layers, and stay too. Raises ModelError where
    there is none.
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
        and not (read_past(model, name) or read_past(model, name, WRITTEN))
        and not any(f".{name}".endswith(f".{each}") or name.startswith(f"{each}.") for each in but)
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
