"""A key-value cache of slots: sequences of any age side by side in one buffer of fixed size.

All slots end in the same column, so that a step writes one column for everybody and left-padded masks, which every
model of transformers understands, say what belongs to whom:

    column      0 ........ first ............. now ..... capacity
    slot 0              [ prompt | response so far ]
    slot 1                      [ prompt | so far  ]          entered later
    slot 2                                                     free

A new sequence is prefilled on its own and copied in so that it ends at ``now`` and occupies no more columns than it has
tokens. When the columns run out, everything moves left by the columns that no living slot needs any more; when a
sequence enters that is longer than the columns before ``now``, everything moves right until it fits.

A recurrence or a convolution has no columns: its states stand side by side, one for each slot.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from rlhf_toolkit.errors import ModelError
from rlhf_toolkit.models.renamed import CACHELESS, INDEXED

STATES = ("conv_states", "recurrent_states")
"""What a layer without columns may keep, each a dictionary of tensors (rows, ...) or None by their number."""


class Columns:
    """Which columns of the buffer are in use: ``first`` up to ``now``, which the next step writes."""

    def __init__(self, first: int, now: int, capacity: int) -> None:
        self.first, self.now, self.capacity = first, now, capacity


class SlotLayer(CacheLayerMixin):
    """Keys and values (slots, heads, capacity, D) of one attention layer.

    A layer with a sliding window keeps the whole history too; its mask hides what is out of the window.
    """

    is_sliding = False
    keys: Any
    values: Any

    def __init__(self, slots: int, columns: Columns, *, is_sliding: bool) -> None:
        super().__init__()
        self.slots, self.columns, self.is_sliding = slots, columns, is_sliding

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate the buffers in the shape and dtype of the first states seen."""
        self.keys, self.values = (
            states.new_zeros(self.slots, states.shape[1], self.columns.capacity, states.shape[-1])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the states (slots, heads, 1, D) of one step to column ``now`` and return all columns in use."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        first, now = self.columns.first, self.columns.now
        self.keys[:, :, now : now + 1] = key_states
        self.values[:, :, now : now + 1] = value_states
        return self.keys[:, :, first : now + 1], self.values[:, :, first : now + 1]

    def admit(self, layer: CacheLayerMixin, rows: torch.Tensor, slots: torch.Tensor) -> None:
        """Copy ``rows`` of a prefilled layer to ``slots``, so that they end at column ``now``."""
        if not layer.is_initialized or layer.keys is None or layer.values is None:
            return
        if not self.is_initialized:
            self.lazy_initialization(layer.keys, layer.values)
        start = self.columns.now - layer.keys.shape[2]
        self.keys[slots, :, start : self.columns.now] = layer.keys[rows]
        self.values[slots, :, start : self.columns.now] = layer.values[rows]

    def shift(self, by: int) -> None:
        """Move the columns in use ``by`` to the right, or to the left where ``by`` is negative."""
        if self.is_initialized:
            for buffer in (self.keys, self.values):
                first, now = self.columns.first, self.columns.now
                buffer[:, :, first + by : now + by] = buffer[:, :, first:now].clone()

    def keep(self, slots: torch.Tensor) -> None:
        """Keep only ``slots``, in the order given."""
        self.slots = len(slots)
        if self.is_initialized:
            self.keys, self.values = self.keys[slots], self.values[slots]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that ``update`` returns, and the first one's number as the mask counts them."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Columns in use before the step under way."""
        return self.columns.now - self.columns.first

    def get_max_length(self) -> int:
        """No maximum that a model should know of."""
        return -1


class IndexedSlotLayer(SlotLayer):
    """Keys and values, and ``indexer_keys`` (slots, capacity, D) by which sparse attention finds what it attends to."""

    indexer_keys: torch.Tensor | None = None

    def update_indexer(self, indexer_key_states: torch.Tensor) -> torch.Tensor:
        """Write the indexer's keys (slots, 1, D) of one step to column ``now`` and return all columns in use: called
        before or after ``update``, within the same step."""
        held = self._indexer_columns(indexer_key_states)
        held[:, self.columns.now] = indexer_key_states[:, 0]
        return held[:, self.columns.first : self.columns.now + 1]

    def _indexer_columns(self, like: torch.Tensor) -> torch.Tensor:
        if self.indexer_keys is None:
            self.indexer_keys = like.new_zeros(self.slots, self.columns.capacity, like.shape[-1])
        return self.indexer_keys

    def admit(self, layer: Any, rows: torch.Tensor, slots: torch.Tensor) -> None:
        """Copy ``rows`` of a prefilled layer to ``slots``, so that they end at column ``now``."""
        super().admit(layer, rows, slots)
        if layer.indexer_keys is not None:
            now = self.columns.now
            self._indexer_columns(layer.indexer_keys)[slots, now - layer.indexer_keys.shape[1] : now] = (
                layer.indexer_keys[rows]
            )

    def shift(self, by: int) -> None:
        """Move the columns in use ``by`` to the right, or to the left where ``by`` is negative."""
        super().shift(by)
        if self.indexer_keys is not None:
            first, now = self.columns.first, self.columns.now
            self.indexer_keys[:, first + by : now + by] = self.indexer_keys[:, first:now].clone()

    def keep(self, slots: torch.Tensor) -> None:
        """Keep only ``slots``, in the order given."""
        super().keep(slots)
        if self.indexer_keys is not None:
            self.indexer_keys = self.indexer_keys[slots]


class StateLayer(LinearAttentionLayer):
    """States (slots, ...) of one layer that keeps no keys: of a convolution, of a recurrence, or of both."""

    def __init__(self, slots: int, number_of_states: int) -> None:
        super().__init__(number_of_states=number_of_states)
        self.slots = slots

    def admit(self, layer: LinearAttentionLayer, rows: torch.Tensor, slots: torch.Tensor) -> None:
        """Copy the states of ``rows`` of a prefilled layer to ``slots``."""
        for kind, index, state in states_of(layer):
            held = getattr(self, kind)
            if held[index] is None:
                empty: dict[str, Any] = {kind: state.new_zeros(self.slots, *state.shape[1:])}
                LinearAttentionLayer.lazy_initialization(self, **empty, state_idx=index)
                self.has_previous_state[index] = True
            held[index][slots] = state[rows]

    def keep(self, slots: torch.Tensor) -> None:
        """Keep only ``slots``, in the order given."""
        self.slots = len(slots)
        for kind, index, state in states_of(self):
            getattr(self, kind)[index] = state[slots]


class StateAndSlotLayer(StateLayer, SlotLayer):  # type: ignore[override]
    """A layer with attention and a recurrence side by side: keys and values in columns, and states."""

    def __init__(self, slots: int, columns: Columns, number_of_states: int, *, is_sliding: bool) -> None:
        SlotLayer.__init__(self, slots, columns, is_sliding=is_sliding)
        StateLayer.__init__(self, slots, number_of_states)

    def lazy_initialization(self, *keys_and_values: Any, **states: Any) -> None:
        """Allocate keys and values, given in their order, or a state, given by name: the two kinds of layer share this
        method."""
        (SlotLayer if keys_and_values else LinearAttentionLayer).lazy_initialization(self, *keys_and_values, **states)

    def admit(self, layer: Any, rows: torch.Tensor, slots: torch.Tensor) -> None:
        """Copy ``rows`` of a prefilled layer to ``slots``, so that their columns end at ``now``."""
        StateLayer.admit(self, layer, rows, slots)
        SlotLayer.admit(self, layer, rows, slots)

    def keep(self, slots: torch.Tensor) -> None:
        """Keep only ``slots``, in the order given."""
        StateLayer.keep(self, slots)
        SlotLayer.keep(self, slots)


def states_of(layer: object) -> Iterator[tuple[str, int, torch.Tensor]]:
    """The states that ``layer`` holds, each with its kind and its number."""
    for kind in STATES if isinstance(layer, LinearAttentionLayer) else ():
        for index, state in list(getattr(layer, kind).items()):
            if state is not None:
                yield kind, index, state


def slot_layer(layer: object, slots: int, columns: Columns) -> Any:
    """The layer of a ``SlotCache`` for one of transformers' ``layer``; ModelError where there is none of its kind."""
    bases = type(layer).__bases__
    if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
        return SlotLayer(slots, columns, is_sliding=isinstance(layer, DynamicSlidingWindowLayer))
    if type(layer) in INDEXED:
        return IndexedSlotLayer(slots, columns, is_sliding=False)
    if type(layer) is LinearAttentionLayer:
        return StateLayer(slots, layer.number_of_states)
    if isinstance(layer, LinearAttentionLayer) and bases[1:] in ((DynamicLayer,), (DynamicSlidingWindowLayer,)):
        is_sliding = isinstance(layer, DynamicSlidingWindowLayer)
        return StateAndSlotLayer(slots, columns, layer.number_of_states, is_sliding=is_sliding)
    if isinstance(layer, CACHELESS):
        return layer
    raise ModelError(
        f"decoding in slots does not know cache layers of kind {type(layer).__name__}; use a model of full, "
        "sliding-window, short-convolution or recurrent layers"
    )


class SlotCache(Cache):
    """The cache of ``slots`` sequences, each shorter than ``capacity`` columns.

    ``mask`` (slots, capacity) is 1 where a column belongs to the slot's sequence; ``starts`` (slots,) is the first
    such column. Raises ModelError for a model that keeps another kind of state.
    """

    def __init__(self, config: PretrainedConfig, *, slots: int, capacity: int, device: torch.device) -> None:
        self.columns = Columns(0, 0, capacity)
        super().__init__(
            layers=[slot_layer(layer, slots, self.columns) for layer in DynamicCache(config=config).layers]
        )
        self.mask = torch.zeros(slots, capacity, dtype=torch.long, device=device)
        self.starts = [0] * slots

    @property
    def step_mask(self) -> torch.Tensor | None:
        """(slots, columns in use + 1) for the step that writes column ``now``, which belongs to every slot. None where
        no layer keeps columns: Mamba would take each for a token."""
        if not any(isinstance(layer, SlotLayer) for layer in self.layers):
            return None
        self.mask[:, self.columns.now] = 1
        return self.mask[:, self.columns.first : self.columns.now + 1]

    def advance(self) -> None:
        """The step has been made: the next one writes the next column."""
        self.columns.now += 1

    def admit(
        self, prefilled: DynamicCache, mask: torch.Tensor, lengths: Sequence[int], rows: list[int], slots: list[int]
    ) -> None:
        """Let ``rows`` of a prefilled cache enter ``slots``, so that they end at ``now``; call ``make_room`` before.

        ``mask`` (n, width) of the prefilled cache is left-padded and without holes: row i has ``lengths[i]`` columns.
        """
        now, device = self.columns.now, self.mask.device
        for layer in prefilled.layers[len(self.layers) :]:  # a model that loops adds layers at its first pass
            self.layers.append(slot_layer(layer, self.mask.shape[0], self.columns))
        source, target = torch.tensor(rows, device=device), torch.tensor(slots, device=device)
        for mine, layer in zip(self.layers, prefilled.layers, strict=True):
            if isinstance(mine, SlotLayer | StateLayer):
                mine.admit(cast(Any, layer), source, target)
        self.mask[target] = 0
        self.mask[target, now - mask.shape[1] : now] = mask[source]
        for row, slot in zip(rows, slots, strict=True):
            self.starts[slot] = now - lengths[row]

    def keep(self, slots: torch.Tensor) -> None:
        """Keep only ``slots``, in the order given: the others' memory is given back."""
        for layer in self.layers:
            if isinstance(layer, SlotLayer | StateLayer):
                layer.keep(slots)
        self.mask, self.starts = self.mask[slots], [self.starts[slot] for slot in slots.tolist()]

    def make_room(self, living: list[int], *, entering: int = 0) -> None:
        """Forget columns that no slot of ``living`` needs, and move the others where the next step, or a sequence of
        ``entering`` columns that is to end at ``now``, would not fit.

        It always succeeds where every sequence is shorter than ``capacity``: all end in the same column, so that they
        need no more columns than the longest of them. A move leaves ``capacity`` less that many columns for the steps
        before the next one, however often sequences of any length take turns. Raises ValueError for a longer one.
        """
        columns = self.columns
        columns.first = min((self.starts[slot] for slot in living), default=columns.now)
        if entering <= columns.now < columns.capacity:
            return
        longest = max(columns.now - columns.first, entering)
        if longest >= columns.capacity:
            raise ValueError(f"a sequence of {longest} columns leaves none of the {columns.capacity} of its slot")
        self._move(longest - columns.now)

    def _move(self, by: int) -> None:
        """Move the columns in use ``by`` to the right, or to the left where ``by`` is negative; forget the rest."""
        columns, mask = self.columns, torch.zeros_like(self.mask)
        mask[:, columns.first + by : columns.now + by] = self.mask[:, columns.first : columns.now]
        for layer in self.layers:
            if isinstance(layer, SlotLayer):
                layer.shift(by)
        self.mask, self.starts = mask, [start + by for start in self.starts]
        columns.first, columns.now = columns.first + by, columns.now + by


def close_holes(cache: DynamicCache, mask: torch.Tensor) -> torch.Tensor:
    """Move the columns of each row of a prefilled cache so that those of ``mask`` (n, width) stand together at the
    right end, in their order; return their mask. Only for layers that keep all columns (``full_attention_only``)."""
    mask, order = mask.sort(dim=1, stable=True)
    for layer in cache.layers:
        if isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None:
            layer.keys, layer.values = (
                states.gather(2, order[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))
                for states in (layer.keys, layer.values)
            )
    return mask


def full_attention_only(config: PretrainedConfig) -> bool:
    """Whether a hole of masked columns between two parts of a sequence changes nothing: no windows, no states."""
    layers = DynamicCache(config=config).layers
    return all(type(layer) is DynamicLayer or isinstance(layer, CACHELESS) for layer in layers)


def column_bytes(cache: DynamicCache) -> int:
    """Bytes of keys and values that one token of one sequence takes, an indexer's keys too, read from a cache that has
    seen one token."""
    kept = [layer for layer in cache.layers if isinstance(layer, DynamicLayer)]
    held = [[layer.keys, layer.values, getattr(layer, "indexer_keys", None)] for layer in kept]
    return sum(buffer.nbytes for buffers in held for buffer in buffers if buffer is not None)


def state_bytes(cache: DynamicCache) -> int:
    """Bytes of the states of one sequence, which has them whatever its length, read from a cache of one sequence."""
    return sum(state.nbytes for layer in cache.layers for _, _, state in states_of(layer))
