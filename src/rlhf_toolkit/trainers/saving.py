"""When and by whom checkpoints are written: rank 0, in a thread, while the run goes on."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from rlhf_toolkit.checkpoint_files import Contents, complete, prune, temporary
from rlhf_toolkit.distributed.collectives import agreement, any_rank, rank
from rlhf_toolkit.errors import CheckpointError, RLHFError, described

Fill = Callable[[Path], None]
"""Writes role folders into a folder, of what neither the other ranks nor what the run does meanwhile changes."""

filling = threading.Lock()
"""Held by whoever writes role folders: PEFT notes in the model's own configuration that it writes."""


class CheckpointWriter:
    """Writes a run's checkpoints, one at a time. Every rank has one and calls it with the others; rank 0's writes.

    Args:
        folder: the run folder.
        keep: how many of the last checkpoints stay.

    What goes wrong in the thread is raised, as CheckpointError on all ranks, by the next call of ``write``, ``look`` or
    ``finish``.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self.last: int | None = None
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._under_way = False

    def write(
        self, step: int, contents: Callable[[], Contents], fill: Fill, *, best: int | None = None, at_once: bool = False
    ) -> None:
        """Write the checkpoint of ``step`` while the run goes on, but its role folders ``at_once`` where that is said.
        What ``contents`` and ``fill`` put into it must not change from now on. ``best`` is the step of a checkpoint
        that stays however old it is. A collective."""
        self.finish()
        with agreement("the writing of a checkpoint"):
            if rank() == 0:
                if at_once:
                    self._fill(step, fill)
                self._writing = self._pool.submit(self._complete, step, contents, None if at_once else fill, best)
        self._under_way, self.last = True, step

    def look(self) -> None:
        """Raise what has gone wrong so far, on all ranks. A collective, cheap where nothing is being written."""
        if self._under_way and any_rank(self._writing is not None and self._writing.done()):
            self.finish()

    def finish(self) -> None:
        """Wait until the checkpoint that is being written is whole. A collective."""
        if self._under_way:
            self._under_way = False
            with agreement("the writing of a checkpoint"):
                self.close()

    def close(self) -> None:
        """Wait for this rank's thread alone. Raises CheckpointError."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _fill(self, step: int, fill: Fill) -> None:
        with self._cleaned_up(step):
            shutil.rmtree(temporary(self.folder, step), ignore_errors=True)
            fill(temporary(self.folder, step))

    def _complete(self, step: int, contents: Callable[[], Contents], fill: Fill | None, best: int | None) -> None:
        if fill is not None:
            self._fill(step, fill)
        with self._cleaned_up(step):
            complete(self.folder, contents())
        prune(self.folder, newest=step, keep=self.keep, best=best)

    @contextmanager
    def _cleaned_up(self, step: int) -> Iterator[None]:
        """Inside, the temporary folder is filled: from nothing, and where that fails nothing stays."""
        place = temporary(self.folder, step)
        try:
            yield
        except RLHFError:
            shutil.rmtree(place, ignore_errors=True)
            raise
        except Exception as error:
            shutil.rmtree(place, ignore_errors=True)
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {self.folder} ({described(error)}); make room "
                "or mend that disk, then continue with --resume"
            ) from error
