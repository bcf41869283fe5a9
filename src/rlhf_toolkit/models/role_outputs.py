"""RoleOutputs: what roles say about tokens, in a forward pass and about a whole rollout alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from rlhf_toolkit.data.layout import unpack
from rlhf_toolkit.models.roles import POLICY, REFERENCE, REWARD, VALUE


@dataclass(frozen=True)
class Column:
    """One attribute of ``RoleOutputs``: what ``role`` says, about each response token or about each sequence."""

    role: str
    of_tokens: bool = True


COLUMNS = {
    "policy_logprobs": Column(POLICY),
    "policy_entropies": Column(POLICY),
    "reference_logprobs": Column(REFERENCE),
    "token_values": Column(VALUE),
    "final_values": Column(VALUE, of_tokens=False),
    "reward_scores": Column(REWARD, of_tokens=False),
}


class RoleOutputs(dict[str, Tensor]):
    """What roles say about n sequences with K response tokens, in float32. A column is there where its role ran.

    A forward pass gives columns of tokens as (K,), one sequence after the other; ``as_rows`` lays them out as (n, R).
    Columns of sequences are (n,). It is a dict because ZeRO-3 looks for the tensors of a forward pass in dicts and
    lists, and would not see those of another record; code that reads a column writes ``outputs.token_values``.

    Attributes:
        policy_logprobs, reference_logprobs: log-probs of the response tokens.
        policy_entropies: of the policy's distribution of each response token, in nats.
        token_values: the value of what stands *before* each response token.
        final_values: the value after a sequence's last token.
        reward_scores: the score of a sequence, read at its last token.

    Raises:
        RuntimeError: a column is read whose role did not run, which is a defect of the toolkit.
    """

    if TYPE_CHECKING:
        policy_logprobs: Tensor
        policy_entropies: Tensor
        reference_logprobs: Tensor
        token_values: Tensor
        final_values: Tensor
        reward_scores: Tensor

    def __getattr__(self, name: str) -> Tensor:
        if name not in COLUMNS:
            raise AttributeError(name)
        if name not in self:
            raise RuntimeError(f"{name} is needed, but the {COLUMNS[name].role} did not run: there is {list(self)}")
        return self[name]

    def says(self, role: str) -> bool:
        """Whether ``role`` ran."""
        return any(COLUMNS[name].role == role for name in self)

    def each(self, change: Callable[[Tensor], Tensor]) -> RoleOutputs:
        """With ``change`` made to every column."""
        return RoleOutputs({name: change(column) for name, column in self.items()})

    def and_of(self, other: RoleOutputs) -> RoleOutputs:
        """With the columns of ``other``, which replace those of the same name."""
        return RoleOutputs({**self, **other})

    def as_rows(self, lengths: Tensor, width: int) -> RoleOutputs:
        """Columns of tokens (K,) as (n, ``width``), 0 past each response's end; ``lengths`` (n,) are the responses'.
        Gradients flow back."""
        rows = RoleOutputs(self)
        for name in self:
            if COLUMNS[name].of_tokens:
                rows[name] = unpack(self[name], lengths, width)
        return rows

    def not_finite(self) -> tuple[str, int] | None:
        """The first role that says NaN or infinity, and the first row about which it does, in columns laid out as rows.

        Entropies are left out: a model that forbids tokens by a logit of minus infinity has none, and trains well.
        """
        for name, column in COLUMNS.items():
            if name in self and name != "policy_entropies" and not self[name].isfinite().all():
                return column.role, int((~self[name].isfinite()).nonzero()[0, 0])
        return None
