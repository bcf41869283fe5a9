"""How many bytes each phase of a run takes on one rank, from numbers alone.

    kept      what lies there between phases: the base or its shard, what is trained, DeepSpeed's buffers, moments
    start     loading, fingerprint, engine
    window    kept + base or live layers + max(weights in decoding order + slots + prefill, role pass)
    update    kept + live layers and what is gathered ahead + activations + the largest thing made on the way

``place`` in ``planning/memory.py`` decides from them. Shapes in comments: H hidden, I the MLP's width, Q all heads, KV
all key heads, N tokens of a pass with its roles together. ``bench/phases.py`` holds the sums to real runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

FP32 = 4  # bytes of an element
EIGHT_BIT = 1 + FP32 / 256  # bytes of a moment's element in 8 bits: its code, and its part of a block's magnitude
CHECKSUM_BYTES = 24 * 2**18  # three int64 of each element that the fingerprint looks at together
QUANTISING = 5  # matrices in the base's dtype that quantising one takes: as read, and twice in fp32
PASS_WIDTHS = 5  # rows of H that a pass without gradient holds where it is largest, beside 3 of I, in the MLP


@dataclass(frozen=True)
class ModelSize:
    """A model in numbers.

    Bytes: ``base`` all frozen parameters, ``kept`` those of them that ZeRO-3 leaves whole on every rank, ``largest``
    the largest one, ``adapted`` the weights that have adapters, as matrices, ``matrix`` the largest matrix that a
    quantised layer becomes while it is used, 0 where none is, ``column`` keys and values of one token. Elements:
    ``trained``; ``policy``, those of the policy's adapters; ``low_rank``, what the x A^T of one role have together for
    a token; ``queries`` and ``keys``, a token's in one layer. ``tile``: positions and tokens of a tile of the output
    layer. ``plain``: norms and MLP are transformers' own, which keep more for backward. Where ``recurrent`` layers keep
    states: bytes of them all for a sequence, ``state``; and of one such layer for a token of a pass, at its peak
    without gradient, ``scratch``, and for backward, ``scan``.
    """

    base: int
    kept: int
    largest: int
    adapted: int
    trained: int
    policy: int
    low_rank: int
    layers: int
    hidden: int
    intermediate: int
    queries: int
    keys: int
    heads: int
    vocabulary: int
    element: int
    column: int
    tile: tuple[int, int]
    plain: bool = False
    recurrent: int = 0
    state: int = 0
    scratch: int = 0
    scan: int = 0
    matrix: int = 0


@dataclass(frozen=True)
class Sharding:
    """How ``ranks`` share a model.

    Args:
        stage: of ZeRO, 0 without DeepSpeed.
        bucket: elements of DeepSpeed's buffer of gradients, of which there are two with ``overlap`` under ZeRO-2.
        live, prefetched: elements that ZeRO-3 keeps gathered, and gathers ahead.
        on_cpu: files are mapped into the memory that is counted, and attention of short rows keeps its scores.
        offloaded: the optimizer's copies, gradients and moments lie in other memory.
        eight_bit: the moments are kept in 8 bits. Paged ones count as well: a step has them on the device.
    """

    ranks: int
    stage: int
    bucket: int
    live: int
    prefetched: int
    overlap: bool = False
    on_cpu: bool = False
    offloaded: bool = False
    eight_bit: bool = False

    @property
    def sharded(self) -> bool:
        """Whether a rank holds a part of the base only."""
        return self.stage == 3


@dataclass(frozen=True)
class PassSize:
    """A forward pass of ``tokens``, its ``roles`` together, in sequences of at most ``columns``.

    Args:
        checkpointing: layers are computed again in backward.
        key_copies: how often attention copies a token's keys and values: more than once where packed sequences share
            what they begin with, or a kernel wants the keys of grouped heads repeated.
    """

    tokens: int
    roles: int
    columns: int
    checkpointing: bool = False
    key_copies: float = 1.0


def kept_bytes(model: ModelSize, how: Sharding, *, moments: bool = True) -> int:
    """What lies on a rank between phases; without ``moments``, before the first rollout and update."""
    trained = model.trained * FP32
    share = -(-trained // how.ranks) if how.stage else trained
    of_optimizer = 0 if how.offloaded else share
    moment = ceil(of_optimizer * EIGHT_BIT / FP32) if how.eight_bit else of_optimizer
    late = 2 * moment if moments else 0
    if how.sharded:
        # Of each share the partition, DeepSpeed's flat copy of it and its gradient; later whole copies of all of it.
        late += trained if moments else 0
        return shard_bytes(model, how) + model.kept + share + 2 * of_optimizer + how.bucket * FP32 + late
    return model.base + trained + (of_optimizer if how.stage == 2 else 0) + late


def shard_bytes(model: ModelSize, how: Sharding) -> int:
    """This rank's part of the base."""
    return -(-model.base // how.ranks) if how.sharded else model.base


def window_bytes(model: ModelSize, how: Sharding) -> int:
    """What gathering the base adds."""
    return model.base - model.kept if how.sharded else 0


def live_bytes(model: ModelSize, how: Sharding) -> int:
    """What ZeRO-3 keeps gathered at most while it goes layer by layer."""
    return min(window_bytes(model, how), max(how.live * model.element, model.largest))


def prefetched_bytes(model: ModelSize, how: Sharding) -> int:
    """The buffer in which ZeRO-3 gathers what comes next: as much as it may, and the parameter that goes beyond."""
    return min(window_bytes(model, how), how.prefetched * model.element + model.largest)


def start_bytes(model: ModelSize, how: Sharding) -> int:
    """The most that a rank holds before the first rollout."""
    trained, own = model.trained * FP32, shard_bytes(model, how)
    loading = own + QUANTISING * model.matrix
    if how.sharded:
        copies = 1 if how.on_cpu else 2  # of the matrix being loaded; its new shard comes beside it
        loading += copies * model.largest + model.largest // how.ranks + (model.base if how.on_cpu else 0)
    fingerprint = own + (0 if how.sharded else trained) + min(CHECKSUM_BYTES, 24 * model.largest // model.element)
    engine = kept_bytes(model, how, moments=False) + (trained if how.stage else 0)
    return max(loading, fingerprint, engine)


def pass_bytes(model: ModelSize, how: Sharding, size: PassSize) -> int:
    """A role pass without gradient: its activations, or the output layer's tiles."""
    return model.matrix + max(_pass(model, how, size), _states(model, size) + _head(model, how, size))


def _pass(model: ModelSize, how: Sharding, size: PassSize) -> int:
    return size.tokens * pass_token_bytes(model, how, size)


def pass_token_bytes(model: ModelSize, how: Sharding, size: PassSize) -> int:
    """Bytes that a pass without gradient holds for a token, in the MLP, in attention or in a recurrence."""
    mlp = PASS_WIDTHS * model.hidden + (5 if model.plain else 3) * model.intermediate
    attention = 4 * model.hidden + 4 * model.queries + 4 * model.keys + _taken_keys(model, size)
    if how.on_cpu:
        attention += 2 * model.heads * size.columns
    return max(max(mlp, attention) * model.element, 2 * model.hidden * model.element + model.scratch)


def update_bytes(model: ModelSize, how: Sharding, size: PassSize, *, streamed: bool = False) -> int:
    """What a micro-batch of the update needs beside what is kept.

    ``streamed``: rollouts are. Which layers ZeRO-3 lets go after a forward pass it decides once for each place in a
    pass, and there role passes come first, which need none of them again. So the update gathers its layers once more
    for backward, also where the bounds would let it keep them all.
    """
    trained = model.trained * FP32
    gradients = 0 if how.sharded else trained
    if how.stage == 2:
        share = 0 if how.offloaded else -(-trained // how.ranks)
        gradients = share + how.bucket * FP32 * (2 if how.overlap else 1)
    gathered = live_bytes(model, how)
    ahead = prefetched_bytes(model, how)
    if streamed and gathered == window_bytes(model, how):
        gathered = model.largest
    if gathered < window_bytes(model, how):  # backward gathers again
        return gradients + gathered + ahead + activation_bytes(model, how, size)
    before_backward = _kept_of_forward(model, how, size) + ahead + max(_last_norm(model, size), model.matrix)
    if size.checkpointing:  # a layer keeps nothing for backward yet
        passing = model.matrix + _pass(model, how, size)
        before_backward = max(before_backward, ahead + _inputs_of_layers(model, size) + passing)
    return gradients + gathered + max(before_backward, activation_bytes(model, how, size))


def activation_bytes(model: ModelSize, how: Sharding, size: PassSize) -> int:
    """What backward needs of the forward pass, and the largest thing that is made on the way: the last norm, the output
    layer, or the backward of an MLP, in a layer that is computed again where there is checkpointing.

    The gradients of product, gate and up and the product of two are there at once, when what the layer has kept of the
    product is gone; a quantised layer's matrix only before, beside the gradient of the product alone.
    """
    width, matrix = model.intermediate, ceil(model.matrix / size.tokens)
    mlp = 2 * model.hidden * model.element + max(2 * width * model.element, width * model.element + matrix)
    backward = size.tokens * max(mlp, model.scratch + matrix)
    if size.checkpointing:  # its input is counted among those of all layers
        again = layer_token_bytes(model, how, size) - model.hidden * model.element + model.scan
        backward += size.tokens * again
    made = max(_last_norm(model, size), _head(model, how, size, gradient=True), backward)
    return _kept_of_forward(model, how, size) + made


def _kept_of_forward(model: ModelSize, how: Sharding, size: PassSize) -> int:
    """What the whole forward pass leaves behind."""
    layers = size.tokens * (model.layers * layer_token_bytes(model, how, size) + model.recurrent * model.scan)
    return _states(model, size) + (_inputs_of_layers(model, size) if size.checkpointing else layers)


def _inputs_of_layers(model: ModelSize, size: PassSize) -> int:
    return model.layers * size.tokens * model.hidden * model.element


def _last_norm(model: ModelSize, size: PassSize) -> int:
    return size.tokens * model.hidden * (2 * FP32 + model.element)


def layer_token_bytes(model: ModelSize, how: Sharding, size: PassSize) -> int:
    """Bytes that one layer keeps of a token for backward: two residuals, two normed states, queries, keys, values,
    attention's output, gate, up and product, each adapter's x A^T."""
    widths = 4 * model.hidden + 2 * model.queries + _taken_keys(model, size) + 3 * model.intermediate
    widths += model.low_rank // max(1, model.layers)
    if how.on_cpu:
        widths += model.heads * size.columns
    plain = 2 * 2 * FP32 * model.hidden + model.intermediate * model.element if model.plain else 0
    return widths * model.element + 2 * FP32 + plain


def _taken_keys(model: ModelSize, size: PassSize) -> int:
    """Elements of keys and values of a token, as attention takes them."""
    return ceil(2 * model.keys * size.key_copies)


def _states(model: ModelSize, size: PassSize) -> int:
    """The embedding's output and the trunk's last states."""
    return 2 * size.tokens * model.hidden * model.element


def _head(model: ModelSize, how: Sharding, size: PassSize, *, gradient: bool = False) -> int:
    """The output layer over one role's positions, tile by tile (``models/heads.py``)."""
    positions, tokens = model.tile
    count = size.tokens // size.roles  # at most: every position may be one of a response
    positions = min(positions, count)
    matrices = 2 * positions * tokens * FP32
    if how.on_cpu:
        matrices += (tokens + positions) * model.hidden * FP32
    rows = count
    if gradient:
        matrices += positions * (tokens + 2 * model.hidden) * model.element + 3 * positions * model.hidden * FP32
        rows += 2 * count
    return matrices + rows * model.hidden * model.element
