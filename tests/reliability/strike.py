"""What a rank runs before its recipe, so that a signal falls into a named phase: it wraps the toolkit from outside.

A phase is entered at a function of the toolkit and struck at something that happens within it: a model's pass, a
backward pass, the writing of a file of a checkpoint, its rename. Nothing of the product knows of this.
"""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PHASES = ("start", "loading", "rollout", "scoring", "update", "evaluation", "write", "rename", "renamed")
"""``start`` is loading in an empty run folder, ``loading`` in one that is resumed; ``renamed``: just after it."""
LOADING = ("start", "loading")
BY_ONE_RANK = ("write", "rename", "renamed")
"""What one rank may do for all: whoever comes there first strikes, also at another rank."""
LAUNCHER = "launcher"
NUMBER = re.compile(r"checkpoint-(\d+)")
STRUCK, RESUMED = "struck.json", "resumed.json"
ORIGINAL_OPEN = open


@dataclass(frozen=True)
class Strike:
    """The signal ``number`` at ``target``, a rank or the launcher, in ``phase``.

    ``step``: once so many optimizer steps are done; of the phases that write, in the first checkpoint of at least that
    step. ``moment``: at which pass, or file, within it. ``notes``: a folder for what is to be told. ``fill``: no signal
    is sent, but this file takes what room there is on its disk, except for ``leave`` bytes.
    """

    phase: str
    number: int
    target: str
    notes: str
    step: int = 0
    moment: int = 1
    fill: str = ""
    leave: int = 0

    def code(self) -> str:
        """Python code that arms a rank with this."""
        return f"from tests.reliability.strike import Strike, arm; arm(Strike(**{asdict(self)!r}))"


def watch_code(notes: Path) -> str:
    """Python code that has a rank note from which step it goes on."""
    return f"from tests.reliability.strike import note_resumed_step; note_resumed_step({str(notes)!r})"


# ---- in a rank -------------------------------------------------------------------------------------------------------


