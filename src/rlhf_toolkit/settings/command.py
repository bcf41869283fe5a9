"""The command line of recipes and of ``rlhf train``: a file, settings that replace its own, an earlier run.

It is read before torch is imported, so that what is wrong with it is said at once.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from rlhf_toolkit.errors import ConfigError, shortened
from rlhf_toolkit.last_words import command_of_rlhf
from rlhf_toolkit.settings.experiment import Experiment, FineTuning
from rlhf_toolkit.settings.loading import load_experiment, parse_overrides
from rlhf_toolkit.texts import say

E = TypeVar("E", bound=Experiment | FineTuning)
SETTING = r"[A-Za-z_]\w*\.[A-Za-z_][\w.]*"
WITH_VALUE, ALONE = re.compile(rf"(?:--)?({SETTING}=.*)", re.DOTALL), re.compile(rf"--({SETTING})")


@dataclass(frozen=True)
class Command(Generic[E]):
    """What a recipe was told on its command line."""

    experiment: E
    resume: bool
    overwrite: bool


def read_command(kind: type[E], description: str | None, words: Sequence[str] | None = None) -> Command[E]:
    """The command line of every recipe: the experiment's YAML file, overrides, and what to do with an earlier run.
    ``words`` are those of this process unless they are given. Raises ConfigError.

    Rank 0 says what begins, since torch takes seconds to import; under ``rlhf train`` that has been said."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", required=True, help="the experiment's YAML file")
    parser.add_argument("--resume", action="store_true", help="continue from the run folder's newest sound checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in the run folder")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="settings that replace those of the file; --section.key value and --section.key=value mean the same",
    )
    others, overrides = split_settings(words)
    options = parser.parse_args(others)
    experiment = load_experiment(options.config, parse_overrides([*overrides, *options.overrides]), kind)
    if os.environ.get("RANK", "0") == "0" and not command_of_rlhf():
        say(f"{options.config}: results in {experiment.run.output_dir}")
    return Command(experiment, options.resume, options.overwrite)


def split_settings(words: Sequence[str] | None = None) -> tuple[list[str], list[str]]:
    """Of the words of a command line (this process's unless they are given) those that set nothing, and
    ``section.key=value`` for each setting, however it was written. Raises ConfigError for one without a value."""
    waiting = list(sys.argv[1:] if words is None else words)
    others, settings = list[str](), list[str]()
    while waiting:
        word = waiting.pop(0)
        if whole := WITH_VALUE.fullmatch(word):
            settings.append(whole[1])
        elif name := ALONE.fullmatch(word):
            if not waiting or waiting[0].startswith("--"):
                raise ConfigError(f"{shortened(word, 80)[1:-1]} has no value; write {name[1]}=VALUE")
            settings.append(f"{name[1]}={waiting.pop(0)}")
        else:
            others.append(word)
    return others, settings
