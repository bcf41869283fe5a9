"""A pretended GPU: tensors whose numbers lie on the CPU and that say they lie on a GPU, and what a GPU would do.

Under ``Rules`` an operator that mixes such tensors with those of the CPU raises ``MixedDevices``, but where CUDA allows
it; kernels that only a GPU has are computed by ``gpu_kernels``; and three things are counted: ``launches``, the kernels
that the CPU would launch; ``waits``, the times that it would wait for the GPU (a number read back, a blocking copy in
either direction, an operator whose result has a size of its own); and ``lines``, where in the package each came from.

What it cannot show: the time anything takes, memory, rounding of a GPU's kernels, and reads of memory that another
stream writes.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from tests.cuda_rules.gpu_kernels import KERNELS

NAME = "pretended"
PACKAGE = "/src/rlhf_toolkit/"
VIEWS = frozenset(
    {
        *("view", "_unsafe_view", "t", "transpose", "expand", "slice", "select", "unsqueeze", "squeeze", "permute"),
        *("detach", "alias", "as_strided", "split", "split_with_sizes", "unbind", "diagonal", "unfold", "lift_fresh"),
        *("_reshape_alias", "view_as_real", "view_as_complex", "is_same_size"),
    }
)
"""Operators that launch nothing: they only describe memory anew."""
READ_BACK = frozenset({"_local_scalar_dense", "equal"})
"""Operators that give the CPU a number."""
SIZE_UNKNOWN = frozenset({"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount"})
"""Operators whose result has a size that only the GPU knows: PyTorch waits for it."""
INDEXING = frozenset({"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"})


NO_NUMBERS = frozenset(
    {
        *("cat", "stack", "index_select", "gather", "scatter", "scatter_", "scatter_add", "scatter_add_", "take"),
        *(
            "index_add",
            "index_add_",
            "index_copy",
            "index_copy_",
            "embedding",
            "searchsorted",
            "isin",
            "masked_scatter",
        ),
    }
)
"""Operators that take not even a tensor without dimensions from the CPU."""


class MixedDevices(AssertionError):
    """An operator got tensors of the GPU together with some of the CPU."""


class GpuModule(_DummyBackendModule):
    """What ``torch.cuda`` is to a GPU, as far as autograd and checkpointing ask."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, *args: object) -> Tensor:
        return torch.zeros(8, dtype=torch.uint8)

    def set_rng_state(self, *args: object) -> None:
        pass

    def synchronize(self, *args: object) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        pass

    def empty_cache(self) -> None:
        pass


_setup_privateuseone_for_python_backend(NAME, backend_module=GpuModule())
torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=GPU) must come by here
GPU = torch.device(NAME, 0)
Module = TypeVar("Module", bound=nn.Module)


class OnGpu(Tensor):
    """A tensor that says it lies on the GPU; ``numbers`` are its own, on the CPU."""

    numbers: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, numbers: Tensor) -> OnGpu:
        made = Tensor._make_wrapper_subclass(
            cls,
            numbers.size(),
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=GPU,
        )
        made.numbers = numbers
        return made

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    def tolist(self) -> Any:
        """PyTorch's own reads memory, past every operator."""
        return self.cpu().tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        """Whose address tells what shares memory with what."""
        return self.numbers.untyped_storage()

    def storage(self) -> Any:
        """The same, as safetensors asks for it."""
        return self.numbers.storage()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A checkpoint holds the numbers."""
        return self.numbers.__reduce_ex__(protocol)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnGpu({self.numbers})"

    @classmethod
    def __torch_dispatch__(cls, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise AssertionError(f"{func} ran on the pretended GPU outside of Rules")


class Operator(NamedTuple):
    """What is to be known of an operator: which arguments it writes to, and whether it is made of others, for which
    CUDA has no kernel of its own."""

    function: OpOverload
    name: str
    composite: bool
    written: tuple[int, ...]

    def run(self, args: Any, kwargs: Any) -> Any:
        """The result for the tensors' numbers."""

        def plain(value: Any) -> Any:
            if isinstance(value, OnGpu):
                return value.numbers
            return torch.device("cpu") if isinstance(value, torch.device) else value

        kernel = KERNELS.get(str(self.function), self.function)
        return kernel(*mapped(plain, args), **mapped(plain, kwargs))


@cache
def known(function: OpOverload) -> Operator:
    """``function`` as an ``Operator``."""
    written = (
        i for i, a in enumerate(function._schema.arguments) if a.alias_info is not None and a.alias_info.is_write
    )
    composite = function.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    name = function._schema.name.split("::")[1]
    return Operator(function, name, composite and str(function) not in KERNELS, tuple(written))


