"""Frozen linear layers in 4 or 8 bits: one parameter of plain bytes a layer, made into a matrix wherever it is used.

    bytes    [scales, each the 4 bytes of an fp32 | numbers]
    nf4      64 weights in a row share a scale, 4 bits each (bitsandbytes; Dettmers et al. (2023), arXiv:2305.14314)
    int8     W = s_row q with whole q from -127 to 127 and s_row = max |W_row| / 127
    float8   W = s_row q with q in e4m3 and s_row = max |W_row| / 448

ZeRO-3 gathers such a layer in one piece and shards its scales with it: as a parameter of their own they would be below
the size from which it shards at all. Stored as bfloat16 the same bits would hold NaNs, which any cast changes, and a
float8 dtype cannot be sent by gloo.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from rlhf_toolkit.distributed.zero3 import element_count
from rlhf_toolkit.errors import ModelError, described


class Quantisation(StrEnum):
    """How the weights of linear layers are stored."""

    NONE = "none"
    NF4 = "nf4"
    INT8 = "int8"
    FLOAT8 = "float8"


PER_SCALE = 64  # weights that share a scale in NF4; twice as many save 2% and cost a tenth more error
LARGEST = {Quantisation.INT8: 127.0, Quantisation.FLOAT8: 448.0}
NUMBERS = {Quantisation.INT8: torch.int8, Quantisation.FLOAT8: torch.float8_e4m3fn}
ERROR = {Quantisation.NF4: 0.1, Quantisation.INT8: 0.01, Quantisation.FLOAT8: 0.03}
"""What quantising a random matrix changes at most, relative to its norm."""
Matrix = Callable[[Tensor, torch.dtype], Tensor]
"""From the stored weight of a layer to its matrix (out, in); a quantised one comes in the dtype that is asked for."""


class QuantisedLinear(nn.Linear):
    """y = x W^T + b with W in ``kind``. It *is* an nn.Linear, so PEFT adapts it.

    ``weight`` is the flat uint8 parameter, empty until bytes are put in; ``layer`` lends shape, bias, device and
    ``products``, the dtype in which the model multiplies.
    """

    def __init__(self, layer: nn.Linear | Conv1D, kind: Quantisation) -> None:
        nn.Module.__init__(self)
        self.kind, self.bias, self.products = kind, layer.bias, layer.weight.dtype
        rows, columns = layer.weight.shape
        self.out_features, self.in_features = (columns, rows) if isinstance(layer, Conv1D) else (rows, columns)
        self.turned = isinstance(layer, Conv1D)
        size = scale_bytes(self.shape, kind) + number_bytes(self.shape, kind)
        empty = torch.empty(size, dtype=torch.uint8, device=layer.weight.device)
        self.weight = nn.Parameter(empty, requires_grad=False)

    @property
    def shape(self) -> torch.Size:
        """(out, in) of the matrix."""
        return torch.Size((self.out_features, self.in_features))

    def stored(self, weight: Tensor) -> Tensor:
        """The bytes of ``weight``, oriented as the layer that this one stands for keeps it."""
        return quantised(weight.t().contiguous() if self.turned else weight.contiguous(), self.kind)

    def matrix(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """(out, in) in ``dtype`` from the whole parameter, in new memory."""
        return dequantised(stored, self.shape, self.kind, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Where roles are routed, ``role_slices`` takes its place, which keeps no matrix for backward."""
        return linear(x, self.matrix(self.weight, x.dtype), self.bias)

    def extra_repr(self) -> str:
        """What printing a model shows."""
        return f"{super().extra_repr()}, {self.kind}"


def matrix_of(layer: nn.Module) -> Matrix:
    """How the weight of a plain linear layer becomes its matrix; GPT-2 keeps it as (in, out)."""
    if isinstance(layer, QuantisedLinear):
        return layer.matrix
    return turned if isinstance(layer, Conv1D) else as_stored


def products_of(layer: Any) -> torch.dtype:
    """The dtype in which a plain linear layer multiplies."""
    return layer.products if isinstance(layer, QuantisedLinear) else layer.weight.dtype  # type: ignore[no-any-return]


def matrix_bytes(layer: Any) -> int:
    """What the matrix of a plain linear layer takes, whatever its weight takes and wherever that lies."""
    if isinstance(layer, QuantisedLinear):
        return layer.shape.numel() * layer.products.itemsize
    return element_count(layer.weight) * int(layer.weight.element_size())


class StoredBytes(NamedTuple):
    """What a base takes, over all ranks: its quantised layers as they are and as matrices, and all the rest."""

    layers: int
    quantised: int
    matrices: int
    rest: int

    def sentence(self, kind: str, dtype: str) -> str:
        """For the start of a run."""
        return (
            f"model.quantization {kind}: {self.layers} layers in {self.quantised / 2**30:.2f} GiB instead of "
            f"{self.matrices / 2**30:.2f}; {self.rest / 2**30:.2f} GiB of the base stay in {dtype}"
        )


