"""Linear layers in 4 and 8 bits: their bytes by the formats' definitions, what backward keeps, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from rlhf_toolkit.errors import ModelError
from rlhf_toolkit.models import quantised as module
from rlhf_toolkit.models.loading import load_base, load_model_config
from rlhf_toolkit.models.quantised import (
    ERROR,
    Quantisation,
    QuantisedLinear,
    dequantised,
    quantised,
    require_kernels,
    stored_bytes,
    weight_count,
)
from rlhf_toolkit.models.quantised_loading import QuantisedLoading, Quantiser
from tests.distributed.test_quantised_base import ALONE, base_on, dense, roles_on
from tests.models.test_architectures import WORKS
from tests.support.roles import packed_rows, sequences_and_mask
from tests.support.tiny import tiny_llama

NF4, INT8, FLOAT8 = Quantisation.NF4, Quantisation.INT8, Quantisation.FLOAT8
KINDS = (NF4, INT8, FLOAT8)
LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""NF4's numbers, from the appendix of Dettmers et al. (2023)."""
SHAPES = ((32, 192), (7, 9), (1, 64), (3, 65), (64, 96), (50, 80), (20, 48))
"""With rows that end within a scale's 64 weights, and of them such as a kernel takes sixteen at a time."""


def written_out(stored: Tensor, shape: tuple[int, int], kind: Quantisation) -> Tensor:
    """The matrix of ``stored`` by the definition of its format, number by number."""
    rows, columns = shape
    count = rows * columns
    scales = -(-count // 64) if kind == NF4 else rows
    s, numbers = stored[: 4 * scales].clone().view(torch.float32), stored[4 * scales :].tolist()
    if kind == NF4:
        codes = [code for byte in numbers for code in (byte >> 4, byte & 15)][:count]
        return torch.tensor([LEVELS[code] * float(s[i // 64]) for i, code in enumerate(codes)]).view(shape)
    plain = [byte - 256 * (byte > 127) for byte in numbers] if kind == INT8 else [e4m3(byte) for byte in numbers]
    return torch.tensor([number * float(s[i // columns]) for i, number in enumerate(plain)]).view(shape)


def e4m3(byte: int) -> float:
    exponent, mantissa = byte >> 3 & 15, byte & 7
    size = 2.0 ** (exponent - 7) * (1 + mantissa / 8) if exponent else 2.0**-6 * mantissa / 8
    return -size if byte > 127 else size


def test_bytes_are_those_of_the_format_and_near_the_matrix() -> None:
    for kind in KINDS:
        for shape in SHAPES:
            matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            matrix[-1, -1] = 0
            stored = quantised(matrix, kind)
            found = dequantised(stored, torch.Size(shape), kind, torch.float32)
            torch.testing.assert_close(found, written_out(stored, shape, kind), rtol=1e-6, atol=1e-7)
            assert (found - matrix).norm() < 1.2 * ERROR[kind] * matrix.norm(), (kind, shape)
            half = dequantised(stored, torch.Size(shape), kind, torch.bfloat16)
            assert torch.equal(half, found.bfloat16()), (kind, "is rounded once")
            elsewhere = torch.cat([stored.new_zeros(1), stored])[1:]  # bytes that a gather has put anywhere
            assert torch.equal(dequantised(elsewhere, torch.Size(shape), kind, torch.float32), found)


def test_a_row_of_zeros_stays_one() -> None:
    for kind in KINDS:
        stored = quantised(torch.zeros(2, 64), kind)
        assert torch.equal(dequantised(stored, torch.Size((2, 64)), kind, torch.float32), torch.zeros(2, 64))


def test_a_conv1d_is_quantised_as_the_matrix_it_is_used_as() -> None:
    plain = Conv1D(128, 64)
    layer = QuantisedLinear(plain, INT8)
    assert layer.shape == (128, 64)
    layer.weight.data = layer.stored(plain.weight.detach())
    torch.testing.assert_close(layer.matrix(layer.weight, torch.float32), plain.weight.t(), atol=2e-3, rtol=0.02)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(hidden_size=128, intermediate_size=192).save_pretrained(folder)
    return str(folder)


def test_weights_are_counted_whatever_their_bits(folder: str) -> None:
    plain, few = (base_on(folder, ALONE, kind) for kind in ("none", "nf4"))
    assert weight_count(few) == weight_count(plain) == sum(p.numel() for p in plain.parameters())
    stored = stored_bytes(few)
    assert stored.layers == 14 and stored.quantised + stored.rest == sum(p.nbytes for p in few.parameters())
    assert stored.matrices + stored.rest == sum(p.nbytes for p in plain.parameters())


def test_backward_keeps_bytes_and_no_matrix(folder: str) -> None:
    """Of layers with an adapter and without; a base of ordinary matrices shows that the hook sees them."""
    layout = packed_rows(*sequences_and_mask([3, 2], [4, 5]))
    for kind, base in (("nf4", base_on(folder, ALONE, "nf4")), ("dense", dense(base_on(folder, ALONE, "nf4")))):
        shared, kept = roles_on(base), list[Tensor]()
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: (kept.append(t), t)[1], lambda t: t):  # type: ignore[misc]
            shared(layout, roles=("policy", "value", "reference"))
        matrices = {(128, 128), (64, 128), (192, 128), (128, 192)}
        assert {t.shape for t in kept if tuple(t.shape) in matrices} == (
            set() if kind == "nf4" else {torch.Size(shape) for shape in matrices}
        )


def test_the_base_is_never_whole_while_it_is_loaded(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever a tensor comes, no matrix of a quantised layer lies in the model."""
    own, most = Quantiser.placed, 0

    def placed(self: Quantiser, model: Any, name: str, tensor: Tensor) -> nn.Parameter | None:
        nonlocal most
        floats = [p for n, p in model.named_parameters() if p.dtype != torch.uint8 and p.device.type != "meta"]
        most = max(most, sum(p.numel() for p in floats))
        return own(self, model, name, tensor)

    monkeypatch.setattr(Quantiser, "placed", placed)
    base = base_on(folder, ALONE, "int8")
    others = sum(p.numel() for p in base.parameters() if p.dtype != torch.uint8)
    assert 0 < most <= others


def test_nf4_is_what_bitsandbytes_makes_of_a_model(folder: str) -> None:
    """So an adapter trained here is loaded over the very same weights elsewhere."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)
    ours, ids = base_on(folder, ALONE, "nf4"), torch.tensor([[3, 4, 5]])
    for name, layer in ours.named_modules():
        if isinstance(layer, QuantisedLinear):
            weight = theirs.get_submodule(name).weight
            right = bitsandbytes.functional.dequantize_4bit(weight, weight.quant_state)
            assert torch.equal(layer.matrix(layer.weight, torch.float32), right), name
    # With autograd on, since without it a kernel of theirs for CPUs multiplies in bfloat16.
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)


ODD = ("gpt2", "falcon, rotary", "qwen2_moe", "mixtral", "gemma3 with vision", "llama tied", "opt, projected")


def test_layers_whose_weight_the_model_reads_itself_stay_matrices(tmp_path: Path) -> None:
    """Bytes would be taken for numbers there: what each model says is near what it says in full precision."""
    ids = torch.randint(3, 30, (2, 9), generator=torch.Generator().manual_seed(0))
    for name, stays in (("jamba", "dt_proj"), ("mamba", "x_proj"), ("gemma3n, shared keys", "correction_coefs")):
        case, folder = WORKS[name], str(tmp_path / name.replace(" ", "_"))
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(CONFIG_MAPPING[case.model_type](**case.sizes)).save_pretrained(folder)
        config, attention = load_model_config(folder), case.attention
        plain, found = (
            load_base(folder, config, ALONE, dtype=torch.float32, attention=attention, quantization=kind)
            for kind in ("none", "int8")
        )
        kept = [layer for n, layer in found.named_modules() if n.endswith(stays)]
        assert kept and not any(isinstance(layer, QuantisedLinear) for layer in kept), name
        for training in (False, True):
            with torch.no_grad():
                right, said = (model.train(training)(ids, use_cache=False).logits for model in (plain, found))
            assert (said - right).norm() < 0.05 * right.norm(), (name, training)


def test_every_plain_layer_of_the_decoder_is_quantised_and_nothing_else_changes(tmp_path: Path) -> None:
    """Transposed layers, words of their own for a product, experts, a gate that is a linear layer, a tower, ties."""
    for name in ODD:
        case, folder = WORKS[name], str(tmp_path / name.replace(" ", "_"))
        torch.manual_seed(0)
        config: Any = CONFIG_MAPPING[case.model_type](**case.sizes)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        plain, found = (
            load_base(
                folder, load_model_config(folder), ALONE, dtype=torch.float32, attention="sdpa", quantization=kind
            )
            for kind in ("none", "int8")
        )
        before = dict(plain.named_parameters())
        layers = {n for n, layer in found.named_modules() if isinstance(layer, QuantisedLinear)}
        assert len(layers) >= 8, name
        for n, parameter in found.named_parameters():
            if n.removesuffix(".weight") in layers:
                layer: Any = found.get_submodule(n.removesuffix(".weight"))
                right = before[n].t() if layer.turned else before[n]
                assert (layer.matrix(parameter, torch.float32) - right).norm() < ERROR[INT8] * right.norm(), (name, n)
            else:
                assert torch.equal(parameter, before[n]), (name, n)
        left = [n for n, layer in found.named_modules() if type(layer) in (nn.Linear, Conv1D)]
        assert all(
            n == "lm_head" or "vision" in n or n.endswith("shared_expert_gate") or "router" in n for n in left
        ), (name, left)


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_without_bitsandbytes_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"needs bitsandbytes.*rlhf_toolkit\[quantized\].*int8"):
        require_kernels(NF4, torch.device("cpu"))
    require_kernels(INT8, torch.device("cpu"))


def test_a_device_without_the_kernel_or_with_a_broken_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(matrix: Tensor, kind: Quantisation) -> Tensor:
        raise NotImplementedError("no kernel\nfor this card")

    monkeypatch.setattr(module, "quantised", none)
    with pytest.raises(ModelError, match=r"nf4 does not run on this cpu \(.*no kernel.*int8 or none") as caught:
        require_kernels(NF4, torch.device("cpu"))
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(module, "quantised", lambda matrix, kind: quantised(2 * matrix, kind))
    with pytest.raises(ModelError, match=r"changes a test matrix by .* its kernels are broken"):
        require_kernels(INT8, torch.device("cpu"))


def test_a_stored_matrix_of_another_shape_or_none_at_all(tmp_path: Path) -> None:
    for name, changes in {"missing": None, "narrow": torch.zeros(128, 100)}.items():
        model = tiny_llama(hidden_size=128, intermediate_size=192)
        weights = model.state_dict()
        odd = "model.layers.1.mlp.down_proj.weight"
        if changes is None:
            del weights[odd]
        else:
            weights[odd] = changes
        model.save_pretrained(tmp_path / name, state_dict=weights)
        with pytest.raises(ModelError, match="down_proj") as caught:
            base_on(str(tmp_path / name), ALONE, "int8")
        assert "\n" not in str(caught.value)


def test_what_waits_for_a_weight_has_the_dtype_that_is_read(folder: str) -> None:
    """transformers before 5.23 casts what it reads to what it finds there: as bytes every weight would be cut."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_model_config(folder))
    quantiser = Quantiser(QuantisedLoading(INT8, torch.device("cpu"), None))
    quantiser.update_dtype(torch.bfloat16)
    quantiser._process_model_before_weight_loading(model)
    waiting = [layer.weight.dtype for layer in model.modules() if isinstance(layer, QuantisedLinear)]
    assert waiting == [torch.bfloat16] * 14


# ---- what lies in 4 bits already -------------------------------------------------------------------------------------


def save_by_bitsandbytes(folder: str, place: Path, **settings: Any) -> dict[str, Tensor]:
    """Write the model to ``place`` in 4 bits, and return its matrices by the library's own reckoning."""
    config = BitsAndBytesConfig(load_in_4bit=True, **{"bnb_4bit_quant_type": "nf4", **settings})
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)
    layers = {name: layer.weight for name, layer in model.named_modules() if type(layer).__name__ == "Linear4bit"}
    found = {
        name: bitsandbytes.functional.dequantize_4bit(weight, weight.quant_state) for name, weight in layers.items()
    }
    model.save_pretrained(place)
    return found


def test_a_model_that_is_stored_in_nf4_is_loaded_as_it_is(folder: str, tmp_path: Path) -> None:
    """With single and double quantisation, whatever dtype its bytes are said to have, and layers that it left whole."""
    ways: dict[str, dict[str, Any]] = {
        "plain": {},
        "double": {"bnb_4bit_use_double_quant": True},
        "bfloat16": {"bnb_4bit_quant_storage": torch.bfloat16},
        "but": {"llm_int8_skip_modules": ["lm_head", "down_proj"]},
    }
    for name, settings in ways.items():
        matrices = save_by_bitsandbytes(folder, tmp_path / name, **settings)
        base = base_on(str(tmp_path / name), ALONE, "nf4")
        ours = {n: layer for n, layer in base.named_modules() if isinstance(layer, QuantisedLinear)}
        assert ours.keys() == matrices.keys() and len(ours) == (12 if name == "but" else 14)
        for n, layer in ours.items():
            assert torch.equal(layer.matrix(layer.weight, torch.float32), matrices[n].float()), (name, n)
        plain, left = base_on(folder, ALONE, "none"), 0
        for n, parameter in base.named_parameters():
            if parameter.dtype != torch.uint8:
                assert torch.equal(parameter, plain.get_parameter(n)), (name, n)
                left += 1
        assert left >= 6


def test_what_is_stored_in_other_bits_is_refused_by_name(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_by_bitsandbytes(folder, tmp_path / "nf4")
    save_by_bitsandbytes(folder, tmp_path / "fp4", bnb_4bit_quant_type="fp4")
    save_by_bitsandbytes(folder, tmp_path / "spoiled")
    weights = load_file(tmp_path / "spoiled/model.safetensors")
    state = next(name for name in weights if "quant_state" in name)
    save_file({**weights, state: weights[state][:-9].clone()}, tmp_path / "spoiled/model.safetensors", {"format": "pt"})
    for place, kind, words in (
        (
            "nf4",
            "none",
            r"quantised already \(quant_method='bitsandbytes', nf4\).* is none; set model.quantization to nf4",
        ),
        ("nf4", "int8", "set model.quantization to nf4, as it is stored"),
        ("fp4", "nf4", "give the model it was made from"),
        ("spoiled", "nf4", "first model.layers.0.mlp.down_proj.weight: its quant_state cannot be read .*fetch"),
    ):
        with pytest.raises(ModelError, match=words) as caught:
            base_on(str(tmp_path / place), ALONE, kind)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(transformers, "__version__", "5.20.1")
    with pytest.raises(
        ModelError, match=r"stored in nf4, which is read with transformers 5.21 or newer, not with 5.20.1"
    ):
        base_on(str(tmp_path / "nf4"), ALONE, "nf4")
