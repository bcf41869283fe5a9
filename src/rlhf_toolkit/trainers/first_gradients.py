"""Whether the first update reaches all that is trained: a tensor that no loss depends on would stay as it is for ever,
and nothing else would say so."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from rlhf_toolkit.distributed.collectives import all_gather
from rlhf_toolkit.errors import ModelError
from rlhf_toolkit.models.shared_base import SharedBase
from rlhf_toolkit.models.targets import ROUTED_EXPERT
from rlhf_toolkit.models.whole_model import WholeModel


class FirstGradients:
    """Watches which trained tensors a gradient comes to in the first update that this process makes.

    What counts is that a backward pass comes to a tensor, in any micro-batch of any rank, and not what it brings. So a
    gradient of zeros counts: that of LoRA's A while B is zero, of a policy during value warm-up, of the bias of a
    reward head, which cancels out. A layer that is never called, or whose weight is read past its adapter, gets
    none.
    """

    def __init__(self) -> None:
        self._missing = dict[str, None]()
        self._hooks = list[RemovableHandle]()
        self._finished = False

    def watch(self, model: SharedBase | WholeModel) -> None:
        """Begin with ``model``'s trained tensors, before the first backward pass; later, and while an update is made
        again, nothing happens."""
        if self._finished or self._hooks:
            return
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self._missing[name] = None
                self._hooks.append(parameter.register_hook(partial(self._note, name)))

    def _note(self, name: str, gradient: Tensor) -> None:
        self._missing.pop(name, None)

    def check(self) -> None:
        """After the first update's last backward pass and before its step: raise ModelError, on all ranks, where a
        tensor has had no gradient on any of them. Single experts of a model that trains as a whole are let off: none of
        the tokens may be theirs. A collective the first time; later nothing happens."""
        if self._finished:
            return
        for hook in self._hooks:
            hook.remove()
        self._finished = True
        everyone = [set(names) for names in all_gather(list(self._missing))]
        missing = [name for name in self._missing if all(name in names for names in everyone)]
        missing = [name for name in missing if not ROUTED_EXPERT.search(name)]
        if missing:
            raise ModelError(said(missing))


def said(missing: Sequence[str]) -> str:
    """What is wrong where the trained tensors ``missing`` have had no gradient, and the way out."""
    tensor = missing[0].removeprefix("base_model.model.").removeprefix("causal_lm.")
    layer, _, of_adapter = tensor.partition(".lora_")
    way_out = f"set model.exclude_modules: [{layer.rpartition('.')[2]}]" if of_adapter else "train an adapter instead"
    return (
        f"{tensor} has had no gradient in the first update, one of {len(missing)} such tensors: the model does not "
        f"call {layer.removesuffix('.weight')}, or reads its weight itself, so that it would never learn; {way_out}"
    )