class Rules(TorchDispatchMode):
    """Runs operators as a GPU would. ``traced`` also counts by line of the package, which takes a while."""

    def __init__(self, *, traced: bool = False) -> None:
        super().__init__()
        self.launches, self.waits, self.traced = 0, Counter[str](), traced
        self.lines: Counter[str] = Counter()

    def forget(self) -> None:
        """Begin to count anew."""
        self.launches = 0
        self.waits.clear()
        self.lines.clear()

    def table(self) -> str:
        """What was counted, by line, the most first."""
        lines = [f"{count:5} {line}" for line, count in self.lines.most_common()]
        return "\n".join([f"{self.launches} launches, waits {dict(self.waits)}", *lines])

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        flat = leaves((args, kwargs))
        here = [each for each in flat if isinstance(each, OnGpu)]
        if not here and not any(isinstance(each, torch.device) and each.type == NAME for each in flat):
            return func(*args, **kwargs)
        operator = known(func)
        if operator.composite:
            with self:
                return func.decompose(*args, **kwargs)
        if operator.name in ("_to_copy", "copy_"):
            return self._copied(operator, args, kwargs)
        self._refuse_mixture(operator, args, here, [each for each in flat if _on_cpu(each)])
        self._count(operator.name, args)
        return _wrapped(operator, args, kwargs, operator.run(args, kwargs))

    def _copied(self, operator: Operator, args: Any, kwargs: Any) -> Any:
        """Copies, the only way from one device to the other."""
        name = operator.name
        if name == "copy_":
            there, source = args[0], args[1]
            goes_to_gpu, comes_from_gpu = isinstance(there, OnGpu), isinstance(source, OnGpu)
            waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        else:
            comes_from_gpu, device = isinstance(args[0], OnGpu), kwargs.get("device")
            goes_to_gpu = comes_from_gpu if device is None else device.type == NAME
            waits = not kwargs.get("non_blocking", False)
        if goes_to_gpu and comes_from_gpu:
            self._count(name, ())
        elif waits or comes_from_gpu:
            self._wait("copy to the GPU" if goes_to_gpu else "copy to the CPU")
        result = operator.run(args, kwargs)
        if name == "copy_":
            return args[0]
        return OnGpu(result) if goes_to_gpu else result

    def _refuse_mixture(self, operator: Operator, args: Any, here: list[OnGpu], there: list[Tensor]) -> None:
        """CUDA allows numbers (tensors without dimensions) of the CPU among the operands of a kernel of the GPU, and
        indices of the CPU for a tensor of the GPU, which it copies."""
        if not here:
            return
        strangers = [each for each in there if each.dim() > 0 or operator.name in NO_NUMBERS]
        if operator.name in INDEXING and isinstance(args[0], OnGpu):
            indices = [each for each in args[1] if isinstance(each, Tensor)]
            strangers = [each for each in strangers if not any(each is index for index in indices)]
        strangers += [args[i] for i in operator.written if i < len(args) and _on_cpu(args[i]) and args[i].dim() == 0]
        if strangers:
            shapes = [tuple(each.shape) for each in strangers], [tuple(each.shape) for each in here]
            raise MixedDevices(
                f"{operator.function}: CPU tensors of shapes {shapes[0]} with GPU tensors of shapes {shapes[1]}"
            )

    def _count(self, name: str, args: Any) -> None:
        if name in READ_BACK or name in SIZE_UNKNOWN or (name == "repeat_interleave" and len(args) == 1):
            self._wait(name)
        if name in INDEXING:
            for index in (each for each in args[1] if isinstance(each, Tensor)):
                if index.dtype in (torch.bool, torch.uint8):
                    self._wait("index of booleans")
                elif not isinstance(index, OnGpu):
                    self._wait("index from the CPU")
        if name not in VIEWS and name not in READ_BACK:
            self.launches += 1
            self._trace(name)

    def _wait(self, why: str) -> None:
        self.waits[why] += 1
        self._trace(f"waits: {why}")

    def _trace(self, what: str) -> None:
        if self.traced:
            self.lines[f"{_line()} {what}"] += 1


def to_gpu(module: Module) -> Module:
    """``module`` with parameters and buffers on the pretended GPU. The parameters are other ones than before."""
    with Rules():
        return module.to(GPU)


def numbers(tensor: Tensor) -> Tensor:
    """The numbers of a tensor, wherever it lies, without a copy and without being counted."""
    return tensor.numbers if isinstance(tensor, OnGpu) else tensor


def leaves(value: Any) -> list[Any]:
    """What lists, tuples and dictionaries hold in the end; PyTorch's own way takes most of the time of a run here."""
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for each in value for leaf in leaves(each)] if isinstance(value, list | tuple) else [value]


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """The same lists, tuples and dictionaries of ``function(leaf)``."""
    if isinstance(value, dict):
        return {name: mapped(function, each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([mapped(function, each) for each in value])
    return function(value)


def _on_cpu(value: object) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, OnGpu)


def _wrapped(operator: Operator, args: Any, kwargs: Any, result: Any) -> Any:
    """The result on the GPU; what was written in place is the tensor that was given."""
    if operator.name in READ_BACK:
        return result
    given = [args[i] for i in operator.written if i < len(args)] + [kwargs[name] for name in ("out",) if name in kwargs]
    own = {id(each.numbers): each for each in leaves(given) if isinstance(each, OnGpu)}

    def on_gpu(value: Any) -> Any:
        if not _on_cpu(value):
            return value
        if id(value) in own:
            return own[id(value)]
        if value.is_inference() == torch.is_inference_mode_enabled():
            return OnGpu(value)
        with torch.inference_mode(value.is_inference()):  # there, too, a view of a normal tensor is a normal one
            return OnGpu(value)

    return mapped(on_gpu, result)


def _line() -> str:
    """The innermost line of the package that is being run, and the one of transformers beneath it."""
    frame, beneath = sys._getframe(3), ""
    while frame is not None:
        path = frame.f_code.co_filename
        if PACKAGE in path:
            return f"{path.split(PACKAGE)[1]}:{frame.f_lineno}{beneath}"
        if "/transformers/" in path and not beneath:
            beneath = f" ({path.rsplit('/', 1)[1]}:{frame.f_lineno})"
        frame = frame.f_back  # type: ignore[assignment]
    return beneath
