"""Which tokens several sequences may share: a compressed trie over their prompts.

Sequences that begin with the same prompt tokens (a chat template, the whole prompt of a group of responses) need those
tokens only once: in a causal model a state depends on nothing but what stands before it. The trie's nodes are segments,
laid end to end as one row of tokens. A token of a segment attends to all of the segments above it and, causally, to its
own. Responses are never shared: each row ends in a segment of its own.

    rows      T T T a b | r r        segments   0: T T T        (parent none)
              T T T a c | r r                   1: a            (parent 0)
              T T T d   | r                     2: b r r        (parent 1)   ...
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

LEAST_SAVING = 8  # tokens; every further segment makes attention's pieces smaller

Tokens = tuple[int, ...]


class Segment(NamedTuple):
    """Positions ``start`` to ``stop`` of ``row``, and of every other row that goes through it. It continues segment
    ``parent``, None at the beginning of a sequence."""

    row: int
    start: int
    stop: int
    parent: int | None

    @property
    def size(self) -> int:
        """Tokens of the segment alone."""
        return self.stop - self.start


class Trie(NamedTuple):
    """Segments in the order in which they are laid end to end, parents first, and the last segment of each row."""

    segments: list[Segment]
    leaves: list[int]

    @property
    def tokens(self) -> int:
        """N, the tokens of all segments."""
        return sum(segment.size for segment in self.segments)

    def path(self, segment: int) -> list[int]:
        """From the beginning of the sequence down to ``segment``."""
        found = [segment]
        while (parent := self.segments[found[-1]].parent) is not None:
            found.append(parent)
        return found[::-1]


def share_prefixes(prompts: Sequence[Tokens], lengths: Sequence[int], *, least: int = LEAST_SAVING) -> Trie:
    """The trie of rows with these ``prompts`` and whole ``lengths``, prompt and response.

    A segment is shared only where that saves ``least`` tokens: (rows through it - 1) x its tokens. Pure function of its
    arguments, so that all ranks agree.
    """
    trie = Trie([], [-1] * len(prompts))
    # Rows, the position up to which segments carry them, that up to which they are known to agree, the segment above.
    open_groups: list[tuple[list[int], int, int, int | None]] = [(list(range(len(prompts))), 0, 0, None)]
    while open_groups:
        rows, start, agree, parent = open_groups.pop()
        groups: dict[tuple[str, int], list[int]] = {}  # by the next token; a row whose prompt has ended stands alone
        for row in rows:
            ended = len(prompts[row]) == agree
            groups.setdefault(("row", row) if ended else ("token", prompts[row][agree]), []).append(row)
        for group in groups.values():
            if len(group) == 1:
                trie.leaves[group[0]] = _add(trie, Segment(group[0], start, lengths[group[0]], parent))
                continue
            stop = common_prefix([prompts[row] for row in group])
            if (len(group) - 1) * (stop - start) >= least:
                shared = _add(trie, Segment(group[0], start, stop, parent))
                open_groups.append((group, stop, stop, shared))
            else:
                open_groups.append((group, start, stop, parent))
    return trie


class GrowingRow:
    """Counts the tokens of a packed row while sequences join it in the order of their prompts.

    After any number of ``add``, ``tokens`` equals that of the trie which ``share_prefixes`` makes of what was added,
    without building it again: in this order a prompt meets those before it only along the path to the last one, so that
    path alone is kept open.
    """

    def __init__(self) -> None:
        self._lengths = 0
        self._last: Tokens | None = None
        self._path = [_Shared(depth=0, rows=0)]

    @property
    def tokens(self) -> int:
        """Tokens that the sequences take together."""
        root, *below = self._path
        saved, start = root.saved, 0
        for node in below:
            if node.saves(start):
                saved += (node.rows - 1) * (node.depth - start) + node.saved
                start = node.depth
            else:
                saved += sum(child.saving(start) for child in node.closed)
        return self._lengths - saved

    def add(self, prompt: Tokens, length: int) -> None:
        """A sequence joins; its prompt must not be smaller than that of the one before."""
        common = 0 if self._last is None else _agree(self._last, prompt)
        left: _Shared | None = None  # the nodes below depth common are left, and one at that depth has to be there
        while self._path[-1].depth > common:
            left = self._path.pop()
            if self._path[-1].depth >= common:
                self._path[-1].close(left)
        if self._path[-1].depth < common:
            shared = _Shared(depth=common, rows=left.rows if left else 1)
            if left:
                shared.close(left)
            self._path.append(shared)
        for node in self._path:
            node.rows += 1
        self._lengths, self._last = self._lengths + length, prompt


class _Shared:
    """What ``rows`` have in common: their first ``depth`` tokens. ``closed`` are the nodes below it that no further row
    goes through, and ``saved`` the tokens they save if this node is a segment."""

    def __init__(self, *, depth: int, rows: int) -> None:
        self.depth, self.rows, self.closed, self.saved = depth, rows, list[_Shared](), 0

    def close(self, child: _Shared) -> None:
        self.closed.append(child)
        self.saved += child.saving(self.depth)

    def saves(self, start: int) -> bool:
        """Whether the node is worth a segment below one that ends at ``start``."""
        return (self.rows - 1) * (self.depth - start) >= LEAST_SAVING

    def saving(self, start: int) -> int:
        """Tokens that the node and those below it save, all closed. A node that is no segment has fewer than nine rows,
        so that looking at each node below it again costs nothing."""
        if self.saves(start):
            return (self.rows - 1) * (self.depth - start) + self.saved
        return sum(child.saving(start) for child in self.closed)


def common_prefix(prompts: Sequence[Tokens]) -> int:
    """How many tokens all ``prompts`` have in common at their beginning: what the smallest and the largest have."""
    return _agree(min(prompts), max(prompts))


def _agree(first: Tokens, last: Tokens) -> int:
    low, high = 0, min(len(first), len(last))
    while low < high:  # slices are compared in C, tokens one by one are not
        middle = (low + high + 1) // 2
        low, high = (middle, high) if first[low:middle] == last[low:middle] else (low, middle - 1)
    return low


def _add(trie: Trie, segment: Segment) -> int:
    trie.segments.append(segment)
    return len(trie.segments) - 1
