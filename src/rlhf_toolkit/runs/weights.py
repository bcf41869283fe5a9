"""A run's base and the adapters on it: what is loaded, and how a checkpoint knows it again."""

from __future__ import annotations

import torch
from peft import LoraConfig
from transformers import PretrainedConfig, PreTrainedModel

from rlhf_toolkit.checkpoints import base_fingerprint, checksum, fingerprint
from rlhf_toolkit.distributed.collectives import on_main, world_size
from rlhf_toolkit.distributed.machines import require_same
from rlhf_toolkit.distributed.topology import Topology
from rlhf_toolkit.given import MODEL, given_object
from rlhf_toolkit.models.given_model import weights_of
from rlhf_toolkit.models.loading import load_base, lora_config
from rlhf_toolkit.models.quantised import Quantisation, QuantisedLinear, stored_bytes
from rlhf_toolkit.models.shared_base import SharedBase
from rlhf_toolkit.models.targets import refuse_unknown
from rlhf_toolkit.models.whole_model import WholeModel
from rlhf_toolkit.settings.configs import ModelConfig
from rlhf_toolkit.texts import say


def require_one_model(name: str) -> None:
    """Raise TopologyError where a program has given ranks different models as ``name``: one that starts from random
    weights needs a seed. A collective."""
    model = given_object(MODEL, name)
    if model is not None and world_size() > 1:
        sums = [checksum(tensor.flatten(), 0) for tensor in weights_of(model).values()]
        require_same("the weights of", {"the model that was given": fingerprint(sums)})


def load_adapted_base(
    model: ModelConfig, config: PretrainedConfig, topology: Topology
) -> tuple[PreTrainedModel, LoraConfig]:
    """The base, and the settings of a new adapter on it."""
    require_one_model(model.name)
    base = load_base(
        model.name,
        config,
        topology,
        dtype=getattr(torch, model.dtype),
        attention=model.attention,
        trust_remote_code=model.trust_remote_code,
        quantization=model.quantization,
        revision=model.revision,
    )
    if model.quantization != Quantisation.NONE:
        stored = stored_bytes(base)
        on_main(lambda: say(stored.sentence(model.quantization, model.dtype)))
    return base, new_adapter(model, base)


def new_adapter(model: ModelConfig, base: PreTrainedModel) -> LoraConfig:
    """The settings of a new adapter on ``base``. Raises ModelError for names of layers that it has not."""
    for setting in ("target_modules", "exclude_modules"):
        refuse_unknown(base, f"model.{setting}", getattr(model, setting))
    return lora_config(
        rank=model.lora_rank,
        alpha=model.lora_alpha,
        rslora=model.rslora,
        target_modules=model.target_modules,
        exclude_modules=model.exclude_modules,
        revision=model.revision,
        start=model.init_lora_weights,
    )


def fingerprint_of(model: SharedBase | WholeModel) -> str:
    """Identifies the frozen base, so that a checkpoint is never resumed on another one. Of a model that is trained as a
    whole only the config counts: all of its weights are in the checkpoint."""
    frozen = [
        (name, p)
        for name, p in model.named_parameters()
        if not p.requires_grad and "lora_" not in name and not name.startswith("scalar_heads")
    ]
    kinds = {layer.kind for layer in model.modules() if isinstance(layer, QuantisedLinear)}
    return base_fingerprint(f"{model.causal_lm.config.to_json_string()}{''.join(sorted(kinds))}", frozen)
