"""How often a run writes checkpoints, and what its start says of where everything goes."""

from __future__ import annotations

from rlhf_toolkit.runs.places import places_text, saved_every
from rlhf_toolkit.settings.configs import RunConfig
from tests.support.offenders import for_each


@for_each(
    "every, rounds, found",
    [(None, 1, 1), (None, 10, 1), (None, 11, 2), (None, 100, 10), (None, 1001, 101), (0, 100, 0), (7, 100, 7)],
)
def test_ten_checkpoints_unless_the_settings_say_otherwise(every: int | None, rounds: int, found: int) -> None:
    assert saved_every(RunConfig(save_every=every), rounds) == found


@for_each(
    "settings, end",
    [
        ({}, "a checkpoint every 4 rollouts, the newest 2 kept; W&B offline"),
        ({"save_every": 1, "wandb": "off"}, "a checkpoint every rollout, the newest 2 kept"),
        ({"save_every": 0, "wandb": "online"}, "no checkpoints before the end; W&B online"),
    ],
)
def test_where_everything_goes(settings: dict[str, object], end: str) -> None:
    said = places_text(RunConfig(**{"output_dir": "runs/x", **settings}), 40, "rollout")  # type: ignore[arg-type]
    assert said == f"writes: runs/x: log.jsonl, samples.jsonl, summary.json, {end}"
