"""A reward that says the same of everything, in a run's first rollouts: nothing can be learned from it."""

from __future__ import annotations

from rlhf_toolkit.rollout.sampled import Sampled

ROLLOUTS, LEAST = 3, 8
"""How many rollouts are looked at, and the scores that it takes to say something."""


class ConstantRewards:
    """Looks at the first ``ROLLOUTS`` rollouts of a start, the same on every rank."""

    def __init__(self) -> None:
        self._seen: dict[str, list[float]] = {}
        self._rollouts, self._finished, self._by_token = 0, False, False

    def look(self, sampled: Sampled) -> list[str]:
        """Note what each reward has given to the responses of one more rollout, before its weight. At the last of the
        rollouts: a line about each reward whose scores were all the same, with what is likeliest."""
        if self._rollouts == ROLLOUTS:
            return []
        self._rollouts += 1
        self._finished |= bool(sampled.finished.any())
        self._by_token |= bool(sampled.token_rewards.any())  # it may tell tokens apart where it does not their sums
        for name, part in sampled.parts.items():
            self._seen.setdefault(name, []).extend(part[~part.isnan()].tolist())
        if self._rollouts < ROLLOUTS or self._by_token:
            return []
        return [
            f"reward {name} has given {scores[0]:g} to all {len(scores)} responses of the first {ROLLOUTS} rollouts, "
            f"from which nothing can be learned; {self._why()}"
            for name, scores in self._seen.items()
            if len(scores) >= LEAST and len({*scores}) == 1
        ]

    def _why(self) -> str:
        if not self._finished:
            return (
                "no response has come to its end: raise rollout.max_new_tokens, and look at the stop tokens that the "
                "run named at its start"
            )
        return (
            "likeliest it looks for what is never there (a format that the prompt has begun already, special tokens, "
            "which rewards do not read, a column that has other values), or all prompts are too hard or too easy; read "
            "samples.jsonl"
        )
