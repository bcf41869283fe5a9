"""The section ``alarms``: limits of a rollout's metrics. It is about who watches a run, not about what it computes."""

# knob() is dataclasses.field() with a help text: ruff: noqa: RUF009

from __future__ import annotations

from dataclasses import dataclass

from rlhf_toolkit.settings.knobs import ABOVE_0, ABOVE_0_TO_1, NOT_NEGATIVE, Section, knob


@dataclass(frozen=True)
class AlarmsConfig(Section):
    """Limits of a rollout's metrics, each none for no limit. Beyond one there is a line in the log and in W&B."""

    kl_above: float | None = knob(200.0, "of actor/ref_kl, the nats of a response", ABOVE_0)
    entropy_below: float | None = knob(0.01, "of actor/entropy, the nats of a token", NOT_NEGATIVE)
    entropy_above: float | None = knob(None, "of actor/entropy", ABOVE_0)
    length_below: float | None = knob(None, "of response_length/mean, in tokens", ABOVE_0)
    length_above: float | None = knob(None, "of response_length/mean, in tokens", ABOVE_0)
    repetition_above: float | None = knob(0.6, "of response_length/repetition, a share", ABOVE_0_TO_1)
    cut_above: float | None = knob(None, "of response_length/clip_ratio, a share", ABOVE_0_TO_1)
    stop: bool = knob(False, "at an alarm write a checkpoint and end the run as if it were done")

    @property
    def limits(self) -> dict[str, float]:
        """The limits that there are, by their names."""
        return {name: value for name, value in vars(self).items() if name != "stop" and value is not None}
