"""Every tensor that the operations inside a block make, forward and backward."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocation(NamedTuple):
    """The larger of what ``operation`` returned and what lies behind it."""

    elements: int
    operation: str


class Allocations(TorchDispatchMode):
    """What is new: results whose storage none of the operation's arguments has, by the size of the storage; and
    results that show more elements than that, by their own."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Allocation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                behind = 0 if storage.data_ptr() in given else storage.nbytes() // leaf.element_size()
                is_view_of_old = behind == 0 and leaf.numel() * leaf.element_size() <= storage.nbytes()
                self.seen.append(Allocation(0 if is_view_of_old else max(behind, leaf.numel()), str(func)))
        return result

    @property
    def largest(self) -> int:
        """Elements of the largest new tensor."""
        return max(self.seen).elements

    def above(self, elements: int) -> list[Allocation]:
        """Those with more than ``elements``."""
        return [allocation for allocation in self.seen if allocation.elements > elements]
