"""What a run shows while it trains: a bar for the phase that it is in, and a line for each rollout and each evaluation.

Bars are for people: they are there where a terminal is, and gone once their phase is over. Lines are for people and
logs: the same in both.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from statistics import median
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rlhf_toolkit import texts
from rlhf_toolkit.reporting.records import EVAL, Record, kind_of_record
from rlhf_toolkit.texts import say

PHASES = {
    "gen": "sampling",
    "reward": "scoring",
    "old_log_prob": "role pass",
    "update_actor": "updating",
    "testing": "evaluating",
}
"""What the phases of the clock are called."""
COUNTED, UNCOUNTED = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {elapsed}{postfix}", "{desc} {elapsed}"
DELAY_SECONDS = 0.5
"""A phase that is over by then has no bar."""
SHOWN = {
    "critic/score/mean": "score",
    "actor/ref_kl": "kl",
    "response_length/mean": "length",
    "train/loss": "loss",
    "perf/throughput": "tok/s",
}
SHOWN_HELD_OUT = {
    "eval/score/mean": "score",
    "eval/ref_kl": "kl",
    "eval/response_length": "length",
    "eval/loss": "loss",
    "eval/accuracy": "accuracy",
}
NOT_OF_ROLLOUTS = "train/loss"
"""PPO's loss says nothing about its progress."""
STEP, TESTING = "timing_s/step", "timing_s/testing"
LINES_OF_STEPS = 20
"""A run that counts optimizer steps has so many lines."""
REMEMBERED = 8
"""How many rounds the time that is left is worked out from."""


def on_terminal() -> bool:
    """Whether people look at what is written to stderr, where bars are."""
    return sys.stderr.isatty()


def redraw(bar: tqdm[Any], over: threading.Event, drawing: threading.Lock) -> None:
    """Draw the bar every second until it is ``over``: by itself it is drawn only where something advances, and one
    thing of a phase, such as an update, may take minutes."""
    wait = DELAY_SECONDS
    while not over.wait(wait):
        with drawing:
            if not over.is_set():
                bar.refresh()
        wait = 1.0


class Progress(TrainerCallback):
    """Shows on rank 0 (``show``) what the run is at. It is the onlooker of the clock that times a rollout's phases.

    ``num_rollouts`` and ``updates_per_rollout`` are of what the run counts, its ``unit``: rollouts, or optimizer steps.
    """

    def __init__(self, *, num_rollouts: int, updates_per_rollout: int, show: bool, unit: str = "rollout") -> None:
        self.rounds, self.updates_per_round, self.unit, self.shown = num_rollouts, updates_per_rollout, unit, show
        self.with_bars = show and on_terminal()
        if self.with_bars:
            texts.around_lines = partial(tqdm.external_write_mode, sys.stderr)
        self._bar: tqdm[Any] | None = None
        self._over, self._drawing = threading.Event(), threading.Lock()
        self._phase, self._within, self._round = "", "", 0
        self._began, self._tokens = 0.0, 0
        self._last, self._seconds = time.perf_counter(), list[float]()

    # ---- bars --------------------------------------------------------------------------------------------------------

    def begins(self, phase: str, count: int) -> None:
        """A phase of the clock has begun, about ``count`` things; 0: nobody counts them."""
        if phase == "testing":
            self._within = "evaluation: "
        if phase == "update_actor" and self._phase == phase:
            return
        self._open(
            phase, f"{self._within}{PHASES[phase]}", self.updates_per_round if phase == "update_actor" else count
        )

    def advances(self) -> None:
        """One of the things that the phase is about is done."""
        if self._bar is not None:
            self._bar.update(1)

    def ends(self, phase: str) -> None:
        """A phase of the clock has ended. That of updates goes on until the rollout has had all of them."""
        if phase == "testing":
            self._within = ""
        if phase == "update_actor" and self._bar is not None:
            self._bar.update(1)
            if self._bar.n < (self._bar.total or 0):
                return
        self.close()

    def on_tokens(self, count: int) -> None:
        """Show ``count`` more sampled tokens, and their rate. The decode loop calls it after each step."""
        if self._bar is None:
            return
        now = time.perf_counter()
        self._began = self._began or now
        self._tokens += count
        rate = f", {self._tokens / (now - self._began):.0f} tok/s" if now > self._began else ""
        self._bar.set_postfix_str(f"{self._tokens} tokens{rate}", refresh=False)
        self._bar.update(0)

    def next_round(self) -> None:
        """A round is over of what is no training: bars name the next one."""
        self._round += 1

    def _open(self, phase: str, words: str, count: int) -> None:
        self.close()
        self._phase, self._began, self._tokens = phase, 0.0, 0
        if self.with_bars:
            self._bar = tqdm(
                desc=f"{self.unit} {min(self._round + 1, self.rounds)}/{self.rounds}  {words}",
                total=count or None,
                leave=False,
                delay=DELAY_SECONDS,
                mininterval=0.2,
                dynamic_ncols=True,
                bar_format=COUNTED if count else UNCOUNTED,
            )
            self._over = threading.Event()
            redrawing = threading.Thread(target=redraw, args=(self._bar, self._over, self._drawing), daemon=True)
            redrawing.start()

    def close(self) -> None:
        """Take the bar off the terminal, if one is there: whatever is printed next begins a line of its own."""
        bar, self._bar, self._phase = self._bar, None, ""
        if bar is not None:
            self._over.set()
            with self._drawing:
                bar.close()

    # ---- Trainer's events --------------------------------------------------------------------------------------------

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count rounds; a run of optimizer steps has one bar for all of them."""
        self._round = state.global_step // self.updates_per_round
        if self.unit == "step" and self.with_bars:
            if self._bar is None:
                self._open("steps", "training", self.rounds)
            assert self._bar is not None
            self._bar.update(self._round - self._bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Record | None = None,
        **kwargs: Any,
    ) -> None:
        """A line about a rollout, or about every so many optimizer steps, and about every evaluation."""
        record, kind = logs or {}, kind_of_record(logs or {})
        if kind is None:
            return
        self._round = state.global_step // self.updates_per_round
        now = time.perf_counter()
        if kind == EVAL:
            self._say(f"evaluation after {self._counted()}", record, SHOWN_HELD_OUT, record.get(TESTING))
            self._last = now
            return
        seconds, self._last = record.get(STEP, now - self._last), now
        self._seconds = [*self._seconds, seconds][-REMEMBERED:]
        every = max(1, self.rounds // LINES_OF_STEPS) if self.unit == "step" else 1
        if self._round % every == 0 or self._round == self.rounds:
            shown = {name: words for name, words in SHOWN.items() if self.unit == "step" or name != NOT_OF_ROLLOUTS}
            self._say(self._counted(), record, shown, record.get(STEP), self.left())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the bar away."""
        self.close()

    # ---- lines -------------------------------------------------------------------------------------------------------

    def left(self) -> str:
        """How long the rest of the run may take, by its latest rounds; nothing at its end."""
        rest = self.rounds - self._round
        return f"  left {timedelta(seconds=round(rest * median(self._seconds)))}" if rest > 0 else ""

    def _counted(self) -> str:
        width = len(str(self.rounds))
        return f"{self.unit} {self._round:{width}d}/{self.rounds}"

    def _say(
        self, what: str, record: Mapping[str, Any], names: Mapping[str, str], seconds: float | None, end: str = ""
    ) -> None:
        if self.shown:
            found = [f"{words} {record[name]:7.2f}" for name, words in names.items() if name in record]
            took = [] if seconds is None else [f"{seconds:6.1f} s"]
            say("  ".join([what, *found, *took]) + end)
