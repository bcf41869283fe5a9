"""What libraries say while a run works: nothing, unless it is about the user's own code."""

from __future__ import annotations

import sys
import sysconfig
import warnings
from pathlib import Path
from typing import TextIO

import datasets
from transformers.utils import logging

from rlhf_toolkit.errors import RunWarning, in_script
from rlhf_toolkit.texts import say

LIBRARIES = tuple(sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib"))
OURS = str(Path(__file__).parents[1])


def quiet_libraries() -> None:
    """No bars of datasets and transformers, of which every rank would draw its own, and of transformers' log its errors
    alone. In a script, where the terminal is the run's, no library's warnings either: those of the toolkit and of files
    of the user are a line each."""
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if in_script():
        warnings.showwarning = show_warning


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Takes the place of ``warnings.showwarning``. A warning with our name on it that is not of our kind is a library's
    that we have called."""
    if issubclass(category, RunWarning):
        say(f"warning: {message}", sys.stderr)
    elif not filename.startswith((*LIBRARIES, OURS, "<")):
        say(f"warning at {Path(filename).name}:{lineno}: {category.__name__}: {message}", sys.stderr)
