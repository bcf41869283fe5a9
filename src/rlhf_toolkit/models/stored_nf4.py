"""Models that lie in NF4 already, as bitsandbytes saves them: their very bytes become those of our layers.

Beside a matrix of packed numbers such a file has its scales (``absmax``), or those in 8 bits with scales of their own
(double quantisation), and a tensor whose bytes are a JSON object of the rest. Nothing is quantised anew: the weights
are the file's own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import PretrainedConfig
from transformers.core_model_loading import WeightConverter

from rlhf_toolkit.errors import ModelError, described, shortened
from rlhf_toolkit.models.folders import check_floating_point
from rlhf_toolkit.models.quantised import PER_SCALE, bitsandbytes_functions

ONLY_EXPERTS = "mxfp4"  # of GPT-OSS: transformers reads it, and routed experts have no adapters
STATE = "weight.quant_state.bitsandbytes__nf4"
PARTS = ("weight", "weight.nested_absmax", "weight.nested_quant_map", "weight.quant_map", "weight.absmax", STATE)
"""The names under which a matrix and what belongs to it are stored."""
OLDEST = Version("5.21")
"""The first version of transformers that hands a quantiser of ours the parts of a stored weight."""
MOST_STATE = 4096
"""Bytes of that JSON; bitsandbytes writes some hundred."""


def stored_quantisation(config: PretrainedConfig) -> dict[str, Any]:
    """What a model's config says of the bits it is stored in; empty where it is stored in full precision."""
    found = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None
    )
    return {} if found is None else dict(found) if isinstance(found, Mapping) else dict(found.to_dict())


def check_stored(name: str, config: PretrainedConfig, kind: str) -> bool:
    """Whether the model is stored in NF4 and wanted so. Raises ModelError for one that is stored in few bits in another
    way, or that is wanted in others, and for one in full precision of which a weight is in whole numbers."""
    stored = stored_quantisation(config)
    if not stored:
        check_floating_point(name)
    method = stored.get("quant_method")
    if not stored or (method == ONLY_EXPERTS and kind == "none"):
        return False
    nf4 = method == "bitsandbytes" and stored.get("load_in_4bit") and stored.get("bnb_4bit_quant_type") == "nf4"
    if nf4 and kind == "nf4":
        if Version(transformers.__version__) < OLDEST:
            raise ModelError(
                f"{name} is stored in nf4, which is read with transformers {OLDEST} or newer, not with "
                f"{transformers.__version__}; update it, or give the model it was made from"
            )
        return True
    way_out = "set model.quantization to nf4, as it is stored" if nf4 else "give the model it was made from"
    raise ModelError(
        f"{name} is quantised already (quant_method={shortened(str(method))}{', nf4' if nf4 else ''}), but "
        f"model.quantization is {kind}; {way_out}"
    )


def plain_config(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of ``config`` that says nothing of the bits, so that transformers builds ordinary layers."""
    plain = deepcopy(config)
    for part in (plain, plain.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return plain


def kept_whole(config: PretrainedConfig) -> tuple[str, ...]:
    """The layers that the file has in full precision although others like them are quantised, by names or endings."""
    skipped = stored_quantisation(config).get("llm_int8_skip_modules")
    return tuple(str(each) for each in skipped) if isinstance(skipped, list) else ()


def gathering(operation: Any) -> WeightConverter:
    """What has transformers hand all that belongs to one weight to ``operation``."""
    return WeightConverter(list(PARTS), "weight", [operation])


def bytes_of(parts: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
    """``[scales as fp32 bytes | numbers]`` of a stored matrix (out, in). Raises ValueError where they are not of it."""
    try:
        state = json.loads(bytes(parts[STATE][:MOST_STATE].tolist()))
        told = (torch.Size(state["shape"]), state["blocksize"], state["quant_type"])
    except Exception as error:  # the bytes may be anything
        raise ValueError(f"its quant_state cannot be read ({described(error)})") from error
    if told != (shape, PER_SCALE, "nf4"):
        raise ValueError(f"it is {shortened(told)} and not {tuple(shape)} in nf4 with {PER_SCALE} weights a scale")
    scales, numbers = parts["weight.absmax"], parts["weight"].contiguous().view(torch.uint8).flatten()
    if "weight.nested_absmax" in parts:
        functions = bitsandbytes_functions()
        outer = functions.QuantState(
            parts["weight.nested_absmax"].float(),
            code=parts["weight.nested_quant_map"].float(),
            blocksize=int(state["nested_blocksize"]),
            dtype=torch.float32,
        )
        scales = functions.dequantize_blockwise(scales, outer) + float(state["nested_offset"])
    if scales.numel() != -(-shape.numel() // PER_SCALE) or numbers.numel() != -(-shape.numel() // 2):
        raise ValueError(f"it has {scales.numel()} scales and {numbers.numel()} bytes for {tuple(shape)}")
    return torch.cat([scales.float().contiguous().view(torch.uint8).flatten(), numbers])