def stored_bytes(base: nn.Module) -> StoredBytes:
    """Counted without looking at a number, so of shards as well."""
    layers = [layer for layer in base.modules() if isinstance(layer, QuantisedLinear)]
    parameters = [(p.dtype, element_count(p) * p.element_size()) for p in base.parameters()]
    few = sum(size for dtype, size in parameters if dtype == torch.uint8)
    rest = sum(size for dtype, size in parameters if dtype != torch.uint8)
    return StoredBytes(len(layers), few, sum(map(matrix_bytes, layers)), rest)


def weight_count(model: nn.Module) -> int:
    """The numbers that the parameters of ``model`` stand for, in however many bits."""
    layers = {layer.weight: layer for layer in model.modules() if isinstance(layer, QuantisedLinear)}
    return sum(layers[p].shape.numel() if p in layers else element_count(p) for p in model.parameters())


def as_stored(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix of a weight that is kept as (out, in)."""
    return weight


def turned(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """That of one that is kept as (in, out)."""
    return weight.t()


# ---- bytes -----------------------------------------------------------------------------------------------------------


def scale_bytes(shape: torch.Size, kind: Quantisation) -> int:
    """Bytes of the scales of a matrix (out, in)."""
    return 4 * (-(-shape.numel() // PER_SCALE) if kind == Quantisation.NF4 else shape[0])


def number_bytes(shape: torch.Size, kind: Quantisation) -> int:
    """Bytes of what the scales multiply."""
    return -(-shape.numel() // 2) if kind == Quantisation.NF4 else shape.numel()


def quantised(matrix: Tensor, kind: Quantisation) -> Tensor:
    """The bytes of ``matrix`` (out, in): a flat uint8 tensor, scales first, since as fp32 they have to be aligned."""
    if kind == Quantisation.NF4:
        functions = bitsandbytes_functions()
        numbers, state = functions.quantize_4bit(
            matrix, blocksize=PER_SCALE, quant_type="nf4", quant_storage=torch.uint8, compress_statistics=False
        )
        scales = state.absmax
    else:
        exact = matrix.float()
        scales = exact.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / LARGEST[kind]
        scaled = exact / scales[:, None]
        numbers = (scaled.round() if kind == Quantisation.INT8 else scaled).to(NUMBERS[kind])
    return torch.cat([scales.contiguous().view(torch.uint8), numbers.view(torch.uint8).flatten()])


def dequantised(stored: Tensor, shape: torch.Size, kind: Quantisation, dtype: torch.dtype) -> Tensor:
    """The matrix of ``shape`` (out, in) that ``quantised`` made ``stored`` of, in ``dtype``: products with the
    scales in fp32, rounded once."""
    end = scale_bytes(shape, kind)
    scales, numbers = stored.detach()[:end], stored.detach()[end:]
    if scales.storage_offset() % 4:  # a gather may have put the bytes anywhere
        scales = scales.clone()
    scales = scales.view(torch.float32)
    if kind == Quantisation.NF4:
        functions = bitsandbytes_functions()
        # In rows of one scale each: bitsandbytes' kernel for AVX-512 takes wrong ones where a row ends within its 64.
        count = shape.numel()
        rows = (count // PER_SCALE, PER_SCALE) if count % PER_SCALE == 0 else (1, count)
        state = functions.QuantState(scales, torch.Size(rows), None, PER_SCALE, "nf4", dtype)
        return functions.dequantize_4bit(numbers, state).view(shape)  # type: ignore[no-any-return]
    if kind == Quantisation.FLOAT8 and stored.device.type == "cpu":  # PyTorch's own conversion takes nine times as long
        numbers = _all_float8(dtype).index_select(0, numbers.int())
    else:
        numbers = numbers.view(NUMBERS[kind]).to(dtype)  # exact in any dtype of a base
    return numbers.view(shape).mul_(scales[:, None])


@cache
def _all_float8(dtype: torch.dtype) -> Tensor:
    """The 256 numbers of e4m3 in the order of their bytes."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(dtype)


def bitsandbytes_functions() -> Any:
    """bitsandbytes' functions: an optional extra, which ``require_kernels`` has looked for."""
    from bitsandbytes import functional

    return functional


def require_kernels(kind: Quantisation, device: torch.device) -> None:
    """Raise ModelError where bitsandbytes is missing, or this device cannot quantise to ``kind`` and back."""
    if kind == Quantisation.NF4 and find_spec("bitsandbytes") is None:
        raise ModelError(
            "model.quantization=nf4 needs bitsandbytes, which is not installed: pip install 'rlhf_toolkit[quantized]', "
            "or set model.quantization to int8, which needs nothing more"
        )
    sample = torch.linspace(-1, 1, 6 * PER_SCALE, device=device).view(4, -1)  # rows of one scale and a half
    try:
        again = dequantised(quantised(sample, kind), sample.shape, kind, torch.float32)
        wrong = float((again - sample).norm() / sample.norm())
    except Exception as error:  # a library of kernels raises whatever it likes
        raise ModelError(
            f"model.quantization={kind} does not run on this {device.type} ({described(error)}); set it to int8 or none"
        ) from error
    if not wrong <= 2 * ERROR[kind]:
        raise ModelError(
            f"model.quantization={kind} changes a test matrix by {wrong:.3g} of its norm on this {device.type}, where "
            f"at most {ERROR[kind]} is right: its kernels are broken; set it to int8 or none"
        )
