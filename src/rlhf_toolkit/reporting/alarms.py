"""Alarms: a metric of a rollout that is beyond its limit is said once, in words, and may end the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

Notify = Callable[[str, str], None]
"""Takes a title and a text."""


@dataclass(frozen=True)
class Alarm:
    """What a limit is about: the metric, on which side of the limit it should stay, and what it says if it does not."""

    metric: str
    means: str
    do: str
    upper: bool = True

    def beyond(self, value: float, limit: float) -> bool:
        """Whether ``value`` is on the wrong side of ``limit``."""
        return value > limit if self.upper else value < limit


ALARMS = {
    "kl_above": Alarm(
        "actor/ref_kl",
        "the policy has left the reference, and the reward may be what it exploits",
        "read samples.jsonl; raise ppo.kl_coef, or lower update.policy_lr",
    ),
    "entropy_below": Alarm(
        "actor/entropy",
        "the policy has collapsed onto few answers and explores no more",
        "take an earlier checkpoint; raise ppo.entropy_coef or ppo.clip_range_high, or lower update.policy_lr",
        upper=False,
    ),
    "entropy_above": Alarm(
        "actor/entropy",
        "the policy writes what is close to noise",
        "lower ppo.entropy_coef or update.policy_lr; look whether the reward still tells answers apart",
    ),
    "length_below": Alarm(
        "response_length/mean",
        "the reward likes brevity, or nothing at all",
        "read samples.jsonl; have the reward ask for an answer",
        upper=False,
    ),
    "length_above": Alarm(
        "response_length/mean",
        "the reward likes length",
        "read samples.jsonl; set reward.overlong_buffer, or have the reward ignore length",
    ),
    "repetition_above": Alarm(
        "response_length/repetition",
        "responses say the same again and again",
        "read samples.jsonl; take an earlier checkpoint, raise ppo.kl_coef, or have the reward see repetition",
    ),
    "cut_above": Alarm(
        "response_length/clip_ratio",
        "responses do not come to their end within the budget",
        "raise rollout.max_new_tokens, or set reward.missing_eos_penalty",
    ),
}
"""By the names of the settings in the section alarms."""


class Alarms(TrainerCallback):
    """Compares each rollout's record with ``limits``, by the names of ``ALARMS``, before it is written.

    While a metric is beyond its limit the record says so (``alarm/kl_above`` is 1). ``notify`` hears of it once, when
    the limit is crossed, and again after the metric has been back; on ranks other than 0 it should do nothing. With
    ``stop`` the run then writes a checkpoint and ends. All ranks see the same numbers and decide alike.
    """

    def __init__(self, limits: Mapping[str, float], *, stop: bool, notify: Notify) -> None:
        self.limits, self.stop, self.notify = dict(limits), stop, notify
        self._beyond: set[str] = set()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Look at a record, which is of a rollout where it has a metric of ``ALARMS``; those of evaluations do not."""
        logs = {} if logs is None else logs
        found = self.found(logs)
        crossed = [name for name in found if name not in self._beyond]
        measured = {name for name in self.limits if ALARMS[name].metric in logs}  # what was not decides nothing
        self._beyond = (self._beyond - measured) | set(found)
        logs |= {f"alarm/{name}": 1.0 for name in found}
        for name in crossed:
            self.notify(f"alarm {name}", self.text(name, found[name], state.global_step))
        if crossed and self.stop:
            control.should_save = control.should_training_stop = True

    def found(self, logs: Mapping[str, Any]) -> dict[str, float]:
        """The values that are beyond their limits, by the names of the alarms."""
        values = {name: logs[ALARMS[name].metric] for name in self.limits if ALARMS[name].metric in logs}
        return {name: value for name, value in values.items() if ALARMS[name].beyond(value, self.limits[name])}

    def text(self, name: str, value: float, step: int) -> str:
        """What is said: value, limit, what it usually means and what to do."""
        alarm, side = ALARMS[name], "above" if ALARMS[name].upper else "below"
        end = "; the run writes a checkpoint and ends, since alarms.stop is set" if self.stop else ""
        return (
            f"{alarm.metric} is {value:.4g} at step {step}, {side} alarms.{name}={self.limits[name]:g}: usually "
            f"{alarm.means}; {alarm.do}{end}"
        )
