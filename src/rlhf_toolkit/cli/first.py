"""``rlhf config`` and ``rlhf init``: what may be set, and a first experiment to set it in."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from rlhf_toolkit.cli.first_files import written
from rlhf_toolkit.cli.machine import gpus
from rlhf_toolkit.cli.words import Argument, Command, Options
from rlhf_toolkit.errors import CheckpointError
from rlhf_toolkit.settings.kinds import KINDS
from rlhf_toolkit.settings.listing import listing
from rlhf_toolkit.settings.schema import schema
from rlhf_toolkit.texts import say


def config(options: Options) -> None:
    """Print every setting of a kind of run, or its JSON schema."""
    say(json.dumps(schema(options.kind), indent=2) if options.schema else listing(options.kind).rstrip())


def init(options: Options) -> None:
    """Write a first experiment, which runs as it is. Nothing that lies there already is touched."""
    folder: Path = options.folder
    model = options.model
    if model is not None and Path(model).is_dir() and folder.resolve() != Path.cwd():  # the run starts in the folder
        model = str(Path(model).resolve())
    files = written(options.kind, model=model, gpus=gpus())
    there = [name for name in files if (folder / name).exists()]
    if there:
        raise CheckpointError(f"{folder / there[0]} exists already; choose another folder: rlhf init FOLDER")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"cannot write to {folder}: {error.strerror}; choose another folder") from error
    say(f"wrote {', '.join(str(folder / name) for name in files)}")
    change = "" if folder.resolve() == Path.cwd() else f"cd {shlex.quote(str(folder))} && "
    say(f"now: {change}rlhf check && rlhf train")


COMMANDS = (
    Command(
        "init",
        "write a first experiment with its data, which runs on this machine as it is",
        init,
        (
            Argument("folder", nargs="?", type=Path, default=Path(), metavar="FOLDER", help="default: this one"),
            Argument("--kind", choices=tuple(KINDS), default="ppo", help="of run; default: %(default)s"),
            Argument("--model", metavar="NAME", help="hub name or folder; without it, a small model for this machine"),
        ),
        light=True,
    ),
    Command(
        "config",
        "list every setting of a kind of run with its default",
        config,
        (
            Argument("kind", nargs="?", choices=tuple(KINDS), default="ppo", metavar="KIND", help=", ".join(KINDS)),
            Argument("--schema", action="store_true", help="a JSON schema instead, for editors"),
        ),
        light=True,
    ),
)