class Armed:
    """One rank's part of a strike."""

    def __init__(self, strike: Strike) -> None:
        self.strike, self.rank = strike, os.environ.get("RANK", "0")
        self.seen, self.inside = 0, [""]
        self.trainer: Any = None
        self.notes = Path(strike.notes)
        self.notes.joinpath(f"pid-{self.rank}").write_text(str(os.getpid()))

    def within(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, which is ``phase`` wherever it is not part of another one."""

        @functools.wraps(function)
        def entered(*args: Any, **kwargs: Any) -> Any:
            if self.inside[-1]:
                return function(*args, **kwargs)
            self.inside.append(phase)
            self.seen = 0
            try:
                return function(*args, **kwargs)
            finally:
                self.inside.pop()

        return entered

    @property
    def steps(self) -> int:
        """Optimizer steps that are done."""
        return int(getattr(getattr(self.trainer, "state", None), "global_step", 0))

    def passing(self) -> None:
        """A pass runs: the strike, if this is its phase, its step and its moment."""
        strike = self.strike
        if self.inside[-1] == strike.phase and self.steps >= strike.step:
            self.seen += 1
            if self.seen == strike.moment and strike.target in (self.rank, LAUNCHER):
                self.fall()

    def writing(self, phase: str, path: str) -> bool:
        """Whether the strike falls at this file of a checkpoint, whose name, or whose folder's, says its step."""
        found = NUMBER.search(path)
        if phase != self.strike.phase or found is None or int(found[1]) < self.strike.step:
            return False
        self.seen += 1
        return self.seen == self.strike.moment

    def fall(self) -> None:
        """Send the signal, once in a run, and note how many optimizer steps were done."""
        with suppress(FileExistsError):
            with ORIGINAL_OPEN(self.notes / STRUCK, "x") as file:
                json.dump({"rank": self.rank, "steps": self.steps}, file)
            if self.strike.fill:
                fill(Path(self.strike.fill), self.strike.leave)
            else:
                self._send()

    def _send(self) -> None:
        target = os.getppid() if self.strike.target == LAUNCHER else int(self._pid_file().read_text())
        os.kill(target, self.strike.number)

    def _pid_file(self) -> Path:
        return self.notes / f"pid-{self.strike.target}"

    @property
    def kills_itself(self) -> bool:
        """Whether this process does not outlive the strike, so that what it was writing may be left half done."""
        return self.strike.number == signal.SIGKILL and self.strike.target == self.rank


def arm(strike: Strike) -> None:
    """Wrap what the phase of ``strike`` is made of, in this process."""
    armed = Armed(strike)
    _keep_trainer(armed)
    if strike.phase in BY_ONE_RANK:
        _wrap_writing(armed)
        return
    _wrap_phases(armed)
    _wrap_passes(armed)


def fill(path: Path, leave: int) -> None:
    """A file that leaves no more than ``leave`` bytes on its disk."""
    free = os.statvfs(path.parent)
    with ORIGINAL_OPEN(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize - leave)


def note_resumed_step(notes: str) -> None:
    """Write down the optimizer steps that were done when the first training step begins."""
    from rlhf_toolkit.trainers.fine_tuner import FineTuner
    from rlhf_toolkit.trainers.ppo import PPOTrainer

    def noted(real: Callable[..., Any]) -> Callable[..., Any]:
        def step(self: Any, *args: Any, **kwargs: Any) -> Any:
            path = Path(notes, RESUMED)
            if os.environ.get("RANK", "0") == "0" and not path.exists():
                path.write_text(json.dumps(self.state.global_step))
            return real(self, *args, **kwargs)

        return step

    for trainer in (PPOTrainer, FineTuner):
        trainer.training_step = noted(trainer.training_step)  # type: ignore[method-assign]


def _keep_trainer(armed: Armed) -> None:
    from rlhf_toolkit.trainers.base import RoleTrainer

    real = RoleTrainer.__init__

    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        armed.trainer = self
        real(self, *args, **kwargs)

    RoleTrainer.__init__ = made  # type: ignore[method-assign]


def _wrap_phases(armed: Armed) -> None:
    from rlhf_toolkit.rollout.scored_sampler import ScoredSampler
    from rlhf_toolkit.runs.fine_tuning import FineTuningKind
    from rlhf_toolkit.runs.ppo import PPOKind
    from rlhf_toolkit.trainers.fine_tuner import FineTuner
    from rlhf_toolkit.trainers.ppo import PPOTrainer

    places: list[tuple[str, Any, str]] = [
        ("rollout", ScoredSampler, "responses"),
        ("scoring", ScoredSampler, "role_outputs"),
        *(("update", trainer, "training_step") for trainer in (PPOTrainer, FineTuner)),
        *(("evaluation", trainer, "evaluate") for trainer in (PPOTrainer, FineTuner)),
    ]
    for phase, owner, name in places:
        setattr(owner, name, armed.within(phase, getattr(owner, name)))
    if armed.strike.phase in LOADING:
        for kind in (PPOKind, FineTuningKind):
            struck = _then(kind.load_model, armed.passing)
            kind.load_model = armed.within(armed.strike.phase, struck)  # type: ignore[method-assign]


def _then(function: Callable[..., Any], after: Callable[[], None]) -> Callable[..., Any]:
    """``function``, and ``after`` it: the other rank already waits in the next collective."""

    def both(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        after()
        return result

    return both


def _wrap_passes(armed: Armed) -> None:
    """An update is struck before a backward pass, everything else in a forward pass of the model."""
    import torch

    if armed.strike.phase in LOADING:
        return
    owner, name = (torch.Tensor, "backward") if armed.strike.phase == "update" else (torch.nn.Embedding, "forward")
    real = getattr(owner, name)

    def passing(*args: Any, **kwargs: Any) -> Any:
        armed.passing()
        return real(*args, **kwargs)

    setattr(owner, name, passing)


def _wrap_writing(armed: Armed) -> None:
    """Files of a checkpoint are written by safetensors and torch, which Python does not see open them, or by Python."""
    import safetensors.torch
    import torch

    _replace_everywhere(safetensors.torch.save_file, _halved(armed, safetensors.torch.save_file, place=1))
    _replace_everywhere(torch.save, _halved(armed, torch.save, place=1))
    sys.addaudithook(functools.partial(_on_event, armed))
    for name in ("rename", "replace"):
        setattr(os, name, _renaming(armed, getattr(os, name)))


def _halved(armed: Armed, save: Callable[..., Any], *, place: int) -> Callable[..., Any]:
    """``save``, struck in the middle where the strike falls there: what lies on the disk is half of the file."""

    @functools.wraps(save)
    def saving(*args: Any, **kwargs: Any) -> Any:
        path = str(args[place] if len(args) > place else kwargs.get("filename", kwargs.get("f", "")))
        struck = armed.writing("write", path)
        if struck and not armed.kills_itself:
            armed.fall()
        result = save(*args, **kwargs)
        if struck and armed.kills_itself:
            os.truncate(path, os.path.getsize(path) // 2)
            armed.fall()
        return result

    return saving


def _on_event(armed: Armed, event: str, args: tuple[Any, ...]) -> None:
    """Python opens a file of a checkpoint to write."""
    if event == "open" and isinstance(args[0], str | os.PathLike) and args[2] & (os.O_WRONLY | os.O_RDWR):
        path = os.fspath(args[0])
        if armed.writing("write", path if isinstance(path, str) else path.decode()):
            armed.fall()


def _renaming(armed: Armed, real: Callable[..., Any]) -> Callable[..., Any]:
    """A rename that makes a checkpoint whole: of its folder or, inside it, of its manifest."""

    @functools.wraps(real)
    def renaming(source: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
        path = Path(os.fspath(target))
        folder = path.parent if path.name == "manifest.json" else path
        whole = NUMBER.fullmatch(folder.name) is not None
        if whole and armed.writing("rename", folder.name):
            armed.fall()
        result = real(source, target, *args, **kwargs)
        if whole and armed.writing("renamed", folder.name):
            armed.fall()
        return result

    return renaming


def _replace_everywhere(original: object, replacement: object) -> None:
    """In every module that has imported it by name."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("rlhf_toolkit", "peft", "transformers", "safetensors", "torch", "accelerate"):
            for attribute, value in list(getattr(module, "__dict__", {}).items()):
                if value is original:
                    setattr(module, attribute, replacement)
