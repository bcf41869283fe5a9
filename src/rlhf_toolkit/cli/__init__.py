"""``rlhf``: one command for every step from a first experiment to a merged model.

Each module here has the words of some commands, prints their lines, and imports what does their work when it is asked
to: ``rlhf --help`` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import rlhf_toolkit
from rlhf_toolkit.cli import data, first, results, train
from rlhf_toolkit.cli.words import Command, Options
from rlhf_toolkit.errors import LONGEST, reported
from rlhf_toolkit.settings.command import split_settings
from rlhf_toolkit.texts import printable

COMMANDS = (*first.COMMANDS, *train.COMMANDS, *results.COMMANDS)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command. An error the user can mend ends the process with status 1 and one line."""
    with reported():
        parsed = parse(list(sys.argv[1:] if arguments is None else arguments))
        if not parsed.light:
            from transformers.utils import logging

            warnings.filterwarnings("ignore")  # no warnings and no bars of libraries between a command's lines
            logging.disable_progress_bar()
            logging.set_verbosity_error()
        try:
            parsed.run(parsed)
        except BrokenPipeError:  # whoever reads, such as head, has had enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parse(words: list[str]) -> Options:
    """The options of a command, with its function as ``run``. Settings among its words may stand anywhere."""
    parser, places = command_line()
    if not words or words[0] not in {command.name for command in COMMANDS if command.settings}:
        return parser.parse_args(words)
    others, settings = split_settings(words[1:])
    options: Options = places[words[0]].parse_intermixed_args(others)
    options.overrides += settings
    return options


class Parser(argparse.ArgumentParser):
    """A parser whose help may end with what is worked out only when it is asked for."""

    more: Callable[[], str] | None = None

    def format_help(self) -> str:
        """argparse's own, and ``more``."""
        return super().format_help() + ("" if self.more is None else f"\n{self.more()}")

    def error(self, message: str) -> NoReturn:
        """One line, where argparse has its usage above it, and characters of the command line as they are."""
        settings = "" if self.more is None else "; a setting is written section.key=value"
        self.exit(2, f"{self.prog}: {printable(message, longest=LONGEST)}{settings}; see {self.prog} --help\n")


def command_line() -> tuple[Parser, dict[str, Any]]:
    """The parser of all commands, and those of each by its name."""

    def add(parser: Parser, commands: Sequence[Command]) -> Any:
        places = parser.add_subparsers(required=True, metavar="COMMAND")
        for command in commands:
            place = places.add_parser(command.name, help=command.help, description=command.help)
            for argument in command.arguments:
                place.add_argument(*argument.names, **argument.options)
            place.more = command.more
            place.set_defaults(run=command.run, light=command.light)
        return places

    parser = Parser(prog="rlhf", description="Begin with: rlhf init, rlhf check, rlhf train.")
    parser.add_argument("--version", action="version", version=f"rlhf_toolkit {rlhf_toolkit.__version__}")
    places = add(parser, COMMANDS)
    add(places.add_parser("data", help="look at training data as a model will see it"), data.DATA_COMMANDS)
    return parser, places.choices
