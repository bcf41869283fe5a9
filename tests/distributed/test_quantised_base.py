"""Adapters of all roles on a base in 4 or 8 bits: gradients and numbers are those over the dequantised weights, under
every stage, on one rank and on two, packed and padded, with and without checkpointing; nothing of the base is whole."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import deepspeed
import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DynamicCache, PreTrainedModel

from rlhf_toolkit.distributed.engine import backward
from rlhf_toolkit.distributed.streaming import streamed
from rlhf_toolkit.distributed.topology import Launch, Topology, check_engine, deepspeed_settings
from rlhf_toolkit.distributed.zero3 import element_count, gathered, is_here, is_partitioned, whole
from rlhf_toolkit.models.decoding_weights import decoding_weights
from rlhf_toolkit.models.inference import inference
from rlhf_toolkit.models.loading import build_ppo_roles, load_base, load_model_config, lora_config
from rlhf_toolkit.models.quantised import QuantisedLinear
from rlhf_toolkit.models.quantised_loading import Quantiser
from rlhf_toolkit.models.shared_base import SharedBase
from rlhf_toolkit.runs.weights import fingerprint_of
from tests.support.launch import run_worker
from tests.support.roles import packed_rows, plain_peft, rows_of, sequences_and_mask
from tests.support.tiny import tiny_llama

KINDS = {"nf4": 4.5, "int8": 8 + 32 / 128, "float8": 8 + 32 / 128}  # bits a weight, rows of 128 or more
ROLES = ("policy", "value", "reference")
LAUNCHES = ((1, 3), (2, 2), (2, 3))
ALONE = Topology(Launch.from_environment({}), rank=0, world_size=1, device=torch.device("cpu"))
IDS = torch.tensor([[5, 9, 11], [7, 8, 2]])


def base_on(folder: str, topology: Topology, kind: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return load_base(folder, load_model_config(folder), topology, dtype=dtype, attention="sdpa", quantization=kind)


def roles_on(base: PreTrainedModel, *, checkpointing: bool = False) -> SharedBase:
    """Adapters that say something, the same every time; one layer of each kind has none."""
    adapter = lora_config(
        rank=4, alpha=8, rslora=False, target_modules="all-linear", exclude_modules=["v_proj", "0.mlp.down_proj"]
    )
    adapter.init_lora_weights = False
    torch.manual_seed(1)
    return build_ppo_roles(base, adapter, policy_adapter=None, gradient_checkpointing=checkpointing, value_head_std=0.3)


def dense(base: PreTrainedModel) -> PreTrainedModel:
    """The same model with ordinary layers of the dequantised weights."""
    for name, layer in list(base.named_modules()):
        if isinstance(layer, QuantisedLinear):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            plain.weight.data, plain.bias = layer.matrix(layer.weight, torch.float32), layer.bias
            base.set_submodule(name, plain)
    return base


def of_roles(outputs: dict[str, Tensor]) -> Tensor:
    """A loss in which every number of every role that trains counts differently."""
    factors = torch.linspace(-1, 1, len(outputs["policy_logprobs"]))
    return (factors * outputs["policy_logprobs"]).sum() + (factors**2 * outputs["token_values"]).sum()


class Oracle:
    """What plain PEFT and autograd say of the dequantised weights about the parts of all ranks."""

    def __init__(self, folder: str, kind: str, parts: list[tuple[Tensor, Tensor]]) -> None:
        shared = roles_on(base_on(folder, ALONE, kind))
        self.bytes = {n: p.detach().clone() for n, p in shared.named_parameters() if p.dtype == torch.uint8}
        models = {role: plain_peft(shared, role, dense(base_on(folder, ALONE, kind))) for role in ("policy", "value")}
        reference, head = dense(base_on(folder, ALONE, kind)), shared.scalar_heads["value"]
        self.outputs: list[dict[str, Tensor]] = []
        for sequences, mask in parts:
            said = {
                f"{role}_logprobs": logprobs(model, sequences, mask)
                for role, model in (("policy", models["policy"]), ("reference", reference))
            }
            trunk = models["value"].base_model.model.model
            states = trunk(input_ids=sequences).last_hidden_state[:, :-1][mask[:, 1:]]
            said["token_values"] = states @ head.get_parameter("weight").flatten() + head.get_parameter("bias")
            of_roles(said).backward()
            self.outputs.append({name: column.detach() for name, column in said.items()})
        self.gradients = {
            name: parameter.grad
            for model in models.values()
            for name, parameter in model.named_parameters()
            if "lora_" in name
        }
        with torch.no_grad():
            self.logits = models["policy"](input_ids=IDS).logits[:, -1]


def logprobs(model: Any, sequences: Tensor, mask: Tensor) -> Tensor:
    logits = model(input_ids=sequences).logits[:, :-1].log_softmax(-1)
    return logits.gather(2, sequences[:, 1:, None]).squeeze(2)[mask[:, 1:]]


def parts_of(world: int) -> list[tuple[Tensor, Tensor]]:
    sequences, mask = sequences_and_mask([3, 2, 3, 4], [4, 5, 2, 3])
    return [(sequences[rank::world], mask[rank::world]) for rank in range(world)]


def engine_of(model: SharedBase, topology: Topology) -> Any:
    trained = [p for group in model.parameter_groups().values() for p in group]
    sizes = [element_count(p) for p in trained]
    settings = deepspeed_settings(
        topology, rows_per_rank=1, max_grad_norm=1e9, largest_adapter=max(sizes), trained=sum(sizes)
    )
    if settings is None:
        return model
    engine = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(trained, lr=0.0), config=settings)[0]
    check_engine(topology, engine)
    return engine


def check_everything(topology: Topology, base: str, stored: str) -> dict[str, Any]:
    """On each rank; returns of each kind the fingerprint and the bytes of the base that stay on a rank."""
    check_loading(topology, base, stored)
    found: dict[str, Any] = {}
    parts = parts_of(topology.world_size)
    for kind in KINDS:
        oracle = Oracle(base, kind, parts)
        for checkpointing in (False, True):
            model = roles_on(base_on(base, topology, kind), checkpointing=checkpointing)
            found[kind] = {"fingerprint": fingerprint_of(model), "bytes": kept(model)}
            engine = engine_of(model.train(), topology)
            for rows in (rows_of, packed_rows):
                check_update(engine, model, oracle, rows(*parts[topology.rank]), topology.rank)
            check_sampling(engine, model, oracle)
            assert kept(model) == found[kind]["bytes"], "something of the base has stayed whole"
    return found


def check_loading(topology: Topology, base: str, stored: str) -> None:
    """Whenever a tensor comes, nothing that came before lies here whole under ZeRO-3; and bytes that bitsandbytes has
    stored are sharded as those that are made here."""
    own, wholes = Quantiser.placed, list[str]()

    def placed(self: Quantiser, model: Any, name: str, tensor: Tensor) -> Any:
        wholes.extend(n for n, p in model.named_parameters() if p.device.type != "meta" and is_here(p))
        return own(self, model, name, tensor)

    with patch.object(Quantiser, "placed", placed):
        made = base_on(base, topology, "nf4")
    assert (not wholes) == (topology.launch.zero_stage == 3)
    for (name, p), (other, q) in zip(
        made.named_parameters(), base_on(stored, topology, "nf4").named_parameters(), strict=True
    ):
        assert name == other and is_here(p) == is_here(q) == (topology.launch.zero_stage != 3)
        with whole([p]), whole([q]):
            assert torch.equal(p, q), name


def kept(model: SharedBase) -> int:
    """Bytes of quantised layers that lie here."""
    stored: list[Any] = [p for p in model.parameters() if p.dtype == torch.uint8]
    return sum((p.ds_tensor if is_partitioned(p) and not is_here(p) else p).nbytes for p in stored)


def check_update(engine: Any, model: SharedBase, oracle: Oracle, layout: Any, rank: int) -> None:
    """Numbers of all roles, and gradients over all ranks, in fp32."""
    outputs = engine(layout, roles=ROLES)
    for name, expected in oracle.outputs[rank].items():
        torch.testing.assert_close(outputs[name], expected, rtol=1e-4, atol=1e-5)
    backward(engine, of_roles(outputs), last=True)
    seen = 0
    for name, parameter in model.named_parameters():
        if "lora_" in name and parameter.requires_grad:
            gradient = parameter.grad if engine is model else safe_get_full_grad(parameter)
            expected = oracle.gradients[name]
            assert gradient is not None and expected is not None and parameter.dtype == torch.float32
            assert (gradient - expected).norm() <= 1e-5 * expected.norm(), name
            seen += 1
    assert seen == len(oracle.gradients) > 0
    engine.zero_grad() if engine is model else engine.step()


def check_sampling(engine: Any, model: SharedBase, oracle: Oracle) -> None:
    """The window holds the very bytes; decoding in it, merged or not, and streamed, says what plain PEFT says."""
    with gathered(engine), inference(engine) as shared:
        for name, parameter in shared.named_parameters():
            if parameter.dtype == torch.uint8:
                assert torch.equal(parameter, oracle.bytes[name])
        for kind, keep in (("exact", True), ("exact", False), ("merged", True)):
            with decoding_weights(shared, "policy", kind, keep_matrices=keep):
                torch.testing.assert_close(logits(shared), oracle.logits, rtol=1e-4, atol=1e-4)
    with ExitStack() as stack:
        pace, shared = stack.enter_context(streamed(engine)), stack.enter_context(inference(engine))
        stack.enter_context(decoding_weights(shared, "policy", "exact"))
        with pace.forward_pass():
            said = logits(shared)
        torch.testing.assert_close(said, oracle.logits, rtol=1e-4, atol=1e-4)


def logits(shared: SharedBase) -> Tensor:
    with torch.no_grad():
        cache = DynamicCache(config=shared.causal_lm.config)
        return shared.next_token_logits(IDS, torch.ones_like(IDS), torch.arange(3).expand(2, 3), cache)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(hidden_size=128, intermediate_size=192, attention_bias=True).save_pretrained(folder / "base")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    stored: Any = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32, quantization_config=config)
    stored.save_pretrained(folder / "stored")
    return folder


@pytest.fixture(scope="module")
def found(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], list[dict[str, Any]]]:
    function = "tests.distributed.test_quantised_base:check_everything"
    return {
        (ranks, stage): run_worker(
            function,
            tmp_path_factory.mktemp(f"{ranks}_{stage}"),
            processes=ranks,
            stage=stage,
            base=str(folder / "base"),
            stored=str(folder / "stored"),
        )
        for ranks, stage in LAUNCHES
    }


def test_one_process_without_an_engine(folder: Path) -> None:
    """Where the same checks run as on ranks."""
    check_everything(ALONE, str(folder / "base"), str(folder / "stored"))


def test_a_base_is_the_same_everywhere_and_shared_by_ranks(folder: Path, found: dict[Any, Any]) -> None:
    """One fingerprint a kind, under all stages; a rank of two holds half the bytes, scales included, under ZeRO-3."""
    alone = {kind: roles_on(base_on(str(folder / "base"), ALONE, kind)) for kind in KINDS}
    prints = {kind: fingerprint_of(model) for kind, model in alone.items()}
    assert len({*prints.values(), fingerprint_of(roles_on(base_on(str(folder / "base"), ALONE, "none")))}) == 1 + len(
        KINDS
    )
    for (ranks, stage), results in found.items():
        for kind, model in alone.items():
            layers = [module for module in model.modules() if isinstance(module, QuantisedLinear)]
            weights = sum(layer.shape.numel() for layer in layers)
            share = ranks if stage == 3 else 1
            for result in results:
                assert result[kind]["fingerprint"] == prints[kind]
                assert 8 * result[kind]["bytes"] <= KINDS[kind] * weights / share + 8 * len(layers)


def test_an_adapter_loads_in_plain_peft_over_the_same_quantised_base(folder: Path, tmp_path: Path) -> None:
    shared = roles_on(base_on(str(folder / "base"), ALONE, "nf4")).eval()
    shared.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(base_on(str(folder / "base"), ALONE, "nf4"), str(tmp_path / "policy")).eval()
    with torch.no_grad():
        torch.testing.assert_close(logits(shared), plain(input_ids=IDS).logits[:, -1], rtol=1e-4, atol=1e-5)
